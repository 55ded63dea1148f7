"""Objectives as pure array functions; see README.md for the table.

The reductions stay in their module (`from objectives import reduce; reduce.token_mean(...)`): a function
`objectives.reduce` would hide the module of that name.
"""

from objectives.advantages import frac_reward_zero_std, group_advantages, zero_std_groups
from objectives.dpo import dpo_loss
from objectives.grpo import clipped_surrogate, grpo_loss
from objectives.kl import kl_estimate
from objectives.next_token import next_token_loss
from objectives.types import ObjectiveOutput, Scalar, WeightedSum

__all__ = [
    "ObjectiveOutput",
    "Scalar",
    "WeightedSum",
    "clipped_surrogate",
    "dpo_loss",
    "frac_reward_zero_std",
    "group_advantages",
    "grpo_loss",
    "kl_estimate",
    "next_token_loss",
    "zero_std_groups",
]
