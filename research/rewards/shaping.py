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

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from research.config.sections import Reward
from research.rewards.builtin import FORMATS
from research.rewards.normalization import RunningNorm, check_finite, normalized


class Shaped(NamedTuple):
    """Shaped rewards.

    Attributes:
      rewards: `[B]` float32, the sum of the parts.
      advantage_scale: `[B]` float32, >= 0, a factor of the advantages (not of the loss weights).
      parts: `[B]` float32 by name: "score" (normalised and clipped), and those of "format", "length", "overlong" and
        "missing_eos" that are on.
      state: the statistics afterwards.
    """

    rewards: np.ndarray
    advantage_scale: np.ndarray
    parts: dict[str, np.ndarray]
    state: RunningNorm

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
    """The rewards to learn from, in the order of operations above.

    Args:
      rewards: `[B]` scores, reward units.
      correct: `[B]` bool, whether the answer is right, whatever else the score holds.
      texts: B decoded completions.
      lengths: `[B]` tokens, the stop token included.
      stopped: `[B]` bool, False where the completion was cut at its limit.
      group_size: G.
      max_new_tokens: the sampler's limit, tokens.
      spec: what is done; "gated" rewards the format of right answers only, "additive" always, and can be hacked.
      state: statistics so far.

    Returns:
      See `Shaped`. With the default section the rewards are those given, bit for bit.

    Raises:
      ValueError: shapes that disagree, a reward that is not finite, or overlong_buffer > max_new_tokens.
    """
    B = len(rewards)
    sizes = {"correct": correct, "texts": texts, "lengths": lengths, "stopped": stopped}
    for name, values in sizes.items():
        if len(values) != B:
            raise ValueError(f"{name}: got {len(values)} rows, expected {B}, as many as rewards")
    if group_size < 1 or B % group_size:
        raise ValueError(f"group_size: got {group_size}, expected a divisor of {B} rewards")
    check_finite(rewards)
    correct, stopped = np.asarray(correct, bool), np.asarray(stopped, bool)
    lengths = np.asarray(lengths, np.int64)

    score, state = normalized(np.asarray(rewards, np.float64), spec.normalize, state)
    parts = {"score": np.clip(score, -spec.score_clip, spec.score_clip) if spec.score_clip else score}
    if spec.format_mode != "off":
        check = FORMATS[spec.format_pattern]
        held = np.array([check(text) for text in texts], bool)
        paid = held & correct if spec.format_mode == "gated" else held
        parts["format"] = spec.format_coef * paid
    if spec.length_coef:
        parts["length"] = spec.length_coef * length_reward(lengths, correct, group_size)
    if spec.overlong_buffer:
        parts["overlong"] = spec.overlong_coef * overlong_penalty(
            lengths, max_length=max_new_tokens, buffer=spec.overlong_buffer
        )
    if spec.missing_eos_penalty:
        parts["missing_eos"] = -spec.missing_eos_penalty * ~stopped
    total = np.sum(list(parts.values()), axis=0)
    return Shaped(
        total.astype(np.float32),
        advantage_scale(correct, group_size, spec.difficulty_weighting),
        {name: values.astype(np.float32) for name, values in parts.items()},
        state,
    )


def length_reward(lengths: np.ndarray, correct: np.ndarray, group_size: int) -> np.ndarray:
    """Shorter is better among right answers; a wrong answer never gains by being short.

    `lambda_i = 0.5 - (len_i - min_len) / (max_len - min_len)`; right: `lambda_i`, wrong: `min(0, lambda_i)`;
    0 for a whole group of equal lengths. Minimum and maximum are over the whole group, wrong answers too.

    Source: Kimi k1.5, Kimi Team 2025, Section 2.3.3.

    Args:
      lengths: `[B]` tokens.
      correct: `[B]` bool.
      group_size: G.

    Returns:
      `[B]` float64 in [-0.5, 0.5].
    """
    grouped = np.asarray(lengths, np.float64).reshape(-1, group_size)
    low, high = grouped.min(axis=1, keepdims=True), grouped.max(axis=1, keepdims=True)
    spread = high - low
    relative = 0.5 - (grouped - low) / np.where(spread > 0, spread, 1.0)
    relative = np.where(spread > 0, relative, 0.0).reshape(-1)
    return np.where(correct, relative, np.minimum(0.0, relative))


def overlong_penalty(lengths: np.ndarray, *, max_length: int, buffer: int) -> np.ndarray:
    """0 up to `max_length - buffer` tokens, then falling linearly to -1 at `max_length`.

    `0` if `|y| <= L_max - L_cache`; `(L_max - L_cache - |y|) / L_cache` if `|y| <= L_max`; else `-1`

    Source: DAPO, Yu et al. 2025, Eq. 13.

    Args:
      lengths: `[B]` tokens.
      max_length: `L_max`, tokens.
      buffer: `L_cache`, tokens, in [1, max_length].

    Returns:
      `[B]` float64 in [-1, 0].

    Raises:
      ValueError: buffer outside [1, max_length].
    """
    if not 1 <= buffer <= max_length:
        raise ValueError(f"overlong_buffer: got {buffer}, expected between 1 and max_new_tokens = {max_length}")
    over = np.asarray(lengths, np.float64) - (max_length - buffer)
    return -np.clip(over / buffer, 0.0, 1.0)


def advantage_scale(correct: np.ndarray, group_size: int, weighting: str) -> np.ndarray:
    """How much each group's advantages count, from its pass rate `p`; not renormalised over the batch.

    "fail_rate": `1 - p`: a group that is always right teaches nothing, not even format or length.
    "inverse_pass_rate": `1 / max(p, 1 / G)`, in [1, G].

    Args:
      correct: `[B]` bool.
      group_size: G.
      weighting: which; "none" is 1 everywhere.

    Returns:
      `[B]` float32, the same within a group.

    Raises:
      ValueError: unknown weighting.
    """
    passed = np.asarray(correct, np.float64).reshape(-1, group_size).mean(axis=1)
    if weighting == "none":
        scale = np.ones_like(passed)
    elif weighting == "fail_rate":
        scale = 1.0 - passed
    elif weighting == "inverse_pass_rate":
        scale = 1.0 / np.maximum(passed, 1.0 / group_size)
    else:
        raise ValueError(f"difficulty_weighting: got {weighting!r}, expected none, fail_rate or inverse_pass_rate")
    return np.repeat(scale, group_size).astype(np.float32)
