"""TRL's online losses, advantages and divergences on the stored inputs. Needs torch and trl."""

from collections import defaultdict
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from trl.experimental.gkd import GKDTrainer
from trl.experimental.online_dpo import OnlineDPOTrainer
from trl.experimental.server_distillation.server_distillation_trainer import ServerDistillationTrainer
from trl.trainer.distillation_trainer import _chunked_divergence_loss
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.rloo_trainer import RLOOTrainer

from tests.objectives.golden.inputs import COMPLETION, EOS, GROUP, PAD
from tests.objectives.golden.offline import Case, Run, leaf
from tests.objectives.golden.stubs import trainer

MAX_LENGTH = 9
"""The completion limit in tokens, which "dr_grpo" divides by: not the width of the batch."""
IS_CAPS = {"vllm_importance_sampling_clip_min": 0.6, "vllm_importance_sampling_clip_max": 1.4}

GRPO: dict[str, dict[str, Any]] = {
    **{name: {"loss_type": name} for name in ("grpo", "bnpo", "dr_grpo", "dapo")},
    "clip_higher": {"epsilon_low": 0.1, "epsilon_high": 0.28},
    "two_sided": {"delta": 1.5},
    "kl": {"beta": 0.2},
    "kl_times_ratio": {"beta": 0.2, "use_bias_correction_kl": True},
    "kl_times_sequence_ratio": {"beta": 0.2, "use_bias_correction_kl": True, "importance_sampling_level": "sequence"},
    "sequence": {"importance_sampling_level": "sequence", "epsilon_low": 0.05, "epsilon_high": 0.08},
    "sequence_two_sided": {
        "importance_sampling_level": "sequence",
        "epsilon_low": 0.05,
        "epsilon_high": 0.08,
        "delta": 1.1,
    },
    "cispo": {"loss_type": "cispo", "epsilon_high": 1.2},
    "cispo_sequence": {"loss_type": "cispo", "epsilon_high": 1.1, "importance_sampling_level": "sequence"},
    "sapo": {"loss_type": "sapo", "beta": 0.2},
    "luspo": {"loss_type": "luspo", "importance_sampling_level": "sequence"},
    "entropy_bonus": {"entropy_coef": 0.3, "_entropy_bonus_enabled": True, "loss_type": "dapo"},
    "token_advantages": {"advantages": "token_advantages", "loss_type": "dapo"},
    "truncated_masked": {"mask_truncated_completions": True},
    **{
        f"importance_{mode}": {"use_vllm": True, "beta": 0.2, "vllm_importance_sampling_mode": mode}
        for mode in ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
    },
}
ADVANTAGES: dict[str, tuple[Any, dict[str, Any]]] = {
    "group": (GRPOTrainer, {"scale_rewards": "group"}),
    "batch": (GRPOTrainer, {"scale_rewards": "batch"}),
    "none": (GRPOTrainer, {"scale_rewards": "none"}),
    "leave_one_out": (RLOOTrainer, {}),
    "leave_one_out_whitened": (RLOOTrainer, {"normalize_advantages": True}),
    "leave_one_out_kl_in_reward": (RLOOTrainer, {"beta": 0.2}),
}
DIVERGENCES = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": 0.5, "jsd_uneven": 0.1}


def runs() -> Iterator[tuple[str, str, Run]]:
    """Variant, input family, and what computes it."""
    for name, options in GRPO.items():
        yield f"grpo/{name}", "rollouts", grpo_run(options)
    yield "rloo/clipped", "rollouts", rloo_run
    yield "dpo/ipo_unnormalized", "pairs", online_ipo_run
    for name, beta in DIVERGENCES.items():
        yield f"distillation/{name}", "teacher", gkd_run(beta, temperature=1.0)
    yield "distillation/temperature", "teacher", gkd_run(0.5, temperature=2.0)
    yield "distillation/chunked", "teacher", chunked_run
    yield "distillation/topk_bucket", "teacher", topk_run(add_tail=True)
    yield "distillation/topk_renormalize", "teacher", topk_run(add_tail=False)


def extras(inputs: dict[str, Case]) -> Iterator[tuple[str, np.ndarray]]:
    """What is not a loss: advantages and importance ratios, without a gradient."""
    rollouts = inputs["rollouts"]
    cases = [{key: value[c] for key, value in rollouts.items()} for c in range(len(rollouts["mask"]))]
    for name, (owner, options) in ADVANTAGES.items():
        values = [score(owner, case, options)["advantages"].numpy() for case in cases]
        yield f"advantages/{name}/value", np.stack(values)
    for name, options in GRPO.items():
        if name.startswith("importance_"):
            ratios = [score(GRPOTrainer, case, options)["importance_sampling_ratio"] for case in cases]
            ratio = np.stack([np.broadcast_to(pad_columns(x), rollouts["mask"].shape[1:]) for x in ratios])
            yield f"importance/{name.removeprefix('importance_')}/value", ratio * rollouts["mask"]


