"""What an algorithm is: a small frozen dataclass between the models and an objective.

An algorithm says which data it learns from, what it trains and which frozen models it needs; it computes
log-probs through the one shared function and calls its objective. It holds only what is static; its numbers
arrive traced, in a dict, at every call. Its module lists the names under which a config finds it (`OBJECTIVES`).
"""

import abc
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, NamedTuple, get_origin, get_type_hints

import flax.struct
import numpy as np
from jaxtyping import Array, Float

from models.config import ModelConfig
from models.transformer import Params
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

Scalars = dict[str, Float[Any, ""]]
Summed = tuple[WeightedSum, dict[str, WeightedSum]]
"""Total and count of a loss, and of each metric."""


class Frozen(flax.struct.PyTreeNode):
    """The frozen models of a run, None where the algorithm asks for none."""

    reference: Network | None = None
    teacher: Network | None = None


class Rollouts(NamedTuple):
    """One iteration's samples on the host, rows laid out [p1, p1, ..., p2, p2]; B = P * group_size.

    Attributes:
      prompt_tokens: `[B, L]` int32, left-padded.
      prompt_mask: `[B, L]` bool.
      tokens: `[B, N]` int32 completions.
      mask: `[B, N]` bool, True on the tokens that the policy drew, the stop token included.
      sampler_logps: `[B, N]` float32, nats, under the distribution sampled from.
      stopped: `[B]` bool, False where the completion was cut at its limit.
      rewards: `[B]` float32, after shaping.
      correct: `[B]` bool, whether the completion is correct: the verifier's verdict, or (reward model) score above the
        group's mean.
      prompt_ids: `[B]` int32.
      group_size: G.
      step_rewards: `[B, N]` float32, paid at the last token of a step; None where no step is paid.
      step_mask: `[B, N]` bool, the last token of each step; None with `step_rewards`.
      advantage_scale: `[B]` float32, difficulty weights of the advantages; None is 1.
      given: `[B, N]` bool, True on tokens between the drawn ones that came from outside, such as a tool's results:
        context without loss; None is nowhere.
    """

    prompt_tokens: np.ndarray
    prompt_mask: np.ndarray
    tokens: np.ndarray
    mask: np.ndarray
    sampler_logps: np.ndarray
    stopped: np.ndarray
    rewards: np.ndarray
    correct: np.ndarray
    prompt_ids: np.ndarray
    group_size: int
    step_rewards: np.ndarray | None = None
    step_mask: np.ndarray | None = None
    advantage_scale: np.ndarray | None = None
    given: np.ndarray | None = None

    @property
    def lengths(self) -> np.ndarray:
        """`[B]` tokens that the policy drew of each completion, the stop token included."""
        return self.mask.sum(axis=1)

    @property
    def given_lengths(self) -> np.ndarray:
        """`[B]` tokens that the policy was given in each completion."""
        return np.zeros(len(self.mask), np.int64) if self.given is None else self.given.sum(axis=1)


class Algorithm(abc.ABC):
    """The interface of `research/algorithms/*.py`; implementations are frozen, hashable dataclasses.

    Attributes:
      layout: what is trained: a policy, a scorer (trunk and head), a step scorer, or policy and value model.
    """

    layout: ClassVar[Layout] = "policy"

    def __post_init__(self) -> None:
        """Checks every field whose type is a `Literal`, so that a misspelt name fails here and not in the first step.

        Raises:
          ValueError: a value that its type does not list.
        """
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
    def loss(self, params: Params, config: ModelConfig, batch: Batch, scalars: Scalars, frozen: Frozen) -> Summed:
        """Total and count of the loss, and of each metric, of one micro-batch."""

    def prepare(self, params: Params, config: ModelConfig, batch: Batch, scalars: Scalars, frozen: Frozen) -> Batch:
        """What is computed once on the global batch, before the first update on it, without gradient.

        Reference and old log-probs, values, and advantages, which depend on the whole batch.
        """
        del params, config, scalars, frozen
        return batch

    def from_rows(self, rows: SequenceBatch) -> Batch:
        """On the host: given rows of text or of chat examples as this algorithm's batch."""
        return rows

    def from_rollouts(self, rollouts: Rollouts, seed: int) -> tuple[Batch, dict[str, float]]:
        """On the host: samples to a training batch of fixed shape, and metrics about the choice.

        `seed` is unique to the iteration. A batch without a target in a row of weight above 0 has nothing to learn
        from, and no update is made.
        """
        raise NotImplementedError(f"{type(self).__name__} does not learn from rollouts ({seed=})")

    def check_model(self, config: ModelConfig) -> None:
        """Raises ValueError where the options do not fit the model."""
        del config

    def summarize(self, metrics: dict[str, Array]) -> dict[str, Array]:
        """Metrics of an update as they are logged, from their means over the global batch."""
        return metrics

    def adapt(self, scalars: Scalars, metrics: Mapping[str, float], completions: int) -> Scalars:
        """On the host, after an iteration with an update: the scalars of the next one; a controller's whole state."""
        del metrics, completions
        return scalars

    @property
    def for_update(self) -> "Algorithm":
        """Equal where `loss` is the same program: without what only `prepare` or the host reads."""
        return self

    @property
    def prepares(self) -> bool:
        """Whether `prepare` does anything."""
        return type(self).prepare is not Algorithm.prepare


