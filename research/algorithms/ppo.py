"""Proximal policy optimisation: a policy and its value model, trained together."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from models.config import ModelConfig
from models.heads import state_values
from models.transformer import Params
from objectives.gae import explained_variance, gae, token_rewards, whiten
from objectives.kl import LossKLEstimator, kl_estimate
from objectives.ppo import adaptive_kl_coef, ppo_policy_loss, ppo_value_loss
from objectives.reduce import Aggregation, reduce, reduce_metrics
from objectives.surrogate import require_above_clip
from research.algorithms.base import (
    NO_K1,
    Algorithm,
    Batch,
    Frozen,
    Objective,
    Role,
    Rollouts,
    Scalars,
    Setting,
    Summed,
    drawn_rows,
    rollout_batch,
    used_mask,
)
from research.config.schema import choice, number, static_number
from research.config.sections import Facts
from research.core.batch import RolloutBatch, SequenceBatch
from research.core.network import batch_logps, row_outputs
from research.core.state import Layout


@dataclasses.dataclass(frozen=True)
class PPO(Algorithm):
    """Clipped surrogate on advantages by GAE, and the squared error of the values (Ouyang et al. 2022).

    Attributes:
      max_new_tokens: N; the constant of the "constant" aggregation.
      aggregation: how tokens become one number, of policy and value loss alike.
      kl: where the KL to the reference enters: nowhere, the loss, or the reward (k1 per token).
      kl_estimator: of a KL in the loss.
      adaptive: whether `kl_coef` follows `target_kl` (Ziegler et al. 2019).
      target_kl, horizon: of the controller, nats per completion and completions.
      clips_value: whether the value's move is clipped.
      dual: whether `dual_clip` bounds the ratio of tokens with negative advantage.
      whitens: whether advantages are whitened over the global batch.
      mask_truncated: whether completions cut at their limit are left out of the loss.

    Scalars: `clip_eps_low`, `clip_eps_high`, `dual_clip`, `clip_eps_value`, `value_coef`, `entropy_coef`,
    `gamma`, `gae_lambda`, `kl_coef`, `temperature`.
    """

    max_new_tokens: int
    aggregation: Aggregation = "token_mean"
    kl: Literal["none", "loss", "reward"] = "reward"
    kl_estimator: LossKLEstimator = "k3"
    adaptive: bool = dataclasses.field(default=False, compare=False)  # with the next two, read on the host only
    target_kl: float = dataclasses.field(default=6.0, compare=False)
    horizon: float = dataclasses.field(default=10_000.0, compare=False)
    clips_value: bool = True
    dual: bool = False
    whitens: bool = True
    mask_truncated: bool = dataclasses.field(default=False, compare=False)

    layout: ClassVar[Layout] = "actor_critic"

    @property
    def roles(self) -> tuple[Role, ...]:
        """A reference where there is a KL term."""
        return () if self.kl == "none" else ("reference",)

    def from_rollouts(self, rollouts: Rollouts, seed: int) -> tuple[Batch, dict[str, float]]:
        """All B rows; values, returns and advantages follow in `prepare`."""
        del seed
        return rollout_batch(rollouts, mask_truncated=self.mask_truncated), {}

    def prepare(self, params: Params, config: ModelConfig, batch: Batch, scalars: Scalars, frozen: Frozen) -> Batch:
        """Reference log-probs, values, returns; then advantages, whitened over the global batch."""
        assert isinstance(batch, RolloutBatch)
        rows, mask = batch.sequences, batch.sequences.loss_mask
        ref_logps, kl, coef = None, None, 0.0
        if frozen.reference is not None:
            reference = frozen.reference
            scored = batch_logps(reference.params, reference.config, drawn_rows(batch), scalars["temperature"])
            ref_logps = scored.logps
        if self.kl == "reward":
            assert ref_logps is not None
            kl = kl_estimate(batch.sampler_logps, ref_logps, "k1")
            coef = scalars["kl_coef"]
        values = row_values(params["value"], config, rows)
        rewards = token_rewards(
            scores=batch.scores, completion_mask=mask, kl_penalty=kl, kl_coef=coef, step_rewards=batch.step_rewards
        )
        advantages, returns = gae(
            rewards=rewards,
            values=values,
            completion_mask=mask,
            gamma=scalars["gamma"],
            gae_lambda=scalars["gae_lambda"],
        )
        if self.whitens:
            advantages = whiten(values=advantages, mask=mask, weights=rows.weights)
        return batch.replace(
            old_logps=batch.sampler_logps,
            ref_logps=ref_logps,
            values=jnp.where(mask, values, 0.0),
            returns=returns,
            advantages=advantages * batch.advantage_scale[:, None],
        )

    def loss(self, params: Params, config: ModelConfig, batch: Batch, scalars: Scalars, frozen: Frozen) -> Summed:
        """Policy loss at the rollout's temperature plus `value_coef` times the value loss."""
        del frozen
        assert isinstance(batch, RolloutBatch) and batch.old_logps is not None
        assert batch.advantages is not None and batch.returns is not None
        rows, mask = batch.sequences, used_mask(batch.sequences)
        scored = batch_logps(params["policy"], config, rows, scalars["temperature"])
        policy = ppo_policy_loss(
            policy_logps=scored.logps,
            old_logps=batch.old_logps,
            advantages=batch.advantages,
            completion_mask=mask,
            clip_eps_low=scalars["clip_eps_low"],
            clip_eps_high=scalars["clip_eps_high"],
            dual_clip=scalars["dual_clip"] if self.dual else None,
            entropy=scored.entropy,
            entropy_coef=scalars["entropy_coef"],
            ref_logps=batch.ref_logps,
            kl_coef=scalars["kl_coef"] if self.kl == "loss" else 0.0,
            kl_estimator=self.kl_estimator,
        )
        value = ppo_value_loss(
            values=row_values(params["value"], config, rows),
            returns=batch.returns,
            completion_mask=mask,
            old_values=batch.values if self.clips_value else None,
            clip_eps_value=scalars["clip_eps_value"] if self.clips_value else None,
        )
        gap = jnp.abs(jax.lax.stop_gradient(scored.logps) - batch.sampler_logps)
        losses = {"loss/policy": policy.losses, "loss/value": value.losses}
        metrics = {**policy.metrics, **value.metrics, **losses, "sampler_trainer_gap": gap}
        loss = reduce(
            policy.losses + scalars["value_coef"] * value.losses,
            mask,
            aggregation=self.aggregation,
            max_length=float(self.max_new_tokens),
            weights=rows.weights,
        )
        return loss, reduce_metrics(jax.lax.stop_gradient(metrics), mask=mask, weights=rows.weights)

    def summarize(self, metrics: dict[str, Array]) -> dict[str, Array]:
        """With the explained variance in the place of the sums that it is made of."""
        parts = {key: metrics.pop(key) for key in ("returns_squared", "value_error", "value_error_squared")}
        metrics["explained_variance"] = explained_variance(returns=metrics["returns"], **parts)
        return metrics

    def adapt(self, scalars: Scalars, metrics: Mapping[str, float], completions: int) -> Scalars:
        """Moves `kl_coef` towards the target KL; it stays where no finite KL was measured."""
        observed = metrics.get("kl/reference", np.nan)
        if not self.adaptive or not np.isfinite(observed):
            return scalars
        coef = adaptive_kl_coef(
            kl_coef=scalars["kl_coef"],
            observed_kl=observed,
            target_kl=self.target_kl,
            horizon=self.horizon,
            batch_size=completions,
        )
        return {**scalars, "kl_coef": np.float32(coef)}


