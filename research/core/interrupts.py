"""SIGINT (Ctrl-C) and SIGTERM as a flag that a loop reads between its steps.

Python runs a signal's handler between two bytecodes of the main thread. An exception raised there may land in a
library's callback, which drops it, and it comes late while the main thread compiles or waits for a device. Here a
thread of its own waits for signals instead: nothing can swallow one, and a second one ends the process at once.

This module imports the standard library only, so that a command can be interrupted while it imports the rest.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """Work has stopped where it can go on; `number` is the signal's. No error: nothing that catches those gets it."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number = number


class Interrupts:
    """What a process does with signals, from `install` on; before, and in a process without it, nothing.

    A signal ends the process, with one sentence and exit status 128 + its number. Inside of `deferred`, a first one
    is only noted in `received`.
    """

    def __init__(self) -> None:
        """Nothing received."""
        self.received = 0  # number of the signal that was noted, 0 if none was
        self.advice = "interrupted"  # what is said when a signal ends the process
        self._said = ""  # of a signal that is only noted; "" outside of `deferred`
        self._lock = threading.Lock()
        self._installed = False

    def install(self) -> None:
        """Takes over both signals, as far as they are not ignored; call it from the main thread."""
        if self._installed:
            return
        self._installed = True
        read, write = os.pipe()
        os.set_blocking(write, False)
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        for number in SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, lambda *_: None)  # the thread hears of it by the pipe
        os.register_at_fork(after_in_child=_reset)
        threading.Thread(target=self._watch, args=(read,), name="signals", daemon=True).start()

    @contextlib.contextmanager
    def deferred(self, said: str) -> Iterator[None]:
        """Within, a first signal only prints `said`; whoever reads `received` stops when it is safe to."""
        with self._lock:
            self._said = said
        try:
            yield
        finally:
            with self._lock:
                self._said = ""

    def release(self) -> None:
        """Gives both signals back to Python, for a command that reads from a terminal."""
        if self._installed:
            _reset(signal.default_int_handler)
            self._installed = False

    def _watch(self, pipe: int) -> None:
        while numbers := os.read(pipe, 16):
            for number in filter(SIGNALS.__contains__, numbers):
                with self._lock:
                    if self.received or not self._said:
                        end(number, self.advice)
                    self.received = number
                    _print(number, self._said)


def end(number: int, said: str) -> None:
    """Ends the process because of a signal, whatever its threads are doing: everything on disk is whole."""
    with contextlib.suppress(OSError, ValueError):  # a closed stream
        sys.stdout.flush()
    _print(number, said)
    os._exit(128 + number)


def _print(number: int, said: str) -> None:
    with contextlib.suppress(OSError, ValueError):
        print(f"{chr(10) * sys.stderr.isatty()}{signal.Signals(number).name}: {said}", file=sys.stderr, flush=True)


def _reset(interrupt: Any = signal.SIG_DFL) -> None:
    """Python's own handling; in a forked child, whose parent's the pipe is, that of the system."""
    signal.set_wakeup_fd(-1)
    for number, handler in ((signal.SIGINT, interrupt), (signal.SIGTERM, signal.SIG_DFL)):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)
