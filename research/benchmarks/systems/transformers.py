"""transformers as a system under test: `generate`, and a training step with torch's AdamW. Needs torch too."""

from collections.abc import Callable, Mapping
from typing import Any

from research.benchmarks.systems.channel import Channel

Lap = Callable[[], dict[str, float]]
Work = Mapping[str, Any]


def main() -> None:
    """Serves one workload."""
    channel = Channel()
    work = channel.workload
    import torch
    import transformers

    torch.set_num_threads(work["threads"])
    torch.manual_seed(work["seed"])
    device = "cuda" if work["platform"] == "gpu" else "cpu"
    model = make_llama(work["model"]).to(device=device, dtype=getattr(torch, work["model"]["param_dtype"]))
    lap = (rollout if work["kind"] == "rollout" else train)(work, model, device)
    channel.describe(
        parameters=sum(p.numel() for p in model.parameters()),
        versions={"torch": torch.__version__, "transformers": transformers.__version__},
    )
    channel.repeat(lap)


def make_llama(shape: Mapping[str, Any]) -> Any:
    """A fresh Llama of Temper's shape."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=shape["vocab_size"],
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


def rollout(work: Work, model: Any, device: str) -> Lap:
    """`generate` on batches; each row is done at its wanted length, each batch when its longest row is."""
    import torch
    from transformers import StoppingCriteria, StoppingCriteriaList

    class WantedLength(StoppingCriteria):
        """Says of each row whether it is done."""

        def __init__(self, ends: Any) -> None:
            self._ends = ends

        def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
            del scores
            return input_ids.shape[1] >= self._ends

    model.eval()
    model.generation_config.eos_token_id = None  # rows end at their length
    prompts = torch.tensor(work["prompts"], device=device)
    lengths = torch.tensor(work["lengths"], device=device)
    how = {"do_sample": False} if work["greedy"] else {"do_sample": True, "temperature": 1.0, "top_k": 0}

    def lap() -> dict[str, float]:
        size = work["batch_size"]
        with torch.no_grad():
            for start in range(0, len(prompts), size):
                batch, wanted = prompts[start : start + size], lengths[start : start + size]
                out = model.generate(
                    batch,
                    attention_mask=torch.ones_like(batch),
                    max_new_tokens=work["max_new_tokens"],
                    stopping_criteria=StoppingCriteriaList([WantedLength(batch.shape[1] + wanted)]),
                    pad_token_id=0,
                    **how,
                )
                drawn = out.shape[1] - batch.shape[1]
                assert drawn == int(wanted.max()), f"drew {drawn} tokens, expected {int(wanted.max())}"
        return {"tokens": float(lengths.sum()), **device_peak(device)}

    return lap


def train(work: Work, model: Any, device: str) -> Lap:
    """Steps of AdamW on full rows of random tokens."""
    import torch

    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=work["optimizer"]["learning_rate"])
    shape = (work["batch_size"], work["length"])

    def lap() -> dict[str, float]:
        for _ in range(work["steps"]):
            rows = torch.randint(0, work["model"]["vocab_size"], shape, device=device)
            loss = model(input_ids=rows, labels=rows).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert torch.isfinite(loss), "the loss is not finite"
        return {"tokens": float(work["steps"] * shape[0] * shape[1]), **device_peak(device)}

    return lap


def device_peak(device: str) -> dict[str, float]:
    """The most memory of the accelerator in use so far; nothing on a CPU."""
    import torch

    return {"device_bytes": float(torch.cuda.max_memory_allocated())} if device == "cuda" else {}


if __name__ == "__main__":
    main()
