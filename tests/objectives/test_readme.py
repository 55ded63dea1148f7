"""objectives/README.md is what the code says; its parity bounds are checked where the numbers are computed."""

import re
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


def test_every_choice_has_a_formula_or_leads_to_one():
    missing = [
        f"{function.__name__}({parameter}={value})"
        for function in readme.objectives_only()
        for parameter in readme.choices_of(function)
        for value in readme.choices_in_order(function, parameter)
        if not readme.variant_cell(function, parameter, value)
    ]
    assert not missing


def test_each_objective_is_one_line_and_one_section():
    text = readme.text(readme.printed_bounds())
    for function in readme.objectives_only():
        name = function.__name__
        assert text.count(f"| [{name}](#{name}) |") == 1 and text.count(f"### {name}\n") == 1
        [line] = [line for line in text.splitlines() if line.startswith(f"| [{name}]")]
        assert len(line) < 360 and not re.search(r"\|  \|", line), line
    assert "| as above |" not in text


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


def test_choices_options_and_shapes_come_from_the_signature():
    def function(
        *, x: Float[Array, "B T"], y: Float[Array, " B"] | None, kind: Literal["a", "b"], c: Scalar = 0.5,
        other: Literal["c", "d"] = "d",
    ):  # fmt: skip
        del x, y, kind, c, other

    assert list(readme.choices_of(function)) == ["kind", "other"]
    assert readme.choices_in_order(function, "kind") == ("a", "b")
    assert readme.options(function) == "`kind` (a, b); `c` = 0.5; `other` = d (c, d)"
    assert readme.shapes(function) == "`[B,T]`, `[B]`"


def test_a_choice_that_is_passed_on_leads_to_the_function_that_reads_it():
    assert readme.variant_cell(grpo_loss, "kl_estimator", "k2") == "see [kl_estimate](#kl_estimate)"
    assert readme.variant_cell(grpo_loss, "surrogate", "cispo") == "see [cispo_surrogate](#cispo_surrogate)"
    assert readme.variant_cell(dpo_loss, "f_divergence", "js") == "see [f_divergence_score](#f_divergence_score)"
    assert readme.variant_cell(kl_estimate, "estimator", "k2") == "`k2 = d^2 / 2`"


def test_batch_and_roles_come_from_the_algorithms():
    assert readme.declared_use("dpo_loss") == readme.Use("`PreferenceBatch`", "policy, reference")
    assert readme.declared_use("bradley_terry_loss") == readme.Use("`PreferenceBatch`", "reward model")
    assert readme.declared_use("kl_estimate_of_nobody") is None
    assert readme.declared_use("simpo_loss") == readme.Use("`PreferenceBatch`", "policy")  # its base's
    assert readme.declared_use("distillation_loss").roles == "policy, teacher"


@pytest.mark.parametrize(
    ("value", "printed"), [(0.0, "< 1e-6"), (1e-7, "< 1e-6"), (3.3e-7, "< 1e-6"), (4e-7, "< 1e-5"), (float("nan"), "")]
)
def test_bounds_are_three_times_the_measured_difference(value, printed):
    assert readme.bound(value) == printed
