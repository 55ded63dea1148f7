"""Our supervised, preference and reward-model losses against TRL's."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from objectives.bradley_terry import bradley_terry_loss
from objectives.cpo import cpo_loss
from objectives.dpo import dpo_loss
from objectives.dpo_terms import length_desensitized_logps, wpo_weights
from objectives.kto import kto_loss, kto_reference_point
from objectives.next_token import next_token_loss
from objectives.orpo import orpo_loss
from objectives.reduce import sequence_sum, token_mean
from objectives.simpo import simpo_loss
from tests.objectives.golden.terms import Case, Entry, both_sums, lengths, mean, mean_nll, pair_mean_nll, target_logps

BETA, SMOOTHING, RPO_ALPHA, CPO_ALPHA = 0.3, 0.1, 0.7, 0.6
NEEDS_LENGTHS, NEEDS_SMOOTHING = ("ipo", "sigmoid_norm"), ("robust", "exo_pair", "aot", "aot_unpaired")
NLL_DIFFERENCE = "TRL's NLL is one mean over the chosen tokens of the batch, ours the mean over pairs of means"

DPO: dict[str, dict[str, Any]] = {
    **{name: {"loss_type": name} for name in ("sigmoid", "hinge", "ipo_unnormalized", "discopop")},
    **{name: {"loss_type": name} for name in NEEDS_LENGTHS},
    **{name: {"loss_type": name, "label_smoothing": SMOOTHING} for name in NEEDS_SMOOTHING},
    **{name: {"loss_type": name} for name in ("nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down")},
    "forward_kl": {"f_divergence": "forward_kl"},
    "js": {"f_divergence": "js"},
    "alpha": {"f_divergence": "alpha", "alpha_divergence_coef": 0.5},
    "ipo_js": {"loss_type": "ipo", "f_divergence": "js"},
    "hinge_forward_kl": {"loss_type": "hinge", "f_divergence": "forward_kl"},
}


def dpo(case: Case, sums: Any = both_sums, **options: Any) -> Array:
    """`dpo_loss` of the sequence log-probs, plain mean over pairs."""
    policy, ref = sums(case["policy"], case["mask"]), sums(case["ref"], case["mask"])
    if options.get("loss_type") in NEEDS_LENGTHS:
        options["chosen_lengths"], options["rejected_lengths"] = lengths(case["mask"])
    return mean(
        dpo_loss(
            policy_chosen_logps=policy[0],
            policy_rejected_logps=policy[1],
            ref_chosen_logps=ref[0],
            ref_rejected_logps=ref[1],
            beta=BETA,
            **options,
        ).losses
    )


def dpo_entry(options: dict[str, Any]) -> Entry:
    text = ", ".join(f"{key} {value}" for key, value in options.items())
    return Entry("dpo_loss", text, "pairs", "policy", lambda case: dpo(case, **options))


def plain_rpo(case: Case) -> Array:
    return dpo(case, rpo_alpha=RPO_ALPHA, chosen_lengths=lengths(case["mask"][0]))


def rpo(case: Case) -> Array:
    chosen, mask = case["policy"][0], case["mask"][0]
    return plain_rpo(case) + RPO_ALPHA * (mean_nll(chosen, mask) - pair_mean_nll(chosen, mask))


def ld(case: Case) -> Array:
    public = lengths(case["mask"]).min(axis=0).astype(jnp.int32)

    def sums(token_logps: Array, masks: Array) -> Array:
        sides = zip(token_logps, masks, strict=True)
        return jnp.stack(
            [length_desensitized_logps(token_logps=x, mask=m, public_lengths=public, ld_alpha=0.4) for x, m in sides]
        )

    return dpo(case, sums)


def wpo(case: Case) -> Array:
    chosen, rejected = (
        wpo_weights(
            token_logps=case["policy"][side], log_collision=case["log_collision"][side], mask=case["mask"][side]
        )
        for side in (0, 1)
    )
    return dpo(case, pair_weights=chosen * rejected)


def nll(case: Case) -> Array:
    token_logps, mask = (x.reshape(-1, x.shape[-1]) for x in (case["policy"], case["mask"]))
    return token_mean(next_token_loss(token_logps=token_logps, mask=mask).losses, mask).mean()


def smoothed_nll(case: Case) -> Array:
    logps = jax.nn.log_softmax(case["logits"][:, :, :-1], axis=-1)
    rows = (target_logps(case), logps.mean(axis=-1), case["mask"])
    token_logps, mean_logps, mask = (x.reshape(-1, x.shape[-1]) for x in rows)
    losses = next_token_loss(
        token_logps=token_logps, mask=mask, mean_logps=mean_logps, label_smoothing=SMOOTHING
    ).losses
    return token_mean(losses, mask).mean()


def cpo(case: Case, loss_type: str, nll_coef: float = 0.0) -> Array:
    logps, mask = target_logps(case), case["mask"]
    chosen, rejected = both_sums(logps, mask)
    options: dict[str, Any] = {}
    if loss_type == "ipo" or nll_coef:
        options["chosen_lengths"] = lengths(mask[0])
    if loss_type == "ipo":
        options["rejected_lengths"] = lengths(mask[1])
    if loss_type == "sigmoid":
        options["label_smoothing"] = SMOOTHING
    losses = cpo_loss(
        policy_chosen_logps=chosen,
        policy_rejected_logps=rejected,
        beta=BETA,
        nll_coef=nll_coef,
        loss_type=loss_type,  # type: ignore[arg-type]
        **options,
    ).losses
    return mean(losses) + nll_coef * (mean_nll(logps[0], mask[0]) - pair_mean_nll(logps[0], mask[0]))


def simpo(case: Case) -> Array:
    chosen, rejected = both_sums(target_logps(case), case["mask"])
    return mean(
        simpo_loss(
            policy_chosen_logps=chosen,
            policy_rejected_logps=rejected,
            chosen_lengths=lengths(case["mask"][0]),
            rejected_lengths=lengths(case["mask"][1]),
            beta=BETA,
            gamma=0.5,
            label_smoothing=SMOOTHING,
        ).losses
    )


def plain_orpo(case: Case) -> Array:
    logps, mask = target_logps(case), case["mask"]
    chosen, rejected = both_sums(logps, mask)
    losses = orpo_loss(
        policy_chosen_logps=chosen,
        policy_rejected_logps=rejected,
        chosen_lengths=lengths(mask[0]),
        rejected_lengths=lengths(mask[1]),
        lambda_coef=BETA,
    ).losses
    return mean(losses)


def orpo(case: Case) -> Array:
    logps, mask = target_logps(case)[0], case["mask"][0]
    slots, length = jnp.arange(1, mask.shape[-1] + 1), (case["prompt"] + case["completion"])[0]
    with_prompt = slots[None] < length[:, None]
    return plain_orpo(case) + mean_nll(logps, with_prompt) - pair_mean_nll(logps, mask)


def kto(case: Case, loss_type: str) -> Array:
    point: Any = 0.0
    if loss_type == "kto":
        point = kto_reference_point(
            policy_kl_logps=sequence_sum(case["kl_policy"], case["kl_mask"]), ref_kl_logps=case["kl_ref_logps"]
        )
    return mean(
        kto_loss(
            policy_logps=sequence_sum(case["policy"], case["mask"]),
            ref_logps=case["ref_logps"],
            desirable=case["desirable"],
            reference_point=point,
            beta=BETA,
            desirable_weight=1.3,
            undesirable_weight=0.8,
            loss_type=loss_type,  # type: ignore[arg-type]
        ).losses
    )


def bradley_terry(case: Case, **options: Any) -> Array:
    chosen, rejected = case["scores"]
    return mean(bradley_terry_loss(chosen_scores=chosen, rejected_scores=rejected, **options).losses)


def cpo_entry(options: str, loss: Any, difference: str = "") -> Entry:
    return Entry("cpo_loss", options, "logits", "logits", loss, difference)


def reward_entry(options: str, loss: Any) -> Entry:
    return Entry("bradley_terry_loss", options, "scores", "scores", loss)


def kto_entry(loss_type: str) -> Entry:
    options = f"loss_type {loss_type}, weights 1.3 and 0.8"
    return Entry("kto_loss", options, "unpaired", "policy", lambda case: kto(case, loss_type))


ENTRIES = {
    "next_token/nll": Entry("next_token_loss", "`token_mean`", "pairs", "policy", nll),
    "next_token/label_smoothing": Entry("next_token_loss", "label_smoothing 0.1", "logits", "logits", smoothed_nll),
    **{f"dpo/{name}": dpo_entry(options) for name, options in DPO.items()},
    "dpo/rpo": Entry("dpo_loss", "rpo_alpha 0.7", "pairs", "policy", rpo, NLL_DIFFERENCE),
    "dpo/ld": Entry("length_desensitized_logps", "sigmoid, ld_alpha 0.4", "pairs", "policy", ld),
    "dpo/wpo": Entry("wpo_weights", "sigmoid, pair_weights", "pairs", "policy", wpo),
    "cpo/sigmoid": cpo_entry("sigmoid, label_smoothing 0.1, nll_coef 0", lambda c: cpo(c, "sigmoid")),
    "cpo/sigmoid_nll": cpo_entry(
        "sigmoid, label_smoothing 0.1, nll_coef 0.6", lambda case: cpo(case, "sigmoid", CPO_ALPHA), NLL_DIFFERENCE
    ),
    "cpo/hinge": cpo_entry("hinge, nll_coef 0", lambda case: cpo(case, "hinge")),
    "cpo/ipo": cpo_entry("ipo, nll_coef 0", lambda case: cpo(case, "ipo")),
    "cpo/simpo": Entry("simpo_loss", "gamma 0.5, label_smoothing 0.1", "logits", "logits", simpo),
    "orpo/orpo": Entry(
        "orpo_loss", "lambda_coef 0.3", "logits", "logits", orpo, f"{NLL_DIFFERENCE}; TRL's also has the prompt's"
    ),
    "kto/kto": kto_entry("kto"),
    "kto/apo_zero_unpaired": kto_entry("apo_zero_unpaired"),
    "bradley_terry/plain": reward_entry("", bradley_terry),
    "bradley_terry/margin": reward_entry("margins", lambda c: bradley_terry(c, margins=c["margins"])),
    "bradley_terry/center": reward_entry("center_coef 0.3", lambda c: bradley_terry(c, center_coef=0.3)),
}
