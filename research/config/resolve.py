"""From a config and overrides to an `Experiment`: parsed against the schema, checked, each key's effect known."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from ml_collections import ConfigDict

from research.config.checks import check_experiment
from research.config.experiment import Experiment, Stage
from research.config.schema import Key, short
from research.config.sections import (
    Ablation,
    Data,
    Evaluation,
    Facts,
    Mesh,
    Model,
    Objective,
    Records,
    Sampler,
    StageSection,
    Tools,
)
from research.config.tree import Section, Tree, flatten, parse_section, to_tree, unknown_key, with_overrides
from research.core.errors import ConfigError

SECTIONS: Mapping[str, type] = {
    "model": Model,
    "teacher_model": Model,
    "mesh": Mesh,
    "data": Data,
    "evaluation": Evaluation,
    "sampler": Sampler,
    "tools": Tools,
    "records": Records,
    "ablation": Ablation,
}
_HEAD = ("name", "question", "stages")
_STAGES = Key((), "The chain of stages.")
_ARMS = ("arms", "grid")
"""Keys of the ablation that are no single values: `research/ablation/arms.py` reads them."""


def resolve(config: ConfigDict | Tree, overrides: Iterable[str] = (), where: str = "") -> Experiment:
    """Validates a config and turns it into dataclasses.

    Args:
      config: what differs from the defaults of `research/config/sections.py`.
      overrides: "dotted.key=value" from the command line or an arm; one without effect is refused.
      where: what an error about an override names.

    Raises:
      ConfigError: an unknown key, a value of another type or out of range, an override without effect.
    """
    tree = to_tree(config) if isinstance(config, ConfigDict) else dict(config)
    tree, keys = with_overrides(tree, overrides, where or "override")
    experiment = resolve_tree(tree)
    refuse_without_effect(experiment, keys)
    return experiment


def resolve_tree(tree: Tree) -> Experiment:
    """`resolve` of a config as nested dicts, with no overrides to judge."""
    chain = _chain(tree)
    for key in tree:
        if key not in (*_HEAD, *SECTIONS) and not _is_stage(tree[key]):
            raise unknown_key(key, [*_HEAD, *SECTIONS, *chain])
    ablation = tree.get("ablation", {})
    parsed = {
        name: parse_section(cls, tree.get(name, {}), f"{name}.", _ARMS if name == "ablation" else ())
        for name, cls in SECTIONS.items()
    }
    stages: list[Stage] = []
    for name in chain:
        stages.append(_stage(name, tree[name], stages))
    others = {k: v for k, v in tree.items() if _is_stage(v) and k not in chain and k not in SECTIONS}
    for name, section in others.items():  # not run, but a mistake in it is one all the same
        _parse_stage(name, section)
    experiment = Experiment(
        name=str(tree.get("name", "")),
        question=str(tree.get("question", "")),
        stages=tuple(stages),
        models={stage.model: parsed[stage.model].value for stage in stages},
        **{name: parsed[name].value for name in SECTIONS if name not in ("model", "teacher_model")},
        parsed=parsed,
        tree={
            "name": str(tree.get("name", "")),
            "question": str(tree.get("question", "")),
            "stages": list(chain),
            **{name: section.tree() for name, section in parsed.items()},
            "ablation": {**parsed["ablation"].tree(), **{k: ablation[k] for k in _ARMS if k in ablation}},
            **{stage.name: stage.parsed.tree() for stage in stages},
        },
    )
    check_experiment(experiment)
    return experiment


def _is_stage(section: Any) -> bool:
    return isinstance(section, Mapping) and "objective" in section


def _chain(tree: Tree) -> tuple[str, ...]:
    chain = _STAGES.parse("stages", tree.get("stages", ()))
    if not chain or len(set(chain)) != len(chain):
        raise ConfigError(f"stages: got {short(chain)}, expected names of stages, at least one and each once")
    for name in chain:
        if name in SECTIONS or not _is_stage(tree.get(str(name))):
            raise ConfigError(
                f"stages: got {short(name)}, expected the name of a stage: a section that has an objective"
            )
        if not str(name).replace("_", "").isalnum() or not str(name).isascii():
            raise ConfigError(
                f"stages: got {short(name)}, expected letters, digits and _ because folders are named by it"
            )
    return tuple(chain)


def _parse_stage(name: str, given: Tree) -> Section:
    parsed = parse_section(StageSection, given, f"{name}.", ("objective",))
    objective = parse_section(Objective, given["objective"], f"{name}.objective.")
    return dataclasses.replace(parsed, sections={**parsed.sections, "objective": objective})


def _stage(name: str, given: Tree, before: list[Stage]) -> Stage:
    parsed = _parse_stage(name, given)
    section: StageSection = parsed.value
    if section.model not in ("model", "teacher_model"):
        raise ConfigError(f"{name}.model: got {section.model!r}, expected one of model, teacher_model")
    (chosen,) = parsed.sections["objective"].chosen["name"]
    objective, options = chosen.component.target, chosen.options
    try:
        objective.check(options)
    except ValueError as error:
        raise ConfigError(f"{name}.objective.{objective.name}.{error}") from error
    return Stage(
        **vars(section),
        name=name,
        objective=objective,
        options=options,
        start=_start(name, section, before),
        facts=_facts(section, objective, options),
        parsed=parsed,
    )


def _facts(section: StageSection, objective: Any, options: Mapping[str, Any]) -> Facts:
    online = objective.own and (objective.given is None or section.data.source == "own")
    algorithm = objective.static(options, online, section.rollout.group_size, section.rollout.max_new_tokens)
    policy = algorithm.layout in ("policy", "actor_critic") and objective.given != "text"
    reads = objective.reads(options)
    roles = set(algorithm.roles)
    if algorithm.layout == "actor_critic":
        roles.add("value")
    if online and reads and section.reward.source == "model":
        roles.add("reward")
    if online and "steps" in reads and section.reward.step_coef > 0:
        roles.add("prm")
    answers = {section.final_answer} & {"reward", "prm"} if policy else set()
    return Facts(
        online=online,
        given=objective.given or "",
        own=objective.own,
        policy=policy,
        trains=algorithm.layout,
        reads=reads,
        roles=frozenset(roles),
        answer_roles=frozenset(answers),
        untruncated=objective.untruncated,
    )


def _start(name: str, section: StageSection, before: list[Stage]) -> str:
    """The stage it starts from: the named one, or the newest policy of the same model."""
    given = section.start_from
    if given == "scratch":
        return ""
    if given and "/" not in given and given not in {stage.name for stage in before}:
        listed = ", ".join(stage.name for stage in before) or "none"
        raise ConfigError(
            f"{name}.start_from: got {given!r}, expected scratch, the folder of a finished stage, or an earlier stage: "
            f"{listed}"
        )
    policies = [s.name for s in before if s.model == section.model and s.facts.trains in ("policy", "actor_critic")]
    return given or (policies[-1] if policies else "")


def used_keys(experiment: Experiment) -> set[str]:
    """Dotted keys that have any effect in this experiment."""
    stages, data = experiment.stages, experiment.data
    kinds = {stage.facts.given for stage in stages if not stage.online}
    read = {
        "preferences": kinds & {"preferences", "unpaired"},
        "rankings": "rankings" in kinds,
        "steps": "steps" in kinds,
    }
    found = {*_HEAD, *(f"ablation.{key}" for key in (*flatten(experiment.parsed["ablation"].tree()), *_ARMS))}
    for name, section in experiment.parsed.items():
        if name not in ("model", "teacher_model") or name in experiment.models:
            found |= section.used_keys(None)
    for name, wanted in read.items():
        if not wanted:
            found -= experiment.parsed["data"].sections[name].used_keys(None)
    if data.text.path:
        found.discard("data.text.max_bytes")
    return found.union(*(stage.parsed.used_keys(stage.facts) for stage in stages))


def refuse_without_effect(experiment: Experiment, overridden: Iterable[str]) -> None:
    """Refuses a key that somebody set by hand and that changes nothing."""
    used = used_keys(experiment)
    for key in overridden:
        if key in used or key.startswith(("ablation.arms", "ablation.grid")):
            continue
        section = key.split(".")[0]
        under = [f"{s.name}.objective.name={s.objective.name}" for s in experiment.stages if s.name == section]
        raise ConfigError(
            f"{key}: has no effect under {under[0] if under else 'this config'}; expected it not to be set"
        )