def row_values(scorer: Params, config: ModelConfig, rows: SequenceBatch) -> Array:
    """`[B, T]` value of the state that each token is drawn from."""
    outputs = row_outputs(scorer, config, rows)
    return state_values(outputs[:, :, 0])


def _check(options: Mapping[str, Any]) -> None:
    """Raises ValueError where options exclude each other."""
    if options["dual_clip"] > 0:
        require_above_clip("dual_clip", options["dual_clip"], options["clip_eps_high"])


def _make(setting: Setting) -> Algorithm:
    o = setting.options
    return PPO(
        max_new_tokens=setting.max_new_tokens,
        aggregation=o["aggregation"],
        kl=o["kl_in"] if o["kl_coef"] > 0 else "none",
        kl_estimator=o["kl_estimator"],
        adaptive=o["kl_coef"] > 0 and o["kl_controller"] == "adaptive",
        target_kl=o["target_kl"],
        horizon=o["horizon"],
        clips_value=o["clip_eps_value"] > 0,
        dual=o["dual_clip"] > 0,
        whitens=o["whiten_advantages"],
        mask_truncated=o["mask_truncated"],
    )


def _has_kl(options: Mapping[str, Any], _: Facts) -> bool:
    return bool(options["kl_coef"] > 0)


def _adapts(options: Mapping[str, Any], facts: Facts) -> bool:
    return _has_kl(options, facts) and options["kl_controller"] == "adaptive"


OPTIONS = {
    "aggregation": choice("token_mean", "How tokens become one number.", "sequence_mean", "constant"),
    "clip_eps_low": number(0.2, "The ratio is clipped below at 1 minus this.", 0, 1, "the ratio is positive"),
    "clip_eps_high": number(0.2, "The ratio is clipped above at 1 plus this.", 0),
    "dual_clip": number(0.0, "Bound of the ratio at negative advantages; 0 is off.", 0),
    "clip_eps_value": number(0.2, "Bound of a value's move; 0 is off.", 0, unit="reward units"),
    "value_coef": number(0.1, "Weight of the value loss.", 0),
    "entropy_coef": number(0.0, "Weight of the entropy bonus.", 0),
    "gamma": number(1.0, "Discount per token.", 0, 1),
    "gae_lambda": number(0.95, "Lambda of GAE.", 0, 1),
    "kl_coef": number(0.05, "Weight of the KL to the reference; 0 needs no reference.", 0),
    "kl_in": choice("reward", "Where the KL enters: the reward (k1 a token) or the loss.", "loss", used=_has_kl),
    "kl_estimator": choice(
        "k3", "Of a KL in the loss.", "k2", why=NO_K1, used=lambda o, f: _has_kl(o, f) and o["kl_in"] == "loss"
    ),
    "kl_controller": choice("fixed", "Whether kl_coef follows target_kl.", "adaptive", used=_has_kl),
    "target_kl": static_number(
        6.0,
        "Of the adaptive controller.",
        1e-6,
        None,
        "the controller divides by it",
        unit="nats a completion",
        used=_adapts,
    ),
    "horizon": static_number(
        10_000.0,
        "Of the adaptive controller.",
        1e-6,
        None,
        "the controller divides by it",
        unit="completions",
        used=_adapts,
    ),
    "whiten_advantages": choice(True, "Advantages to mean 0 and standard deviation 1 over the batch.", False),
    "mask_truncated": choice(False, "Leave completions cut at their limit out of the loss.", True),
}

PROVIDES = {
    "objective": {
        "ppo": Objective(
            "ppo",
            _make,
            OPTIONS,
            own=True,
            check=_check,
            reads=lambda _options: frozenset({"rewards", "scale", "steps"}),
            untruncated=True,
        )
    }
}
