"""Tunix as a system under test: its sampler, and a training step of its Llama with optax. Needs google-tunix, chex."""

import importlib.metadata
from collections.abc import Callable, Mapping
from typing import Any

from research.benchmarks.systems.channel import Channel

Lap = Callable[[], dict[str, float]]
Work = Mapping[str, Any]


def main() -> None:
    """Serves one workload."""
    channel = Channel()
    work = channel.workload
    import jax
    import numpy as np
    from flax import nnx
    from tunix.models.llama3 import model as llama

    shape = work["model"]
    config = llama.ModelConfig(
        num_layers=shape["num_layers"],
        vocab_size=shape["vocab_size"],
        embed_dim=shape["d_model"],
        hidden_dim=shape["d_ff"],
        num_heads=shape["num_heads"],
        head_dim=shape["head_dim"],
        num_kv_heads=shape["num_kv_heads"],
        rope_theta=shape["rope_theta"],
        norm_eps=shape["norm_eps"],
        weight_tying=shape["tie_embeddings"],
    )
    mesh = jax.sharding.Mesh(np.array(jax.devices(work["platform"])[:1]).reshape(1, 1), ("fsdp", "tp"))
    with mesh:
        model = llama.Llama3(config, rngs=nnx.Rngs(work["seed"]))
        lap = (rollout if work["kind"] == "rollout" else train)(work, model)
        names = ("jax", "google-tunix", "flax")
        channel.describe(
            parameters=sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))),
            versions={name: importlib.metadata.version(name) for name in names},
        )
        channel.repeat(lap)


class Words:
    """A tokenizer for prompts that are ids already, written as words; the sampler puts `bos_id` before them."""

    def encode(self, text: str, **_: Any) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids: Any, **_: Any) -> str:
        return " ".join(map(str, ids))

    def bos_id(self) -> int:
        return 2

    def eos_id(self) -> int:
        return 1

    def pad_id(self) -> int:
        return 0


def rollout(work: Work, model: Any) -> Lap:
    """The sampler on batches; it knows no limit of a row's own, so each batch runs to its longest row."""
    from tunix.generate import sampler as sampling

    shape, size = work["model"], work["batch_size"]
    prompts = [
        " ".join(map(str, ids[1:])) for ids in work["prompts"]
    ]  # one token less: BOS comes before them
    length, lengths = len(work["prompts"][0]), work["lengths"]
    sampler = sampling.Sampler(
        model,
        Words(),
        sampling.CacheConfig(
            cache_size=length + work["max_new_tokens"] + 32,
            num_layers=shape["num_layers"],
            num_kv_heads=shape["num_kv_heads"],
            head_dim=shape["head_dim"],
        ),
    )
    # An id that does not exist: rows end at their length.
    stops = [shape["vocab_size"]]
    how = {"temperature": 0.0} if work["greedy"] else {"temperature": 1.0, "top_p": 1.0}

    def lap() -> dict[str, float]:
        for start in range(0, len(prompts), size):
            longest = max(lengths[start : start + size])
            out = sampler(
                prompts[start : start + size],
                max_generation_steps=longest,
                max_prompt_length=length,
                seed=work["seed"],
                eos_tokens=stops,
                return_logprobs=False,
                **how,
            )
            drawn = {len(tokens) for tokens in out.tokens}
            assert drawn == {longest}, f"drew {drawn} tokens, expected {longest}"
        return {"tokens": float(sum(lengths))}

    return lap


def train(work: Work, model: Any) -> Lap:
    """Steps of optax's AdamW on full rows of random tokens."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax
    from flax import nnx

    B, T = work["batch_size"], work["length"]
    optimizer = nnx.Optimizer(model, optax.adamw(work["optimizer"]["learning_rate"]), wrt=nnx.Param)
    positions = jnp.broadcast_to(jnp.arange(T), (B, T))
    mask = jnp.broadcast_to(jnp.tril(jnp.ones((T, T), bool)), (B, T, T))
    rng = np.random.default_rng(work["seed"])

    def loss_of(model: Any, rows: Any) -> Any:
        logits, _ = model(rows[:, :-1], positions, None, mask)
        return optax.softmax_cross_entropy_with_integer_labels(logits, rows[:, 1:]).mean()

    @nnx.jit
    def step(model: Any, optimizer: Any, rows: Any) -> Any:
        loss, grads = nnx.value_and_grad(loss_of)(model, rows)
        optimizer.update(model, grads)
        return loss

    def lap() -> dict[str, float]:
        for _ in range(work["steps"]):
            loss = step(model, optimizer, rng.integers(0, work["model"]["vocab_size"], (B, T + 1), np.int32))
        assert jnp.isfinite(jax.block_until_ready(loss)), "the loss is not finite"
        return {"tokens": float(work["steps"] * B * T)}

    return lap


if __name__ == "__main__":
    main()
