"""Proximal policy optimisation: a policy and its value model, trained together."""

import dataclasses
from collections.abc import Collection, Mapping
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
    choice,
    drawn_rows,
    number,
    rollout_batch,
    static_number,
    used_mask,
)
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
    adaptive: bool = dataclasses.field(
        default=False, compare=False
    )  # with the next two, read on the host only
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

    def prepare(
        self, params: Params, config: ModelConfig, batch: Batch, scalars: Scalars, frozen: Frozen
    ) -> Batch:
        """Reference log-probs, values, returns; then advantages, whitened over the global batch."""
        assert isinstance(batch, RolloutBatch)
        rows, mask = batch.sequences, batch.sequences.loss_mask
        ref_logps, kl, coef = None, None, 0.0
        if frozen.reference is not None:
            reference = frozen.reference
            scored = batch_logps(
                reference.params, reference.config, drawn_rows(batch), scalars["temperature"]
            )
            ref_logps = scored.logps
        if self.kl == "reward":
            assert ref_logps is not None
            kl = kl_estimate(batch.sampler_logps, ref_logps, "k1")
            coef = scalars["kl_coef"]
        values = row_values(params["value"], config, rows)
        rewards = token_rewards(
            scores=batch.scores,
            completion_mask=mask,
            kl_penalty=kl,
            kl_coef=coef,
            step_rewards=batch.step_rewards,
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

    def loss(
        self, params: Params, config: ModelConfig, batch: Batch, scalars: Scalars, frozen: Frozen
    ) -> Summed:
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


def _no_effect(options: Mapping[str, Any], online: bool) -> Collection[str]:
    del online
    unread = set()
    if options["kl_coef"] == 0:
        unread |= {"kl_in", "kl_controller"}
    if options["kl_coef"] == 0 or options["kl_in"] == "reward":
        unread.add("kl_estimator")
    if options["kl_coef"] == 0 or options["kl_controller"] == "fixed":
        unread |= {"target_kl", "horizon"}
    return unread


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


OBJECTIVES = (
    Objective(
        "ppo",
        _make,
        {
            "aggregation": choice("token_mean", "sequence_mean", "constant"),
            "clip_eps_low": number(0, 1, "the ratio is positive"),
            "clip_eps_high": number(0, None, "the ratio is clipped above 1"),
            "dual_clip": number(0, None, "0 is off; it bounds the ratio"),
            "clip_eps_value": number(0, None, "0 is off; it bounds a move"),
            "value_coef": number(0, None, "it is the weight of a loss"),
            "entropy_coef": number(0, None, "it is the strength of a bonus"),
            "gamma": number(0, 1, "it is a discount per token"),
            "gae_lambda": number(0, 1, "it is a share"),
            "kl_coef": number(0, None, "it is the strength of a penalty"),
            "kl_in": choice("reward", "loss"),
            "kl_estimator": choice("k2", "k3", why=NO_K1),
            "kl_controller": choice("fixed", "adaptive"),
            "target_kl": static_number(1e-6, None, "the controller divides by it"),
            "horizon": static_number(1e-6, None, "the controller divides by it"),
            "whiten_advantages": choice(True, False),
            "mask_truncated": choice(False, True),
        },
        own=True,
        no_effect=_no_effect,
        check=_check,
        reads=lambda _options: frozenset({"rewards", "scale", "steps"}),
        untruncated=True,
    ),
)
