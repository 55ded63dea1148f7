"""Accuracy by hand on made-up completions: what counts as right, who votes, what cannot be told."""

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from research.core.errors import ConfigError
from research.data.records import first_records
from research.evals.accuracy import Accuracy, judge
from research.evals.policy import Sample, TrainedPolicy
from research.evals.results import evaluate
from research.tasks.jsonl import Jsonl

RECORDS = [{"prompt": "2+3", "answer": "5"}, {"prompt": "2*3", "answer": "6"}]
TEXTS = [["#### 5", "#### 5", "#### 4", "cut"], ["#### 7", "#### 6", "#### 7", "#### 7"]]


def sample(text: str, *, stopped: bool = True) -> Sample:
    tokens = np.arange(len(text))
    return Sample(text, np.array([1]), tokens, tokens >= 0, -np.ones(len(text)), stopped, text)


def policy(texts: Sequence[Sequence[str]], records: Sequence[Mapping[str, Any]] = RECORDS, **how: Any) -> TrainedPolicy:
    """Says what it is told to; a text "cut ..." is cut there."""

    class Scripted(TrainedPolicy):
        def held_out(self, limit: int = 0) -> first_records:
            return first_records(self.records, limit)

        def _generate(self, records: Any, *_: Any) -> list[list[Sample]]:
            assert len(records) == len(texts)
            return [[sample(text.removeprefix("cut "), stopped=not text.startswith("cut")) for text in row]
                    for row in texts]  # fmt: skip

    settings: Any = SimpleNamespace(
        problems=len(records), samples=len(texts[0]), k=how.pop("k", (1,)), seed=0, temperature=1.0, max_new_tokens=8
    )
    nothing: Any = None
    return Scripted(nothing, nothing, nothing, nothing, nothing, settings, Jsonl(answer_format="mark"), records, **how)


def values(made: TrainedPolicy) -> dict[str, np.ndarray]:
    return dict(Accuracy().run(made, 0))


def test_metrics_by_hand() -> None:
    found = values(policy(TEXTS, k=(1, 2, 4)))
    assert {name: float(value.mean()) for name, value in found.items()} == pytest.approx(
        {
            "eval/pass@1": (2 / 4 + 1 / 4) / 2,
            "eval/pass@2": ((1 - 1 / 6) + (1 - 3 / 6)) / 2,
            "eval/maj@2": ((1 + 1 / 2 + 1 + 1 / 2 + 1 + 0) / 6 + (1 / 2 + 0 + 0 + 1 / 2 + 1 / 2 + 0) / 6) / 2,
            "eval/pass@4": 1.0,
            "eval/maj@4": (1.0 + 0.0) / 2,
            "eval/accuracy": (2 / 4 + 1 / 4) / 2,
            "eval/unknown": 0.0,
            "eval/truncated_fraction": (1 / 4 + 0) / 2,
            "eval/mean_length": (np.mean([6, 6, 6, 3]) + 6) / 2,
        }
    )
    np.testing.assert_allclose(found["eval/pass@1"], [0.5, 0.25])


def test_a_completion_that_was_cut_is_wrong_and_does_not_vote() -> None:
    """Three were cut in what looks like the right answer; the only whole one is wrong, and is the majority."""
    made = policy([["cut #### 5", "cut #### 5", "cut #### 5", "#### 4"]], RECORDS[:1], k=(1, 4))
    judged = judge(made, made.held_out(), made.generate(made.held_out(), seed=0))
    assert judged.votes == [[None, None, None, "4"]] and not judged.right.any()
    found = values(made)
    assert found["eval/pass@4"] == found["eval/maj@4"] == found["eval/accuracy"] == 0.0
    # Nor may wrong answers that were cut outvote a right one.
    found = values(policy([["cut #### 4", "cut #### 4", "cut #### 4", "#### 5"]], RECORDS[:1], k=(4,)))
    assert found["eval/maj@4"] == 1.0


def test_equivalent_answers_are_one_vote() -> None:
    made = policy([["#### 1,800", "#### $1800.", "#### 1799", "#### 1,800.0", "#### 1799"]],
                  [{"prompt": "?", "answer": "1800"}], k=(5,))  # fmt: skip
    assert values(made)["eval/maj@5"] == 1.0


def test_the_yardstick_is_the_evaluations_own_not_what_was_optimised() -> None:
    """A format reward as yardstick measures the format; votes stay the task's."""
    form = policy(TEXTS, yardstick=lambda text, *_: float("####" in text), k=(1,))
    assert values(form)["eval/pass@1"].tolist() == [0.75, 1.0]
    assert values(policy(TEXTS))["eval/pass@1"].tolist() == [0.5, 0.25]
    assert judge(form, form.held_out(), form.generate(form.held_out(), seed=0)).votes[0] == ["5", "5", "4", None]


def by_column(text: str, record: Mapping[str, Any], context: Any) -> float | None:
    assert context.stopped and context.prompt[-1].content == record["prompt"]
    return None if not record["answer"].strip() else float(text == "#### 5")


def test_a_yardstick_that_raises_cannot_tell_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    def odd(text: str, *_: Any) -> float:
        if text.endswith("7"):
            raise KeyError("odd")
        return float(text.endswith("6"))

    results = evaluate(policy(TEXTS, yardstick=odd), {"accuracy": Accuracy()}, seed=0)
    assert results.values["eval/pass@1"].tolist() == [0.0, 0.25]
    assert results.values["eval/unknown"].tolist() == [0.0, 0.75]
    assert "correctness raised on 3 completions, e.g. KeyError: 'odd'" in capsys.readouterr().out
    assert results.samples[1]["correct"] == [None]


def test_what_cannot_be_told_is_counted_and_is_not_right() -> None:
    records = [{"prompt": "2+3", "answer": "5"}, {"prompt": "a poem?", "completion": " ", "answer": " "}]
    made = policy([["#### 5", "#### 4"], ["roses", "cut violets"]], records,
                  yardstick=by_column)  # fmt: skip
    found = values(made)
    assert found["eval/unknown"].tolist() == [0.0, 0.5], "what was cut is wrong: nobody is asked"
    assert found["eval/pass@1"].tolist() == [0.5, 0.0]


@pytest.mark.parametrize(
    ("final_answer", "expected"), [("sample", [0.5, 0.25]), ("majority", [1, 0]), ("reward", [0, 1])]
)
def test_the_one_answer_that_a_stage_gives(final_answer: str, expected: list[float]) -> None:
    class Scored(SimpleNamespace):
        pass

    made = policy(TEXTS, final_answer=final_answer)
    likes = np.array([[0.1, 0.2, 0.3, 0.25], [0.1, 0.9, 0.3, 0.2]])
    object.__setattr__(made, "scores", lambda groups: likes[: len(groups)])
    assert values(made)["eval/accuracy"].tolist() == expected


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="final_answer: got prm, expected a scorer"):
        values(policy(TEXTS, final_answer="prm"))
    nothing: Any = None
    empty = TrainedPolicy(*([nothing] * 5), SimpleNamespace(samples=1, temperature=1.0, max_new_tokens=8),  # type: ignore[arg-type]
                          Jsonl(answer_format="mark"), first_records([], 0))  # fmt: skip
    with pytest.raises(ConfigError, match="there are no held-out problems"):
        empty.generate([], seed=0)
