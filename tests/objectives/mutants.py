"""Breaks the objectives one small change at a time and asks whether their tests notice.

    python -m tests.objectives.mutants --file dpo.py
    python -m tests.objectives.mutants --file kl.py --all --list

Works on a copy of the tree in a temporary folder. A process that has imported jax, but not started it, is
forked for each mutant (see `mutations.py`); the fork imports the changed module and runs the tests of `TESTS`.
A mutant is caught if a test fails. One that cannot be imported is not counted. The exit status is 1 where
fewer than 95% are caught.
"""

import argparse
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
from tests.objectives.mutations import KINDS, Mutant, find_mutants, sample

ROOT = Path(__file__).resolve().parents[2]
COPIED = ("objectives", "tests/objectives", "tests/conftest.py", "tests/__init__.py", "pyproject.toml")
REQUIRED = 0.95
SECONDS = 400  # for the tests of one mutant; a mutant that takes longer is listed with the survivors

# Test files of a module, fastest first; then the cases of test_properties.py (`-k`) for what survives them.
TESTS: dict[str, tuple[tuple[str, ...], str]] = {
    "advantages": (("advantages", "gae"), ""),
    "bradley_terry": (("bradley_terry",), "bradley_terry or ranking"),
    "cpo": (("cpo",), "cpo"),
    "distillation": (("distillation",), "distillation"),
    "dpo": (("dpo", "dpo_variants"), "dpo and not step"),
    "dpo_terms": (("dpo_terms", "dpo_variants"), "dpo_forward_kl or dpo_js or dpo_alpha or ld_dpo"),
    "gae": (("gae", "ppo", "advantages"), ""),
    "grpo": (("grpo", "grpo_variants"), "grpo or gspo or cispo or sapo"),
    "importance": (("importance",), ""),
    "kl": (("kl", "grpo_variants"), ""),
    "kto": (("kto",), "kto"),
    "next_token": (("next_token",), "next_token"),
    "numerics": (("numerics",), "next_token"),
    "orpo": (("orpo",), "orpo"),
    "pairs": (("dpo", "simpo", "orpo", "dpo_variants"), "simpo"),
    "ppo": (("ppo",), "ppo"),
    "prm": (("prm",), "prm"),
    "reduce": (("reduce",), "next_token"),
    "simpo": (("simpo",), "simpo"),
    "step_dpo": (("step_dpo",), "step_dpo"),
    "surrogate": (("ppo", "grpo", "grpo_variants"), "gspo or cispo or sapo or two_sided"),
}

# Changes that change nothing, by module and the line that they leave: why no test can tell.
_FORMS = "two forms of one function, which differ by less than the rounding of what they are added to"
_DROPPED = "the selection on the next line drops the same tokens, and no gradient passes"
_UNREAD = "the value is selected away by the same condition"
EQUIVALENT = {
    (
        "advantages",
        "centered = jnp.where(steps, shifted - shifted.sum(axis=1, keepdims=True) / jnp.maximum(count, 2.0), 0.0)",
    ): "with one step the sum is of its difference to itself, 0",
    ("gae", "count = jnp.maximum(token_weights.sum(), 2e-08)"): "matters where nothing counts: 0 / guard",
    ("gae", "return jnp.where(varies, 1.0 - unexplained / jnp.where(varies, variance, 2.0), 0.0)"): _UNREAD,
    ("orpo", "return (jnp.log(-jnp.expm1(x)))"): _FORMS,
    ("orpo", "return jnp.where(x > -math.log(4.0), jnp.log(-jnp.expm1(x)), jnp.log1p(-jnp.exp(x)))"): _FORMS,
    ("prm", "scores = jnp.where(mask, probs, 2.0).min(axis=1)"): "a probability is at most 1",
    ("step_dpo", "log_ratio = (policy_logps) - masked(ref_logps, is_used)"): _DROPPED,
    ("step_dpo", "log_ratio = masked(policy_logps, is_used) - (ref_logps)"): _DROPPED,
}


class _Changed(importlib.machinery.SourceFileLoader):
    """Imports one module from a text instead of its file."""

    text = ""

    def get_code(self, fullname: str) -> CodeType:  # noqa: ARG002
        return compile(self.text, self.path, "exec", dont_inherit=True)

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:  # noqa: ARG002
        return importlib.util.spec_from_file_location(name, self.path, loader=self) if name == self.name else None


def copy_tree(folder: Path) -> Path:
    """What the tests of the objectives need, so that nobody's edits change a run half way."""
    for name in COPIED:
        target = folder / "tree" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, target)
    return folder / "tree"