def pad_columns(values: torch.Tensor) -> np.ndarray:
    """Zeros up to the completion limit, unless there is one value a row."""
    width = values.shape[1]
    return np.pad(values.numpy(), ((0, 0), (0, 0 if width == 1 else COMPLETION - width)))


def score(owner: Any, case: Case, options: dict[str, Any]) -> dict[str, torch.Tensor]:
    """`_generate_and_score_completions`: masks, advantages and importance ratios from given samples."""
    lengths = case["mask"].sum(axis=1)
    ids = [row[:n].tolist() for row, n in zip(case["tokens"], lengths, strict=True)]
    width = int(lengths.max())
    rows = len(ids)
    sampled = [row[:n].tolist() for row, n in zip(case["sampler"], lengths, strict=True)]
    generated: tuple[Any, ...] = ([[1]] * rows, ids, None, ids, sampled, {}, None, None)
    if owner is RLOOTrainer:
        generated = (generated[0], ids, ids)
    policy_model, ref_model = (SimpleNamespace(training=True, is_gradient_checkpointing=False) for _ in "ab")

    def logps(model: Any, *_: Any, **__: Any) -> tuple[torch.Tensor, None, None]:
        return torch.tensor(case["old" if model is policy_model else "ref"][:, :width]), None, None

    defaults = {
        "environment_factories": None,
        "environments": None,
        "tools": None,
        "mask_truncated_completions": False,
        "num_iterations": 2,
        "use_vllm": False,
        "vllm_importance_sampling_correction": True,
        "beta": 0.0,
        "multi_objective_aggregation": "sum_then_normalize",
        "scale_rewards": "group",
        "reward_clip_range": None,
        "normalize_advantages": False,
    }
    stub = trainer(
        **defaults | IS_CAPS | options,
        model=policy_model,
        ref_model=ref_model,
        args=SimpleNamespace(
            per_device_train_batch_size=rows,
            gradient_checkpointing_kwargs=None,
            steps_per_generation=1,
            gradient_accumulation_steps=1,
        ),
        _generate=lambda _: generated,
        _get_per_token_logps_and_entropies=logps,
        _calculate_rewards=lambda *_: torch.tensor(case["rewards"])[:, None],
        _tokenizer=SimpleNamespace(pad_token_id=PAD),
        eos_token_ids=[EOS],
        pad_to_multiple_of=None,
        num_generations=GROUP,
        reward_weights=torch.ones(1),
        reward_funcs=[None],
        reward_func_names=["reward"],
        _pending_extra_logs={},
        _pending_metrics={},
    )
    stub._logs = {key: [] for key in ("prompt", "completion", "advantages")}
    stub._logs |= {"rewards": {"reward": []}, "extra": {}}
    return owner._generate_and_score_completions(stub, [{"prompt": "a"}] * rows)


