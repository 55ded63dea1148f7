"""Direct preference optimisation and the losses of its family, on given pairs or on pairs of own samples."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, get_args

import jax.numpy as jnp

from objectives.dpo import READ_BY, DPOLossType, dpo_loss
from objectives.dpo_terms import FDivergence, bco_delta_statistic, length_desensitized_logps, wpo_weights
from research.algorithms import pairs
from research.algorithms.base import Frozen, Scalars, Summed, provides, when
from research.config.schema import choice, number
from research.core.batch import PreferenceBatch
from research.core.network import Network

PairWeighting = Literal["none", "wpo"]

BATCH_COUPLED: tuple[DPOLossType, ...] = ("aot", "aot_unpaired", "bco_pair")
"""Losses of a pair that depend on the other pairs of the batch, so that micro-batches would change them."""


@dataclasses.dataclass(frozen=True)
class DPO(pairs.ReferencePairs, pairs.PairAlgorithm):
    """DPO (Rafailov et al. 2023, eq. 7) and what shares its contrast; sources in `objectives/dpo.py`.

    Margins and soft labels of the data are not read; `label_smoothing` is one number for all pairs.
    """

    loss_type: DPOLossType = "sigmoid"
    f_divergence: FDivergence = "reverse_kl"
    weighting: PairWeighting = "none"

    @property
    def batch_coupled(self) -> bool:
        """Whether micro-batches would change the loss."""
        return self.loss_type in BATCH_COUPLED

    def loss(self, model: Network, batch: PreferenceBatch, scalars: Scalars, frozen: Frozen) -> Summed:
        """Mean over pairs; log-probs are summed over the completion."""
        assert batch.ref_chosen_logps is not None and batch.ref_rejected_logps is not None
        weights, read = batch.chosen.weights, {name for name, losses in READ_BY.items() if self.loss_type in losses}
        sides, masks = pairs.pair_logps(model, batch), pairs.pair_masks(batch)
        shared = jnp.minimum(masks[0].sum(axis=1), masks[1].sum(axis=1))
        summed = partial(length_desensitized_logps, public_lengths=shared, ld_alpha=scalars["ld_alpha"])
        policy = [summed(token_logps=side.logps, mask=mask) for side, mask in zip(sides, masks, strict=True)]
        logps = batch.ref_chosen_logps, batch.ref_rejected_logps
        ref = [summed(token_logps=side, mask=mask) for side, mask in zip(logps, masks, strict=True)]
        options: dict[str, Any] = {name: scalars[name] for name in ("label_smoothing", "discopop_tau") if name in read}
        if "rejected_lengths" in read:
            options["rejected_lengths"] = pairs.lengths(masks[1])
        if "weights" in read:
            options["weights"] = weights
        if "bco_delta" in read:
            good, bad = (scalars["beta"] * (policy[side] - ref[side]) for side in (0, 1))
            statistic = bco_delta_statistic(rewards_chosen=good, rewards_rejected=bad, weights=weights)
            options["bco_delta"] = statistic.mean()
        if self.f_divergence == "alpha":
            options["alpha_divergence_coef"] = scalars["alpha_divergence_coef"]
        if self.weighting == "wpo":
            own = [
                wpo_weights(token_logps=side.logps, log_collision=side.log_collision, mask=mask)
                for side, mask in zip(sides, masks, strict=True)
            ]
            options["pair_weights"] = own[0] * own[1]
        out = dpo_loss(
            policy_chosen_logps=policy[0],
            policy_rejected_logps=policy[1],
            ref_chosen_logps=ref[0],
            ref_rejected_logps=ref[1],
            beta=scalars["beta"],
            loss_type=self.loss_type,
            f_divergence=self.f_divergence,
            chosen_lengths=pairs.lengths(masks[0]),
            rpo_alpha=scalars["rpo_alpha"],
            **options,
        )
        return pairs.mean_over_pairs(out, weights)


def _reads(option: str) -> Callable[[Mapping[str, Any], Any], bool]:
    return lambda options, _: options["loss_type"] in READ_BY[option]


def _check(options: Mapping[str, Any]) -> None:
    loss_type, smoothing = options["loss_type"], options["label_smoothing"]
    if loss_type == "exo_pair" and smoothing <= 0:
        raise ValueError(f"label_smoothing: got {smoothing}, expected above 0 because exo_pair takes its log")
    if options["rpo_alpha"] > 0 and options["ld_alpha"] < 1:
        raise ValueError(
            f"ld_alpha: got {options['ld_alpha']}, expected 1 with rpo_alpha={options['rpo_alpha']} because the "
            "likelihood of the chosen would be desensitised too"
        )
    if options["f_divergence"] != "reverse_kl" and loss_type not in READ_BY["f_divergence"]:
        raise ValueError(
            f"f_divergence: got {options['f_divergence']!r}, expected 'reverse_kl' because {loss_type} is no "
            "function of the contrast alone"
        )


DPO_OPTIONS = {
    "loss_type": choice("sigmoid", "Which function of the contrast: see objectives/dpo.py.", *get_args(DPOLossType)),
    "f_divergence": choice(
        "reverse_kl", "What keeps the policy near the reference.", *get_args(FDivergence), used=_reads("f_divergence")
    ),
    "weighting": choice(
        "none", "wpo weighs a pair by how likely the policy itself is to write it.", *get_args(PairWeighting)
    ),
    "beta": pairs.BETA,
    "label_smoothing": pairs.label_smoothing(_reads("label_smoothing")),
    "alpha_divergence_coef": number(
        0.5, "Alpha of the alpha-divergence: 0 is the forward KL, 1 the reverse.", 0, 1, used=when(f_divergence="alpha")
    ),
    "discopop_tau": number(
        0.05, "Temperature of discopop.", 1e-6, None, "the contrast is divided by it", used=_reads("discopop_tau")
    ),
    "rpo_alpha": number(0.0, "Weight of the chosen's negative log-likelihood a token; 0 is off.", 0),
    "ld_alpha": number(1.0, "Weight of the tokens beyond the shorter side's length; 1 is off.", 0, 1),
    **pairs.PAIR_OPTIONS,
}

PROVIDES = provides(pairs.PairObjective("dpo", DPO.from_setting, DPO_OPTIONS, check=_check))
