"""Preference optimisation without a reference: ORPO, SimPO, CPO."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, get_args

from models.config import ModelConfig
from models.transformer import Params
from objectives.cpo import CPOLossType, cpo_loss
from objectives.orpo import orpo_loss
from objectives.simpo import simpo_loss
from objectives.types import ObjectiveOutput
from research.algorithms.base import Algorithm, Batch, Frozen, Objective, Scalars, Setting, Summed
from research.algorithms.pairs import (
    PAIR_OPTIONS,
    PairAlgorithm,
    lengths,
    mean_over_pairs,
    pair_logps,
    pair_masks,
    pair_sums,
    pairs_per_group,
)
from research.config.schema import Key, choice, number
from research.config.sections import Facts
from research.core.batch import PreferenceBatch


@dataclasses.dataclass(frozen=True)
class ReferenceFree(PairAlgorithm):
    """A loss of both sides' summed log-probs and lengths."""

    def loss(self, params: Params, config: ModelConfig, batch: Batch, scalars: Scalars, frozen: Frozen) -> Summed:
        """Mean over pairs."""
        del frozen
        assert isinstance(batch, PreferenceBatch)
        (chosen, rejected), masks = pair_logps(params, config, batch), pair_masks(batch)
        sums = pair_sums((chosen.logps, rejected.logps), masks)
        sides = {
            "policy_chosen_logps": sums[0],
            "policy_rejected_logps": sums[1],
            "chosen_lengths": lengths(masks[0]),
            "rejected_lengths": lengths(masks[1]),
        }
        return mean_over_pairs(self.objective(sides, scalars), batch.chosen.weights)

    def objective(self, sides: dict[str, Any], scalars: Scalars) -> ObjectiveOutput:
        """The objective on the sides' log-probs and lengths."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class ORPO(ReferenceFree):
    """Likelihood of the chosen and an odds ratio (Hong et al. 2024, eq. 6 and 7).

    Scalars: `lambda_coef`.
    """

    def objective(self, sides: dict[str, Any], scalars: Scalars) -> ObjectiveOutput:
        """`orpo_loss`."""
        return orpo_loss(**sides, lambda_coef=scalars["lambda_coef"])


@dataclasses.dataclass(frozen=True)
class SimPO(ReferenceFree):
    """Mean log-probs as rewards, with a target margin (Meng et al. 2024, eq. 6).

    Scalars: `beta`, `gamma`, `label_smoothing`.
    """

    def objective(self, sides: dict[str, Any], scalars: Scalars) -> ObjectiveOutput:
        """`simpo_loss`."""
        return simpo_loss(
            **sides, beta=scalars["beta"], gamma=scalars["gamma"], label_smoothing=scalars["label_smoothing"]
        )


@dataclasses.dataclass(frozen=True)
class CPO(ReferenceFree):
    """A contrast against a uniform reference and the likelihood of the chosen (Xu et al. 2024, eq. 3 to 5).

    Attributes:
      loss_type: sigmoid, hinge or ipo.

    Scalars: `beta`, `nll_coef`, `label_smoothing`.
    """

    loss_type: CPOLossType = "sigmoid"

    def objective(self, sides: dict[str, Any], scalars: Scalars) -> ObjectiveOutput:
        """`cpo_loss`."""
        unread = set() if self.loss_type == "ipo" else {"rejected_lengths"}
        smoothing = {"label_smoothing": scalars["label_smoothing"]} if self.loss_type == "sigmoid" else {}
        return cpo_loss(
            **{name: value for name, value in sides.items() if name not in unread},
            beta=scalars["beta"],
            nll_coef=scalars["nll_coef"],
            loss_type=self.loss_type,
            **smoothing,
        )


def _make_orpo(setting: Setting) -> Algorithm:
    return ORPO(pairs_per_prompt=setting.options["pairs_per_prompt"])


def _make_simpo(setting: Setting) -> Algorithm:
    return SimPO(pairs_per_prompt=setting.options["pairs_per_prompt"])


def _make_cpo(setting: Setting) -> Algorithm:
    return CPO(setting.options["loss_type"], pairs_per_prompt=setting.options["pairs_per_prompt"])


def _objective(name: str, make: Callable[[Setting], Algorithm], options: Mapping[str, Key]) -> Objective:
    return Objective(
        name, make, {**options, **PAIR_OPTIONS}, given="preferences", own=True, rows_per_group=pairs_per_group
    )


def _beta(default: float) -> Key:
    return number(default, "Scale of the contrast.", 1e-6, None, "at 0 there is no contrast")


def _smoothing(used: Callable[[Mapping[str, Any], Facts], bool] | None = None) -> Key:
    doc, why = "Probability that a label is flipped.", "at 0.5 the labels are noise"
    return number(0.0, doc, 0, 0.4999, why, used=used)


_ORPO = {"lambda_coef": number(0.1, "Weight of the odds ratio.", 0)}
_SIMPO = {
    "beta": _beta(2.0),
    "gamma": number(1.0, "Target margin.", 0, unit="reward units"),
    "label_smoothing": _smoothing(),
}
_CPO = {
    "loss_type": choice("sigmoid", "Which function of the contrast.", *get_args(CPOLossType)),
    "beta": _beta(0.1),
    "nll_coef": number(1.0, "Weight of the chosen's likelihood.", 0),
    "label_smoothing": _smoothing(lambda o, _: o["loss_type"] == "sigmoid"),
}

PROVIDES = {
    "objective": {
        "orpo": _objective("orpo", _make_orpo, _ORPO),
        "simpo": _objective("simpo", _make_simpo, _SIMPO),
        "cpo": _objective("cpo", _make_cpo, _CPO),
    }
}
