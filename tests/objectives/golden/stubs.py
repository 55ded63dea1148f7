"""What TRL's loss methods are given in place of a trainer, a model and an accelerator. Needs torch."""

import contextlib
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import torch
from transformers.modeling_outputs import CausalLMOutput


class Accelerator:
    """One process on a CPU."""

    device = torch.device("cpu")
    num_processes, process_index, sync_gradients, parallelism_config = 1, 0, True, None

    def gather(self, value: Any, **_: Any) -> Any:
        """Nothing to gather."""
        return value

    gather_for_metrics = reduce = pad_across_processes = unwrap_model = gather

    def autocast(self) -> contextlib.AbstractContextManager[None]:
        """Float32 throughout."""
        return contextlib.nullcontext()


class FixedLogps:
    """A model whose token log-probs are given: `logps[b, t]` scores token t + 1 of row b."""

    training, is_gradient_checkpointing = True, False

    def __init__(self, logps: torch.Tensor, log_collision: torch.Tensor | None = None) -> None:
        self.logps, self.log_collision = logps, log_collision

    def __call__(self, input_ids: torch.Tensor, labels: torch.Tensor, **_: Any) -> SimpleNamespace:
        """The outputs of the patched language-model head: zero wherever the label is ignored."""
        width = input_ids.shape[1] - 1
        learned = labels[:, 1:] != -100
        logps = torch.where(learned, self.logps[:, :width], 0.0)
        zeros = torch.zeros_like(logps)
        collision = zeros if self.log_collision is None else self.log_collision[:, :width]
        return SimpleNamespace(
            log_probs=logps,
            log_sum_sq_probs=torch.where(learned, collision, 0.0),
            label_mask=learned,
            entropy=zeros,
            mean_logits=zeros,
            is_top1=zeros.bool(),
        )


class FixedLogits:
    """A model whose logits are given."""

    training = True

    def __init__(self, logits: torch.Tensor) -> None:
        self.logits = logits

    def __call__(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None, **_: Any) -> Any:
        """The logits, cut to the width of the batch."""
        logits = self.logits[:, : input_ids.shape[1]]
        if labels is None:
            return CausalLMOutput(logits=logits)
        return FixedLogps(torch.zeros_like(logits[:, 1:, 0]))(input_ids, labels)


def trainer(**attributes: Any) -> SimpleNamespace:
    """What every loss method reads from `self`, and the given attributes."""
    common = {
        "accelerator": Accelerator(),
        "model": SimpleNamespace(training=True, is_gradient_checkpointing=False),
        "ref_model": None,
        "aux_loss_enabled": False,
        "_metrics": defaultdict(lambda: defaultdict(list)),
        "_logs": defaultdict(lambda: defaultdict(list)),
        "_total_train_tokens": 0,
        "_tp_size": 1,
        "current_gradient_accumulation_steps": 1,
    }
    return SimpleNamespace(**common | attributes)
