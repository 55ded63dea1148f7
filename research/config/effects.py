"""Which keys of a config change a result: all others enter no hash and are refused as overrides."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from research.algorithms.base import Algorithm, Objective, Read
from research.config.checks import Tree
from research.config.rules import STAGE_SCALARS
from research.rewards.shaping import Shaping

_GIVEN_KEYS: Mapping[str, tuple[str, ...]] = {
    "text": ("text_weight", "problems_weight", "limit"),
    "chat": ("limit", "packing", "terse_fraction"),
    "preferences": ("terse_fraction",),
    "steps": ("terse_fraction",),
}
"""Keys of a stage's data section that given data of a kind read."""

_CURRICULUM = ("curriculum_low", "curriculum_high", "curriculum_decay", "curriculum_retry")
_GENERATED = ("train", "test", "seed", "operations", "min_steps", "max_steps", "max_operand", "max_value")


def is_online(objective: Objective, source: str) -> bool:
    """Whether an objective learns from the policy's own samples under this data source."""
    return objective.own and (objective.given is None or source == "own")


def is_policy(algorithm: Algorithm) -> bool:
    """Whether what is trained can be sampled."""
    return algorithm.layout in ("policy", "actor_critic")


def effective_stage(
    section: Tree, objective: Objective, algorithm: Algorithm, online: bool, start: str
) -> Tree:
    """The keys of a stage that change its result or its records.

    Args:
      section: the stage's section of the config.
      objective: what it names.
      algorithm: what it makes.
      online: whether the policy samples its own data.
      start: name of the stage that it starts from, "" from scratch.
    """
    unused: set[str] = {"batch_size", "length", "eval_batches"} if online else set()
    if not is_policy(algorithm) or objective.given == "text":  # nothing to sample
        unused |= {"eval_problems", "final_answer"}
    if section["final_answer"] != "prm" or "final_answer" in unused:
        unused.add("prm_score")
    options = dict(section["objective"][objective.name])
    for key in objective.no_effect(options, online):
        del options[key]
    tree: Tree = {key: section[key] for key in STAGE_SCALARS if key not in unused}
    tree["start_from"] = start
    tree["data"] = {key: section["data"][key] for key in _data_keys(section, objective, algorithm, online)}
    tree["objective"] = {"name": objective.name, objective.name: options}
    tree["optimizer"] = section["optimizer"]
    roles: set[str] = set(algorithm.roles)
    if algorithm.layout == "actor_critic":
        roles.add("value")
    if online:
        tree["rollout"] = _rollout(section["rollout"], objective.untruncated and "reference" in roles)
        tree["reward"] = _reward(section["reward"], objective.reads(options), roles)
    if section["final_answer"] in ("reward", "prm") and "final_answer" not in unused:
        roles.add(section["final_answer"])
    tree["roles"] = {role: section["roles"][role] for role in sorted(roles)}
    return tree


def effective_data(section: Tree, stages: Iterable[Any]) -> Tree:
    """The keys of the data section that some stage or the evaluation reads."""
    kinds = {stage.objective.given for stage in stages if not stage.online}
    problems = dict(section["problems"])
    for key in _GENERATED if problems["kind"] == "jsonl" else ("path", "validation_one_in"):
        del problems[key]
    found = {**section, "problems": problems}
    readers = {"preferences": {"preferences", "unpaired"}, "rankings": {"rankings"}, "steps": {"steps"}}
    for name, wanted in readers.items():
        if kinds & wanted:
            other = (
                ("train", "validation") if section[name]["kind"] == "jsonl" else ("path", "validation_one_in")
            )
            found[name] = {key: value for key, value in section[name].items() if key not in other}
        else:
            del found[name]
    return found


def effective_tools(section: Tree) -> Tree:
    """The keys of the tools section that one of its tools reads."""
    names = section["names"]
    off = set() if names else set(section) - {"names"}
    if "search" not in names:
        off |= {"corpus", "search_results"}
    if "python" not in names:
        off.add("isolation")
    return {key: value for key, value in section.items() if key not in off}


def _data_keys(section: Tree, objective: Objective, algorithm: Algorithm, online: bool) -> list[str]:
    data = section["data"]
    keys = ["limit"] if online else list(_GIVEN_KEYS.get(objective.given or "", ()))
    if objective.own and objective.given is not None:
        keys.append("source")
    if objective.given == "text" and data["problems_weight"] == 0:
        keys.remove("limit")
    if "teacher" in algorithm.roles:
        keys.append("context")
        if "packing" in keys:  # the teacher's rows and the student's are aligned one by one
            keys.remove("packing")
    return keys


def _rollout(section: Tree, measures_kl: bool) -> Tree:
    """The effective keys; a KL that the objective takes anyway need not be monitored."""
    off = () if (section["curriculum_low"], section["curriculum_high"]) != (0.0, 1.0) else _CURRICULUM[2:]
    return {
        key: value
        for key, value in section.items()
        if key not in off and not (measures_kl and key == "monitor_kl")
    }


def unread_rewards(reads: frozenset[Read]) -> set[str]:
    """Keys of the reward section that an objective has no use for."""
    shaping = {field.name for field in dataclasses.fields(Shaping)} - {"difficulty_weighting"}
    off = set() if reads else {"source", "ensemble", "variance_coef", "error_reward"}
    if "rewards" not in reads:
        off |= shaping
    if "scale" not in reads:
        off.add("difficulty_weighting")
    if "steps" not in reads:
        off.add("step_coef")
    return off


def _reward(section: Tree, reads: frozenset[Read], roles: set[str]) -> Tree:
    """The effective keys; adds the roles that it gives parts to."""
    off = unread_rewards(reads)
    if section["source"] == "model" and "source" not in off:
        roles.add("reward")
    else:
        off |= {"ensemble", "variance_coef"}
    if section["ensemble"] != "mean_minus_variance":
        off.add("variance_coef")
    if section["step_coef"] > 0:
        roles.add("prm")
    if section["format_mode"] == "off":
        off |= {"format_pattern"}
    if section["overlong_buffer"] == 0:
        off.add("overlong_coef")
    return {key: value for key, value in section.items() if key not in off}
