"""From a ConfigDict to frozen dataclasses: resolved, validated once, and stripped of what has no effect."""

import dataclasses
from collections.abc import Iterable, Mapping

from ml_collections import ConfigDict

from research.algorithms.base import Setting
from research.algorithms.registry import objectives
from research.config.checks import Tree, check_keys, check_values, flatten, refuse_overrides
from research.config.effects import (
    effective_data,
    effective_stage,
    effective_tools,
    is_online,
    is_policy,
    unread_rewards,
)
from research.config.experiment import (
    Evaluation,
    Experiment,
    Optimizer,
    Reward,
    Roles,
    Rollout,
    Sampler,
    Stage,
    StageData,
    Tools,
    make_model,
    to_tree,
)
from research.config.rules import STAGE_SCALARS
from research.core.errors import ConfigError
from research.core.state import Layout
from research.environments.registry import NAMES
from research.rewards.shaping import Shaping


def resolve(config: ConfigDict, overridden: Iterable[str] = ()) -> Experiment:
    """Validates a config and turns it into dataclasses.

    Args:
      config: a config made from `experiments/base.py`.
      overridden: dotted keys that somebody set by hand (command line or arm); one that has no effect under
        the chosen objectives is refused.

    Raises:
      ConfigError: an unknown or missing key, a value out of range, an override without effect.
    """
    return resolve_tree(to_tree(config), overridden)


def resolve_tree(tree: Tree, overridden: Iterable[str] = ()) -> Experiment:
    """`resolve` of a config as plain values."""
    flat = flatten({key: value for key, value in tree.items() if key != "ablation"})
    chain = tuple(tree["stages"])
    for name in chain:
        if not isinstance(tree.get(name), dict) or "objective" not in tree[name]:
            raise ConfigError(
                f"stages: got {name!r}, expected the name of a stage section such as pretrain, sft, rl"
            )
    if len(set(chain)) != len(chain) or not chain:
        raise ConfigError(f"stages: got {list(chain)}, expected at least one stage and each once")
    check_keys(tree)
    check_values(flat, tree, chain)
    stages: list[Stage] = []
    for name in chain:
        stages.append(_stage(name, tree, stages))
    evaluation = Evaluation(**{**tree["evaluation"], "k": tuple(tree["evaluation"]["k"])})
    if not evaluation.k or min(evaluation.k) < 1 or max(evaluation.k) > evaluation.samples:
        raise ConfigError(
            f"evaluation.k: got {list(evaluation.k)}, expected values from 1 to evaluation.samples="
            f"{evaluation.samples} because pass@k needs k samples"
        )
    if evaluation.temperature == 0 and evaluation.samples > 1:
        raise ConfigError(
            f"evaluation.samples: got {evaluation.samples}, expected 1 at evaluation.temperature=0 because "
            "greedy samples are equal"
        )
    models = {stage.model: tree[stage.model] for stage in stages}
    for name, section in models.items():
        _check_context("evaluation", evaluation, name, section["max_length"])
        make_model(section, 512)
    resolved = {
        "stages": list(chain),
        **models,
        "mesh": tree["mesh"],
        "data": effective_data(tree["data"], stages),
        "evaluation": tree["evaluation"],
        "sampler": tree["sampler"],
        "tools": effective_tools(tree["tools"]),
        **{stage.name: stage.tree for stage in stages},
    }
    refuse_overrides(overridden, flat, flatten(resolved), tree)
    mesh = (tree["mesh"]["data"], tree["mesh"]["fsdp"], tree["mesh"]["tensor"])
    return Experiment(
        name=tree["name"],
        question=tree["question"],
        stages=tuple(stages),
        models=models,
        mesh=mesh,
        data=tree["data"],
        evaluation=evaluation,
        sampler=Sampler(**tree["sampler"]),
        tools=_tools(tree),
        tree=tree,
        resolved=resolved,
    )


