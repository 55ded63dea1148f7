"""Breaks objectives, models and what trains them, one small change at a time, and asks whether the tests notice.

    python -m tests.mutation.mutants --file objectives/dpo.py
    python -m tests.mutation.mutants --file research/train --per-kind 1 --jobs 2
    python -m tests.mutation.mutants --file models/logprobs.py --all --list

Works on a copy of the tree in a temporary folder. A process that has imported jax, but not started it, is
forked for each mutant (see `mutations.py`); the fork imports the changed module and runs its tests (`targets.py`).
A mutant is caught if a test fails. One that cannot be imported is not counted. The exit status is 1 where
fewer than 95% are caught.
"""

import argparse
import contextlib
import importlib.machinery
import importlib.util
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import CodeType

from research.core.progress import Progress
from tests.mutation.mutations import KINDS, Mutant, find_mutants, sample
from tests.mutation.targets import EQUIVALENT, ROOT, covering_tests, modules

OWN = ("objectives", "models", "research", "experiments", "launch", "tests")
COPIED = (*OWN, "pyproject.toml", "README.md", "setup.py")
REQUIRED = 0.95
SECONDS = 400  # for the tests of one mutant; a mutant that takes longer is listed with the survivors


class _Changed(importlib.machinery.SourceFileLoader):
    """Imports one module from a text instead of its file."""

    text = ""

    def get_code(self, fullname: str) -> CodeType:  # noqa: ARG002
        return compile(self.text, self.path, "exec", dont_inherit=True)

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:  # noqa: ARG002
        return importlib.util.spec_from_file_location(name, self.path, loader=self) if name == self.name else None


def copy_tree(folder: Path) -> Path:
    """What the tests need, so that nobody's edits change a run half way."""
    for name in COPIED:
        target = folder / "tree" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, target)
    return folder / "tree"


