"""What a config becomes: frozen dataclasses, one a section; `research/config/resolve.py` makes and checks them."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from models.config import ModelConfig
from objectives.prm import StepReduction
from research.algorithms.base import Algorithm, Objective, Setting
from research.config.checks import Tree
from research.config.effects import effective_data, is_online, is_policy
from research.core.errors import ConfigError
from research.rewards.sandbox.sandbox import Isolation
from research.rewards.shaping import Shaping
from research.sampling.methods import SamplingMethod
from research.sampling.weights import Weights


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
    epochs: int
    minibatches: int
    resample_rounds: int
    curriculum_low: float
    curriculum_high: float
    curriculum_decay: float
    curriculum_retry: float
    monitor_kl: bool

    @property
    def curriculum(self) -> bool:
        """Whether prompts are filtered by their pass rate."""
        return (self.curriculum_low, self.curriculum_high) != (0.0, 1.0)

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
    context: str


@dataclasses.dataclass(frozen=True)
class Reward:
    """What pays a sample; see `experiments/base.py`."""

    source: str
    ensemble: str
    variance_coef: float
    step_coef: float
    error_reward: float
    shaping: Shaping


@dataclasses.dataclass(frozen=True)
class Roles:
    """The stages whose results play a role in this one; "" where the default or nobody does."""

    reference: str
    teacher: str
    reward: tuple[str, ...]
    value: str
    prm: str


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage, resolved.

    Attributes:
      name: its key in the config.
      objective: what the config says of its objective.
      options: the chosen objective's own settings.
      start: name of the stage that it starts from; "" starts from scratch.
      tree: what has an effect on its result, as JSON: the stage's identity.
      The others: see `experiments/base.py`.
    """

    name: str
    objective: Objective
    options: Mapping[str, Any]
    start: str
    model: str
    start_from: str
    final_answer: str
    prm_score: StepReduction
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
    reward: Reward
    roles: Roles
    tree: Tree

    @property
    def online(self) -> bool:
        """Whether the policy samples its own data."""
        return is_online(self.objective, self.data.source)

    @property
    def rows(self) -> int:
        """Rows (pairs, groups) of one optimizer step's batch."""
        if not self.online:
            return self.batch_size
        per_group = self.objective.rows_per_group(self.options, self.rollout.group_size)
        return self.rollout.prompts_per_step * per_group

    @property
    def setting(self) -> Setting:
        """What the config says to the algorithm; what only the tokenizer knows is left out."""
        return Setting(self.options, self.online, self.rollout.group_size, self.rollout.max_new_tokens)

    def algorithm(self) -> Algorithm:
        """The algorithm, as far as it can be known without a tokenizer."""
        return self.objective.make(self.setting)

    @property
    def samples(self) -> bool:
        """Whether its result is a policy, which can be sampled."""
        return is_policy(self.algorithm()) and self.objective.given != "text"

    @property
    def played(self) -> tuple[tuple[str, str], ...]:
        """(role, name of the stage that plays it) of every role that this stage needs; "" where none is named."""
        algorithm, roles = self.algorithm(), self.roles
        found: list[tuple[str, str]] = [(role, getattr(roles, role)) for role in algorithm.roles]
        if (self.online and self.reward.source == "model") or self.final_answer == "reward":
            found += [("reward", name) for name in roles.reward or ("",)]
        if (self.online and self.reward.step_coef > 0) or self.final_answer == "prm":
            found.append(("prm", roles.prm))
        if algorithm.layout == "actor_critic":
            found.append(("value", roles.value))
        return tuple(found)

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the stages whose results it reads, the one it starts from first."""
        used = [self.start, *(name for _, name in self.played)]
        return tuple(dict.fromkeys(name for name in used if name))

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
class Sampler:
    """How rollouts and evaluations are computed; see `experiments/base.py`."""

    slots: int
    chunk: int
    admit: int
    cache_bucket: int
    int8_cache: bool
    weights: Weights


@dataclasses.dataclass(frozen=True)
class Tools:
    """What a policy may call while it is sampled; see `experiments/base.py`."""

    names: tuple[str, ...]
    corpus: str
    max_turns: int
    max_result_tokens: int
    search_results: int
    isolation: Isolation


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A whole config, validated.

    Attributes:
      name, question: for the report.
      stages: in an order in which each comes after those that it reads.
      models: the sections `model` and `teacher_model` without the vocabulary, which the tokenizer gives.
      mesh: (data, fsdp, tensor).
      data: the data section.
      evaluation: the final evaluation.
      sampler: how completions are computed.
      tools: what may be called on the way.
      tree: the whole config as plain values.
      resolved: what has an effect, as plain values.
    """

    name: str
    question: str
    stages: tuple[Stage, ...]
    models: Mapping[str, Tree]
    mesh: tuple[int, int, int]
    data: Tree
    evaluation: Evaluation
    sampler: Sampler
    tools: Tools
    tree: Tree
    resolved: Tree

    def until(self, name: str) -> tuple[Stage, ...]:
        """The stages that the result of stage `name` needs, itself last."""
        by_name = {stage.name: stage for stage in self.stages}
        needed = {name}
        for stage in reversed(self.stages):
            if stage.name in needed:
                needed.update(by_name[stage.name].inputs)
        return tuple(stage for stage in self.stages if stage.name in needed)

    def identity(self, until: str) -> Tree:
        """What the result of stage `until` depends on: two runs with the same one are the same run."""
        stages = self.until(until)
        # Without tools the section is not there, as it was before there were any.
        tools = {"tools": self.resolved["tools"]} if self.tools.names else {}
        return {
            **tools,
            "stages": {stage.name: stage.identity for stage in stages},
            "models": {stage.model: self.models[stage.model] for stage in stages},
            "mesh": list(self.mesh),
            "data": effective_data(self.data, stages),
            "evaluation": {k: v for k, v in self.tree["evaluation"].items() if k != "batch_problems"},
            # The rest of the section does not change what is drawn.
            "int8_cache": self.sampler.int8_cache,
            **({} if self.sampler.weights == "compute" else {"weights": self.sampler.weights}),
        }

    def model_config(self, vocab_size: int, model: str = "model") -> ModelConfig:
        """The static model description once the vocabulary is known."""
        return make_model(self.models[model], vocab_size)


def make_model(section: Tree, vocab_size: int) -> ModelConfig:
    """A ModelConfig from a model section.

    Raises:
      ConfigError: shapes that do not fit together.
    """
    fields = {key: value for key, value in section.items() if key != "max_length"}
    try:
        return ModelConfig(vocab_size=vocab_size, **fields)
    except ValueError as error:
        raise ConfigError(f"model.{error}") from error


def to_tree(config: ConfigDict) -> Tree:
    """A config as plain JSON values."""
    return json.loads(config.to_json(sort_keys=False))


_RECORD_KEYS = ("log_every", "checkpoint_every", "keep_checkpoints")
"""What is written down when; it changes no result, so it enters no hash."""
