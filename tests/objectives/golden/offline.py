"""TRL's offline losses on the stored inputs. Needs torch and trl.

Every number comes from a trainer's own method and collator, called with a stub in place of the trainer.
"""

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from transformers.trainer_pt_utils import LabelSmoother
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference, DPOTrainer
from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference, KTOTrainer
from trl.trainer.reward_trainer import RewardTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling, SFTTrainer

from tests.objectives.golden.inputs import PAD
from tests.objectives.golden.stubs import FixedLogits, FixedLogps, trainer

Case = dict[str, np.ndarray]
Run = Callable[[Case], tuple[torch.Tensor, torch.Tensor]]
"""From one case's inputs to the loss and the array that it is differentiated for."""

PLAIN = {"beta": 0.3, "label_smoothing": 0.0}
SMOOTH = {"beta": 0.3, "label_smoothing": 0.1}
DPO: dict[str, dict[str, Any]] = {
    **{name: PLAIN | {"loss_types": [name]} for name in ("sigmoid", "sigmoid_norm", "hinge", "ipo")},
    **{name: SMOOTH | {"loss_types": [name]} for name in ("robust", "exo_pair", "aot", "aot_unpaired")},
    **{name: PLAIN | {"loss_types": [name]} for name in ("nca_pair", "bco_pair", "sppo_hard")},
    **{name: PLAIN | {"loss_types": [name]} for name in ("apo_zero", "apo_down", "discopop")},
    "forward_kl": PLAIN | {"f_divergence_type": "forward_kl"},
    "js": PLAIN | {"f_divergence_type": "js_divergence"},
    "alpha": PLAIN | {"f_divergence_type": "alpha_divergence"},
    "ipo_js": PLAIN | {"loss_types": ["ipo"], "f_divergence_type": "js_divergence"},
    "hinge_forward_kl": PLAIN | {"loss_types": ["hinge"], "f_divergence_type": "forward_kl"},
    "rpo": PLAIN | {"loss_types": ["sigmoid", "sft"], "loss_weights": [1.0, 0.7]},
    "ld": PLAIN | {"ld_alpha": 0.4},
    "wpo": PLAIN | {"use_weighting": True},
}
CPO: dict[str, dict[str, Any]] = {
    "sigmoid": {"loss_type": "sigmoid", "cpo_alpha": 0.0},
    "sigmoid_nll": {"loss_type": "sigmoid", "cpo_alpha": 0.6},
    "hinge": {"loss_type": "hinge", "cpo_alpha": 0.0},
    "ipo": {"loss_type": "ipo", "cpo_alpha": 0.0},
    "simpo": {"loss_type": "simpo", "cpo_alpha": 0.0},
}
KTO: dict[str, dict[str, Any]] = {
    "kto": {"loss_type": "kto", "calculate_KL": True},
    "apo_zero_unpaired": {"loss_type": "apo_zero_unpaired", "calculate_KL": False},
}


def runs() -> Iterator[tuple[str, str, Run]]:
    """Variant, input family, and what computes it."""
    yield "next_token/nll", "pairs", sft_run
    yield "next_token/label_smoothing", "logits", smoothed_sft_run
    for name, options in DPO.items():
        yield f"dpo/{name}", "pairs", dpo_run(options)
    for name, options in CPO.items():
        yield f"cpo/{name}", "logits", odds_run(CPOTrainer, options | {"label_smoothing": 0.1})
    yield "orpo/orpo", "logits", odds_run(ORPOTrainer, {})
    for name, options in KTO.items():
        yield f"kto/{name}", "unpaired", kto_run(options)
    yield "bradley_terry/plain", "scores", reward_run(None, False)
    yield "bradley_terry/margin", "scores", reward_run(None, True)
    yield "bradley_terry/center", "scores", reward_run(0.3, False)


def leaf(values: np.ndarray) -> torch.Tensor:
    """A tensor that collects a gradient."""
    return torch.tensor(values, requires_grad=True)


