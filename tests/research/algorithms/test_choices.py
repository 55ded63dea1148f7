"""A misspelt name fails where an algorithm is made, not in the first step of training."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from objectives.reduce import Aggregation
from research.algorithms.base import Algorithm
from research.algorithms.distill import Distill
from research.algorithms.dpo import DPO
from research.algorithms.ppo import PPO
from research.algorithms.rejection_sampling import RejectionSampling
from tests.research.algorithms.toy import grpo


@dataclasses.dataclass(frozen=True)
class Mine(Algorithm):
    """As a user writes one."""

    aggregation: Aggregation = "token_mean"

    def loss(self, *arguments: Any) -> Any:
        raise NotImplementedError(arguments)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: grpo(aggregation="example_mean"), "aggregation: got 'example_mean', expected one of token_mean"),
        (lambda: grpo(advantage="gae"), "advantage: got 'gae', expected one of group, reinforce_pp"),
        (lambda: grpo(mask_truncated=True, kl="both"), "kl: got 'both', expected one of none, loss, reward"),
        (lambda: PPO(8, aggregation="mean"), "aggregation: got 'mean'"),  # type: ignore[arg-type]
        (lambda: DPO("sigmod"), "loss_type: got 'sigmod', expected one of sigmoid"),  # type: ignore[arg-type]
        (lambda: Distill("kl"), "divergence: got 'kl'"),  # type: ignore[arg-type]
        (lambda: RejectionSampling(selector="first"), "selector: got 'first'"),  # type: ignore[arg-type]
        (lambda: Mine("sum"), "aggregation: got 'sum', expected one of token_mean, sequence_mean, constant"),  # type: ignore[arg-type]
    ],
)
def test_unknown_names_are_refused_when_the_algorithm_is_made(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
