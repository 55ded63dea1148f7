"""objectives/README.md is what the code says; its parity bounds are checked where the numbers are computed."""

from typing import Literal

import pytest
from jaxtyping import Array, Float

from objectives.dpo import dpo_loss
from objectives.grpo import grpo_loss
from objectives.kl import kl_estimate
from objectives.types import Scalar
from tests.objectives import readme


def test_readme_is_what_the_code_says():
    written = readme.README.read_text("utf-8")
    assert written == readme.text(readme.printed_bounds()), f"write it anew with: {readme.UPDATE}"


def test_every_function_with_a_source_has_an_equation():
    missing = [f.__name__ for f in readme.public_functions() if "`" not in readme.equation(f)]
    assert not missing


def test_every_choice_is_a_row():
    table = readme.objective_table()
    for function in (dpo_loss, kl_estimate):
        values = list(readme.variants(function))
        assert values
        for parameter, value in values:
            assert f'`{function.__name__}({parameter}="{value}")`' in table


LISTED = """Does.

`y = x`; `z` of:
  one: `x + 1`
  two: `x + 2`

Source: A 2020, Eq. 1. It lists:
  More.

Args:"""
IN_ONE_LINE = """Does.

With `d`: `one = d`, `two = d^2`.

Source: B
2021."""


@pytest.mark.parametrize(
    ("doc", "equation", "source", "variant"),
    [
        (LISTED, "`y = x`; `z`", "A 2020, Eq. 1", "`x + 2`"),
        (IN_ONE_LINE, "With `d`: `one = d`, `two = d^2`.", "B 2021", "`two = d^2`"),
        ("Mean: `sum / n`.\n\nArgs:\n  two: `no`", "`sum / n`", "", ""),
    ],
)
def test_reading_a_docstring(doc, equation, source, variant):
    def function():
        pass

    function.__doc__ = doc
    assert readme.equation(function) == equation
    assert readme.source(function) == source
    assert readme.variant_equation(function, "two") == variant


def test_variants_options_and_shapes_come_from_the_signature():
    def function(
        *, x: Float[Array, "B T"], y: Float[Array, " B"] | None, kind: Literal["a", "b"], c: Scalar = 0.5,
        other: Literal["c", "d"] = "d",
    ):  # fmt: skip
        del x, y, kind, c, other

    assert list(readme.variants(function)) == [("kind", "a"), ("kind", "b"), ("other", "c"), ("other", "d")]
    assert readme.options(function) == "`kind` (a, b); `c` = 0.5; `other` = d (c, d)"
    assert readme.shapes(function) == "`[B,T]`, `[B]`"


def test_a_choice_that_is_passed_on_has_the_formula_of_the_function_that_reads_it():
    assert readme.variant_cell(grpo_loss, "kl_estimator", "k2") == "`kl_estimate`: `k2 = d^2 / 2`"
    assert readme.variant_cell(grpo_loss, "surrogate", "cispo").startswith("`cispo_surrogate`: `loss = ")
    assert readme.variant_cell(dpo_loss, "f_divergence", "js").startswith("`f_divergence_score`: ")


def test_batch_and_roles_come_from_the_algorithms():
    assert readme.declared_use("dpo_loss") == readme.Use("`PreferenceBatch`", "policy, reference")
    assert readme.declared_use("bradley_terry_loss") == readme.Use("`PreferenceBatch`", "reward model")
    assert readme.declared_use("kl_estimate_of_nobody") is None
    assert readme.declared_use("simpo_loss") == readme.Use("`PreferenceBatch`", "policy")  # its base's
    assert readme.declared_use("distillation_loss").roles == "policy, teacher"


@pytest.mark.parametrize(
    ("value", "printed"),
    [(0.0, "< 1e-6"), (1e-7, "< 1e-6"), (3.3e-7, "< 1e-6"), (4e-7, "< 1e-5"), (float("nan"), "")],
)
def test_bounds_are_three_times_the_measured_difference(value, printed):
    assert readme.bound(value) == printed
