"""Objectives as pure array functions; see README.md for the table.

The reductions stay in their module (`from objectives import reduce; reduce.token_mean(...)`): a function
`objectives.reduce` would hide the module of that name. For the same reason `from objectives.gae import gae`.
"""

from objectives.advantages import (
    frac_reward_zero_std,
    group_advantages,
    process_advantages,
    reinforce_pp_advantages,
    reinforce_pp_baseline_advantages,
    zero_std_groups,
)
from objectives.bradley_terry import bradley_terry_loss, ensemble_score, ranking_loss
from objectives.cpo import cpo_loss
from objectives.distillation import distillation_loss, token_divergence, topk_distillation_loss
from objectives.dpo import dpo_loss
from objectives.dpo_terms import bco_delta_statistic, length_desensitized_logps, wpo_weights
from objectives.gae import explained_variance, token_rewards, whiten
from objectives.grpo import grpo_loss
from objectives.importance import importance_weights
from objectives.kl import kl_estimate
from objectives.kto import kto_loss, kto_reference_point
from objectives.next_token import next_token_loss
from objectives.orpo import orpo_loss
from objectives.ppo import adaptive_kl_coef, ppo_policy_loss, ppo_value_loss
from objectives.prm import prm_loss, solution_scores, step_reward_tokens
from objectives.simpo import simpo_loss
from objectives.step_dpo import step_dpo_loss, step_q_values
from objectives.surrogate import cispo_surrogate, clipped_surrogate, sapo_surrogate
from objectives.types import ObjectiveOutput, Scalar, WeightedSum

__all__ = [
    "ObjectiveOutput",
    "Scalar",
    "WeightedSum",
    "adaptive_kl_coef",
    "bco_delta_statistic",
    "bradley_terry_loss",
    "cispo_surrogate",
    "clipped_surrogate",
    "cpo_loss",
    "distillation_loss",
    "dpo_loss",
    "ensemble_score",
    "explained_variance",
    "frac_reward_zero_std",
    "group_advantages",
    "grpo_loss",
    "importance_weights",
    "kl_estimate",
    "kto_loss",
    "kto_reference_point",
    "length_desensitized_logps",
    "next_token_loss",
    "orpo_loss",
    "ppo_policy_loss",
    "ppo_value_loss",
    "prm_loss",
    "process_advantages",
    "ranking_loss",
    "reinforce_pp_advantages",
    "reinforce_pp_baseline_advantages",
    "sapo_surrogate",
    "simpo_loss",
    "solution_scores",
    "step_dpo_loss",
    "step_q_values",
    "step_reward_tokens",
    "token_divergence",
    "token_rewards",
    "topk_distillation_loss",
    "whiten",
    "wpo_weights",
    "zero_std_groups",
]
