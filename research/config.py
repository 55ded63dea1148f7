"""From a ConfigDict to frozen dataclasses: resolved, validated once, and stripped of what has no effect."""

import dataclasses
import difflib
import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

from ml_collections import ConfigDict

from models.config import ModelConfig
from research.config_rules import BOUNDS, CHOICES, SECTIONS, STAGE_SCALARS
from research.errors import ConfigError
from research.sampling.methods import SamplingMethod

Tree = dict[str, Any]

ONLINE = ("rejection_sampling", "dpo", "grpo")
"""Objectives that can learn from the policy's own samples (dpo only where data.source is "own")."""


@dataclasses.dataclass(frozen=True)
class Rollout:
    """How the policy is sampled; see `experiments/base.py` for units."""

    prompts_per_step: int
    group_size: int
    max_prompt_length: int
    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    updates: int

    @property
    def method(self) -> SamplingMethod:
        """The static part of the distribution drawn from."""
        return SamplingMethod(top_k=self.top_k, nucleus=self.top_p < 1.0)


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """AdamW and its schedule; see `experiments/base.py` for units."""

    learning_rate: float
    warmup_steps: int
    end_fraction: float
    b1: float
    b2: float
    eps: float
    weight_decay: float
    clip_norm: float


@dataclasses.dataclass(frozen=True)
class StageData:
    """Which data a stage learns from; see `experiments/base.py`."""

    source: str
    text_weight: float
    problems_weight: float
    limit: int
    packing: bool
    terse_fraction: float


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage, resolved.

    Attributes:
      name: its key in the config.
      objective: name of the objective.
      options: the chosen objective's own settings.
      tree: what has an effect on its result, as JSON: the stage's identity.
      The others: see `experiments/base.py`.
    """

    name: str
    objective: str
    options: Mapping[str, Any]
    seed: int
    steps: int
    batch_size: int
    length: int
    micro_batches: int
    log_every: int
    eval_every: int
    eval_batches: int
    eval_problems: int
    checkpoint_every: int
    keep_checkpoints: int
    data: StageData
    optimizer: Optimizer
    rollout: Rollout
    tree: Tree

    @property
    def online(self) -> bool:
        """Whether the policy samples its own data."""
        return is_online(self.objective, self.data.source)

    @property
    def rows(self) -> int:
        """Rows (pairs, for dpo) of one optimizer step's batch."""
        if not self.online:
            return self.batch_size
        if self.objective == "rejection_sampling":
            return self.rollout.prompts_per_step * int(self.options["keep_per_prompt"])
        if self.objective == "dpo":
            return self.rollout.prompts_per_step * int(self.options["pairs_per_prompt"])
        return self.rollout.prompts_per_step * self.rollout.group_size

    @property
    def identity(self) -> Tree:
        """`tree` without what changes only when something is written down: what the result depends on."""
        return {key: value for key, value in self.tree.items() if key not in _RECORD_KEYS}


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The final evaluation; see `experiments/base.py`."""

    problems: int
    samples: int
    k: tuple[int, ...]
    temperature: float
    seed: int
    batch_problems: int
    max_prompt_length: int
    max_new_tokens: int


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A whole config, validated.

    Attributes:
      name, question: for the report.
      stages: the chain, in order.
      model: the model's section without the vocabulary, which the tokenizer gives.
      mesh: (data, fsdp, tensor).
      data: the data section.
      evaluation: the final evaluation.
      tree: the whole config as plain values.
      resolved: what has an effect, as plain values.
    """

    name: str
    question: str
    stages: tuple[Stage, ...]
    model: Tree
    mesh: tuple[int, int, int]
    data: Tree
    evaluation: Evaluation
    tree: Tree
    resolved: Tree

    def identity(self, until: str) -> Tree:
        """What the result of stage `until` depends on: two runs with the same one are the same run."""
        names = [stage.name for stage in self.stages]
        return {
            "stages": {stage.name: stage.identity for stage in self.stages[: names.index(until) + 1]},
            "model": self.model,
            "mesh": list(self.mesh),
            "data": self.resolved["data"],
            "evaluation": {k: v for k, v in self.tree["evaluation"].items() if k != "batch_problems"},
        }

    def model_config(self, vocab_size: int) -> ModelConfig:
        """The static model description once the vocabulary is known."""
        return make_model(self.model, vocab_size)


def make_model(section: Tree, vocab_size: int) -> ModelConfig:
    """A ModelConfig from the model section.

    Raises:
      ConfigError: shapes that do not fit together.
    """
    fields = {key: value for key, value in section.items() if key != "max_length"}
    try:
        return ModelConfig(vocab_size=vocab_size, **fields)
    except ValueError as error:
        raise ConfigError(f"model.{error}") from error


