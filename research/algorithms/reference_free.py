"""Preference optimisation without a reference: ORPO, SimPO, CPO."""

import abc
import dataclasses
from typing import Any, get_args

from objectives.cpo import CPOLossType, cpo_loss
from objectives.orpo import orpo_loss
from objectives.reduce import sequence_sum
from objectives.simpo import simpo_loss
from objectives.types import ObjectiveOutput
from research.algorithms import pairs
from research.algorithms.base import Frozen, Scalars, Summed, provides, when
from research.config.schema import choice, number
from research.core.batch import PreferenceBatch
from research.core.network import Network


@dataclasses.dataclass(frozen=True)
class ReferenceFree(pairs.PairAlgorithm):
    """A loss of both sides' summed log-probs and lengths."""

    def loss(self, model: Network, batch: PreferenceBatch, scalars: Scalars, frozen: Frozen) -> Summed:
        """Mean over pairs."""
        (chosen, rejected), masks = pairs.pair_logps(model, batch), pairs.pair_masks(batch)
        sides = {
            "policy_chosen_logps": sequence_sum(chosen.logps, masks[0]),
            "policy_rejected_logps": sequence_sum(rejected.logps, masks[1]),
            "chosen_lengths": pairs.lengths(masks[0]),
            "rejected_lengths": pairs.lengths(masks[1]),
        }
        return pairs.mean_over_pairs(self.objective(sides, scalars), batch.chosen.weights)

    @abc.abstractmethod
    def objective(self, sides: dict[str, Any], scalars: Scalars) -> ObjectiveOutput:
        """The objective on the sides' log-probs and lengths."""


@dataclasses.dataclass(frozen=True)
class ORPO(ReferenceFree):
    """Likelihood of the chosen and an odds ratio (Hong et al. 2024, eq. 6 and 7)."""

    def objective(self, sides: dict[str, Any], scalars: Scalars) -> ObjectiveOutput:
        """`orpo_loss`."""
        return orpo_loss(**sides, lambda_coef=scalars["lambda_coef"])


@dataclasses.dataclass(frozen=True)
class SimPO(ReferenceFree):
    """Mean log-probs as rewards, with a target margin (Meng et al. 2024, eq. 6)."""

    def objective(self, sides: dict[str, Any], scalars: Scalars) -> ObjectiveOutput:
        """`simpo_loss`."""
        numbers = {name: scalars[name] for name in ("beta", "gamma", "label_smoothing")}
        return simpo_loss(**sides, **numbers)


@dataclasses.dataclass(frozen=True)
class CPO(ReferenceFree):
    """A contrast against a uniform reference and the likelihood of the chosen (Xu et al. 2024, eq. 3 to 5)."""

    loss_type: CPOLossType = "sigmoid"

    def objective(self, sides: dict[str, Any], scalars: Scalars) -> ObjectiveOutput:
        """`cpo_loss`."""
        read = {name: sides[name] for name in sides if name != "rejected_lengths" or self.loss_type == "ipo"}
        if self.loss_type == "sigmoid":
            read["label_smoothing"] = scalars["label_smoothing"]
        return cpo_loss(**read, beta=scalars["beta"], nll_coef=scalars["nll_coef"], loss_type=self.loss_type)


_SCALE = ("Scale of the contrast.", 1e-6, None, "at 0 there is no contrast")
_ORPO = {"lambda_coef": number(0.1, "Weight of the odds ratio.", 0), **pairs.PAIR_OPTIONS}
_SIMPO = {
    "beta": number(2.0, *_SCALE),
    "gamma": number(1.0, "Target margin.", 0, unit="reward units"),
    "label_smoothing": pairs.label_smoothing(),
    **pairs.PAIR_OPTIONS,
}
_CPO = {
    "loss_type": choice("sigmoid", "Which function of the contrast.", *get_args(CPOLossType)),
    "beta": number(0.1, *_SCALE),
    "nll_coef": number(1.0, "Weight of the chosen's likelihood.", 0),
    "label_smoothing": pairs.label_smoothing(when(loss_type="sigmoid")),
    **pairs.PAIR_OPTIONS,
}

PROVIDES = provides(
    pairs.PairObjective("orpo", ORPO.from_setting, _ORPO),
    pairs.PairObjective("simpo", SimPO.from_setting, _SIMPO),
    pairs.PairObjective("cpo", CPO.from_setting, _CPO),
)