def _stage(name: str, tree: Tree, before: list[Stage]) -> Stage:
    section = tree[name]
    objective = objectives()[section["objective"]["name"]]
    options = section["objective"][objective.name]
    rollout = Rollout(**section["rollout"])
    roles = Roles(**{**section["roles"], "reward": tuple(section["roles"]["reward"])})
    start = _start(name, section, before)
    online = is_online(objective, section["data"]["source"])
    setting = Setting(options, online, rollout.group_size, rollout.max_new_tokens)
    stage = Stage(
        name=name,
        objective=objective,
        options=options,
        start=start,
        **{key: section[key] for key in STAGE_SCALARS},
        data=StageData(**section["data"]),
        optimizer=Optimizer(**section["optimizer"]),
        rollout=rollout,
        reward=_reward(name, section["reward"]),
        roles=roles,
        tree=effective_stage(section, objective, objective.make(setting), online, start),
    )
    _check_stage(stage, tree)
    _check_roles(stage, {stage.name: stage for stage in before})
    return stage


def _start(name: str, section: Tree, before: list[Stage]) -> str:
    """The stage it starts from: the named one, or the newest policy of the same model."""
    known = {stage.name: stage for stage in before}
    given = section["start_from"]
    if given == "scratch":
        return ""
    if given and given not in known:
        raise ConfigError(
            f"{name}.start_from: got {given!r}, expected scratch or an earlier stage: {', '.join(known) or 'none'}"
        )
    if given:
        return given
    policies = [s.name for s in before if s.model == section["model"] and is_policy(s.algorithm())]
    return policies[-1] if policies else ""


def _tools(tree: Tree) -> Tools:
    """The tools section; the tools themselves are made when the ground is laid."""
    tools = Tools(**{**tree["tools"], "names": tuple(tree["tools"]["names"])})
    unknown = [name for name in tools.names if name not in NAMES]
    if unknown or len(set(tools.names)) < len(tools.names):
        raise ConfigError(
            f"tools.names: got {list(tools.names)}, expected some of {', '.join(NAMES)}, each once"
        )
    if ("search" in tools.names) != bool(tools.corpus):
        raise ConfigError(
            f"tools.corpus: got {tools.corpus!r}, expected a file where search is among tools.names and '' elsewhere"
        )
    if tools.names and not tree["sampler"]["slots"]:
        raise ConfigError(
            "sampler.slots: got 0, expected > 0 with tools because only refilled slots stop a row for its result "
            "while the others go on"
        )
    return tools


def _reward(name: str, section: Tree) -> Reward:
    own = {key: section[key] for key in ("source", "ensemble", "variance_coef", "step_coef", "error_reward")}
    try:
        shaping = Shaping(**{key: value for key, value in section.items() if key not in own})
    except ConfigError as error:
        raise ConfigError(f"{name}.reward.{error}") from error
    return Reward(**own, shaping=shaping)


def _check_reads(stage: Stage) -> None:
    """A reward that the objective would not learn from is a mistake, wherever it is set."""
    unread = unread_rewards(stage.objective.reads(stage.options))
    plain = {"source": "verifier", "step_coef": 0.0, **dataclasses.asdict(Shaping())}
    own = {"source": stage.reward.source, "step_coef": stage.reward.step_coef}
    for key, value in {**own, **dataclasses.asdict(stage.reward.shaping)}.items():
        if stage.online and key in unread and value != plain[key]:
            raise ConfigError(
                f"{stage.name}.reward.{key}: got {value!r}, expected {plain[key]!r} because it has no effect under "
                f"{stage.name}.objective.name={stage.objective.name}"
            )


