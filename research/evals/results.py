"""Evaluations as results of their own: which evaluators fit the data, their values, and files that keep them."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich import print as show

from research.config.sections import Evaluation, Facts
from research.core.errors import ConfigError, WorkdirError
from research.core.files import read_json, write_json_atomic
from research.core.metrics import encode_numbers
from research.data.records import Records
from research.evals.base import Evaluator, Need
from research.evals.held_out import PreferenceAccuracy, ValidationLoss
from research.evals.policy import TrainedPolicy
from research.tasks.base import Task

_SHOWN = 8
"""Held-out problems whose first completion is kept for a person to read."""


class Results(NamedTuple):
    """What evaluators found: by metric, one value per example; and the first completions, see `completions`."""

    values: dict[str, np.ndarray]
    samples: list[dict[str, Any]]

    @property
    def metrics(self) -> dict[str, float]:
        """Means over the examples."""
        return self.first(0)

    def first(self, count: int) -> dict[str, float]:
        """Means over the first `count` examples; 0 is all."""
        return {name: float(values[: count or None].mean()) for name, values in self.values.items()}


def evaluate(policy: TrainedPolicy, evaluators: Mapping[str, Evaluator], seed: int) -> Results:
    """Runs evaluators, by their names; says what the yardstick raised.

    ConfigError where two evaluators give one metric, or one gives no values, or values that are not numbers.
    """
    values: dict[str, np.ndarray] = {}
    for name, evaluator in evaluators.items():
        for metric, found in evaluator.run(policy, seed):
            array = np.asarray(found)
            if metric in values:
                raise ConfigError(f"evaluation.evaluators: {name} gives {metric}, which another one gives too")
            if array.ndim != 1 or not array.size or array.dtype.kind not in "biuf":
                raise ConfigError(
                    f"evaluation.evaluators: {name}: {metric}: got {array.dtype} of shape {array.shape}, expected one "
                    "number per example"
                )
            values[metric] = array.astype(np.float64)
    if policy.errors:
        show(f"evaluation: correctness raised on {len(policy.errors)} completions, e.g. {policy.errors[0]}")
    return Results(values, completions(policy, _SHOWN, 1))


def completions(policy: TrainedPolicy, problems: int, samples: int) -> list[dict[str, Any]]:
    """The first completions of the first held-out problems, as plain JSON; none where nothing was drawn.

    "correct" is 1, 0, or None where it cannot be told.
    """
    groups = next(iter(policy.drawn.values()), [])
    return [
        {
            "prompt": "\n".join(message.content for message in policy.task.prompt(record)),
            "answer": policy.task.answer(record),
            "completions": [sample.shown for sample in group[:samples]],
            "correct": [policy.correct(sample, record) for sample in group[:samples]],
            "stopped": [sample.stopped for sample in group[:samples]],
        }
        for record, group in zip(policy.held_out(problems), groups, strict=False)
    ]


def evaluator_metrics(how: Evaluation) -> dict[str, frozenset[str]]:
    """The metrics of the built-in evaluators, by their names."""
    sampled = ("accuracy", "unknown", "truncated_fraction", "mean_length", "tool_calls", "tool_errors")
    named = {
        "accuracy": (*sampled, *(f"pass@{k}" for k in how.k), *(f"maj@{k}" for k in how.k if k > 1)),
        "validation_loss": ("validation_loss", "validation_tokens"),
        "preference_accuracy": ("preference_accuracy", "preference_margin"),
    }
    return {name: frozenset(f"eval/{metric}" for metric in metrics) for name, metrics in named.items()}


def lacking(facts: Facts, *, answers: bool) -> dict[Need, str]:
    """What the evaluation of a stage's result must do without, and why; `answers`: see `checkable`."""
    found: dict[Need, str] = {}
    if not facts.policy:
        found["answers"] = "its result is no policy that answers problems"
    elif not answers:
        found["answers"] = "the held-out problems have no answers that could be checked"
    if facts.given not in ("text", "chat") and not facts.policy:
        found["rows"] = "its result is no language model"
    if facts.given != "preferences" or not facts.policy:
        found["pairs"] = "the stage has no pairs of preferences, or no policy"
    return found


def checkable(task: Task, records: Records, look_at: int = 32) -> bool:
    """Whether the answer of any of the first held-out problems can be told from others."""
    found = (records[place] for place in range(min(len(records), look_at)))
    return any(task.answer(record) and task.correct(task.answer(record), record) is not None for record in found)


def fitting(evaluators: Mapping[str, Evaluator], missing: Mapping[Need, str]) -> tuple[dict[str, Evaluator], list[str]]:
    """The evaluators that can run, and a sentence on each that cannot; `missing` is from `lacking`.

    No evaluators turn the evaluation off. Where none of those named can run, built-in ones that can are taken.
    """

    def unmet(evaluator: Evaluator) -> list[Need]:
        return sorted(getattr(evaluator, "needs", frozenset()) & missing.keys())

    runs = {name: each for name, each in evaluators.items() if not unmet(each)}
    left_out = {name: missing[unmet(each)[0]] for name, each in evaluators.items() if name not in runs}
    said = [f"evaluation: {name} is left out because {why}" for name, why in left_out.items()]
    if left_out and not runs:
        others: dict[str, Evaluator] = {
            "preference_accuracy": PreferenceAccuracy(),
            "validation_loss": ValidationLoss(),
        }
        runs = {name: each for name, each in others.items() if not unmet(each)}
        said += [f"evaluation: {', '.join(runs)} instead"] if runs else []
    return runs, said


def results_path(stage: Path, identity: Mapping[str, Any]) -> Path:
    """Where the evaluation of a stage's folder lies.

    `identity` is what the values depend on, as JSON: the evaluation's keys, the evaluators' sources, held-out data,
    tools. The policy itself is the folder's.
    """
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    return stage / "evaluations" / f"{digest[:12]}.json"


def store(stage: Path, identity: Mapping[str, Any], results: Results) -> Path:
    """Writes an evaluation, whole or not at all; its identity is kept with it."""
    path = results_path(stage, identity)
    path.parent.mkdir(parents=True, exist_ok=True)
    values = {name: found.tolist() for name, found in results.values.items()}
    record = {"identity": identity, "metrics": results.metrics, "values": values, "samples": results.samples}
    write_json_atomic(path, encode_numbers(record))
    return path


def load(stage: Path, identity: Mapping[str, Any]) -> Results | None:
    """An evaluation that was stored, None where there is none; WorkdirError for a file that `store` did not write."""
    path = results_path(stage, identity)
    if not path.exists():
        return None
    record = read_json(path)
    try:
        values = {name: np.array(found, np.float64) for name, found in record["values"].items()}
        return Results(values, list(record["samples"]))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise WorkdirError(f"{path}: is no evaluation ({error!r}), expected values and samples") from error
