"""Verifiers read answers strictly, survive any text, and scores are finite."""

import random

import numpy as np
import pytest

from research.core.errors import ConfigError, DataError
from research.rewards.verifiers import (
    VERIFIERS,
    exact_answer,
    final_line,
    get_verifier,
    score,
)


@pytest.mark.parametrize(
    ("completion", "answer", "reward"),
    [
        ("x\n#### 72", "72", 1.0),
        ("x\n#### 72.0", "72", 1.0),
        ("x\n#### 1,200", "steps\n#### 1200", 1.0),
        ("x\n#### 7", "72", 0.0),
        ("x\n#### 72 or 73", "72", 0.0),
        ("72", "72", 0.0),
        ("", "", 0.0),
        ("#### ", "", 0.0),
        ("#### -5", "-5", 1.0),
        ("#### 5", "-5", 0.0),
        ("#### \u0667", "7", 0.0),
    ],
)
def test_exact_answer(completion, answer, reward):
    assert exact_answer(completion, answer) == reward


def test_final_line_is_format_only():
    assert final_line("a\n#### 9", "1") == 1.0
    assert final_line("a\n#### 9\n", "1") == 1.0
    assert final_line("#### 9\nand more", "9") == 0.0
    assert final_line("#### ", "9") == 0.0


def test_junk_never_raises():
    rng = random.Random(0)
    for _ in range(500):
        text = "".join(rng.choice("#### 0123,.$-+eEnaif\n\x00é\ud800") for _ in range(rng.randrange(30)))
        for verifier in VERIFIERS.values():
            assert verifier(text, text) in (0.0, 1.0)
    assert exact_answer("#### " + "9" * 100_000, "nan") == 0.0


def test_registry_is_closed_and_immutable():
    assert get_verifier("exact_answer") is exact_answer
    with pytest.raises(ConfigError, match="got 'exact', expected one of exact_answer, final_line"):
        get_verifier("exact")
    with pytest.raises(TypeError):
        VERIFIERS["mine"] = exact_answer


def test_score():
    rewards = score(["#### 1", "#### 2"], ["1", "1"], exact_answer)
    assert rewards.dtype == np.float32
    assert rewards.tolist() == [1.0, 0.0]
    assert score([], [], exact_answer).shape == (0,)
    with pytest.raises(DataError, match="got 1 completions and 2 answers"):
        score(["a"], ["a", "b"], exact_answer)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e39])
def test_a_reward_that_is_not_finite_names_prompt_and_function(value):
    def broken(completion, answer):  # noqa: ARG001
        return value if completion == "b" else 0.0

    with pytest.raises(DataError, match="prompt 1: reward function broken returned"):
        score(["a", "b"], ["a", "b"], broken)
