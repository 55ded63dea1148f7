"""The commands."""

import sys

from research.core.cpu import keep_memory
from research.core.interrupts import Interrupts

keep_memory()  # here, because it does not reach the threads that NumPy and JAX start when they are imported

interrupts = Interrupts()
"""The process's own: there is one set of signal handlers."""
if sys.argv[:1] == ["-m"]:  # `python -m launch.x` is still importing it
    interrupts.install()
