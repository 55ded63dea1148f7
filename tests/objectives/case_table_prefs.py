"""Property-test rows of the supervised and preference objectives."""

import numpy as np

from objectives.bradley_terry import bradley_terry_loss, ranking_loss
from objectives.cpo import cpo_loss
from objectives.dpo import dpo_loss
from objectives.dpo_terms import length_desensitized_logps
from objectives.kto import kto_loss
from objectives.next_token import next_token_loss
from objectives.orpo import orpo_loss
from objectives.simpo import simpo_loss
from objectives.step_dpo import step_dpo_loss
from objectives.types import ObjectiveOutput
from tests.objectives.case import EXAMPLE, LENGTHS, B, Case, T
from tests.objectives.cases import random_logps

POLICY = ("policy_chosen_logps", "policy_rejected_logps")
BETA = frozenset({"beta"})


def next_token_arrays(rng):
    return {name: random_logps(rng, B, T) for name in ("token_logps", "mean_logps", "logsumexp")}


def score_arrays(rng):
    margins = rng.uniform(0, 2, B).astype(np.float32)
    soft_labels = rng.uniform(0, 1, B).astype(np.float32)
    scores = rng.normal(size=(2, B)).astype(np.float32)
    return {"chosen_scores": scores[0], "rejected_scores": scores[1], "margins": margins, "soft_labels": soft_labels}


def ranking_arrays(rng):
    return {"scores": rng.normal(size=(B, T)).astype(np.float32), "ranks": rng.integers(0, 3, (B, T))}


def lengths(*names):
    """Token counts of the two sides, different from each other."""
    counts = {"chosen_lengths": np.maximum(LENGTHS, 1), "rejected_lengths": np.maximum(LENGTHS[::-1], 1)}
    return {name: counts[name].astype(np.float32) for name in names}


def pair_arrays(*length_names, reference=True, weighted=False):
    def arrays(rng):
        policy = {name: random_logps(rng, B) * 5 for name in POLICY}
        references = ("ref_chosen_logps", "ref_rejected_logps") if reference else ()
        # far apart, so that finite differences straddle neither the kink of the hinge nor a change of rank
        gaps = np.stack([np.linspace(-2.2, 2.8, B), np.linspace(-1.9, 2.0, B)]).astype(np.float32)
        gaps = rng.permuted(gaps, axis=1)
        near = dict(zip(references, np.stack(list(policy.values())) + gaps, strict=False))
        extra = {"pair_weights": rng.uniform(0.5, 2, B).astype(np.float32)} if weighted else {}
        return policy | near | lengths(*length_names) | extra

    return arrays


def dpo_case(loss_type, *length_names, scalars=(), positive=(), weighted=False, **options):
    named = {"label_smoothing": 0.1, "discopop_tau": 0.4, "bco_delta": 0.2, "rpo_alpha": 0.5}
    named |= {"alpha_divergence_coef": 0.6}
    weights = {"weights": "weights", "coupled": True} if loss_type.startswith("aot") else {}
    return Case(
        dpo_loss,
        set(POLICY),
        pair_arrays(*length_names, weighted=weighted),
        {"beta": 0.3} | {name: named[name] for name in scalars},
        EXAMPLE,
        options={"loss_type": loss_type} | options,
        positive=frozenset(positive),
        **weights,
    )


def free_case(loss, scalars, *length_names, positive=frozenset(), **options):
    """An objective on pairs without a reference."""
    arrays = pair_arrays(*length_names, reference=False)
    return Case(loss, set(POLICY), arrays, scalars, EXAMPLE, options=options, positive=positive)


def kto_arrays(rng):
    policy = random_logps(rng, B) * 5
    ref = policy + rng.normal(size=B).astype(np.float32)
    return {"policy_logps": policy, "ref_logps": ref, "desirable": rng.random(B) < 0.5}


def step_arrays(rng):
    names = [f"{who}_{side}_token_logps" for who in ("policy", "ref") for side in ("chosen", "rejected")]
    return {name: random_logps(rng, B, T) for name in names}


