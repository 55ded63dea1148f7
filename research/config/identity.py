"""What results depend on: two runs with equal identities are the same run."""

from collections.abc import Mapping
from typing import Any

from research.config.experiment import Experiment, Stage
from research.config.schema import Effect
from research.config.tree import Tree

_RESULT: tuple[Effect, ...] = ("result",)
_INPUTS = ("model", "start_from", "extend", "roles")
"""Keys that name other stages and sections: what they stand for counts, not its name."""


def model_identity(experiment: Experiment, section: str) -> Tree:
    """What a model computes, whatever its speed."""
    return experiment.parsed[section].effective(None, _RESULT)


def stage_identity(experiment: Experiment, stage: Stage) -> Tree:
    """What training a stage depends on, besides its data and the stages that it reads."""
    facts = stage.facts._replace(answer_roles=frozenset())
    section = stage.parsed.effective(facts, _RESULT)
    found: Tree = {
        "stage": {key: value for key, value in section.items() if key not in _INPUTS},
        "model": model_identity(experiment, stage.model),
    }
    if stage.online:
        found |= _sampling(experiment)
    if not stage.online or stage.facts.reads:
        found["too_long"] = experiment.data.too_long
    return found


def evaluation_identity(experiment: Experiment, stage: Stage) -> Tree:
    """What the evaluation of a stage's result depends on, besides the result and the held-out data."""
    return {
        "evaluation": experiment.parsed["evaluation"].effective(None, ("evaluation",)),
        "stage": stage.parsed.effective(stage.facts, ("evaluation",)),
        **_sampling(experiment),
    }


def run_identity(experiment: Experiment, until: str) -> Tree:
    """What the evaluated result of stage `until` depends on, data by the keys that describe them."""
    stages = experiment.until(until)
    return {
        "stages": {stage.name: stage_identity(experiment, stage) for stage in stages},
        "inputs": {stage.name: [stage.start, stage.extend, *stage.played] for stage in stages},
        "evaluation": evaluation_identity(experiment, experiment.stage(until)),
        "data": experiment.parsed["data"].effective(None, _RESULT),
    }


def _sampling(experiment: Experiment) -> Mapping[str, Any]:
    tools = experiment.parsed["tools"].effective(None, _RESULT) if experiment.tools.any else {}
    return {"sampler": experiment.parsed["sampler"].effective(None, _RESULT), **({"tools": tools} if tools else {})}