def split(tokens: np.ndarray, prompt: np.ndarray, completion: np.ndarray) -> tuple[list[int], list[int]]:
    """One row's prompt and completion, as the collators want them: without padding, not yet truncated."""
    return tokens[:prompt].tolist(), tokens[prompt : prompt + completion].tolist()


def preference_batch(case: Case, slots: int) -> dict[str, torch.Tensor]:
    """The trainer's collator on the pairs, truncating at `slots + 1` tokens."""
    examples = []
    for b in range(case["prompt"].shape[1]):
        chosen, rejected = (
            split(*(case[name][side, b] for name in ("tokens", "prompt", "completion"))) for side in (0, 1)
        )
        examples.append({"prompt_ids": chosen[0], "chosen_ids": chosen[1], "rejected_ids": rejected[1]})
    return DataCollatorForPreference(pad_token_id=PAD, max_length=slots + 1)(examples)


def check_mask(batch_mask: torch.Tensor, ours: np.ndarray) -> None:
    """TRL's mask, built by its collator from token lists, is ours, built from lengths."""
    np.testing.assert_array_equal(batch_mask[:, 1:].bool().numpy(), ours[:, : batch_mask.shape[1] - 1])


def sft_run(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """`SFTTrainer.compute_loss` on both sides of the pairs."""
    slots = case["mask"].shape[-1]
    policy = leaf(case["policy"])
    batch = language_batch(case, slots)
    stub = trainer(
        compute_loss_func=None,
        label_smoother=None,
        args=SimpleNamespace(loss_type="nll", average_tokens_across_devices=False),
    )
    loss = SFTTrainer.compute_loss(stub, FixedLogps(policy.reshape(-1, slots)), batch)
    return loss, policy


def smoothed_sft_run(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """The same with label smoothing, which needs the logits."""
    logits = leaf(case["logits"])
    stub = trainer(
        compute_loss_func=None,
        label_smoother=LabelSmoother(epsilon=0.1),
        args=SimpleNamespace(loss_type="nll", average_tokens_across_devices=False),
    )
    batch = language_batch(case, case["mask"].shape[-1])
    return SFTTrainer.compute_loss(stub, FixedLogits(logits.reshape(-1, *logits.shape[2:])), batch), logits


def language_batch(case: Case, slots: int) -> dict[str, torch.Tensor]:
    """The SFT collator on `prompt + completion` with labels on the completion only."""
    flat = [case[name].reshape(-1, *case[name].shape[2:]) for name in ("tokens", "prompt", "completion")]
    examples = []
    for row in zip(*flat, strict=True):
        prompt, completion = split(*row)
        labels = [-100] * len(prompt) + completion
        examples.append({"input_ids": (prompt + completion)[: slots + 1], "labels": labels[: slots + 1]})
    batch = DataCollatorForLanguageModeling(pad_token_id=PAD)(examples)
    check_mask(batch["labels"] != -100, case["mask"].reshape(-1, slots))
    return batch


def dpo_run(options: dict[str, Any]) -> Run:
    """`DPOTrainer._compute_loss`; the reference is a second model."""
    defaults = {
        "loss_types": ["sigmoid"],
        "loss_weights": [1.0],
        "f_divergence_type": "reverse_kl",
        "f_alpha_divergence_coef": 0.5,
        "ld_alpha": None,
        "use_weighting": False,
        "precompute_ref_logps": False,
        "args": SimpleNamespace(discopop_tau=0.05, gradient_checkpointing_kwargs=None),
    }

    def run(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
        slots = case["mask"].shape[-1]
        policy = leaf(case["policy"])
        rows = lambda name: torch.tensor(case[name]).reshape(-1, slots)  # noqa: E731
        batch = preference_batch(case, slots)
        check_mask(batch["completion_mask"], case["mask"].reshape(-1, slots))
        stub = trainer(ref_model=FixedLogps(rows("ref")), **defaults | options)
        model = FixedLogps(policy.reshape(-1, slots), rows("log_collision"))
        return DPOTrainer._compute_loss(stub, model, batch, False), policy

    return run


def odds_run(owner: Any, options: dict[str, Any]) -> Run:
    """`get_batch_loss_metrics` of the reference-free trainers, from logits."""

    def run(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
        logits = leaf(case["logits"])
        slots = case["mask"].shape[-1]
        batch = preference_batch(case, slots)
        check_mask(batch["completion_mask"], case["mask"].reshape(-1, slots))
        labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
        fields = {"input_ids": batch["input_ids"], "labels": labels, "attention_mask": batch["attention_mask"]}
        halves = {name: value.chunk(2) for name, value in fields.items()}
        sides = {f"chosen_{name}": value[0] for name, value in halves.items()}
        sides |= {f"rejected_{name}": value[1] for name, value in halves.items()}
        stub = trainer(
            **{"beta": 0.3, "alpha": 0.0, "simpo_gamma": 0.5, "is_encoder_decoder": False} | options,
            padding_value=PAD,
            pad_token_id=PAD,
        )
        for name in ("concatenated_forward", "cpo_loss", "odds_ratio_loss"):
            if hasattr(owner, name):
                setattr(stub, name, getattr(owner, name).__get__(stub))
        for name in ("concatenated_inputs", "get_batch_logps"):
            setattr(stub, name, getattr(owner, name))
        model = FixedLogits(logits.reshape(-1, *logits.shape[2:]))
        return owner.get_batch_loss_metrics(stub, model, sides)[0], logits

    return run


def kto_run(options: dict[str, Any]) -> Run:
    """`KTOTrainer._compute_loss` with precomputed reference log-probs."""

    def run(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
        slots = case["mask"].shape[-1]
        policy = leaf(case["policy"])
        examples = []
        for b in range(len(case["prompt"])):
            prompt, completion = split(case["tokens"][b], case["prompt"][b], case["completion"][b])
            # The mismatched completion has its own row, prompt included, in our inputs.
            examples.append(
                {"prompt_ids": prompt, "completion_ids": completion, "label": bool(case["desirable"][b])}
                | {"ref_logps": float(case["ref_logps"][b])}
                | {"ref_KL_logps": float(case["kl_ref_logps"][b])}
            )
        batch = DataCollatorForUnpairedPreference(pad_token_id=PAD, max_length=slots + 1)(examples)
        check_mask(batch["completion_mask"], case["mask"])
        batch |= mismatched_batch(case, slots)
        models = [FixedLogps(torch.tensor(case["kl_policy"])), FixedLogps(policy)]
        stub = trainer(
            **{"beta": 0.3, "desirable_weight": 1.3, "undesirable_weight": 0.8} | options, precompute_ref_logps=True
        )
        stub._compute_kl_logps = lambda _, inputs: KTOTrainer._compute_kl_logps(stub, models[0], inputs)
        return KTOTrainer._compute_loss(stub, models[1], batch, False), policy

    return run


def mismatched_batch(case: Case, slots: int) -> dict[str, torch.Tensor]:
    """The mismatched rows through the same collator, under the names the loss reads."""
    examples = []
    for b in range(len(case["kl_prompt"])):
        row = [case[f"kl_{name}"][b] for name in ("tokens", "prompt", "completion")]
        prompt, completion = split(*row)
        examples.append({"prompt_ids": prompt, "completion_ids": completion, "label": True})
    batch = DataCollatorForUnpairedPreference(pad_token_id=PAD, max_length=slots + 1)(examples)
    check_mask(batch["completion_mask"], case["kl_mask"])
    return {f"KL_{name}": value for name, value in batch.items() if name != "label"}


def reward_run(center: float | None, with_margin: bool) -> Run:
    """`RewardTrainer.compute_loss`; the model returns the scores."""

    def run(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
        scores = leaf(case["scores"])
        stub = trainer(args=SimpleNamespace(center_rewards_coefficient=center))
        inputs = {"attention_mask": torch.ones(scores.numel(), 2)}

        def model(**_: Any) -> SimpleNamespace:
            return SimpleNamespace(logits=scores.reshape(-1, 1))

        model_inputs = inputs | ({"margin": torch.tensor(case["margins"])} if with_margin else {})
        return RewardTrainer.compute_loss(stub, model, model_inputs), scores

    return run
