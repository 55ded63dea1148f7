"""Our GRPO family, advantages and distillation against TRL's."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from objectives.advantages import group_advantages
from objectives.distillation import distillation_loss, topk_distillation_loss
from objectives.grpo import grpo_loss
from objectives.importance import importance_weights
from objectives.kl import kl_estimate
from objectives.ppo import ppo_policy_loss
from objectives.reduce import reduce, sequence_sum, token_mean
from tests.objectives.golden.inputs import GROUP
from tests.objectives.golden.terms import Case, Entry

MAX_LENGTH = 9.0
CAPS = {"cap": 1.4, "floor": 0.6}
KL = {"beta": 0.2}
SAPO = {"surrogate": "sapo", "sapo_temperature_pos": 1.0, "sapo_temperature_neg": 1.05}

GRPO: dict[str, tuple[str, dict[str, Any]]] = {
    "grpo": ("sequence_mean", {}),
    "bnpo": ("token_mean", {}),
    "dr_grpo": ("constant", {}),
    "dapo": ("token_mean", {}),
    "clip_higher": ("sequence_mean", {"clip_eps_low": 0.1, "clip_eps_high": 0.28}),
    "two_sided": ("sequence_mean", {"delta": 1.5}),
    "kl": ("sequence_mean", KL),
    "kl_times_ratio": ("sequence_mean", KL | {"kl_correction": "ratio"}),
    "sequence": ("sequence_mean", {"ratio_level": "sequence", "clip_eps_low": 0.05, "clip_eps_high": 0.08}),
    "cispo": ("token_mean", {"surrogate": "cispo", "cispo_clip": 1.2}),
    "cispo_sequence": ("token_mean", {"surrogate": "cispo", "cispo_clip": 1.1, "ratio_level": "sequence"}),
    "sapo": ("sequence_mean", SAPO | KL),
    "token_advantages": ("token_mean", {}),
}


def surrogate(case: Case, aggregation: str, max_length: float = MAX_LENGTH, **options: Any) -> Array:
    """`grpo_loss`, reduced."""
    if "beta" in options:
        options["ref_logps"] = case["ref"]
    losses = grpo_loss(
        policy_logps=case["policy"],
        old_logps=case["old"],
        **{"advantages": case["advantages"], "completion_mask": case["mask"]} | options,
    ).losses
    mask = options.get("completion_mask", case["mask"])
    return reduce(losses, mask, aggregation=aggregation, max_length=max_length).mean()  # type: ignore[arg-type]


def grpo_entry(name: str) -> Entry:
    aggregation, options = GRPO[name]

    def loss(case: Case) -> Array:
        given = {"advantages": case["token_advantages"]} if name == "token_advantages" else {}
        return surrogate(case, aggregation, **options, **given)

    text = ", ".join([f"`{aggregation}`", *(f"{key} {value}" for key, value in options.items())])
    return Entry("grpo_loss", f"{name}: {text}", "rollouts", "policy", loss)


def weighted(case: Case, level: str, mode: str) -> Array:
    """The weights of the sampler's log-probs."""
    return importance_weights(
        old_logps=case["old"],
        sampler_logps=case["sampler"],
        completion_mask=case["mask"],
        level=level,  # type: ignore[arg-type]
        mode=mode,  # type: ignore[arg-type]
        **CAPS,
    )


def importance_entries(level: str, mode: str) -> dict[str, Entry]:
    def loss(case: Case) -> Array:
        return surrogate(case, "sequence_mean", importance_weights=weighted(case, level, mode), **KL)

    def value(case: Case) -> Array:
        return weighted(case, level, mode)

    options = f"{level}, {mode}, floor 0.6, cap 1.4"
    return {
        f"grpo/importance_{level}_{mode}": Entry(
            "grpo_loss", f"importance_weights: {options}, beta 0.2", "rollouts", "policy", loss
        ),
        f"importance/{level}_{mode}": Entry("importance_weights", options, "rollouts", None, value, output="value"),
    }


def two_sided_sequence(case: Case) -> Array:
    clip = {"clip_eps_low": 0.05, "clip_eps_high": 0.08, "delta": 1.1}
    return surrogate(case, "sequence_mean", ratio_level="sequence", **clip)


