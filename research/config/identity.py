"""What results depend on: two runs with equal identities are the same run."""

from research.config.experiment import Experiment, Stage
from research.config.tree import Tree

_INPUTS = ("model", "start_from", "extend", "roles")
"""Keys that name other stages and sections: what they stand for counts, not its name."""


def model_identity(experiment: Experiment, section: str) -> Tree:
    """What a model computes, whatever its speed."""
    return experiment.parsed[section].effective(None, "result")


def stage_identity(experiment: Experiment, stage: Stage) -> Tree:
    """What training a stage depends on, besides its data and the stages that it reads."""
    facts = stage.facts._replace(answer_roles=frozenset())
    section = stage.parsed.effective(facts, "result")
    return {
        "stage": {key: value for key, value in section.items() if key not in _INPUTS},
        "model": model_identity(experiment, stage.model),
        **(_sampling(experiment) if stage.online else {}),
        **({"too_long": experiment.data.too_long} if not stage.online or stage.facts.reads else {}),
    }


def evaluation_identity(experiment: Experiment, stage: Stage) -> Tree:
    """What the evaluation of a stage's result depends on, besides the result and the held-out data."""
    return {
        "evaluation": experiment.parsed["evaluation"].effective(None, "evaluation"),
        "stage": stage.parsed.effective(stage.facts, "evaluation"),
        **_sampling(experiment),
    }


def run_identity(experiment: Experiment, until: str) -> Tree:
    """What the evaluated result of stage `until` depends on, data by the keys that describe them."""
    stages = experiment.until(until)
    return {
        "stages": {stage.name: stage_identity(experiment, stage) for stage in stages},
        "inputs": {stage.name: [stage.start, stage.extend, *stage.played] for stage in stages},
        "evaluation": evaluation_identity(experiment, experiment.stage(until)),
        "data": experiment.parsed["data"].effective(None, "result"),
    }


def _sampling(experiment: Experiment) -> Tree:
    names = ("sampler", "tools") if experiment.tools.any else ("sampler",)
    return {name: experiment.parsed[name].effective(None, "result") for name in names}
