"""Starts a program in its own locked interpreter: `python -c <this text> <the program>`.

Randomness that the program does not seed is seeded here, so that what it prints depends on its text alone (and on
clocks, if it reads them). The names that the program sees are those of `python -c`.
"""

import os
import random
import sys


def _seed_randomness() -> None:
    """`random`, `random.Random()`, `os.urandom`, and with it `secrets` and `uuid`, repeat themselves."""
    stream = random.Random(0)
    seed = random.Random.seed

    def seeded(self: random.Random, a: object = None, version: int = 2) -> None:
        seed(self, stream.getrandbits(64) if a is None else a, version)  # type: ignore[arg-type]

    random.Random.seed = seeded  # type: ignore[method-assign]
    os.urandom = random._urandom = stream.randbytes  # type: ignore[attr-defined]
    random.seed = random._inst.seed
    random.seed()


def _show(kind: type[BaseException], error: BaseException, trace: object) -> None:
    """A traceback without this file's frame."""
    del trace
    if error.__traceback__ is not None:
        error = error.with_traceback(error.__traceback__.tb_next)
    sys.__excepthook__(kind, error, error.__traceback__)


_seed_randomness()
sys.excepthook = _show
_code = sys.argv.pop()
sys.modules["__main__"] = type(sys)("__main__")
exec(compile(_code, "<string>", "exec", dont_inherit=True), sys.modules["__main__"].__dict__)
