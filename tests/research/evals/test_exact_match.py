"""The evaluator: metrics by hand on a tiny example, evidence kept per problem."""

import numpy as np
import pytest

from research.core.errors import DataError
from research.evals.exact_match import Completion, Problem, evaluate, score_completions

PROBLEMS = [Problem("sum", [1, 2], "5"), Problem("product", [3], "6")]
TEXTS = {(1, 2): ["#5", "#5", "#4", "cut"], (3,): ["#7", "#6", "#7", "#7"]}


def _generate(prompts, samples):
    return [
        [
            Completion(text, num_tokens=len(text), truncated=text == "cut")
            for text in TEXTS[tuple(p)][:samples]
        ]
        for p in prompts
    ]


def _extract(text):
    return text[1:] if text.startswith("#") else None


def _verify(text, answer):
    return _extract(text) == answer


def test_metrics_by_hand():
    result = evaluate(PROBLEMS, generate=_generate, samples=4, verify=_verify, extract=_extract, ks=(1, 2, 4))
    assert result.metrics == pytest.approx(
        {
            "eval/pass@1": (2 / 4 + 1 / 4) / 2,
            "eval/pass@2": ((1 - 1 / 6) + (1 - 3 / 6)) / 2,
            "eval/maj@2": ((1 + 1 / 2 + 1 + 1 / 2 + 1 + 0) / 6 + (1 / 2 + 0 + 0 + 1 / 2 + 1 / 2 + 0) / 6) / 2,
            "eval/pass@4": 1.0,
            "eval/maj@4": (1.0 + 0.0) / 2,
            "eval/truncated_fraction": (1 / 4 + 0) / 2,
            "eval/mean_length": (9 / 4 + 2) / 2,
        }
    )
    np.testing.assert_allclose(result.per_problem["eval/pass@1"], [0.5, 0.25])
    assert set(result.per_problem) == set(result.estimates) == set(result.metrics)
    assert result.problems[0].correct == (True, True, False, False)
    assert result.problems[0].extracted == ("5", "5", "4", None)
    assert result.problems[1].name == "product"


def test_refuses_what_does_not_fit():
    completions = _generate([problem.prompt_ids for problem in PROBLEMS], 2)
    with pytest.raises(DataError, match="'sum' has 2 samples, expected >= 4"):
        score_completions(PROBLEMS, completions, verify=_verify, extract=_extract, ks=(1, 4))
    with pytest.raises(DataError, match="completions of 1 problems, expected 2"):
        score_completions(PROBLEMS, completions[:1], verify=_verify, extract=_extract)
    with pytest.raises(DataError, match="completions of 0 problems"):
        score_completions([], [], verify=_verify, extract=_extract)
