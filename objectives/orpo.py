"""Odds-ratio preference optimisation: supervised learning and a contrast in one stage, without a reference."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from objectives.pairs import mean_logps, pair_metrics
from objectives.types import ObjectiveOutput, Scalar

MIN_NLL = 1e-6  # nats per token, below which a sequence counts as certain: at 0 its log-odds would be infinite


def orpo_loss(
    *,
    policy_chosen_logps: Float[Array, " B"],
    policy_rejected_logps: Float[Array, " B"],
    chosen_lengths: Float[Array, " B"],
    rejected_lengths: Float[Array, " B"],
    lambda_coef: Scalar,
) -> ObjectiveOutput:
    """Negative log-likelihood of the chosen plus a log-sigmoid of the log odds ratio.

    `a = (1 / |y|) sum_t l_t`; `odds = exp(a) / (1 - exp(a))`;
    `loss = -a_c - lambda log sigmoid(log odds_c - log odds_r)`

    Source: Hong et al. 2024 (ORPO), Eq. 4, 6 and 7.

    Args:
      policy_chosen_logps, policy_rejected_logps: `[B]`, sums; divided by the length here.
      chosen_lengths, rejected_lengths: `|c|`, `|r|`, `[B]`, tokens.
      lambda_coef: weight of the contrast, >= 0; 0.1 is common (TRL calls it beta).
    Returns losses `[B]`, one per pair, `-a_c + lambda log 2` at equal means. Metrics, all `[B]`: `nll_chosen` (`-a_c`),
    `log_odds_ratio`, `odds_ratio_loss` (before lambda), and those of `dpo_loss`, where the reward is `lambda a`.
    Differs from the paper: a mean log-prob above -1e-6 nats counts as -1e-6 in the odds, without gradient. TRL's NLL is
    one mean over the chosen tokens of the batch, those of the *prompt* included,
    `-sum_b (l_prompt + l_c) / sum_b (|prompt| + |c|)`; the paper's and ours is `-mean_b (l_c / |c|)`.
    """
    chosen = mean_logps(policy_chosen_logps, chosen_lengths)
    rejected = mean_logps(policy_rejected_logps, rejected_lengths)
    log_odds_ratio = _log_odds(chosen) - _log_odds(rejected)
    contrast = -jax.nn.log_sigmoid(log_odds_ratio)
    losses = -chosen + lambda_coef * contrast
    metrics = pair_metrics(lambda_coef, chosen, rejected, policy_chosen_logps, policy_rejected_logps)
    metrics |= {"nll_chosen": -chosen, "log_odds_ratio": log_odds_ratio, "odds_ratio_loss": contrast}
    return ObjectiveOutput(losses, jax.lax.stop_gradient(metrics))


def _log_odds(mean_logp: Array) -> Array:
    safe = jnp.where(mean_logp < -MIN_NLL, mean_logp, -MIN_NLL)
    return safe - _log1mexp(safe)


def _log1mexp(x: Array) -> Array:
    """`log(1 - exp(x))` for x <= -MIN_NLL, where both forms are finite; each is used where it keeps its digits."""
    return jnp.where(x > -math.log(2.0), jnp.log(-jnp.expm1(x)), jnp.log1p(-jnp.exp(x)))
