"""ORPO, SimPO and CPO from tokens to loss, against NumPy that shares nothing with them but the logits."""

from typing import Any

import numpy as np
import pytest

from research.algorithms.base import Setting
from research.algorithms.reference_free import CPO, ORPO, PROVIDES, SimPO
from research.train.step import eval_step
from tests.research.algorithms import hand
from tests.research.algorithms.toy import MODEL, host_batch, no_effect, objective_scalars


def evaluate(algorithm: Any, policy: Any) -> dict[str, float]:
    batch, scalars = host_batch(algorithm), objective_scalars(algorithm)
    found = eval_step(policy, batch, scalars, algorithm=algorithm, config=MODEL)
    return {name: float(value.mean()) for name, value in found.items()}


@pytest.fixture(scope="module")
def sides(policy: Any) -> dict[str, np.ndarray]:
    """Sums, means and weights of the toy pairs."""
    batch = host_batch(ORPO())
    chosen, rejected = (hand.sums(policy, side) for side in (batch.chosen, batch.rejected))
    lengths = [side.loss_mask.sum(axis=1) for side in (batch.chosen, batch.rejected)]
    means = chosen / lengths[0], rejected / lengths[1]
    return {"c": chosen, "r": rejected, "mc": means[0], "mr": means[1], "w": batch.chosen.weights}


def test_orpo_equals_numpy_from_logits(policy: Any, sides: dict[str, np.ndarray]) -> None:
    odds = [np.exp(sides[m]) / (1 - np.exp(sides[m])) for m in ("mc", "mr")]
    losses = -sides["mc"] - 0.4 * np.log(hand.sigmoid(np.log(odds[0]) - np.log(odds[1])))
    assert evaluate(ORPO(), policy)["loss"] == pytest.approx(hand.mean(losses, sides["w"]), rel=1e-5)


def test_simpo_equals_numpy_from_logits(policy: Any, sides: dict[str, np.ndarray]) -> None:
    d = 2.0 * (sides["mc"] - sides["mr"]) - 0.3
    losses = -0.9 * np.log(hand.sigmoid(d)) - 0.1 * np.log(hand.sigmoid(-d))
    assert evaluate(SimPO(), policy)["loss"] == pytest.approx(hand.mean(losses, sides["w"]), rel=1e-5)


@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "ipo"])
def test_cpo_equals_numpy_from_logits(policy: Any, sides: dict[str, np.ndarray], loss_type: Any) -> None:
    d = 0.5 * (sides["c"] - sides["r"])
    contrast = {
        "sigmoid": -0.9 * np.log(hand.sigmoid(d)) - 0.1 * np.log(hand.sigmoid(-d)),
        "hinge": np.maximum(1 - d, 0),
        "ipo": (sides["mc"] - sides["mr"] - 1.0) ** 2,
    }[loss_type]
    expected = hand.mean(contrast - 0.7 * sides["mc"], sides["w"])
    assert evaluate(CPO(loss_type), policy)["loss"] == pytest.approx(expected, rel=1e-5)


def test_the_config_finds_them_and_names_what_has_no_effect() -> None:
    found = PROVIDES["objective"]
    assert found.keys() == {"orpo", "simpo", "cpo"}
    options = {"pairs_per_prompt": 3, "loss_type": "hinge", "beta": 0.1, "nll_coef": 1.0, "label_smoothing": 0.0}
    made = found["cpo"].make(Setting(options=options, online=True, group_size=8, max_new_tokens=8))
    assert made == CPO("hinge") and made.pairs_per_prompt == 3
    for name, kind in (("orpo", ORPO()), ("simpo", SimPO()), ("cpo", CPO())):
        objective = found[name]
        assert objective.make(Setting({**options, "loss_type": "sigmoid"}, True, 8, 8)) == kind
        traced = {key for key, option in objective.options.items() if option.traced}
        assert traced == objective_scalars(kind).keys()
        assert objective.given == "preferences" and objective.own and kind.roles == ()
        assert objective.rows_per_group(options, 8) == 3
    assert no_effect(found["cpo"], options, False) == {"label_smoothing", "pairs_per_prompt"}
    assert no_effect(found["cpo"], {**options, "loss_type": "sigmoid"}, True) == set()
    assert no_effect(found["orpo"], {"pairs_per_prompt": 3}, False) == {"pairs_per_prompt"}
