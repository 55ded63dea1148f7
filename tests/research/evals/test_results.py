"""Evaluations as results: which evaluators fit, one's own by reference, and files that are whole or absent."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from research.config.references import find, provided
from research.config.sections import Facts
from research.core.errors import ConfigError, WorkdirError
from research.evals.accuracy import Accuracy
from research.evals.held_out import PreferenceAccuracy, ValidationLoss
from research.evals.results import Results, checkable, evaluate, fitting, lacking, load, results_path, store
from research.tasks.jsonl import Jsonl
from tests.research.evals.test_accuracy import RECORDS, TEXTS, policy

OWN = """
from dataclasses import dataclass
import numpy as np
from research.config.schema import key

@dataclass(frozen=True)
class Words:
    letter: str = key("5", "Which letter is counted.")

    def run(self, policy, seed):
        groups = policy.generate(policy.held_out(policy.settings.problems), seed=seed)
        yield "eval/fives", np.array([np.mean([s.text.count(self.letter) for s in group]) for group in groups])
"""


def test_an_evaluator_of_ones_own_by_reference(tmp_path: Path) -> None:
    path = tmp_path / "own.py"
    path.write_text(OWN)
    component = find("evaluator", f"{path}:Words", "evaluation.evaluators")
    results = evaluate(policy(TEXTS), {component.name: component.make({"letter": "7"})}, seed=0)
    assert results.values["eval/fives"].tolist() == [0.0, 0.75]
    assert results.metrics == {"eval/fives": 0.375} and results.first(1) == {"eval/fives": 0.0}
    assert component.options["letter"].default == "5"


def test_the_built_in_evaluators_have_short_names() -> None:
    assert set(provided("evaluator")) == {"accuracy", "validation_loss", "preference_accuracy"}


class Gives:
    def __init__(self, *found: tuple[str, Any]) -> None:
        self.found = found

    def run(self, policy: Any, seed: int) -> Any:
        del policy, seed
        yield from self.found


@pytest.mark.parametrize(
    ("evaluators", "message"),
    [
        ({"a": Gives(("x", [1.0])), "b": Gives(("x", [1.0]))}, "b gives x, which another one gives too"),
        ({"a": Gives(("x", [])),}, r"a: x: got float64 of shape \(0,\), expected one number per example"),
        ({"a": Gives(("x", 1.0))}, r"a: x: got float64 of shape \(\)"),
        ({"a": Gives(("x", ["good"]))}, "a: x: got <U4"),
    ],
)  # fmt: skip
def test_what_an_evaluator_may_not_give(evaluators: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        evaluate(policy(TEXTS), evaluators, seed=0)


def facts(given: str, *, can_sample: bool = True) -> Facts:
    whole: dict[str, Any] = dict.fromkeys(Facts._fields, "") | {"given": given, "policy": can_sample}
    return Facts(**whole)


@pytest.mark.parametrize(
    ("asked", "given", "can_sample", "answers", "runs", "said"),
    [
        (("accuracy",), "chat", True, True, ["accuracy"], ""),
        (("accuracy",), "chat", True, False, ["validation_loss"], "accuracy is left out because the held-out problems"),
        (("accuracy",), "text", False, True, ["validation_loss"], "is no policy that answers"),
        (("accuracy",), "preferences", True, False, ["preference_accuracy", "validation_loss"], "left out"),
        (("accuracy",), "preferences", False, True, [], "accuracy is left out"),
        (("accuracy", "preference_accuracy"), "chat", True, True, ["accuracy"], "no pairs"),
        ((), "chat", True, True, [], ""),
    ],
)  # fmt: skip
def test_the_evaluation_is_one_that_fits_the_data(
    asked: tuple[str, ...], given: str, can_sample: bool, answers: bool, runs: list[str], said: str
) -> None:
    built_in = {
        "accuracy": Accuracy(),
        "preference_accuracy": PreferenceAccuracy(),
        "validation_loss": ValidationLoss(),
    }
    missing = lacking(facts(given, can_sample=can_sample), answers=answers)
    found, sentences = fitting({name: built_in[name] for name in asked}, missing)
    assert list(found) == runs
    assert bool(sentences) == bool(said) and said in " ".join(sentences)
    own, none = fitting({"own": Gives()}, missing)  # it says of nothing that it needs it
    assert list(own) == ["own"] and not none


def test_which_problems_can_be_checked() -> None:
    assert checkable(Jsonl(answer_format="mark"), RECORDS)

    class Silent(Jsonl):
        def answer(self, record: Any) -> str:
            del record
            return ""

    assert not checkable(Silent(), RECORDS)


def test_results_come_back_as_they_were_stored_and_only_for_the_same_evaluation(tmp_path: Path) -> None:
    results = Results(
        {"eval/pass@1": np.array([0.1, 1 / 3, np.nan])},
        [{"prompt": "2+3", "answer": "5", "completions": ["#### 5"], "correct": [None], "stopped": [True]}],
    )
    identity = {"evaluation": {"samples": 4, "k": [1, 4]}, "source": "abc"}
    assert load(tmp_path, identity) is None
    path = store(tmp_path, identity, results)
    assert path.parent == tmp_path / "evaluations" and path == results_path(tmp_path, identity)
    again = load(tmp_path, identity)
    assert again is not None and again.samples == results.samples
    np.testing.assert_array_equal(again.values["eval/pass@1"], results.values["eval/pass@1"])
    assert load(tmp_path, {**identity, "source": "edited"}) is None
    assert [p.name for p in path.parent.iterdir()] == [path.name], "nothing half-written is left"
    assert json.loads(path.read_text())["identity"] == identity
    path.write_text('{"values": 3}')
    with pytest.raises(WorkdirError, match="is no evaluation"):
        load(tmp_path, identity)
