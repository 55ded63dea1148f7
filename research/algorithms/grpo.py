"""Critic-free policy gradients: GRPO and its family are settings of one algorithm."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from jaxtyping import Array

from objectives import advantages
from objectives.grpo import KLCorrection, RatioLevel, SurrogateName, grpo_loss
from objectives.importance import ImportanceMode, importance_weights
from objectives.kl import kl_estimate
from objectives.reduce import Aggregation, sequence_sum
from research.algorithms.base import Frozen, Objective, Read, Rollouts, Scalars, Setting, Summed, provides, when
from research.algorithms.policy_gradient import NO_K1, PolicyGradient
from research.config.schema import choice, number, static_number, with_defaults
from research.core.batch import RolloutBatch
from research.core.network import Network, batch_logps

Advantage = Literal["group", "reinforce_pp", "reinforce_pp_baseline"]
ImportanceCorrection = Literal["none", "token", "sequence"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class GRPO(PolicyGradient):
    """A surrogate of the policy gradient on advantages without a critic (Shao et al. 2024, eq. 3)."""

    group_size: int
    aggregation: Aggregation = "sequence_mean"
    advantage: Advantage = "group"
    normalization: advantages.Normalization = "group"
    baseline: advantages.Baseline = "mean"
    ddof: int = 1
    ratio_level: RatioLevel = "token"
    surrogate: SurrogateName = "clip"
    two_sided: bool = False  # whether `delta` bounds the ratio of tokens with negative advantage
    kl_correction: KLCorrection = "none"
    importance: ImportanceCorrection = "none"
    importance_mode: ImportanceMode = "truncate"

    @property
    def for_update(self) -> "GRPO":
        """Without what the advantages are made from."""
        same: dict[str, Any] = {"group_size": 2, "advantage": "group", "normalization": "group"}
        return dataclasses.replace(self, **same, baseline="mean", ddof=1)

    def from_rollouts(self, rollouts: Rollouts, seed: int) -> tuple[RolloutBatch, dict[str, float]]:
        """With the fraction of groups whose rewards are equal."""
        batch, metrics = super().from_rollouts(rollouts, seed)
        zero = float(advantages.frac_reward_zero_std(batch.scores, rollouts.group_size))
        return batch, {**metrics, "frac_reward_zero_std": zero}

    def prepare(self, model: Network, batch: RolloutBatch, scalars: Scalars, frozen: Frozen) -> RolloutBatch:
        """Old and reference log-probs, at the rollout's temperature, and advantages."""
        old_logps = batch.sampler_logps
        if self.importance != "none":
            old_logps = batch_logps(model, batch.drawn, scalars["temperature"]).logps
        batch = batch.replace(old_logps=old_logps, ref_logps=self.reference_logps(batch, scalars, frozen))
        return batch.replace(advantages=self._advantages(batch, scalars))

    def _advantages(self, batch: RolloutBatch, scalars: Scalars) -> Array:
        rows, rewards = batch.sequences, batch.scores
        kl, coef = None, 0.0
        if self.kl == "reward":
            assert batch.old_logps is not None and batch.ref_logps is not None
            kl = kl_estimate(batch.old_logps, batch.ref_logps, "k1")
            coef = scalars["beta"]
        scale = batch.advantage_scale
        if self.advantage == "reinforce_pp":
            return scale[:, None] * advantages.reinforce_pp_advantages(
                rewards=rewards, completion_mask=rows.loss_mask, kl_penalty=kl, kl_coef=coef, weights=rows.weights
            )
        if kl is not None:
            rewards = rewards - coef * sequence_sum(kl, batch.completion_mask)
        if self.advantage == "reinforce_pp_baseline":
            return scale[:, None] * advantages.reinforce_pp_baseline_advantages(
                rewards=rewards, group_size=self.group_size, completion_mask=rows.loss_mask, weights=rows.weights
            )
        whole = scale * advantages.group_advantages(
            rewards, self.group_size, baseline=self.baseline, normalization=self.normalization, ddof=self.ddof
        )
        if batch.step_rewards is None or batch.step_mask is None:
            return whole
        return whole[:, None] + scale[:, None] * advantages.process_advantages(
            step_rewards=batch.step_rewards,
            step_mask=batch.step_mask,
            completion_mask=batch.completion_mask,
            group_size=self.group_size,
            ddof=self.ddof,
        )

    def loss(self, model: Network, batch: RolloutBatch, scalars: Scalars, frozen: Frozen) -> Summed:
        """The surrogate at the rollout's temperature, reduced as configured."""
        assert batch.old_logps is not None and batch.advantages is not None
        mask = batch.sequences.used_mask
        scored = batch_logps(model, batch.sequences, scalars["temperature"])
        weights = None
        if self.importance != "none":
            weights = importance_weights(
                old_logps=batch.old_logps,
                sampler_logps=batch.sampler_logps,
                completion_mask=mask,
                level=self.importance,
                mode=self.importance_mode,
                cap=scalars["importance_cap"],
            )
        read = {name: scalars[name] for name in _READ[self.surrogate]}
        if self.two_sided:
            read["delta"] = scalars["delta"]
        out = grpo_loss(
            policy_logps=scored.logps,
            old_logps=batch.old_logps,
            advantages=batch.advantages,
            completion_mask=mask,
            ref_logps=batch.ref_logps,
            beta=scalars["beta"] if self.kl == "loss" else 0.0,
            kl_estimator=self.kl_estimator,
            ratio_level=self.ratio_level,
            surrogate=self.surrogate,
            kl_correction=self.kl_correction if self.kl == "loss" else "none",
            importance_weights=weights,
            **read,
        )
        return self.summed(batch, mask, scored.logps, out.losses, {**out.metrics, "entropy": scored.entropy})


