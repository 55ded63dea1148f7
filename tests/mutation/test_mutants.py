import subprocess
import sys

import pytest

from tests.mutation.mutants import report
from tests.mutation.mutations import KINDS, Mutant, find_mutants, sample
from tests.mutation.targets import EQUIVALENT, NAMED, NOT_MUTATED, ROOT, covering_tests, modules

TINY = '''
LIMIT: float = 0.5
def tiny_loss(*, chosen_logps: Literal[1.0], rejected_logps: float, mask, eps_low, eps_high=0.25):
    """1.0 - 2.0"""
    margin = masked(chosen_logps - rejected_logps, mask)
    bound = jnp.clip(margin, 1.0, eps_high)
    if margin.ndim == 1:
        raise ValueError(f"{1.0 - 2.0}")
    rate: float = key(0.5, "Declared.", low=1.0 - 2.0)
    if not mask or chosen_logps:
        pass
    total = jnp.where(bound, -margin, 0.0).sum()
    return total / jax.lax.stop_gradient(jnp.minimum(mask, 1)) if "é" >= total else "no change here"
'''
CHANGED = {  # written by hand: kind and what the change leaves of its line
    ("constant", "LIMIT: float = 1.0"),
    ("constant", "def tiny_loss(*, chosen_logps: Literal[1.0], rejected_logps: float, mask, eps_low, eps_high=0.5):"),
    ("sign", "margin = masked(((chosen_logps) + (rejected_logps)), mask)"),
    ("mask", "margin = (chosen_logps - rejected_logps)"),
    ("swap", "margin = masked(rejected_logps - rejected_logps, mask)"),
    ("swap", "margin = masked(chosen_logps - chosen_logps, mask)"),
    ("clip", "bound = jnp.clip(margin, eps_high, 1.0)"),
    ("clip", "bound = jnp.clip(margin, 1.0, eps_low)"),
    ("constant", "bound = jnp.clip(margin, 2.0, eps_high)"),
    ("compare", "if ((margin.ndim) != (1)):"),
    ("mask", "total = (-margin).sum()"),
    ("swap", "if not mask or rejected_logps:"),
    ("logic", "if (mask) or chosen_logps:"),
    ("logic", "if ((not mask) and (chosen_logps)):"),
    ("sign", "total = jnp.where(bound, (margin), 0.0).sum()"),
    ("scale", "total = jnp.where(bound, -margin, 0.0).mean()"),
}
LAST = 'return total / jax.lax.stop_gradient(jnp.minimum(mask, 1)) if "é" >= total else "no change here"'
CHANGED |= {
    ("scale", LAST.replace("total / jax.lax.stop_gradient(jnp.minimum(mask, 1))", "PRODUCT")),
    ("scale", LAST.replace("jax.lax.stop_gradient(jnp.minimum(mask, 1))", "(jnp.minimum(mask, 1))")),
    ("clip", LAST.replace("minimum", "maximum")),
    ("compare", LAST.replace('"é" >= total', '(("é") <= (total))')),
}
CHANGED.add(("logic", "return (total / jax.lax.stop_gradient(jnp.minimum(mask, 1)))"))
PRODUCT = "((total) * (jax.lax.stop_gradient(jnp.minimum(mask, 1))))"


def test_each_mutant_of_a_tiny_module_changes_one_line_as_its_kind_says():
    found = []
    for mutant in find_mutants("tiny.py", TINY):
        pairs = zip(TINY.splitlines(), mutant.apply(TINY).splitlines(), strict=True)
        ((number, new),) = [(n, new) for n, (old, new) in enumerate(pairs, 1) if old != new]
        assert mutant.line == number
        assert mutant.diff(TINY).startswith(f"tiny.py:{number} ({mutant.kind})")
        found.append((mutant.kind, new.strip()))
    assert sorted(found) == sorted((kind, text.replace("PRODUCT", PRODUCT)) for kind, text in CHANGED)
    assert {kind for kind, _ in found} == set(KINDS)


def test_a_mutant_refuses_a_source_that_has_changed():
    mutant = find_mutants("tiny.py", TINY)[0]
    with pytest.raises(AssertionError, match="tiny.py:2 has changed"):
        mutant.apply("\n" + TINY)


def test_a_sample_is_the_same_each_time_and_all_keeps_all():
    mutants = find_mutants("tiny.py", TINY)
    assert sample(mutants, 1) == sample(mutants, 1) and len(sample(mutants, 1)) == len(KINDS)
    assert sorted(sample(mutants, None)) == sorted(mutants)


def test_every_module_has_tests_and_mutants_of_every_kind_are_found():
    sources = {path: (ROOT / path).read_text() for path in modules()}
    mutants = {path: find_mutants(path, source) for path, source in sources.items()}
    assert {m.kind for found in mutants.values() for m in found} == set(KINDS)
    for path, found in mutants.items():
        assert not found or covering_tests(path).files, f"{path}: name its tests in targets.py"
        assert all((ROOT / name).exists() for name in covering_tests(path).files)
    assert all((ROOT / path).exists() for path in (*NAMED, *NOT_MUTATED))
    known = {(m.path, m.changed_line(sources[m.path])) for found in mutants.values() for m in found}
    assert set(EQUIVALENT) <= known, "an entry of EQUIVALENT is no mutant any more"


def test_the_report_fails_below_95_percent_and_does_not_count_what_cannot_be_imported():
    mutant = Mutant("tiny.py", "constant", 2, TINY.index("0.5"), "0.5", "1.0")
    caught, missed, broken = (mutant, "caught"), (mutant, "survived"), (mutant, "not importable")
    text, is_enough = report([caught] * 19 + [missed, broken], {"tiny.py": TINY})
    assert is_enough and "19 of 20 mutants caught (95.0%)" in text
    assert "survived: tiny.py:2 (constant)\n    - LIMIT: float = 0.5\n    + LIMIT: float = 1.0" in text
    assert not report([caught] * 18 + [missed], {"tiny.py": TINY})[1]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.mutation.mutants", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_swapped_sides_of_a_real_module_are_caught():
    """In a process of its own: it forks, which a process that has started JAX must not."""
    result = run("--file", "objectives/simpo.py", "--kind", "swap", "--per-kind", "2")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "2 of 2 mutants caught (100.0%), 95% expected" in result.stdout


def test_an_unknown_file_is_refused_in_one_sentence():
    result = run("--file", "nothing.py")
    assert (
        result.returncode == 2
        and "--file: got 'nothing.py', expected a file or a folder of these: objectives/advantages.py" in result.stderr
    )
