"""What an algorithm is: a small frozen dataclass between the models and an objective.

It computes log-probs through the one shared function and calls its objective. It holds only what is static; its numbers
arrive traced, in a dict, at every call. Its module lists the names under which a config finds it (`PROVIDES`).
"""

import abc
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Generic, Literal, NamedTuple, Self, TypeVar, get_origin, get_type_hints

import flax.struct
import numpy as np
from jaxtyping import Array, Float

from models.config import ModelConfig
from objectives.types import WeightedSum, require_choice
from research.config.schema import Key
from research.core.batch import Batch, RolloutBatch, SequenceBatch
from research.core.network import Network
from research.core.state import Layout

DataKind = Literal["text", "chat", "preferences", "rankings", "unpaired", "steps"]
"""Given data: raw text, chat examples, pairs, ranked candidates, labelled completions, labelled steps."""

Role = Literal["reference", "teacher"]
"""A frozen model that an algorithm needs. Reward models are no roles of it: the rollout pays rewards."""

Read = Literal["correct", "rewards", "steps", "scale"]
"""Of a sample: whether it is right, its reward, the rewards of its steps, difficulty weights."""

Scalars = dict[str, Float[Any, ""]]
Summed = tuple[WeightedSum, dict[str, WeightedSum]]
"""Total and count of a loss, and of each metric."""
BatchT = TypeVar("BatchT")


class Frozen(flax.struct.PyTreeNode):
    """The frozen models of a run, None where the algorithm asks for none."""

    reference: Network | None = None
    teacher: Network | None = None


ALONE = Frozen()
"""No frozen model."""


class Rollouts(NamedTuple):
    """One iteration's samples on the host, rows laid out [p1, p1, ..., p2, p2]; B = P * group_size."""

    prompt_tokens: np.ndarray  # [B, L] int32, left-padded
    prompt_mask: np.ndarray  # [B, L] bool
    tokens: np.ndarray  # [B, N] int32 completions
    mask: np.ndarray  # [B, N] bool, True on the tokens that the policy drew, the stop token included
    sampler_logps: np.ndarray  # [B, N] float32, nats, under the distribution sampled from
    stopped: np.ndarray  # [B] bool, False where the completion was cut at its limit
    rewards: np.ndarray  # [B] float32, after shaping
    correct: np.ndarray  # [B] bool, the verifier's verdict, or (reward model) a score above the group's mean
    prompt_ids: np.ndarray  # [B] int32
    group_size: int
    step_rewards: np.ndarray | None = None  # [B, N] float32, paid at the last token of a step; None: no step is paid
    step_mask: np.ndarray | None = None  # [B, N] bool, the last token of each step; None with `step_rewards`
    advantage_scale: np.ndarray | None = None  # [B] float32, difficulty weights of the advantages; None is 1
    # [B, N] bool, tokens between the drawn ones that came from outside, such as a tool's: context without loss.
    given: np.ndarray | None = None

    @property
    def lengths(self) -> np.ndarray:
        """`[B]` tokens that the policy drew of each completion, the stop token included."""
        return self.mask.sum(axis=1)

    @property
    def given_lengths(self) -> np.ndarray:
        """`[B]` tokens that the policy was given in each completion."""
        return np.zeros(len(self.mask), np.int64) if self.given is None else self.given.sum(axis=1)

    def rows(self, chosen: np.ndarray | None, weights: np.ndarray) -> SequenceBatch:
        """The chosen ones as prompt + completion rows; None is all of them, in the groups that share a prompt."""
        index = slice(None) if chosen is None else chosen
        return completion_rows(
            self.prompt_tokens[index],
            self.prompt_mask[index],
            self.tokens[index],
            self.mask[index],
            weights,
            None if self.given is None else self.given[index],
            group_size=self.group_size if chosen is None else 1,
        )


