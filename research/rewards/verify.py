"""Scoring that never loses a run: verifiers that raise are recorded, several rewards are weighted and summed."""

import math
import traceback
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np

from research.core.errors import ConfigError, DataError
from research.rewards.verifiers import Verifier, get_verifier

OnError = Literal["score", "raise"]

_LARGEST = float(np.finfo(np.float32).max)
_SHOWN = 300
"""Characters of an exception's text that are kept."""


class VerifierError(NamedTuple):
    """A verifier that raised on one completion.

    Attributes:
      prompt_id: whose completion.
      source: name of the reward function.
      error: the exception's type and text.
    """

    prompt_id: int
    source: str
    error: str


class RewardSource(NamedTuple):
    """One of several rewards.

    Attributes:
      name: for logs and messages.
      verifier: the function.
      weight: factor in the sum; 0 for a reward that is logged and not learned from.
    """

    name: str
    verifier: Verifier
    weight: float


class Scored(NamedTuple):
    """`[B]` float32 rewards of one function, and where it raised."""

    rewards: np.ndarray
    errors: tuple[VerifierError, ...]


class Scores(NamedTuple):
    """What several weighted functions say.

    Attributes:
      rewards: `[B]` float32, the weighted sum.
      sources: `[B]` float32 by name, before weighting.
      errors: all that was raised.
    """

    rewards: np.ndarray
    sources: dict[str, np.ndarray]
    errors: tuple[VerifierError, ...]

    def metrics(self) -> dict[str, float]:
        """Mean and population std of each source before weighting, and how many calls raised."""
        found: dict[str, float] = {}
        for name, values in self.sources.items():
            found[f"reward/{name}/mean"] = float(values.mean()) if values.size else 0.0
            found[f"reward/{name}/std"] = float(values.std()) if values.size else 0.0
        found["reward/verifier_errors"] = float(len(self.errors))
        return found


def reward_sources(weighted: Sequence[tuple[str, float]]) -> tuple[RewardSource, ...]:
    """The verifiers by name with their weights, such as `(("exact_answer", 1.0), ("final_line", 0.2))`.

    Raises:
      ConfigError: an unknown name, one given twice, a weight that is not finite, or nothing to learn from.
    """
    names = [name for name, _ in weighted]
    for name, weight in weighted:
        if names.count(name) > 1:
            raise ConfigError(f"rewards: got {name!r} {names.count(name)} times, expected each once")
        if not math.isfinite(weight):
            raise ConfigError(f"rewards: got weight {weight} of {name!r}, expected a finite number")
    if not any(weight for _, weight in weighted):
        raise ConfigError("rewards: got none with a weight other than 0, expected one to learn from")
    return tuple(RewardSource(name, get_verifier(name), float(weight)) for name, weight in weighted)


def score_safely(
    completions: Sequence[str],
    answers: Sequence[str],
    verifier: Verifier,
    *,
    prompt_ids: Sequence[int] | np.ndarray,
    on_error: OnError = "score",
    error_reward: float = 0.0,
    name: str = "",
) -> Scored:
    """Rewards of completions against their answers; a verifier that raises costs one sample, not the run.

    Args:
      completions: B texts.
      answers: B answers.
      verifier: the reward function.
      prompt_ids: B ids, for messages.
      on_error: "score" records an exception and gives the sample `error_reward`; "raise" ends the run. What
        returns no number counts as raising.
      error_reward: reward units.
      name: of the function, for messages; its own where empty.

    Raises:
      ConfigError: unknown `on_error`, or an `error_reward` that is not finite.
      DataError: the counts differ; a reward is NaN or infinite, whatever `on_error` says, because it is wrong
        and not missing; an exception under "raise". The last two name prompt and function.
    """
    _check_policy(on_error, error_reward)
    counts = (len(completions), len(answers), len(prompt_ids))
    if len(set(counts)) != 1:
        raise DataError(
            "score: got {} completions, {} answers and {} prompt ids, expected as many.".format(*counts)
        )
    name = name or getattr(verifier, "__name__", repr(verifier))
    rewards = np.empty(len(completions), np.float32)
    errors = []
    for row, (completion, answer) in enumerate(zip(completions, answers, strict=True)):
        prompt_id = int(prompt_ids[row])
        try:
            reward = float(verifier(completion, answer))
        except Exception as error:  # whatever it is: the function is the user's, the text a model's
            said = traceback.format_exception_only(error)[-1].strip()[:_SHOWN]
            if on_error == "raise":
                raise DataError(
                    f"prompt {prompt_id}: reward function {name} raised {said}, expected a number."
                ) from error
            errors.append(VerifierError(prompt_id, name, said))
            reward = error_reward
        if not abs(reward) <= _LARGEST:  # false for NaN too
            raise DataError(
                f"prompt {prompt_id}: reward function {name} returned {reward}, expected a finite number."
            )
        rewards[row] = reward
    return Scored(rewards, tuple(errors))


def score_weighted(
    completions: Sequence[str],
    answers: Sequence[str],
    sources: Sequence[RewardSource],
    *,
    prompt_ids: Sequence[int] | np.ndarray,
    on_error: OnError = "score",
    error_reward: float = 0.0,
) -> Scores:
    """The weighted sum of several rewards, and each of them.

    `r_i = sum_k w_k r_ik`. A source that raises gives `error_reward` in its own place, before weighting.

    Args:
      completions: B texts.
      answers: B answers.
      sources: the reward functions, from `reward_sources`.
      prompt_ids: B ids, for messages.
      on_error: see `score_safely`.
      error_reward: see `score_safely`.

    Raises:
      ConfigError, DataError: see `score_safely`.
    """
    by_name: dict[str, np.ndarray] = {}
    errors: list[VerifierError] = []
    total = np.zeros(len(completions), np.float64)
    for source in sources:
        scored = score_safely(
            completions,
            answers,
            source.verifier,
            prompt_ids=prompt_ids,
            on_error=on_error,
            error_reward=error_reward,
            name=source.name,
        )
        by_name[source.name] = scored.rewards
        errors += scored.errors
        total += source.weight * scored.rewards.astype(np.float64)
    return Scores(total.astype(np.float32), by_name, tuple(errors))


def _check_policy(on_error: str, error_reward: float) -> None:
    if on_error not in get_args(OnError):
        raise ConfigError(f"on_error: got {on_error!r}, expected one of {', '.join(get_args(OnError))}")
    if not abs(error_reward) <= _LARGEST:
        raise ConfigError(f"error_reward: got {error_reward}, expected a finite number")
