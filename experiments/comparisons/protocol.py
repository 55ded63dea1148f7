"""Runs a system under test: python protocol.py MODULE ... DRIVER. All modules are imported, the driver does the work.

JSON lines over standard input and output. The first line in is the workload; the first line out describes what was
built: `parameters` (of the model), `versions`. Every further line in asks for one repetition, which is answered when it
is done: `tokens` (useful ones), `peak_bytes` (most memory so far; a driver may give the accelerator's).

A driver is a module with `main(work, say)`: it builds, says what, then repeats: works and says what it did. `say`
returns when the next repetition is asked for, and ends the process when nobody asks. Standard library only: each
system's venv holds that system and nothing of Temper's.
"""

import importlib
import json
import os
import resource
import sys
from typing import Any


def main() -> None:
    """Serves one workload."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print must not mix with our lines
    work = json.loads(sys.stdin.readline())

    def say(**message: Any) -> None:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        print(json.dumps({"peak_bytes": peak, **message}), file=out, flush=True)
        if not sys.stdin.readline():
            raise SystemExit(0)

    *_, driver = [importlib.import_module(name) for name in sys.argv[1:]]
    driver.main(work, say)


if __name__ == "__main__":
    main()