def start(tree: Path, path: str, text: str | None) -> int:
    """Forks a process that runs the module's tests on `text` (None: unchanged) and returns its id.

    Its exit status is that of pytest: 0 if all passed, 1 if one failed, anything else if none could run.
    """
    import chex  # noqa: F401  # imported once, here; each fork starts its own backend
    import flax.linen  # noqa: F401
    import grain  # noqa: F401
    import jax
    import jax.test_util  # noqa: F401
    import jaxtyping  # noqa: F401
    import optax  # noqa: F401
    import orbax.checkpoint  # noqa: F401
    import pytest
    import scipy.stats  # noqa: F401

    process = os.fork()
    if process:
        return process
    try:
        os.setsid()  # the tests' own processes end with it
        signal.alarm(SECONDS)
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1), os.dup2(null, 2)
        os.chdir(tree)
        for name in [n for n in sys.modules if n.partition(".")[0] in OWN]:
            del sys.modules[name]
        sys.path[:] = [str(tree), *(p for p in sys.path if p and Path(p).resolve() != ROOT)]
        if text is not None:
            loader = _Changed(path.removesuffix(".py").replace("/", "."), str(tree / path))
            loader.text = text
            sys.meta_path.insert(0, loader)
        jax.config.update("jax_compilation_cache_dir", str(tree.parent / "cache"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
        code = 0
        for stage in covering_tests(path).stages():
            options = ["-x", "-q", "--tb=no", "-p", "no:cacheprovider", "-o", "addopts=", "-m", "not slow and not gpu"]
            code = code or int(pytest.main([*stage, *options]))
        os._exit(code)
    finally:
        os._exit(70)


def outcomes(tree: Path, mutants: list[Mutant], jobs: int) -> Iterator[tuple[Mutant, str]]:
    """Runs the tests of each mutant: "caught", "survived", "timed out" or "not importable"."""
    sources = {m.path: (tree / m.path).read_text() for m in mutants}
    waiting, running = list(reversed(mutants)), dict[int, Mutant]()
    while waiting or running:
        while waiting and len(running) < jobs:
            mutant = waiting.pop()
            running[start(tree, mutant.path, mutant.apply(sources[mutant.path]))] = mutant
        process, status = os.wait()
        if process in running:
            with contextlib.suppress(ProcessLookupError):  # the tests' own processes, where a mutant left some
                os.killpg(process, signal.SIGKILL)
            code = os.waitstatus_to_exitcode(status)
            names = {0: "survived", 1: "caught", -signal.SIGALRM: "timed out"}
            yield running.pop(process), names.get(code, "not importable")


def report(results: list[tuple[Mutant, str]], sources: dict[str, str]) -> tuple[str, bool]:
    """The text of the report, and whether enough mutants were caught."""
    counted = [(m, how) for m, how in results if how != "not importable"]
    lines = []
    for title, key in (("file", lambda m: m.path), ("kind", lambda m: m.kind)):
        lines.append(f"{title:<38} {'mutants':>8} {'caught':>8}")
        for name in sorted({key(m) for m, _ in counted}):
            group = [how for m, how in counted if key(m) == name]
            lines.append(f"{name:<38} {len(group):>8} {group.count('caught'):>8}")
        lines.append("")
    missed = [(m, how) for m, how in counted if how != "caught"]
    lines += [f"{how}: {m.diff(sources[m.path])}" for m, how in sorted(missed)]
    caught = len(counted) - len(missed)
    share = caught / len(counted) if counted else 1.0
    lines.append(f"{caught} of {len(counted)} mutants caught ({share:.1%}), {REQUIRED:.0%} expected")
    return "\n".join(lines), share >= REQUIRED


def is_equivalent(mutant: Mutant, source: str) -> bool:
    return (mutant.path, mutant.changed_line(source)) in EQUIVALENT


def selected(names: list[str] | None) -> list[str]:
    """The modules that `--file` names: files, or folders with all that is below them."""
    known = modules()
    if names is None:
        return known
    return [path for path in known if any(path == name or path.startswith(f"{name.rstrip('/')}/") for name in names)]


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.mutation.mutants",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--file", action="append", metavar="PATH", help="a file or a folder; repeatable; default: all")
    parser.add_argument("--kind", action="append", choices=KINDS, help="repeatable; default: every kind")
    parser.add_argument("--per-kind", type=int, default=1, metavar="N", help="a sample per file and kind (1)")
    parser.add_argument("--all", action="store_true", help="every mutant instead of a sample")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="mutants tested at once (1)")
    parser.add_argument("--list", action="store_true", help="show the mutants and run nothing")
    parsed = parser.parse_args(arguments)
    for name in parsed.file or ():
        if not selected([name]):
            parser.error(f"--file: got {name!r}, expected a file or a folder of these: {', '.join(modules())}")
    for name in ("per_kind", "jobs"):
        if getattr(parsed, name) < 1:
            parser.error(f"--{name.replace('_', '-')}: got {getattr(parsed, name)}, expected at least 1")
    return parsed


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        tree = copy_tree(Path(folder))
        sources = {path: (tree / path).read_text() for path in selected(options.file)}
        mutants: list[Mutant] = []
        for path, source in sources.items():
            found = [m for m in find_mutants(path, source) if m.kind in (options.kind or KINDS)]
            found = [m for m in found if not is_equivalent(m, source)]
            mutants += sample(found, None if options.all else options.per_kind)
        if options.list:
            print(*(m.diff(sources[m.path]) for m in mutants), f"{len(mutants)} mutants", sep="\n")
            return 0
        changed = sorted({m.path for m in mutants})
        results = []
        with Progress("mutants", total=len(changed) + len(mutants), unit="runs") as bar:
            for path in changed:  # also compiles the unchanged programs, for the cache
                _, status = os.waitpid(start(tree, path, None), 0)
                if status:
                    print(f"{path}: its tests fail or exceed {SECONDS} s before any change; mend them first")
                    return 1
                bar.advance()
            for mutant, how in outcomes(tree, mutants, options.jobs):
                results.append((mutant, how))
                if how not in ("caught", "not importable"):
                    bar.say(f"{how}: {mutant.diff(sources[mutant.path])}")
                bar.advance(metrics={"missed": sum(h in ("survived", "timed out") for _, h in results)})
    text, is_enough = report(results, sources)
    print(text)
    return 0 if is_enough else 1


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    sys.exit(main(sys.argv[1:]))
