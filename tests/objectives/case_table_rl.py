"""Property-test rows of the reinforcement-learning, process-reward and distillation objectives."""

import numpy as np

from objectives.distillation import distillation_loss, topk_distillation_loss
from objectives.grpo import grpo_loss
from objectives.ppo import ppo_policy_loss, ppo_value_loss
from objectives.prm import prm_loss
from tests.objectives.case import B, Case, T, V
from tests.objectives.cases import random_logps


def normal(rng, *shape):
    return rng.normal(size=shape).astype(np.float32)


def grpo_arrays(rng):
    old = random_logps(rng, B, T)
    # ratios well inside, below and above the clip, so that finite differences do not straddle a kink
    gaps = {"policy_logps": [-0.5, -0.1, 0.05, 0.5], "ref_logps": [-0.3, 0.2]}
    near = {name: old + rng.choice(gap, (B, T)).astype(np.float32) for name, gap in gaps.items()}
    return {"old_logps": old, "advantages": rng.normal(size=B).astype(np.float32), **near}


def token_arrays(rng):
    return grpo_arrays(rng) | {"advantages": normal(rng, B, T)}


def sequence_arrays(rng):
    """One gap per row, so that the sequence ratios keep off the kinks too; clipped on either side."""
    arrays = grpo_arrays(rng)
    gaps = np.array([-0.5, 0.05, 0.5, -0.1] * 2, np.float32)[:, None]
    advantages = np.array([-0.8, 0.5, 1.2, 1.0, 0.7, -0.4, -1.5, 0.9], np.float32)
    return arrays | {"policy_logps": arrays["old_logps"] + gaps, "advantages": advantages}


def cispo_arrays(rng):
    """All above the cap: there the weight is constant and finite differences see the gradient."""
    arrays = token_arrays(rng)
    return arrays | {"policy_logps": arrays["old_logps"] + rng.uniform(0.5, 0.9, (B, T)).astype(np.float32)}


def weighted_arrays(rng):
    return token_arrays(rng) | {"importance_weights": rng.uniform(0.5, 2.0, (B, T)).astype(np.float32)}


def ppo_arrays(rng):
    return token_arrays(rng) | {"entropy": rng.exponential(1.0, (B, T)).astype(np.float32)}


def value_arrays(rng):
    old, returns = normal(rng, B, T), normal(rng, B, T) * 3
    moves = rng.choice([-0.6, -0.1, 0.1, 0.6], (B, T)).astype(np.float32)
    return {"values": old + moves, "old_values": old, "returns": returns}


def plain_value_arrays(rng):
    return {"values": normal(rng, B, T), "returns": normal(rng, B, T)}


def prm_arrays(rng):
    return {"step_logits": normal(rng, B, T, 2), "labels": rng.random((B, T)).astype(np.float32)}


def logits_arrays(rng):
    return {"student_logits": normal(rng, B, T, V), "teacher_logits": normal(rng, B, T, V)}


def topk_arrays(rng):
    """The three most likely of V + 1, so that some probability is left."""

    def logps():
        logits = normal(rng, B, T, V + 1).astype(float)
        return logits - np.log(np.exp(logits).sum(-1, keepdims=True))

    teacher, student = logps(), logps()
    top = np.argsort(-teacher, axis=-1)[..., :3]
    names = {"teacher_topk_logps": teacher, "student_topk_logps": student}
    return {name: np.take_along_axis(x, top, -1).astype(np.float32) for name, x in names.items()}


