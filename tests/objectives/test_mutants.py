import subprocess
import sys

import pytest

from tests.objectives.mutants import EQUIVALENT, ROOT, TESTS, report
from tests.objectives.mutations import KINDS, Mutant, find_mutants, sample

TINY = '''
LIMIT: float = 0.5
def tiny_loss(*, chosen_logps: Literal[1.0], rejected_logps: float, mask, eps_low, eps_high=0.25):
    """1.0 - 2.0"""
    margin = masked(chosen_logps - rejected_logps, mask)
    bound = jnp.clip(margin, 1.0, eps_high)
    if margin.ndim == 1:
        raise ValueError(f"{1.0 - 2.0}")
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
PRODUCT = "((total) * (jax.lax.stop_gradient(jnp.minimum(mask, 1))))"


def test_each_mutant_of_a_tiny_module_changes_one_line_as_its_kind_says():
    found = []
    for mutant in find_mutants("tiny", TINY):
        pairs = zip(TINY.splitlines(), mutant.apply(TINY).splitlines(), strict=True)
        ((number, new),) = [(n, new) for n, (old, new) in enumerate(pairs, 1) if old != new]
        assert mutant.line == number
        assert mutant.diff(TINY).startswith(f"objectives/tiny.py:{number} ({mutant.kind})")
        found.append((mutant.kind, new.strip()))
    assert sorted(found) == sorted((kind, text.replace("PRODUCT", PRODUCT)) for kind, text in CHANGED)
    assert {kind for kind, _ in found} == set(KINDS)


def test_a_mutant_refuses_a_source_that_has_changed():
    mutant = find_mutants("tiny", TINY)[0]
    with pytest.raises(AssertionError, match="tiny.py:2 has changed"):
        mutant.apply("\n" + TINY)


def test_a_sample_is_the_same_each_time_and_all_keeps_all():
    mutants = find_mutants("tiny", TINY)
    assert sample(mutants, 1) == sample(mutants, 1) and len(sample(mutants, 1)) == len(KINDS)
    assert sorted(sample(mutants, None)) == sorted(mutants)


def test_every_module_has_tests_and_mutants_of_every_kind_are_found():
    files = {p.stem: p.read_text() for p in (ROOT / "objectives").glob("*.py")}
    assert set(TESTS) == set(files) - {"__init__", "types"}
    mutants = [m for name in TESTS for m in find_mutants(name, files[name])]
    assert {m.kind for m in mutants} == set(KINDS)
    for tests, _ in TESTS.values():
        assert all((ROOT / f"tests/objectives/test_{name}.py").exists() for name in tests)
    known = {(m.module, m.changed_line(files[m.module])) for m in mutants}
    assert set(EQUIVALENT) <= known, "an entry of EQUIVALENT is no mutant any more"


def test_the_report_fails_below_95_percent_and_does_not_count_what_cannot_be_imported():
    mutant = Mutant("tiny", "constant", 2, TINY.index("0.5"), "0.5", "1.0")
    caught, missed, broken = (mutant, "caught"), (mutant, "survived"), (mutant, "not importable")
    text, is_enough = report([caught] * 19 + [missed, broken], {"tiny": TINY})
    assert is_enough and "19 of 20 mutants caught (95.0%)" in text
    assert "survived: objectives/tiny.py:2 (constant)\n    - LIMIT: float = 0.5\n    + LIMIT: float = 1.0" in text
    assert not report([caught] * 18 + [missed], {"tiny": TINY})[1]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.objectives.mutants", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_swapped_sides_of_a_real_module_are_caught():
    """In a process of its own: it forks, which a process that has started JAX must not."""
    result = run("--file", "simpo.py", "--kind", "swap", "--per-kind", "2")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "2 of 2 mutants caught (100.0%), 95% expected" in result.stdout


def test_an_unknown_file_is_refused_in_one_sentence():
    result = run("--file", "nothing.py")
    assert result.returncode == 2 and "--file: got 'nothing.py', expected one of advantages.py" in result.stderr