def is_online(objective: str, source: str) -> bool:
    """Whether an objective learns from the policy's own samples under this data source."""
    return objective in ONLINE and not (objective == "dpo" and source == "preferences")


def to_tree(config: ConfigDict) -> Tree:
    """A config as plain JSON values."""
    return json.loads(config.to_json(sort_keys=False))


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys and leaf values."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def unknown_key(key: str, known: Iterable[str]) -> ConfigError:
    """The error for a key that does not exist, with the nearest one that does."""
    known = list(known)
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
    return ConfigError(f"{key}: unknown config key; the nearest known one is {near[0] if near else 'none'}")


def resolve(config: ConfigDict, overridden: Iterable[str] = ()) -> Experiment:
    """Validates a config and turns it into dataclasses.

    Args:
      config: a config made from `experiments/base.py`.
      overridden: dotted keys that somebody set by hand (command line or arm); one that has no effect under
        the chosen objectives is refused.

    Raises:
      ConfigError: an unknown or missing key, a value out of range, an override without effect.
    """
    tree = to_tree(config)
    flat = flatten({key: value for key, value in tree.items() if key != "ablation"})
    chain = tuple(tree["stages"])
    for name in chain:
        if not isinstance(tree.get(name), dict) or "objective" not in tree[name]:
            raise ConfigError(
                f"stages: got {name!r}, expected the name of a stage section such as pretrain, sft, rl"
            )
    if len(set(chain)) != len(chain) or not chain:
        raise ConfigError(f"stages: got {list(chain)}, expected at least one stage and each once")
    _check_keys(tree)
    _check_values(flat, chain)
    stages = tuple(_stage(name, tree) for name in chain)
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
    _check_context("evaluation", evaluation, tree["model"]["max_length"])
    make_model(tree["model"], 512)
    resolved = {
        "stages": list(chain),
        "model": tree["model"],
        "mesh": tree["mesh"],
        "data": _effective_data(tree["data"], stages),
        "evaluation": tree["evaluation"],
        **{stage.name: stage.tree for stage in stages},
    }
    _refuse_overrides(overridden, flat, flatten(resolved), tree)
    mesh = (tree["mesh"]["data"], tree["mesh"]["fsdp"], tree["mesh"]["tensor"])
    return Experiment(
        name=tree["name"],
        question=tree["question"],
        stages=stages,
        model=tree["model"],
        mesh=mesh,
        data=tree["data"],
        evaluation=evaluation,
        tree=tree,
        resolved=resolved,
    )


def _stage(name: str, tree: Tree) -> Stage:
    section = tree[name]
    objective = section["objective"]["name"]
    options = section["objective"][objective]
    online = is_online(objective, section["data"]["source"])
    rollout = Rollout(**section["rollout"])
    stage = Stage(
        name=name,
        objective=objective,
        options=options,
        **{key: section[key] for key in STAGE_SCALARS},
        data=StageData(**section["data"]),
        optimizer=Optimizer(**section["optimizer"]),
        rollout=rollout,
        tree=_effective_stage(section, objective, online),
    )
    limit = tree["model"]["max_length"]
    if online:
        _check_context(f"{name}.rollout", rollout, limit)
    if not online and stage.length > limit:
        raise ConfigError(f"{name}.length: got {stage.length}, expected at most model.max_length={limit}")
    if online and objective == "grpo" and rollout.method.truncates:
        raise ConfigError(
            f"{name}.rollout: got top_k {rollout.top_k} and top_p {rollout.top_p}, expected 0 and 1 under grpo "
            "because its ratio compares log-probs of the untruncated distribution"
        )
    if objective == "sft" and stage.data.terse_fraction and tree["data"]["problems"]["kind"] != "arithmetic":
        raise ConfigError(
            f"{name}.data.terse_fraction: got {stage.data.terse_fraction}, expected 0 because only generated "
            "problems have steps to leave out"
        )
    if objective == "next_token" and stage.data.text_weight + stage.data.problems_weight <= 0:
        raise ConfigError(f"{name}.data: got text_weight and problems_weight 0, expected one to be positive")
    for key in ("keep_per_prompt", "pairs_per_prompt"):
        most = rollout.group_size if key == "keep_per_prompt" else rollout.group_size // 2
        if online and key in options and not 1 <= options[key] <= most:
            raise ConfigError(
                f"{name}.objective.{objective}.{key}: got {options[key]}, expected 1 to {most} "
                f"because a group has {rollout.group_size} completions"
            )
    if stage.rows % stage.micro_batches:
        raise ConfigError(
            f"{name}.micro_batches: got {stage.micro_batches}, expected a divisor of the {stage.rows} rows of an update"
        )
    return stage


