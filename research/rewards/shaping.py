"""From a score to the reward that is learned from: normalisation, clipping, format, length, overlong, missing end.

In this order (each is off unless the config's `reward` section says otherwise):

    1. normalise   s = (score - mean) / std, by running statistics or by the reference's
    2. clip        s in [-score_clip, score_clip]
    3. format      + format_coef * (1 if the format holds and, when gated, the answer is right)
    4. length      + length_coef * lambda, relative to the rest of the group
    5. overlong    + overlong_coef * penalty in [-1, 0], by tokens
    6. missing EOS - missing_eos_penalty where the completion never stopped

Only the score is normalised and clipped: a coefficient means the same under any scorer, and what is added here is
neither clipped nor enters the statistics. Difficulty weighting scales the advantages instead, because advantages are
relative to the group, all of whose rewards it would scale alike.

B = P * G completions, laid out [p1, p1, ..., p2, p2]. All on the host, in NumPy.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from research.config.sections import Reward
from research.rewards.builtin import FORMATS


@dataclass(frozen=True)
class RunningNorm:
    """Number and mean of all scores seen, and the sum of their squared distances to it (m2), by Welford's algorithm."""

    count: int = 0
    mean: float = 0.0
    m2: float = 0.0

    @property
    def std(self) -> float:
        """Population standard deviation; 1 where all scores are equal up to rounding, or there are none."""
        std = math.sqrt(self.m2 / self.count) if self.count else 0.0
        return std if std > 1e-8 * max(1.0, abs(self.mean)) else 1.0

    def updated(self, values: np.ndarray) -> "RunningNorm":
        """The statistics with a batch added: `m2 = m2_a + m2_b + (mean_b - mean_a)^2 n_a n_b / (n_a + n_b)`.

        Source: Chan, Golub and LeVeque 1979, the batch form of Welford 1962.
        """
        values = np.asarray(values, np.float64)
        if not values.size:
            return self
        mean, count = float(values.mean()), self.count + values.size
        apart = mean - self.mean
        m2 = self.m2 + float(np.square(values - mean).sum()) + apart**2 * self.count * values.size / count
        return RunningNorm(count, self.mean + apart * values.size / count, m2)


class Shaped(NamedTuple):
    """Shaped rewards."""

    rewards: np.ndarray  # `[B]` float32, the sum of the parts
    advantage_scale: np.ndarray  # `[B]` float32, >= 0, a factor of the advantages (not of the loss weights)
    # `[B]` float32 by name: "score" (normalised and clipped), and those of "format", "length", "overlong" and
    # "missing_eos" that are on
    parts: dict[str, np.ndarray]
    state: RunningNorm  # the statistics afterwards

    def metrics(self) -> dict[str, float]:
        """The mean of each part, as `reward/<part>`."""
        return {f"reward/{name}": float(values.mean()) for name, values in self.parts.items()}


def shape(
    rewards: np.ndarray,
    *,
    correct: np.ndarray,
    texts: Sequence[str],
    lengths: np.ndarray,
    stopped: np.ndarray,
    group_size: int,
    max_new_tokens: int,
    spec: Reward,
    state: RunningNorm,
) -> Shaped:
    """The rewards to learn from, in the order of operations above; by default those given, bit for bit.

    Args:
      rewards: `[B]` scores, reward units; ValueError where one is not finite.
      correct: `[B]` bool, whether the answer is right, whatever else the score holds.
      texts: B decoded completions.
      lengths: `[B]` tokens, the stop token included.
      stopped: `[B]` bool, False where the completion was cut at its limit, `max_new_tokens`.
      spec: what is done; "gated" rewards the format of right answers only, "additive" always, and can be hacked.
      state: statistics so far.
    """
    bad = np.flatnonzero(~np.isfinite(rewards))
    if bad.size:
        raise ValueError(f"rewards: got {rewards[bad[0]]} at row {bad[0]}, expected finite numbers")
    score, state = normalized(np.asarray(rewards, np.float64), spec.normalize, state)
    parts = {"score": np.clip(score, -spec.score_clip, spec.score_clip) if spec.score_clip else score}
    if spec.format_mode != "off":
        held = np.array([FORMATS[spec.format_pattern](text) for text in texts], bool)
        parts["format"] = spec.format_coef * (held & correct if spec.format_mode == "gated" else held)
    if spec.length_coef:
        parts["length"] = spec.length_coef * length_reward(lengths, correct, group_size)
    if spec.overlong_buffer:
        penalty = overlong_penalty(lengths, max_length=max_new_tokens, buffer=spec.overlong_buffer)
        parts["overlong"] = spec.overlong_coef * penalty
    if spec.missing_eos_penalty:
        parts["missing_eos"] = -spec.missing_eos_penalty * ~stopped
    return Shaped(
        np.sum(list(parts.values()), axis=0).astype(np.float32),
        advantage_scale(correct, group_size, spec.difficulty_weighting),
        {name: values.astype(np.float32) for name, values in parts.items()},
        state,
    )