def plain_kl_times_sequence_ratio(case: Case) -> Array:
    return surrogate(case, "sequence_mean", ratio_level="sequence", kl_correction="ratio", **KL)


def kl_times_sequence_ratio(case: Case) -> Array:
    """The surrogate alone, then TRL's penalty: one ratio a sequence."""
    mask = case["mask"]
    plain = surrogate(case, "sequence_mean", ratio_level="sequence")
    gap = sequence_sum(case["policy"] - case["old"], mask) / mask.sum(axis=1)
    penalty = kl_estimate(case["policy"], case["ref"], "k3") * jnp.exp(gap)[:, None]
    return plain + KL["beta"] * reduce(penalty, mask, aggregation="sequence_mean").mean()


def luspo(case: Case) -> Array:
    return surrogate(case, "constant", max_length=1.0, ratio_level="sequence")


def plain_truncated_masked(case: Case) -> Array:
    mask = case["mask"] & case["stopped"][:, None]
    return surrogate(case, "sequence_mean", completion_mask=mask)


def truncated_masked(case: Case) -> Array:
    """Our count leaves out the rows without a token; TRL's does not."""
    return plain_truncated_masked(case) * case["stopped"].mean()


def entropy_bonus(case: Case) -> Array:
    losses = ppo_policy_loss(
        policy_logps=case["policy"],
        old_logps=case["old"],
        advantages=jnp.broadcast_to(case["advantages"][:, None], case["mask"].shape),
        completion_mask=case["mask"],
        entropy=case["entropy"],
        entropy_coef=0.3,
    ).losses
    return token_mean(losses, case["mask"]).mean()


def rloo(case: Case) -> Array:
    """A sequence is one action: its summed log-prob is the only token."""
    sums = {name: sequence_sum(case[name], case["mask"])[:, None] for name in ("policy", "old")}
    one = jnp.ones_like(sums["old"], dtype=bool)
    losses = grpo_loss(
        policy_logps=sums["policy"], old_logps=sums["old"], advantages=case["advantages"], completion_mask=one
    ).losses
    return token_mean(losses, one).mean()


def advantages(case: Case, **options: Any) -> Array:
    return group_advantages(case["rewards"], GROUP, **options)


def has_spread(case: Case) -> Array:
    """Rows of groups whose rewards are not all equal."""
    groups = case["rewards"].reshape(-1, GROUP)
    return jnp.repeat((groups != groups[:, :1]).any(axis=1), GROUP)


def leave_one_out(case: Case) -> Array:
    return advantages(case, baseline="leave_one_out", normalization="none")


def whitened(case: Case) -> Array:
    raw = leave_one_out(case)
    return (raw - raw.mean()) / (raw.std(ddof=1) + 1e-4)


def kl_in_reward(case: Case) -> Array:
    penalty = sequence_sum(kl_estimate(case["old"], case["ref"], "k1"), case["mask"])
    paid = {"rewards": case["rewards"] - 0.2 * penalty}
    return leave_one_out(paid)


def divergence(case: Case, name: str, jsd_beta: float = 0.5, temperature: float = 1.0) -> Array:
    losses = distillation_loss(
        student_logits=case["student"],
        teacher_logits=case["teacher"],
        mask=case["mask"],
        divergence=name,  # type: ignore[arg-type]
        jsd_beta=jsd_beta,
        temperature=temperature,
    ).losses
    return token_mean(losses, case["mask"]).mean()


def top_two(case: Case, tail: str) -> Array:
    teacher, tokens = jax.lax.top_k(jax.nn.log_softmax(case["teacher"], axis=-1), 2)
    student = jnp.take_along_axis(jax.nn.log_softmax(case["student"], axis=-1), tokens, axis=-1)
    losses = topk_distillation_loss(
        student_topk_logps=student,
        teacher_topk_logps=teacher,
        mask=case["mask"],
        divergence="forward_kl",
        tail=tail,  # type: ignore[arg-type]
    ).losses
    return token_mean(losses, case["mask"]).mean()


def rollout_entry(objective: str, options: str, loss: Any, difference: str = "") -> Entry:
    return Entry(objective, options, "rollouts", "policy", loss, difference)