def start(tree: Path, module: str, text: str | None) -> int:
    """Forks a process that runs the module's tests on `text` (None: unchanged) and returns its id.

    Its exit status is that of pytest: 0 if all passed, 1 if one failed, anything else if none could run.
    """
    import chex  # noqa: F401  # imported once, here; each fork starts its own backend
    import jax
    import jax.test_util  # noqa: F401
    import jaxtyping  # noqa: F401
    import pytest

    process = os.fork()
    if process:
        return process
    try:
        signal.alarm(SECONDS)
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1), os.dup2(null, 2)
        os.chdir(tree)
        for name in [n for n in sys.modules if n.partition(".")[0] in ("objectives", "tests")]:
            del sys.modules[name]
        sys.path[:] = [str(tree), *(p for p in sys.path if p and Path(p).resolve() != ROOT)]
        if text is not None:
            loader = _Changed(f"objectives.{module}", str(tree / "objectives" / f"{module}.py"))
            loader.text = text
            sys.meta_path.insert(0, loader)
        jax.config.update("jax_compilation_cache_dir", str(tree.parent / "cache"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        files, cases = TESTS[module]
        stages = [[f"tests/objectives/test_{name}.py"] for name in files]
        if cases:
            stages.append(["tests/objectives/test_properties.py", "-k", f"({cases}) and (gradients or garbage)"])
        code = 0
        for stage in stages:
            code = code or int(pytest.main([*stage, "-x", "-q", "--tb=no", "-p", "no:cacheprovider", "-o", "addopts="]))
        os._exit(code)
    finally:
        os._exit(70)


def outcomes(tree: Path, mutants: list[Mutant], jobs: int) -> Iterator[tuple[Mutant, str]]:
    """Runs the tests of each mutant: "caught", "survived", "timed out" or "not importable"."""
    sources = {m.module: (tree / "objectives" / f"{m.module}.py").read_text() for m in mutants}
    waiting, running = list(reversed(mutants)), dict[int, Mutant]()
    while waiting or running:
        while waiting and len(running) < jobs:
            mutant = waiting.pop()
            running[start(tree, mutant.module, mutant.apply(sources[mutant.module]))] = mutant
        process, status = os.wait()
        if process in running:
            code = os.waitstatus_to_exitcode(status)
            names = {0: "survived", 1: "caught", -signal.SIGALRM: "timed out"}
            yield running.pop(process), names.get(code, "not importable")


def report(results: list[tuple[Mutant, str]], sources: dict[str, str]) -> tuple[str, bool]:
    """The text of the report, and whether enough mutants were caught."""
    counted = [(m, how) for m, how in results if how != "not importable"]
    lines = []
    for title, key in (("file", lambda m: f"{m.module}.py"), ("kind", lambda m: m.kind)):
        lines.append(f"{title:<18} {'mutants':>8} {'caught':>8}")
        for name in sorted({key(m) for m, _ in counted}):
            group = [how for m, how in counted if key(m) == name]
            lines.append(f"{name:<18} {len(group):>8} {group.count('caught'):>8}")
        lines.append("")
    missed = [(m, how) for m, how in counted if how != "caught"]
    lines += [f"{how}: {m.diff(sources[m.module])}" for m, how in sorted(missed)]
    caught = len(counted) - len(missed)
    share = caught / len(counted) if counted else 1.0
    lines.append(f"{caught} of {len(counted)} mutants caught ({share:.1%}), {REQUIRED:.0%} expected")
    return "\n".join(lines), share >= REQUIRED


def is_equivalent(mutant: Mutant, source: str) -> bool:
    return (mutant.module, mutant.changed_line(source)) in EQUIVALENT


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.objectives.mutants",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--file", action="append", metavar="NAME", help="dpo.py; repeatable; default: every file")
    parser.add_argument("--kind", action="append", choices=KINDS, help="repeatable; default: every kind")
    parser.add_argument("--per-kind", type=int, default=4, metavar="N", help="a sample per file and kind (4)")
    parser.add_argument("--all", action="store_true", help="every mutant instead of a sample")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="mutants tested at once (1)")
    parser.add_argument("--list", action="store_true", help="show the mutants and run nothing")
    parsed = parser.parse_args(arguments)
    for name in parsed.file or ():
        if name.removesuffix(".py") not in TESTS:
            parser.error(f"--file: got {name!r}, expected one of {', '.join(f'{m}.py' for m in TESTS)}")
    for name in ("per_kind", "jobs"):
        if getattr(parsed, name) < 1:
            parser.error(f"--{name.replace('_', '-')}: got {getattr(parsed, name)}, expected at least 1")
    return parsed


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    modules = [name.removesuffix(".py") for name in options.file or TESTS]
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        tree = copy_tree(Path(folder))
        sources = {name: (tree / "objectives" / f"{name}.py").read_text() for name in modules}
        mutants: list[Mutant] = []
        for name, source in sources.items():
            found = [m for m in find_mutants(name, source) if m.kind in (options.kind or KINDS)]
            found = [m for m in found if not is_equivalent(m, source)]
            mutants += sample(found, None if options.all else options.per_kind)
        if options.list:
            print(*(m.diff(sources[m.module]) for m in mutants), f"{len(mutants)} mutants", sep="\n")
            return 0
        results = []
        with Progress("mutants", total=len(modules) + len(mutants), unit="runs") as bar:
            for name in modules:  # also compiles the unchanged programs, for the cache
                _, status = os.waitpid(start(tree, name, None), 0)
                if status:
                    print(f"{name}.py: its tests fail or exceed {SECONDS} s before any change; mend them first")
                    return 1
                bar.advance()
            for mutant, how in outcomes(tree, mutants, options.jobs):
                results.append((mutant, how))
                if how not in ("caught", "not importable"):
                    bar.say(f"{how}: {mutant.diff(sources[mutant.module])}")
                bar.advance(metrics={"missed": sum(h in ("survived", "timed out") for _, h in results)})
    text, is_enough = report(results, sources)
    print(text)
    return 0 if is_enough else 1


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    sys.exit(main(sys.argv[1:]))