def grpo_run(options: dict[str, Any]) -> Run:
    """`GRPOTrainer._compute_loss` on a batch that its own scoring made; the advantages are the given ones."""
    defaults = {
        "loss_type": "grpo",
        "importance_sampling_level": "token",
        "epsilon_low": 0.2,
        "epsilon_high": 0.2,
        "beta": 0.0,
        "max_completion_length": MAX_LENGTH,
        "top_entropy_quantile": 1.0,
        "off_policy_mask_threshold": None,
        "use_vllm": False,
        "vllm_importance_sampling_correction": True,
        "_entropy_bonus_enabled": False,
        "use_adaptive_entropy": False,
        "delta": None,
        "use_bias_correction_kl": False,
        "advantages": "advantages",
    }

    def run(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
        policy, settings = leaf(case["policy"]), defaults | options
        args = SimpleNamespace(
            delta=settings["delta"],
            use_bias_correction_kl=settings["use_bias_correction_kl"],
            sapo_temperature_pos=1.0,
            sapo_temperature_neg=1.05,
            steps_per_generation=1,
        )
        batch = score(GRPOTrainer, case, options | {"vllm_importance_sampling_correction": True})
        width = batch["completion_mask"].shape[1]
        if not settings.get("mask_truncated_completions"):
            np.testing.assert_array_equal(batch["completion_mask"].numpy() > 0, case["mask"][:, :width])
        batch["advantages"] = torch.tensor(case[str(settings["advantages"])])
        if batch["advantages"].ndim == 2:
            batch["advantages"] = batch["advantages"][:, :width]
        entropy = torch.tensor(case["entropy"])[:, :width]
        logps = (policy[:, :width], entropy, None)
        stub = trainer(**settings, args=args, _get_per_token_logps_and_entropies=lambda *_, **__: logps)
        return GRPOTrainer._compute_loss(stub, stub.model, batch), policy

    return run


def rloo_run(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """`RLOOTrainer._compute_loss`: the ratio of whole sequences, a product over tokens."""
    policy = leaf(case["policy"])
    batch = score(RLOOTrainer, case, {}) | {"advantages": torch.tensor(case["advantages"])}
    width = batch["completion_mask"].shape[1]
    logps = (policy[:, :width], torch.zeros(len(policy), width), None)
    stub = trainer(epsilon_low=0.2, epsilon_high=0.2, _get_per_token_logps_and_entropies=lambda *_, **__: logps)
    return RLOOTrainer._compute_loss(stub, stub.model, batch), policy


def online_ipo_run(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """`OnlineDPOTrainer.training_step`, whose ipo sums; the first of each two samples is paid more."""
    policy = leaf(case["policy"])
    found: list[torch.Tensor] = []
    rows = policy.shape[1]
    mask = torch.tensor(case["mask"]).flatten(0, 1)
    prompt, models = torch.ones(2 * rows, 1), {"policy": policy.flatten(0, 1)}
    models["ref"] = torch.tensor(case["ref"]).flatten(0, 1)
    stub = trainer(
        ref_model="ref",
        beta=0.3,
        args=SimpleNamespace(
            use_vllm=False,
            missing_eos_penalty=None,
            loss_type="ipo",
            torch_empty_cache_steps=None,
            optim="adamw_torch",
            n_gpu=1,
            gradient_accumulation_steps=1,
        ),
        reward_funcs=None,
        stats=defaultdict(list),
        eos_token_ids=[EOS],
        processing_class=SimpleNamespace(batch_decode=lambda ids, **_: ["a"] * len(ids)),
        _generate=lambda *_: (prompt, prompt, torch.ones_like(mask).long(), mask.long(), None),
        _forward=lambda model, *_: models[model if isinstance(model, str) else "policy"],
        _calculate_rewards_from_functions=lambda **_: torch.arange(2.0 * rows, 0.0, -1.0),
    )
    stub.accelerator.backward = found.append
    model = SimpleNamespace(train=lambda: None)
    OnlineDPOTrainer.training_step(stub, model, {"prompt": ["a"] * rows})
    return found[0], policy


def gkd_run(beta: float, temperature: float) -> Run:
    """`GKDTrainer.generalized_jsd_loss`."""

    def run(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
        student, mask = leaf(case["student"]), torch.tensor(case["mask"])
        labels = torch.where(mask, 1, -100)
        teacher = torch.tensor(case["teacher"])
        loss = GKDTrainer.generalized_jsd_loss(student, teacher, labels, beta, temperature)
        return loss, student

    return run


def chunked_run(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """`_chunked_divergence_loss` of the distillation trainer: the unembedding is the identity."""
    student, eye = leaf(case["student"]), torch.eye(case["student"].shape[-1])
    heads = (eye.clone().requires_grad_(), eye)
    mask = torch.tensor(case["mask"]).long()
    loss, _, _ = _chunked_divergence_loss(
        student, torch.tensor(case["teacher"]), *heads, mask, beta=0.3, temperature=1.5
    )
    return loss, student


def topk_run(add_tail: bool) -> Run:
    """`_compute_server_forward_kl_loss`: the teacher's two likeliest tokens, the rest in one bucket or not."""

    def run(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
        student = leaf(case["student"])
        top = torch.tensor(case["teacher"]).log_softmax(-1).topk(2)
        stub = trainer(loss_add_tail=add_tail)
        stub._reduce_divergence_loss = ServerDistillationTrainer._reduce_divergence_loss
        labels = torch.where(torch.tensor(case["mask"]), 1, -100)
        result = {"topk_logprobs": top.values, "topk_token_ids": top.indices}
        loss = ServerDistillationTrainer._compute_server_forward_kl_loss(stub, result, student.log_softmax(-1), labels)
        return loss, student

    return run