_READ: Mapping[SurrogateName, tuple[str, ...]] = {
    "clip": ("clip_eps_low", "clip_eps_high"),
    "cispo": ("cispo_clip",),
    "sapo": ("sapo_temperature_pos", "sapo_temperature_neg"),
}
"""The scalars that each surrogate reads."""


def _kl_loss(options: Mapping[str, Any], _: Any) -> bool:
    return bool(options["beta"] > 0 and options["kl_in"] == "loss")


_CORRECTS = when(importance=("token", "sequence"))

OPTIONS = {
    "aggregation": choice("sequence_mean", "How tokens become one number.", "token_mean", "constant"),
    "advantage": choice(
        "group", "Relative to the group, or whitened over the batch.", "reinforce_pp", "reinforce_pp_baseline"
    ),
    "normalization": choice(
        "group", "Whose standard deviation divides the advantage.", "batch", "none", used=when(advantage="group")
    ),
    "baseline": choice("mean", "What is subtracted from the reward.", "leave_one_out", used=when(advantage="group")),
    "ddof": static_number(
        1,
        "Of the standard deviation.",
        0,
        1,
        "a group may have 2 completions",
        used=when(advantage="group", normalization=("group", "batch")),
    ),
    "ratio_level": choice("token", "Ratio of each token or of the sequence.", "sequence", "sequence_token"),
    "surrogate": choice("clip", "What replaces the policy gradient.", "cispo", "sapo"),
    "clip_eps_low": number(
        0.2, "The ratio is clipped below at 1 minus this.", 0, 1, "the ratio is positive", used=when(surrogate="clip")
    ),
    "clip_eps_high": number(0.2, "The ratio is clipped above at 1 plus this.", 0, used=when(surrogate="clip")),
    "delta": number(0.0, "Bound of the ratio at negative advantages; 0 is off.", 0, used=when(surrogate="clip")),
    "cispo_clip": number(
        5.0, "Largest ratio that weighs a token.", 1e-6, None, "at 0 nothing is learned", used=when(surrogate="cispo")
    ),
    "sapo_temperature_pos": number(1.0, "Of the gate at positive advantages.", 1e-6, used=when(surrogate="sapo")),
    "sapo_temperature_neg": number(1.05, "Of the gate at negative advantages.", 1e-6, used=when(surrogate="sapo")),
    "beta": number(0.0, "Weight of the KL to the reference; 0 needs no reference.", 0),
    "kl_in": choice("loss", "Where the KL enters.", "reward", used=lambda o, _: o["beta"] > 0),
    "kl_estimator": choice("k3", "Of a KL in the loss.", "k2", why=NO_K1, used=_kl_loss),
    "kl_correction": choice("none", "Whether a KL in the loss is weighted by the ratio.", "ratio", used=_kl_loss),
    "importance": choice("none", "Correction for a sampler that differs from the trainer.", "token", "sequence"),
    "importance_mode": choice("truncate", "What happens above the cap.", "mask", used=_CORRECTS),
    "importance_cap": number(2.0, "Largest weight.", 1e-6, None, "at 0 nothing is learned", used=_CORRECTS),
    "mask_truncated": choice(False, "Leave completions cut at their limit out of the loss.", True),
}
"""The options of the family; each member has its paper's own defaults, save that the KL is off (`beta`).

DAPO's other parts belong to the stage: `rollout.resample_rounds`, `reward.overlong_buffer`.
"""