CLIP = {"clip_eps_low": 0.2, "clip_eps_high": 0.28}
GRPO = {
    "loss": grpo_loss,
    "differentiable": {"policy_logps"},
    "arrays": grpo_arrays,
    "scalars": {**CLIP, "beta": 0.3},
    "masks": ("completion_mask",),
}
CISPO = {**GRPO, "arrays": cispo_arrays, "scalars": {"cispo_clip": 1.3, "beta": 0.3}}
SAPO_TEMPERATURES = {"sapo_temperature_pos": 1.0, "sapo_temperature_neg": 1.5}
SAPO = {
    **GRPO,
    "scalars": {**SAPO_TEMPERATURES, "beta": 0.3},
    "positive": frozenset(SAPO_TEMPERATURES),
    "aggregations": ("token_mean",),
}
PPO = {
    "loss": ppo_policy_loss,
    "differentiable": {"policy_logps", "entropy"},
    "arrays": ppo_arrays,
    "scalars": {**CLIP, "entropy_coef": 0.1, "kl_coef": 0.3},
    "masks": ("completion_mask",),
}
DISTILLATION = {
    "loss": distillation_loss,
    "differentiable": {"student_logits"},
    "arrays": logits_arrays,
    "scalars": {"temperature": 1.5},
    "masks": ("mask",),
    "positive": frozenset({"temperature"}),
    "aggregations": ("token_mean",),
}
TOPK = {
    "loss": topk_distillation_loss,
    "differentiable": {"student_topk_logps"},
    "arrays": topk_arrays,
    "scalars": {},
    "masks": ("mask",),
    "aggregations": ("token_mean",),
}
JSD_SCALARS = {"jsd_beta": 0.3}
CASES = {
    "grpo_k3": Case(**GRPO, options={"kl_estimator": "k3"}),
    "grpo_k2": Case(**GRPO, options={"kl_estimator": "k2"}, aggregations=("token_mean",)),
    "grpo_token_advantages": Case(**GRPO | {"arrays": token_arrays}, aggregations=("token_mean",)),
    "grpo_corrected_kl": Case(**GRPO, options={"kl_correction": "ratio"}, aggregations=("token_mean",)),
    "grpo_two_sided": Case(**GRPO | {"scalars": {**GRPO["scalars"], "delta": 1.5}}, aggregations=("token_mean",)),
    "grpo_importance": Case(**GRPO | {"arrays": weighted_arrays}, aggregations=("token_mean",)),
    "gspo": Case(**GRPO | {"arrays": sequence_arrays}, options={"ratio_level": "sequence"}),
    "gspo_token": Case(**GRPO | {"arrays": sequence_arrays}, options={"ratio_level": "sequence_token"}),
    "cispo": Case(**CISPO, options={"surrogate": "cispo"}, aggregations=("token_mean",)),
    "cispo_sequence": Case(
        **CISPO, options={"surrogate": "cispo", "ratio_level": "sequence"}, aggregations=("token_mean",)
    ),
    "sapo": Case(**SAPO, options={"surrogate": "sapo"}),
    "ppo_policy_k3": Case(**PPO),
    "ppo_policy_k2_dual": Case(
        **PPO | {"scalars": {**PPO["scalars"], "dual_clip": 1.5}},
        options={"kl_estimator": "k2"},
        aggregations=("token_mean",),
    ),
    "ppo_value": Case(ppo_value_loss, {"values"}, value_arrays, {"clip_eps_value": 0.3}, masks=("completion_mask",)),
    "ppo_value_unclipped": Case(
        ppo_value_loss,
        {"values"},
        plain_value_arrays,
        {},
        ("token_mean",),
        {"old_values": None, "clip_eps_value": None},
        ("completion_mask",),
    ),
    "prm": Case(prm_loss, {"step_logits"}, prm_arrays, {}, masks=("label_mask",)),
    "distillation_forward_kl": Case(**DISTILLATION, options={"divergence": "forward_kl"}),
    "distillation_reverse_kl": Case(**DISTILLATION, options={"divergence": "reverse_kl"}),
    "distillation_jsd": Case(
        **DISTILLATION | {"scalars": DISTILLATION["scalars"] | JSD_SCALARS}, options={"divergence": "jsd"}
    ),
    **{
        f"topk_{tail}_{divergence}": Case(
            **TOPK | {"scalars": JSD_SCALARS if divergence == "jsd" else {}},
            options={"tail": tail, "divergence": divergence},
        )
        for tail in ("renormalize", "bucket")
        for divergence in ("forward_kl", "reverse_kl", "jsd")
    },
}