NO_K1 = (
    "k1 belongs in the reward: as a loss its expected gradient is zero (E[grad log pi] = 0), noise with no pull to "
    "the reference"
)
"""Why a KL in the loss is not estimated by k1."""


class Setting(NamedTuple):
    """What an objective's `make` may read.

    Attributes:
      options: the objective's own section of the config.
      online: whether the policy samples its own data.
      group_size, max_new_tokens: of the rollout.
      context_ids: tokens that only a teacher sees before the prompt.
      bos_id: the token that a row starts with, None where rows start without.
      step_end_ids: the tokens that end a step of a solution.
    """

    options: Mapping[str, Any]
    online: bool
    group_size: int
    max_new_tokens: int
    context_ids: tuple[int, ...] = ()
    bos_id: int | None = None
    step_end_ids: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Objective:
    """How a config finds an algorithm.

    Attributes:
      name: `objective.name`, and the name of its section.
      make: from the stage's settings to the algorithm.
      options: what its section may say.
      given: the given data it learns from; None where it only learns from the policy's own samples.
      own: whether it can learn from the policy's own samples.
      check: raises ValueError where options exclude each other.
      rows_per_group: rows (or pairs) of the batch from one prompt's group of G samples.
      reads: what of a paid sample it learns from, under these options: "correct" (whether it is right), "rewards",
        "steps" (rewards of steps), "scale" (difficulty weights).
      least_prompts: prompts that an iteration's samples must be of.
      untruncated: whether its ratio needs the untruncated distribution (no top-k, no top-p).
    """

    name: str
    make: Callable[[Setting], Algorithm]
    options: Mapping[str, Key]
    given: DataKind | None = None
    own: bool = False
    check: Callable[[Mapping[str, Any]], None] = lambda _options: None
    rows_per_group: Callable[[Mapping[str, Any], int], int] = lambda _options, group_size: group_size
    reads: Callable[[Mapping[str, Any]], frozenset[Read]] = lambda _options: frozenset({"rewards"})
    least_prompts: int = 1
    untruncated: bool = False

    def static(self, options: Mapping[str, Any], online: bool, group_size: int, max_new_tokens: int) -> Algorithm:
        """The algorithm as far as it can be known without a tokenizer."""
        return self.make(Setting(options, online, group_size, max_new_tokens))


def sequence_rows(rollouts: Rollouts, rows: np.ndarray | None, weights: np.ndarray) -> SequenceBatch:
    """The chosen rollouts as prompt + completion rows; None is all of them, in the groups that share a prompt."""
    chosen = slice(None) if rows is None else rows
    return completion_rows(
        rollouts.prompt_tokens[chosen],
        rollouts.prompt_mask[chosen],
        rollouts.tokens[chosen],
        rollouts.mask[chosen],
        weights,
        None if rollouts.given is None else rollouts.given[chosen],
        group_size=rollouts.group_size if rows is None else 1,
    )


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

    Drawn tokens (`mask`) and given ones are seen and have positions; only the drawn ones are targets. So many
    adjacent rows as `group_size` have the same prompt.

    Raises:
      ValueError: they have not.
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


def after_prompt(values: np.ndarray, prompt_length: int) -> np.ndarray:
    """Per-completion-token values `[B, N]` aligned with prompt + completion rows `[B, L + N]`."""
    return np.pad(values, ((0, 0), (prompt_length, 0))).astype(np.float32)


def rollout_batch(rollouts: Rollouts, *, mask_truncated: bool) -> RolloutBatch:
    """All B rollouts as one batch.

    Args:
      rollouts: samples on the host.
      mask_truncated: whether completions cut at their limit are masked out of the loss. Their rewards still enter
        the baseline of their group, and as rows of the batch they count in the "constant" aggregation.
    """
    B, L = rollouts.prompt_tokens.shape
    rows = sequence_rows(rollouts, None, np.ones(B))
    kept = rollouts.stopped if mask_truncated else np.ones(B, bool)
    scale, steps, ends = rollouts.advantage_scale, rollouts.step_rewards, rollouts.step_mask
    return RolloutBatch(
        sequences=rows.replace(loss_mask=rows.loss_mask & kept[:, None]),
        completion_mask=rows.loss_mask,
        sampler_logps=after_prompt(rollouts.sampler_logps, L),
        scores=rollouts.rewards.astype(np.float32),
        advantage_scale=np.ones(B, np.float32) if scale is None else scale.astype(np.float32),
        step_rewards=None if steps is None else after_prompt(steps, L),
        step_mask=None if ends is None else np.pad(ends, ((0, 0), (L, 0))),
    )


def used_mask(rows: SequenceBatch) -> Array:
    """`[B, T]` targets of the rows that count: a NaN in a row of weight 0 would reach the gradient, as 0 * NaN."""
    return rows.loss_mask & (rows.weights > 0)[:, None]


def drawn_rows(batch: RolloutBatch) -> SequenceBatch:
    """The rows with every drawn token as a target, also where the completion is masked out of the loss."""
    return batch.sequences.replace(loss_mask=batch.completion_mask)