def _check_stage(stage: Stage, tree: Tree) -> None:
    _check_reads(stage)
    name, rollout, limit = stage.name, stage.rollout, tree[stage.model]["max_length"]
    try:
        stage.objective.check(stage.options)
    except ValueError as error:
        raise ConfigError(f"{name}.objective.{stage.objective.name}.{error}") from error
    if stage.online:
        _check_context(f"{name}.rollout", rollout, stage.model, limit)
    if not stage.online and stage.length > limit:
        raise ConfigError(
            f"{name}.length: got {stage.length}, expected at most {stage.model}.max_length={limit}"
        )
    if stage.online and stage.objective.untruncated and rollout.method.truncates:
        raise ConfigError(
            f"{name}.rollout: got top_k {rollout.top_k} and top_p {rollout.top_p}, expected 0 and 1 under "
            f"{stage.objective.name} because its ratio compares log-probs of the untruncated distribution"
        )
    if stage.online and stage.reward.shaping.overlong_buffer > rollout.max_new_tokens:
        raise ConfigError(
            f"{name}.reward.overlong_buffer: got {stage.reward.shaping.overlong_buffer}, expected at most "
            f"rollout.max_new_tokens={rollout.max_new_tokens}"
        )
    if stage.online and rollout.prompts_per_step < stage.objective.least_prompts:
        raise ConfigError(
            f"{name}.rollout.prompts_per_step: got {rollout.prompts_per_step}, expected at least "
            f"{stage.objective.least_prompts} under {stage.objective.name}"
        )
    if rollout.curriculum_low >= rollout.curriculum_high:
        raise ConfigError(
            f"{name}.rollout.curriculum_low: got {rollout.curriculum_low}, expected less than curriculum_high="
            f"{rollout.curriculum_high}"
        )
    terse_data = {"chat": "problems", "preferences": "preferences", "steps": "steps"}.get(
        stage.objective.given or ""
    )
    if (
        terse_data
        and not stage.online
        and stage.data.terse_fraction
        and tree["data"][terse_data]["kind"] != "arithmetic"
    ):
        raise ConfigError(
            f"{name}.data.terse_fraction: got {stage.data.terse_fraction}, expected 0 because only generated "
            "problems have steps to leave out"
        )
    if stage.objective.given == "text" and stage.data.text_weight + stage.data.problems_weight <= 0:
        raise ConfigError(f"{name}.data: got text_weight and problems_weight 0, expected one to be positive")
    for key in ("keep_per_prompt", "pairs_per_prompt"):
        most = rollout.group_size if key == "keep_per_prompt" else rollout.group_size // 2
        if stage.online and key in stage.options and not 1 <= stage.options[key] <= most:
            raise ConfigError(
                f"{name}.objective.{stage.objective.name}.{key}: got {stage.options[key]}, expected 1 to {most} "
                f"because a group has {rollout.group_size} completions"
            )
    if stage.micro_batches > 1 and stage.algorithm().batch_coupled:
        raise ConfigError(
            f"{name}.micro_batches: got {stage.micro_batches}, expected 1 under these options of "
            f"{stage.objective.name} because a row's loss depends on the whole batch"
        )
    if stage.rows % stage.micro_batches:
        raise ConfigError(
            f"{name}.micro_batches: got {stage.micro_batches}, expected a divisor of the {stage.rows} rows of an update"
        )


_PLAYERS: Mapping[str, tuple[Layout, ...]] = {
    "reference": ("policy", "actor_critic"),
    "teacher": ("policy", "actor_critic"),
    "reward": ("scorer",),
    "value": ("scorer",),
    "prm": ("step_scorer",),
}
"""What a stage must train to play a role."""


def _check_roles(stage: Stage, known: Mapping[str, Stage]) -> None:
    """Every role that the stage needs is played by an earlier stage of the right kind."""
    for role, name in stage.played:
        if role == "value" and not name:  # it starts from the policy
            continue
        if role == "reference" and not name:
            if not stage.start:
                raise ConfigError(
                    f"{stage.name}.roles.reference: got '', expected a stage because this one starts from scratch"
                )
            continue
        if role == "reward" and not name:
            raise ConfigError(
                f"{stage.name}.roles.reward: got none, expected at least one stage that trains a reward model"
            )
        if name not in known:
            raise ConfigError(
                f"{stage.name}.roles.{role}: got {name!r}, expected an earlier stage: {', '.join(known) or 'none'}"
            )
        layouts = _PLAYERS[role]
        if known[name].algorithm().layout not in layouts:
            raise ConfigError(
                f"{stage.name}.roles.{role}: got {name!r}, which trains a {known[name].algorithm().layout}, expected "
                f"a stage that trains a {layouts[0]}"
            )
        if role in ("value", "reference") and known[name].model != stage.model:
            raise ConfigError(
                f"{stage.name}.roles.{role}: got {name!r} of {known[name].model}, expected one of {stage.model}"
            )


def _check_context(key: str, lengths: Rollout | Evaluation, model: str, limit: int) -> None:
    longest = lengths.max_prompt_length + lengths.max_new_tokens
    if longest > limit:
        raise ConfigError(
            f"{key}: got max_prompt_length {lengths.max_prompt_length} + max_new_tokens "
            f"{lengths.max_new_tokens} = {longest}, expected at most {model}.max_length={limit}"
        )