def _check_context(key: str, lengths: Rollout | Evaluation, limit: int) -> None:
    longest = lengths.max_prompt_length + lengths.max_new_tokens
    if longest > limit:
        raise ConfigError(
            f"{key}: got max_prompt_length {lengths.max_prompt_length} + max_new_tokens "
            f"{lengths.max_new_tokens} = {longest}, expected at most model.max_length={limit}"
        )


_RECORD_KEYS = ("log_every", "checkpoint_every", "keep_checkpoints")
"""What is written down when; it changes no result, so it enters no hash."""


def _effective_stage(section: Tree, objective: str, online: bool) -> Tree:
    """The keys of a stage that change its result or its records."""
    unused = {"batch_size", "length", "eval_batches"} if online else {"rollout"}
    if not online and objective != "sft":  # no completions to score
        unused.add("eval_problems")
    data_keys = {
        "next_token": ("text_weight", "problems_weight", "limit"),
        "sft": ("limit", "packing", "terse_fraction"),
        "rejection_sampling": ("limit",),
        "grpo": ("limit",),
        "dpo": ("source", "limit") if online else ("source",),
    }[objective]
    options = dict(section["objective"][objective])
    if objective == "dpo" and not online:
        del options["pairs_per_prompt"]
    if objective == "grpo" and options["beta"] == 0:
        del options["kl_estimator"]
    if objective == "grpo" and options["normalization"] == "none":
        del options["ddof"]
    data = {key: section["data"][key] for key in data_keys}
    if objective == "next_token" and section["data"]["problems_weight"] == 0:
        del data["limit"]
    return {
        **{key: section[key] for key in STAGE_SCALARS if key not in unused},
        "data": data,
        "objective": {"name": objective, objective: options},
        "optimizer": section["optimizer"],
        **({} if "rollout" in unused else {"rollout": section["rollout"]}),
    }


def _effective_data(section: Tree, stages: tuple[Stage, ...]) -> Tree:
    """The keys of the data section that some stage or the evaluation reads."""
    problems = dict(section["problems"])
    generated = ("train", "test", "seed", "operations", "min_steps", "max_steps", "max_operand", "max_value")
    for key in generated if problems["kind"] == "jsonl" else ("path", "validation_one_in"):
        del problems[key]
    if not any(stage.objective == "dpo" and not stage.online for stage in stages):
        return {
            key: value for key, value in {**section, "problems": problems}.items() if key != "preferences"
        }
    return {**section, "problems": problems}


def _check_keys(tree: Tree) -> None:
    """Refuses keys that nothing reads and names those that are missing."""
    sections = {key for key, value in tree.items() if isinstance(value, dict) and "objective" in value}
    for pattern, known in SECTIONS.items():
        paths = [pattern.replace("*", stage) for stage in sorted(sections)] if "*" in pattern else [pattern]
        for path in paths:
            section: Any = tree
            for part in filter(None, path.split(".")):
                section = section.get(part, {}) if isinstance(section, dict) else {}
            prefix = f"{path}." if path else ""
            for key in section:
                if key not in known and not (path == "" and key in sections):
                    raise unknown_key(f"{prefix}{key}", [f"{prefix}{name}" for name in known])
            for key in known:
                if key not in section and (path or key != "ablation"):
                    raise ConfigError(f"{prefix}{key}: is missing, expected every key of experiments/base.py")


def _check_values(flat: Tree, chain: tuple[str, ...]) -> None:
    def keys(pattern: str) -> list[str]:
        if not pattern.startswith("*."):
            return [pattern]
        return [f"{stage}.{pattern[2:]}" for stage in chain]

    for pattern, choices in CHOICES.items():
        for key in keys(pattern):
            if flat[key] not in choices:
                raise ConfigError(f"{key}: got {flat[key]!r}, expected one of {', '.join(map(str, choices))}")
    for pattern, (low, high, why) in BOUNDS.items():
        for key in keys(pattern):
            value = flat[key]
            inside = (low is None or value >= low) and (high is None or value <= high)  # false for NaN
            if not inside or value == math.inf:
                limits = f"expected >= {low:g}" if high is None else f"expected {low:g} to {high:g}"
                raise ConfigError(f"{key}: got {value}, {limits} because {why}")


def _refuse_overrides(overridden: Iterable[str], flat: Tree, effective: Tree, tree: Tree) -> None:
    headings = {"name", "question"}
    for key in overridden:
        if key.split(".")[0] == "ablation" or key in headings or key == "stages":
            continue
        if key not in flat:
            raise unknown_key(key, flat)
        if key not in effective:
            section = key.split(".")[0]
            objective = tree.get(section, {}).get("objective", {}).get("name")
            under = f"{section}.objective.name={objective}" if objective else "this config"
            raise ConfigError(f"{key}: has no effect under {under}; expected it not to be set")
