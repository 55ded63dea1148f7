"""Proximal policy optimisation: a policy and its value model, trained together."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from models.heads import state_values
from objectives.gae import explained_variance, gae, token_rewards, whiten
from objectives.kl import kl_estimate
from objectives.ppo import adaptive_kl_coef, ppo_policy_loss, ppo_value_loss
from objectives.surrogate import require_above_clip
from research.algorithms.base import Frozen, Objective, Scalars, Setting, Summed, provides
from research.algorithms.policy_gradient import NO_K1, PolicyGradient
from research.config.schema import choice, number, static_number
from research.core.batch import RolloutBatch
from research.core.network import Network, batch_logps, row_outputs
from research.core.state import Layout


@dataclasses.dataclass(frozen=True)
class PPO(PolicyGradient):
    """Clipped surrogate on advantages by GAE, and the squared error of the values (Ouyang et al. 2022)."""

    kl: Literal["none", "loss", "reward"] = "reward"
    adaptive: bool = dataclasses.field(default=False, compare=False)  # kl_coef follows target_kl (Ziegler et al. 2019)
    target_kl: float = dataclasses.field(default=6.0, compare=False)
    horizon: float = dataclasses.field(default=10_000.0, compare=False)
    clips_value: bool = True  # whether the value's move is clipped
    dual: bool = False  # whether `dual_clip` bounds the ratio of tokens with negative advantage
    whitens: bool = True  # whether advantages are whitened over the global batch

    layout: ClassVar[Layout] = "actor_critic"

    def prepare(self, model: Network, batch: RolloutBatch, scalars: Scalars, frozen: Frozen) -> RolloutBatch:
        """Reference log-probs, values, returns; then advantages, whitened over the global batch."""
        mask, weights = batch.sequences.loss_mask, batch.sequences.weights
        ref_logps, kl, coef = self.reference_logps(batch, scalars, frozen), None, 0.0
        if self.kl == "reward":
            assert ref_logps is not None
            kl = kl_estimate(batch.sampler_logps, ref_logps, "k1")
            coef = scalars["kl_coef"]
        values = _values(model, batch)
        rewards = token_rewards(
            scores=batch.scores, completion_mask=mask, kl_penalty=kl, kl_coef=coef, step_rewards=batch.step_rewards
        )
        discounts = {name: scalars[name] for name in ("gamma", "gae_lambda")}
        advantages, returns = gae(rewards=rewards, values=values, completion_mask=mask, **discounts)
        if self.whitens:
            advantages = whiten(values=advantages, mask=mask, weights=weights)
        return batch.replace(
            old_logps=batch.sampler_logps,
            ref_logps=ref_logps,
            values=jnp.where(mask, values, 0.0),
            returns=returns,
            advantages=advantages * batch.advantage_scale[:, None],
        )

    def loss(self, model: Network, batch: RolloutBatch, scalars: Scalars, frozen: Frozen) -> Summed:
        """Policy loss at the rollout's temperature plus `value_coef` times the value loss."""
        assert batch.old_logps is not None and batch.advantages is not None and batch.returns is not None
        mask, policy_model = batch.sequences.used_mask, model.replace(params=model.params["policy"])
        scored = batch_logps(policy_model, batch.sequences, scalars["temperature"])
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
            values=_values(model, batch),
            returns=batch.returns,
            completion_mask=mask,
            old_values=batch.values if self.clips_value else None,
            clip_eps_value=scalars["clip_eps_value"] if self.clips_value else None,
        )
        parts = {"loss/policy": policy.losses, "loss/value": value.losses}
        losses = policy.losses + scalars["value_coef"] * value.losses
        return self.summed(batch, mask, scored.logps, losses, {**policy.metrics, **value.metrics, **parts})

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


def _values(model: Network, batch: RolloutBatch) -> Array:
    """`[B, T]` value of the state that each token is drawn from."""
    outputs = row_outputs(model.replace(params=model.params["value"]), batch.sequences)
    return state_values(outputs[:, :, 0])


def _check(options: Mapping[str, Any]) -> None:
    """Raises ValueError where options exclude each other."""
    if options["dual_clip"] > 0:
        require_above_clip("dual_clip", options["dual_clip"], options["clip_eps_high"])


def _make(setting: Setting) -> PPO:
    o = setting.options
    return PPO.from_setting(
        setting,
        kl=o["kl_in"] if o["kl_coef"] > 0 else "none",
        adaptive=o["kl_coef"] > 0 and o["kl_controller"] == "adaptive",
        clips_value=o["clip_eps_value"] > 0,
        dual=o["dual_clip"] > 0,
        whitens=o["whiten_advantages"],
    )


def _has_kl(options: Mapping[str, Any], _: Any) -> bool:
    return bool(options["kl_coef"] > 0)


def _adapts(options: Mapping[str, Any], _: Any) -> bool:
    return _has_kl(options, _) and options["kl_controller"] == "adaptive"


_OF_THE_CONTROLLER = ("Of the adaptive controller.", 1e-6, None, "the controller divides by it")

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
    "target_kl": static_number(6.0, *_OF_THE_CONTROLLER, unit="nats a completion", used=_adapts),
    "horizon": static_number(10_000.0, *_OF_THE_CONTROLLER, unit="completions", used=_adapts),
    "whiten_advantages": choice(True, "Advantages to mean 0 and standard deviation 1 over the batch.", False),
    "mask_truncated": choice(False, "Leave completions cut at their limit out of the loss.", True),
}

PROVIDES = provides(
    Objective(
        "ppo",
        _make,
        OPTIONS,
        own=True,
        check=_check,
        reads=lambda _options: frozenset({"rewards", "scale", "steps"}),
        untruncated=True,
    )
)