def advantage_entry(options: str, value: Any, difference: str = "") -> Entry:
    return Entry("group_advantages", options, "rollouts", None, value, difference, "value")


def teacher_entry(objective: str, options: str, loss: Any, difference: str = "") -> Entry:
    return Entry(objective, options, "teacher", "student", loss, difference)


ENTRIES = {
    **{f"grpo/{name}": grpo_entry(name) for name in GRPO},
    "grpo/sequence_two_sided": rollout_entry("grpo_loss", "ratio_level sequence, delta 1.1", two_sided_sequence),
    "grpo/kl_times_sequence_ratio": rollout_entry(
        "grpo_loss",
        "ratio_level sequence, kl_correction ratio",
        kl_times_sequence_ratio,
        "ours corrects a token's KL by its own ratio at every level, TRL's by the sequence's: `k_t * ratio_t` "
        "against `k_t * exp(mean_u (l_u - l_old_u))`",
    ),
    "grpo/luspo": rollout_entry("grpo_loss", "ratio_level sequence, `constant` with `L_max` 1", luspo),
    "grpo/truncated_masked": rollout_entry(
        "grpo_loss",
        "truncated completions masked out",
        truncated_masked,
        "TRL's mean counts a row without a token: `TRL = ours * #{b: n_b >= 1} / B`",
    ),
    "grpo/entropy_bonus": rollout_entry("ppo_policy_loss", "entropy_coef 0.3, `token_mean`", entropy_bonus),
    **importance_entries("token", "truncate"),
    **importance_entries("token", "mask"),
    **importance_entries("sequence", "truncate"),
    **importance_entries("sequence", "mask"),
    "rloo/clipped": rollout_entry("grpo_loss", "RLOO: one summed log-prob a sequence", rloo),
    "advantages/group": Entry(
        "group_advantages",
        "normalization group",
        "rollouts",
        None,
        advantages,
        "equal rewards give exactly 0; TRL divides the rounding error of their mean by 1e-4 (below 1e-3 here; "
        "compared elsewhere)",
        "value",
        has_spread,
    ),
    "advantages/batch": advantage_entry("normalization batch", lambda case: advantages(case, normalization="batch")),
    "advantages/none": advantage_entry("normalization none", lambda case: advantages(case, normalization="none")),
    "advantages/leave_one_out": advantage_entry("baseline leave_one_out", leave_one_out),
    "advantages/leave_one_out_whitened": advantage_entry(
        "baseline leave_one_out, whitened",
        whitened,
        "TRL divides by the std of the advantages, ours (`batch`) by that of the rewards: "
        "`TRL = A / (std(A) + 1e-4)` with ours `A` of normalization none",
    ),
    "advantages/leave_one_out_kl_in_reward": advantage_entry(
        "baseline leave_one_out, KL (k1) in the reward", kl_in_reward
    ),
    "distillation/forward_kl": teacher_entry(
        "distillation_loss", "forward_kl (TRL's beta 0)", lambda case: divergence(case, "forward_kl")
    ),
    "distillation/reverse_kl": teacher_entry(
        "distillation_loss", "reverse_kl (TRL's beta 1)", lambda case: divergence(case, "reverse_kl")
    ),
    "distillation/jsd": teacher_entry("distillation_loss", "jsd", lambda case: divergence(case, "jsd")),
    "distillation/jsd_uneven": teacher_entry(
        "distillation_loss", "jsd, jsd_beta 0.1", lambda case: divergence(case, "jsd", 0.1)
    ),
    "distillation/temperature": teacher_entry(
        "distillation_loss", "jsd, temperature 2", lambda case: divergence(case, "jsd", 0.5, 2.0)
    ),
    "distillation/chunked": teacher_entry(
        "distillation_loss",
        "jsd, jsd_beta 0.3, temperature 1.5 (TRL's chunked kernel)",
        lambda case: divergence(case, "jsd", 0.3, 1.5),
    ),
    "distillation/topk_bucket": teacher_entry(
        "topk_distillation_loss", "forward_kl, tail bucket", lambda case: top_two(case, "bucket")
    ),
    "distillation/topk_renormalize": teacher_entry(
        "topk_distillation_loss", "forward_kl, tail renormalize", lambda case: top_two(case, "renormalize")
    ),
}