class Setting(NamedTuple):
    """What an objective's `make` may read."""

    options: Mapping[str, Any]  # the objective's own section of the config
    online: bool  # whether the policy samples its own data
    group_size: int
    max_new_tokens: int
    context_ids: tuple[int, ...] = ()  # tokens that only a teacher sees before the prompt
    bos_id: int | None = None  # the token that a row starts with, None where rows start without
    step_end_ids: tuple[int, ...] = ()  # the tokens that end a step of a solution


class Algorithm(abc.ABC, Generic[BatchT]):
    """The interface of `research/algorithms/*.py`: frozen, hashable dataclasses.

    Fields of an option's name mean what its `OPTIONS` says; a field that does not compare is read on the host only, so
    that a change of it does not recompile the step.
    """

    layout: ClassVar[Layout] = "policy"
    """What is trained: a policy, a scorer (trunk and head), a step scorer, or policy and value model."""

    @classmethod
    def from_setting(cls, setting: Setting, **derived: Any) -> Self:
        """The algorithm whose fields are the options, the setting's attributes and `derived` of the same names."""
        known = {**setting._asdict(), **setting.options, **derived}
        names = [field.name for field in dataclasses.fields(cls) if field.name in known]  # type: ignore[arg-type]
        return cls(**{name: known[name] for name in names})

    def __post_init__(self) -> None:
        """Raises ValueError where a field whose type is a `Literal` has a value that it does not list."""
        for name, kind in get_type_hints(type(self)).items():
            if get_origin(kind) is Literal:
                require_choice(name, getattr(self, name), kind)

    @property
    def roles(self) -> tuple[Role, ...]:
        """The frozen models that must be there."""
        return ()

    @property
    def batch_coupled(self) -> bool:
        """Whether a row's loss depends on the other rows of the batch, so that micro-batches would change it."""
        return False

    @abc.abstractmethod
    def loss(self, model: Network, batch: BatchT, scalars: Scalars, frozen: Frozen) -> Summed:
        """Total and count of the loss, and of each metric, of one micro-batch; `model` is what is trained."""

    def prepare(self, model: Network, batch: BatchT, scalars: Scalars, frozen: Frozen) -> BatchT:
        """The global batch with what is computed once on it, without gradient, before the first update.

        Reference and old log-probs, values, and advantages, which depend on the whole batch.
        """
        return batch

    def from_rows(self, rows: SequenceBatch) -> Batch:
        """On the host: given rows of text or of chat examples as this algorithm's batch."""
        return rows

    def from_rollouts(self, rollouts: Rollouts, seed: int) -> tuple[BatchT, dict[str, float]]:
        """On the host: samples to a training batch of fixed shape, and metrics about the choice.

        `seed` is unique to the iteration. No update is made on a batch without a target in a row of weight above 0.
        """
        raise NotImplementedError(f"{type(self).__name__} does not learn from rollouts ({seed=})")

    def check_model(self, config: ModelConfig) -> None:  # noqa: B027 - most options fit every model
        """Raises ValueError where the options do not fit the model."""

    def summarize(self, metrics: dict[str, Array]) -> dict[str, Array]:
        """Metrics of an update as they are logged, from their means over the global batch."""
        return metrics

    def adapt(self, scalars: Scalars, metrics: Mapping[str, float], completions: int) -> Scalars:
        """On the host, after an iteration with an update: the scalars of the next one; a controller's whole state."""
        return scalars

    @property
    def for_update(self) -> "Algorithm":
        """Equal where `loss` is the same program: without what only `prepare` or the host reads."""
        return self

    @property
    def prepares(self) -> bool:
        """Whether `prepare` does anything."""
        return type(self).prepare is not Algorithm.prepare


