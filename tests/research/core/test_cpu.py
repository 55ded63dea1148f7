"""Settings for CPU cores: memory that is kept, options that only a process without accelerators gets."""

import os
import platform
import subprocess
import sys

import jax
import pytest

from research.core import cpu
from research.train import step

FAULTS = """
import ctypes, resource, sys
if sys.argv[1] == "keep":
    import launch
    assert not {"jax", "numpy"} & set(sys.modules)
libc, size = ctypes.CDLL(None), int(sys.argv[2]) * 2**20
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
for _ in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = libc.malloc(size)
    ctypes.memset(block, 1, size)
    libc.free(block)
    found = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(found)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's allocator can be told")
def test_kept_memory_is_not_cleared_again() -> None:
    """Page faults of a block that was freed and is allocated again, a small one and one of more than 2 GiB."""
    faults = {}
    for how, size in (("keep", 64), ("keep", 2200), ("leave", 64)):
        env = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
        command = [sys.executable, "-c", FAULTS, how, str(size)]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
        faults[how, size] = int(done.stdout)
    assert max(faults["keep", 64], faults["keep", 2200]) < 100 < faults["leave", 64], faults


def test_an_accelerator_is_guessed_before_jax_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu.importlib.metadata, "version", lambda _: "0.12.9")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert not cpu.may_have_accelerator()
    assert set(cpu.training_options()) == set(cpu.decoding_options()) != set()
    for platforms in ("tpu", "cuda,cpu"):
        monkeypatch.setenv("JAX_PLATFORMS", platforms)
        assert cpu.may_have_accelerator() and cpu.training_options() == cpu.decoding_options() == {}
    monkeypatch.delenv("JAX_PLATFORMS")
    monkeypatch.setattr(cpu.importlib.util, "find_spec", lambda name: name == "libtpu" or None)
    assert cpu.may_have_accelerator()


def test_an_unknown_version_gets_no_options(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu.importlib.metadata, "version", lambda _: "0.13.0")
    assert cpu.training_options() == cpu.decoding_options() == {}


@pytest.mark.skipif(cpu.jaxlib_version() >= (0, 13), reason="there are no options")
def test_jax_takes_the_options() -> None:
    assert step._OPTIONS == cpu.training_options() != {}
    for options in (cpu.training_options(), cpu.decoding_options()):
        doubled = jax.jit(lambda x: x @ x, compiler_options=options)(jax.numpy.eye(3) * 2)
        assert float(doubled[0, 0]) == 4.0
