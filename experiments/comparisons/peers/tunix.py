"""Tunix as a system under test: its sampler, and training steps of its Llama with optax. Needs google-tunix, chex."""

import importlib.metadata
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tunix.generate import sampler as sampling
from tunix.models.llama3 import model as llama

Work = Mapping[str, Any]


def main(work: Work, say: Callable[..., None]) -> None:
    """Serves one workload."""
    shape = work["model"]
    config = llama.ModelConfig(
        num_layers=shape["num_layers"],
        vocab_size=work["vocab_size"],
        embed_dim=shape["d_model"],
        hidden_dim=shape["d_ff"],
        num_heads=shape["num_heads"],
        head_dim=shape["head_dim"],
        num_kv_heads=shape["num_kv_heads"],
        rope_theta=shape["rope_theta"],
        norm_eps=shape["norm_eps"],
        weight_tying=shape["tie_embeddings"],
    )
    with jax.sharding.Mesh(np.array(jax.devices(work["platform"])[:1]).reshape(1, 1), ("fsdp", "tp")):
        model = llama.Llama3(config, rngs=nnx.Rngs(work["seed"]))
        run = (rollout if work["kind"] == "rollout" else train)(work, model)
        names = ("jax", "google-tunix", "flax")
        say(
            parameters=sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))),
            versions={name: importlib.metadata.version(name) for name in names},
        )
        while True:
            say(tokens=run())


WORDS = SimpleNamespace(
    encode=lambda text, **_: [int(word) for word in text.split()],
    decode=lambda ids, **_: " ".join(map(str, ids)),
    bos_id=lambda: 2,
    eos_id=lambda: 1,
    pad_id=lambda: 0,
)
"""A tokenizer for prompts that are ids already, written as words; the sampler puts `bos_id` before them."""


def rollout(work: Work, model: Any) -> Callable[[], int]:
    """The sampler on batches; it knows no limit of a row's own, so each batch runs to its longest row."""
    shape, size, lengths = work["model"], work["batch_size"], work["lengths"]
    prompts = [" ".join(map(str, ids[1:])) for ids in work["prompts"]]  # one less: BOS comes before them
    length = len(work["prompts"][0])
    sampler = sampling.Sampler(
        model,
        WORDS,
        sampling.CacheConfig(
            cache_size=length + work["max_new_tokens"] + 32,
            num_layers=shape["num_layers"],
            num_kv_heads=shape["num_kv_heads"],
            head_dim=shape["head_dim"],
        ),
    )
    how = {"temperature": 0.0} if work["greedy"] else {"temperature": 1.0, "top_p": 1.0}

    def run() -> int:
        for start in range(0, len(prompts), size):
            longest = max(lengths[start : start + size])
            out = sampler(
                prompts[start : start + size],
                max_generation_steps=longest,
                max_prompt_length=length,
                seed=work["seed"],
                eos_tokens=[work["vocab_size"]],  # no such id: rows end at their length
                return_logprobs=False,
                **how,
            )
            drawn = {len(tokens) for tokens in out.tokens}
            assert drawn == {longest}, f"drew {drawn} tokens, expected {longest}"
        return sum(lengths)

    return run


def train(work: Work, model: Any) -> Callable[[], int]:
    """Steps of optax's AdamW on full rows of random tokens."""
    B, T, V = work["batch_size"], work["length"], work["vocab_size"]
    optimizer = nnx.Optimizer(model, optax.adamw(work["learning_rate"]), wrt=nnx.Param)
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

    def run() -> int:
        for _ in range(work["steps"]):
            loss = step(model, optimizer, rng.integers(0, V, (B, T + 1), np.int32))
        assert jnp.isfinite(jax.block_until_ready(loss)), "the loss is not finite"
        return work["steps"] * B * T

    return run
