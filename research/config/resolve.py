"""From a config and overrides to an `Experiment`: parsed against the schema, checked, each key's effect known."""

from collections.abc import Iterable, Mapping
from typing import Any

from ml_collections import ConfigDict

from research.config.checks import check_experiment
from research.config.experiment import Experiment, Stage
from research.config.schema import Key, expect
from research.config.sections import MODELS, SECTIONS, Facts, StageSection
from research.config.tree import Tree, parse_section, unknown_key, with_overrides
from research.core.errors import ConfigError

_HEAD = ("name", "question", "stages")
_STAGES = Key((), "The chain of stages.")
_ARMS = ("arms", "grid")
"""Keys of the ablation that are no single values: `research/ablation/arms.py` reads them."""


def resolve(config: ConfigDict | Tree, overrides: Iterable[str] = (), where: str = "override") -> Experiment:
    """Validates a config, which says what differs from the defaults of `research/config/sections.py`.

    Args:
      overrides: "dotted.key=value" from the command line or an arm; one without effect is refused.
      where: what an error about an override names.

    Raises:
      ConfigError: an unknown key, a value of another type or out of range, an override without effect.
    """
    tree = config.to_dict() if isinstance(config, ConfigDict) else config
    tree, keys = with_overrides(tree, overrides, where)
    experiment = resolve_tree(tree)
    used = used_keys(experiment)
    for key in keys:
        if key not in used and not key.startswith(("ablation.arms", "ablation.grid")):
            named = {s.name: f"{s.name}.objective.name={s.objective.name}" for s in experiment.stages}
            under = named.get(key.split(".")[0], "this config")
            raise ConfigError(f"{key}: has no effect under {under}; expected it not to be set")
    return experiment


def resolve_tree(tree: Tree) -> Experiment:
    """`resolve` of a config as nested dicts, with no overrides to judge."""
    chain = _chain(tree)
    for key, section in tree.items():
        if key not in (*_HEAD, *SECTIONS) and not _is_stage(section):
            raise unknown_key(key, [*_HEAD, *SECTIONS, *chain])
    parsed = {
        name: parse_section(cls, tree.get(name, {}), f"{name}.", _ARMS if name == "ablation" else ())
        for name, cls in SECTIONS.items()
    }
    stages: list[Stage] = []
    for name in chain:
        stages.append(_stage(name, tree[name], stages))
    for name, section in tree.items():
        if _is_stage(section) and name not in (*chain, *SECTIONS):  # not run, but a mistake in it is one all the same
            parse_section(StageSection, section, f"{name}.")
    head: dict[str, Any] = {"name": str(tree.get("name", "")), "question": str(tree.get("question", ""))}
    arms = {key: value for key, value in tree.get("ablation", {}).items() if key in _ARMS}
    experiment = Experiment(
        **head,
        stages=tuple(stages),
        models={stage.model: parsed[stage.model].value for stage in stages},
        **{name: parsed[name].value for name in SECTIONS if name not in MODELS},
        parsed=parsed,
        tree={
            **head,
            "stages": list(chain),
            **{name: section.tree() for name, section in parsed.items()},
            "ablation": {**parsed["ablation"].tree(), **arms},
            **{stage.name: stage.parsed.tree() for stage in stages},
        },
    )
    check_experiment(experiment)
    return experiment


def _is_stage(section: Any) -> bool:
    return isinstance(section, Mapping) and "objective" in section


def _chain(tree: Tree) -> tuple[str, ...]:
    chain = _STAGES.parse("stages", tree.get("stages", ()))
    expect(0 < len(chain) == len(set(chain)), "stages", chain, "names of stages, at least one and each once")
    for name in chain:
        stage = name not in SECTIONS and _is_stage(tree.get(name))
        expect(stage, "stages", name, "the name of a stage: a section that has an objective")
        plain = name.replace("_", "").isalnum() and name.isascii()
        expect(plain, "stages", name, "letters, digits and _ because folders are named by it")
    return chain


def _stage(name: str, given: Tree, before: list[Stage]) -> Stage:
    parsed = parse_section(StageSection, given, f"{name}.")
    section: StageSection = parsed.value
    (chosen,) = parsed.sections["objective"].chosen["name"]
    objective, options = chosen.component.target, chosen.options
    try:
        objective.check(options)
    except ValueError as error:
        raise ConfigError(f"{name}.objective.{objective.name}.{error}") from error
    facts, start = _facts(section, objective, options), _start(name, section, before)
    resolved = {"objective": objective, "options": options, "start": start, "facts": facts, "parsed": parsed}
    return Stage(name=name, **{**vars(section), **resolved})


def _facts(section: StageSection, objective: Any, options: Mapping[str, Any]) -> Facts:
    online = objective.own and (objective.given is None or section.data.source == "own")
    algorithm = objective.static(options, online, section.rollout.group_size, section.rollout.max_new_tokens)
    policy = algorithm.layout in ("policy", "actor_critic") and objective.given != "text"
    reads = objective.reads(options) if online else frozenset()
    needed = {
        "value": algorithm.layout == "actor_critic",
        "reward": reads and section.reward.source == "model",
        "prm": "steps" in reads and section.reward.step_coef > 0,
    }
    answers = {"reward", "prm"} & {section.final_answer} if policy else ()
    return Facts(
        online=online,
        given=objective.given or "",
        own=objective.own,
        policy=policy,
        trains=algorithm.layout,
        reads=reads,
        roles=frozenset({*algorithm.roles, *(role for role, need in needed.items() if need)}),
        answer_roles=frozenset(answers),
        untruncated=objective.untruncated,
    )


def _start(name: str, section: StageSection, before: list[Stage]) -> str:
    """The stage it starts from: the named one, or the newest policy of the same model."""
    given = section.start_from
    if given == "scratch":
        return ""
    names = [stage.name for stage in before]
    if given and "/" not in given:
        earlier = f"scratch, the folder of a finished stage, or an earlier stage: {', '.join(names) or 'none'}"
        expect(given in names, f"{name}.start_from", given, earlier)
    policies = [s.name for s in before if s.model == section.model and s.facts.trains in ("policy", "actor_critic")]
    return given or (policies[-1] if policies else "")


_READ_BY = {"preferences": {"preferences", "unpaired"}, "rankings": {"rankings"}, "steps": {"steps"}}
"""Sections of the data -> the kinds of given data that are read from them."""


def used_keys(experiment: Experiment) -> set[str]:
    """Dotted keys that have any effect in this experiment."""
    stages, parsed = experiment.stages, experiment.parsed
    given = {stage.facts.given for stage in stages if not stage.online}
    sections = [parsed[name] for name in parsed if name not in MODELS or name in experiment.models]
    unread = [parsed["data"].sections[name] for name, kinds in _READ_BY.items() if not kinds & given]
    found = set(_HEAD).union(*(section.used_keys(None) for section in sections))
    found = found.difference(*(section.used_keys(None) for section in unread))
    return found.union(*(stage.parsed.used_keys(stage.facts) for stage in stages))