@dataclasses.dataclass(frozen=True)
class Objective:
    """How a config finds an algorithm."""

    name: str  # `objective.name`, and the name of its section
    make: Callable[[Setting], Algorithm]
    options: Mapping[str, Key]  # what its section may say
    given: DataKind | None = None  # the given data it learns from; None where only from the policy's own samples
    own: bool = False  # whether it can learn from the policy's own samples
    check: Callable[[Mapping[str, Any]], None] = lambda _options: None  # ValueError where options exclude each other
    # Rows (or pairs) of the batch from one prompt's group of G samples.
    rows_per_group: Callable[[Mapping[str, Any], int], int] = lambda _options, group_size: group_size
    # What of a paid sample it learns from, under these options: see `Read`.
    reads: Callable[[Mapping[str, Any]], frozenset[Read]] = lambda _options: frozenset({"rewards"})
    least_prompts: int = 1  # that an iteration's samples must be of
    untruncated: bool = False  # whether its ratio needs the untruncated distribution (no top-k, no top-p)

    def static(self, options: Mapping[str, Any], online: bool, group_size: int, max_new_tokens: int) -> Algorithm:
        """The algorithm as far as it can be known without a tokenizer."""
        return self.make(Setting(options, online, group_size, max_new_tokens))


def provides(*objectives: Objective) -> dict[str, dict[str, Objective]]:
    """What a module's PROVIDES says of them."""
    return {"objective": {each.name: each for each in objectives}}


def when(**values: Any) -> Callable[[Mapping[str, Any], Any], bool]:
    """For `Key.used`: the key has an effect where the options have these values; a tuple's are alternatives."""
    wanted = {name: value if isinstance(value, tuple) else (value,) for name, value in values.items()}
    return lambda options, _: all(options[name] in found for name, found in wanted.items())


def completion_rows(
    prompt_tokens: np.ndarray,
    prompt_mask: np.ndarray,
    tokens: np.ndarray,
    mask: np.ndarray,
    weights: np.ndarray,
    given: np.ndarray | None = None,
    *,
    group_size: int = 1,
) -> SequenceBatch:
    """Prompts `[B, L]` and completions `[B, N]` as rows `[B, L + N]`; positions come from the masks.

    Drawn tokens (`mask`) and given ones are seen and have positions; only the drawn ones are targets.

    Raises:
      ValueError: `group_size` adjacent rows have not the same prompt.
    """
    for name, prompts in (("prompt_tokens", prompt_tokens), ("prompt_mask", prompt_mask)):
        other = (prompts != np.repeat(prompts[::group_size], group_size, axis=0)).any(axis=1)
        if other.any():
            raise ValueError(
                f"{name}: row {int(other.argmax())} differs from the first of its group of {group_size}, expected one "
                "prompt a group"
            )
    real = np.concatenate([prompt_mask, mask if given is None else mask | given], axis=1)
    return SequenceBatch(
        tokens=np.concatenate([prompt_tokens, tokens], axis=1).astype(np.int32),
        loss_mask=np.concatenate([np.zeros_like(prompt_mask), mask], axis=1),
        segment_ids=real.astype(np.int32),
        positions=np.maximum(np.cumsum(real, axis=1) - 1, 0).astype(np.int32),
        weights=weights.astype(np.float32),
        first_target=prompt_tokens.shape[1],
        group_size=group_size,
    )


def rollout_batch(rollouts: Rollouts, *, mask_truncated: bool) -> RolloutBatch:
    """All B rollouts as one batch.

    With `mask_truncated`, completions cut at their limit are masked out of the loss. Their rewards still enter the
    baseline of their group, and as rows of the batch they count in the "constant" aggregation.
    """
    B, L = rollouts.prompt_tokens.shape
    rows = rollouts.rows(None, np.ones(B))
    kept = rollouts.stopped | (not mask_truncated)
    scale, steps, ends = rollouts.advantage_scale, rollouts.step_rewards, rollouts.step_mask

    def aligned(values: np.ndarray) -> np.ndarray:
        return np.pad(values, ((0, 0), (L, 0))).astype(np.float32)

    return RolloutBatch(
        sequences=rows.replace(loss_mask=rows.loss_mask & kept[:, None]),
        completion_mask=rows.loss_mask,
        sampler_logps=aligned(rollouts.sampler_logps),
        scores=rollouts.rewards.astype(np.float32),
        advantage_scale=np.ones(B, np.float32) if scale is None else scale.astype(np.float32),
        step_rewards=None if steps is None else aligned(steps),
        step_mask=None if ends is None else np.pad(ends, ((0, 0), (L, 0))),
    )