def _reads(options: Mapping[str, Any]) -> frozenset[Read]:
    """One gradient a sequence, or a batch-wide advantage, has no place for the rewards of steps."""
    whole = options["ratio_level"] == "sequence" and options["surrogate"] != "cispo"
    steps = options["advantage"] == "group" and not whole
    return frozenset({"rewards", "scale", "steps"} if steps else {"rewards", "scale"})


def _check(options: Mapping[str, Any]) -> None:
    """Raises ValueError where options exclude each other."""
    if options["surrogate"] == "clip" and 0 < options["delta"] <= 1 + options["clip_eps_high"]:
        raise ValueError(
            f"delta: got {options['delta']}, expected 0 (off) or more than 1 + clip_eps_high = "
            f"{1 + options['clip_eps_high']:g}"
        )
    if options["beta"] > 0 and options["kl_correction"] == "ratio" and options["kl_estimator"] != "k3":
        raise ValueError("kl_correction: got 'ratio' with k2, expected kl_estimator=k3")
    if options["surrogate"] == "cispo" and options["ratio_level"] == "sequence_token":
        raise ValueError("ratio_level: got 'sequence_token' with cispo, expected token or sequence")
    if options["advantage"] != "group" and options["ratio_level"] == "sequence":
        raise ValueError(
            f"ratio_level: got 'sequence' with advantage={options['advantage']}, expected sequence_token because "
            "these advantages differ from token to token"
        )


def _make(setting: Setting) -> GRPO:
    o = setting.options
    two_sided = o["surrogate"] == "clip" and o["delta"] > 0
    return GRPO.from_setting(setting, two_sided=two_sided, kl=o["kl_in"] if o["beta"] > 0 else "none")


FAMILY: Mapping[str, Mapping[str, Any]] = {
    "grpo": {},
    "dr_grpo": {"aggregation": "constant", "normalization": "none"},
    "dapo": {"aggregation": "token_mean", "clip_eps_high": 0.28},
    "rloo": {"aggregation": "constant", "baseline": "leave_one_out", "normalization": "none", "kl_in": "reward"},
    "reinforce_pp": {"advantage": "reinforce_pp", "aggregation": "token_mean", "kl_in": "reward"},
    "gspo": {"ratio_level": "sequence", "clip_eps_low": 3e-4, "clip_eps_high": 4e-4},
    "cispo": {"surrogate": "cispo", "aggregation": "token_mean"},
    "sapo": {"surrogate": "sapo"},
}
"""Names of the family's members, and what differs from GRPO: one algorithm and one set of options."""

PROVIDES = provides(
    *(
        Objective(name, _make, with_defaults(OPTIONS, changes), own=True, check=_check, reads=_reads, untruncated=True)
        for name, changes in FAMILY.items()
    )
)