def ld_arrays(rng):
    return {"token_logps": random_logps(rng, B, T), "public_lengths": np.array(LENGTHS) // 2}


def ld_loss(**arguments):
    return ObjectiveOutput(length_desensitized_logps(**arguments), {})


BOTH = ("chosen_lengths", "rejected_lengths")
CASES = {
    "next_token": Case(
        next_token_loss,
        {"token_logps", "mean_logps", "logsumexp"},
        next_token_arrays,
        {"label_smoothing": 0.1, "z_loss_coef": 0.05},
        masks=("mask",),
    ),
    "bradley_terry": Case(
        bradley_terry_loss, {"chosen_scores", "rejected_scores"}, score_arrays, {"center_coef": 0.1}, EXAMPLE
    ),
    "ranking": Case(ranking_loss, {"scores"}, ranking_arrays, {"center_coef": 0.1}, EXAMPLE, masks=("mask",)),
    "dpo": dpo_case("sigmoid", scalars=["label_smoothing"]),
    "dpo_sigmoid_norm": dpo_case("sigmoid_norm", *BOTH, scalars=["label_smoothing"]),
    "dpo_hinge": dpo_case("hinge"),
    "dpo_ipo": dpo_case("ipo", *BOTH, positive=BETA),
    "dpo_ipo_unnormalized": dpo_case("ipo_unnormalized", positive=BETA),
    "dpo_robust": dpo_case("robust", scalars=["label_smoothing"]),
    "dpo_exo_pair": dpo_case("exo_pair", scalars=["label_smoothing"], positive=["label_smoothing"]),
    "dpo_nca_pair": dpo_case("nca_pair"),
    "dpo_bco_pair": dpo_case("bco_pair", scalars=["bco_delta"]),
    "dpo_sppo_hard": dpo_case("sppo_hard", positive=BETA),
    "dpo_aot": dpo_case("aot", scalars=["label_smoothing"]),
    "dpo_aot_unpaired": dpo_case("aot_unpaired", scalars=["label_smoothing"]),
    "dpo_apo_zero": dpo_case("apo_zero"),
    "dpo_apo_down": dpo_case("apo_down"),
    "dpo_discopop": dpo_case("discopop", scalars=["discopop_tau"], positive=["discopop_tau"]),
    "dpo_forward_kl": dpo_case("sigmoid", f_divergence="forward_kl"),
    "dpo_js": dpo_case("sigmoid", f_divergence="js"),
    "dpo_alpha": dpo_case("sigmoid", scalars=["alpha_divergence_coef"], f_divergence="alpha"),
    "dpo_rpo": dpo_case("sigmoid", "chosen_lengths", scalars=["rpo_alpha"]),
    "dpo_wpo": dpo_case("sigmoid", weighted=True),
    "ld_dpo_logps": Case(ld_loss, {"token_logps"}, ld_arrays, {"ld_alpha": 0.4}, EXAMPLE, masks=("mask",)),
    "kto": Case(
        kto_loss,
        {"policy_logps"},
        kto_arrays,
        {"beta": 0.3, "reference_point": 0.4, "desirable_weight": 1.3, "undesirable_weight": 0.7},
        EXAMPLE,
    ),
    "kto_apo_zero_unpaired": Case(
        kto_loss,
        {"policy_logps"},
        kto_arrays,
        {"beta": 0.3, "desirable_weight": 1.3, "undesirable_weight": 0.7},
        EXAMPLE,
        options={"loss_type": "apo_zero_unpaired", "reference_point": 0.0},
    ),
    "orpo": free_case(orpo_loss, {"lambda_coef": 0.5}, *BOTH),
    "simpo": free_case(simpo_loss, {"beta": 2.0, "gamma": 0.6, "label_smoothing": 0.1}, *BOTH),
    "cpo_sigmoid": free_case(cpo_loss, {"beta": 0.3, "nll_coef": 0.8, "label_smoothing": 0.1}, "chosen_lengths"),
    "cpo_hinge": free_case(cpo_loss, {"beta": 0.3, "nll_coef": 0.8}, "chosen_lengths", loss_type="hinge"),
    "cpo_ipo": free_case(cpo_loss, {"beta": 0.3, "nll_coef": 0.8}, *BOTH, positive=BETA, loss_type="ipo"),
    "step_dpo": Case(
        step_dpo_loss,
        {"policy_chosen_token_logps", "policy_rejected_token_logps"},
        step_arrays,
        {"beta": 0.3, "label_smoothing": 0.1},
        EXAMPLE,
        masks=("chosen_step_mask", "rejected_step_mask"),
    ),
}
