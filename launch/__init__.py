"""The commands."""

from research.core.cpu import keep_memory

keep_memory()  # here, because it does not reach the threads that NumPy and JAX start when they are imported