def normalized(scores: np.ndarray, normalize: str, state: RunningNorm) -> tuple[np.ndarray, RunningNorm]:
    """`(score - mean) / std` of `[B]` float64 scores, and the statistics afterwards; `normalize` is how.

    "running" adds the batch to the statistics first, so that no score is further than `sqrt(n)` from 0 after n.
    "reference" takes those of the first batch whose scores differ: the policy is still its own reference. "none" does
    nothing.
    """
    if normalize == "none":
        return scores, state
    if normalize == "running":
        state = state.updated(scores)
    elif not state.count:
        fitted = RunningNorm().updated(scores)
        return (scores - fitted.mean) / fitted.std, fitted if np.ptp(scores) > 0 else state
    return (scores - state.mean) / state.std, state


def length_reward(lengths: np.ndarray, correct: np.ndarray, group_size: int) -> np.ndarray:
    """Shorter is better among right answers; a wrong answer never gains by being short. `[B]` in [-0.5, 0.5].

    `lambda_i = 0.5 - (len_i - min_len) / (max_len - min_len)`; right: `lambda_i`, wrong: `min(0, lambda_i)`;
    0 for a whole group of equal lengths. Minimum and maximum are over the whole group, wrong answers too.

    Source: Kimi k1.5, Kimi Team 2025, Section 2.3.3.
    """
    grouped = np.asarray(lengths, np.float64).reshape(-1, group_size)
    low, spread = grouped.min(axis=1, keepdims=True), np.ptp(grouped, axis=1, keepdims=True)
    relative = np.where(spread > 0, 0.5 - (grouped - low) / np.where(spread > 0, spread, 1.0), 0.0).reshape(-1)
    return np.where(correct, relative, np.minimum(0.0, relative))


def overlong_penalty(lengths: np.ndarray, *, max_length: int, buffer: int) -> np.ndarray:
    """`[B]`: 0 up to `max_length - buffer` tokens, then falling linearly to -1 at `max_length`.

    `0` if `|y| <= L_max - L_cache`; `(L_max - L_cache - |y|) / L_cache` if `|y| <= L_max`; else `-1`

    `L_max` is `max_length`, `L_cache` is `buffer` >= 1. Source: DAPO, Yu et al. 2025, Eq. 13.
    """
    over = np.asarray(lengths, np.float64) - (max_length - buffer)
    return -np.clip(over / buffer, 0.0, 1.0)


def advantage_scale(correct: np.ndarray, group_size: int, weighting: str) -> np.ndarray:
    """`[B]` float32: how much each group's advantages count, from its pass rate `p`; not renormalised over the batch.

    "fail_rate": `1 - p`: a group that is always right teaches nothing, not even format or length.
    "inverse_pass_rate": `1 / max(p, 1 / G)`, in [1, G]. "none": 1.
    """
    passed = np.asarray(correct, np.float64).reshape(-1, group_size).mean(axis=1)
    scale = {
        "none": np.ones_like(passed),
        "fail_rate": 1.0 - passed,
        "inverse_pass_rate": 1.0 / np.maximum(passed, 1.0 / group_size),
    }[weighting]
    return np.repeat(scale, group_size).astype(np.float32)
