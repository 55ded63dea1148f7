"""transformers as a system under test: `generate`, and training steps with torch's AdamW. Needs torch, transformers."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

Work = Mapping[str, Any]


def main(work: Work, say: Callable[..., None]) -> None:
    """Serves one workload."""
    torch.set_num_threads(work["threads"])
    torch.manual_seed(work["seed"])
    device = "cuda" if work["platform"] == "gpu" else "cpu"
    model = make_llama(work).to(device=device, dtype=getattr(torch, work["model"]["param_dtype"]))
    run = rollout(work, model, device) if work["kind"] == "rollout" else train(work, model, device)
    say(parameters=sum(p.numel() for p in model.parameters()), versions=versions())
    while True:
        tokens = run()
        peak = {"peak_bytes": torch.cuda.max_memory_allocated()} if device == "cuda" else {}
        say(tokens=tokens, **peak)


def versions() -> dict[str, str]:
    """Of the packages that do the work."""
    return {"torch": torch.__version__, "transformers": transformers.__version__}


def make_llama(work: Work) -> Any:
    """A fresh Llama of Temper's shape."""
    shape = work["model"]
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=work["vocab_size"],
            hidden_size=shape["d_model"],
            intermediate_size=shape["d_ff"],
            num_hidden_layers=shape["num_layers"],
            num_attention_heads=shape["num_heads"],
            num_key_value_heads=shape["num_kv_heads"],
            head_dim=shape["head_dim"],
            rms_norm_eps=shape["norm_eps"],
            tie_word_embeddings=shape["tie_embeddings"],
            max_position_embeddings=8192,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=2,
        )
    )


def rollout(work: Work, model: Any, device: str) -> Callable[[], int]:
    """`generate` on batches, each to the wanted length of its longest row, as it would go on until all rows end."""
    model.eval()
    model.generation_config.eos_token_id = None  # rows end at their length
    prompts, lengths, size = torch.tensor(work["prompts"], device=device), work["lengths"], work["batch_size"]
    how = {"do_sample": False} if work["greedy"] else {"do_sample": True, "temperature": 1.0, "top_k": 0}

    def run() -> int:
        for start in range(0, len(prompts), size):
            batch, longest = prompts[start : start + size], max(lengths[start : start + size])
            with torch.no_grad():
                out = model.generate(
                    batch, attention_mask=torch.ones_like(batch), max_new_tokens=longest, pad_token_id=0, **how
                )
            drawn = out.shape[1] - batch.shape[1]
            assert drawn == longest, f"drew {drawn} tokens, expected {longest}"
        return sum(lengths)

    return run


def train(work: Work, model: Any, device: str) -> Callable[[], int]:
    """Steps of AdamW on full rows of random tokens."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=work["learning_rate"])
    shape = (work["batch_size"], work["length"])

    def run() -> int:
        for _ in range(work["steps"]):
            rows = torch.randint(0, work["vocab_size"], shape, device=device)
            loss = model(input_ids=rows, labels=rows).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert torch.isfinite(loss), "the loss is not finite"
        return work["steps"] * shape[0] * shape[1]

    return run
