"""What a token costs at least: against counts by hand and against what XLA says of the same programs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.config import ModelConfig
from models.logprobs import token_logps
from models.transformer import init_params
from research.comparisons.roofline import (
    Cost,
    Limits,
    cache_bytes,
    decode_step_bytes,
    forward_flops,
    grpo_cost,
    limit_rate,
    parameter_bytes,
    rollout_cost,
    shares,
)

MODEL = ModelConfig(
    vocab_size=64, num_layers=2, d_model=32, num_heads=4, num_kv_heads=2, head_dim=8, d_ff=48, logprob_chunk=16
)
MATRICES = 2 * (32 * 8 * (4 + 2 + 2 + 4) + 3 * 32 * 48) + 64 * 32
"""Parameters of all matrices: attention, SwiGLU, the tied embedding once."""


def test_bytes() -> None:
    assert parameter_bytes(MODEL) == 4 * MODEL.num_params()
    assert cache_bytes(MODEL) == 2 * 2 * 2 * 8 * 4  # keys and values, layers, kv heads, head_dim, float32
    assert decode_step_bytes(MODEL, 3, 10.0) == parameter_bytes(MODEL) + 30 * cache_bytes(MODEL)


def test_a_rollout_by_hand() -> None:
    lengths, prompt = np.array([1, 3, 4]), 5
    cost = rollout_cost(MODEL, prompt, lengths, rows=3)
    attention = 4 * 2 * 4 * 8  # FLOPs a query and a slot: both products, layers, heads, head_dim
    norms = 2 * (MODEL.num_params() - MATRICES)
    head = 2 * 64 * 32
    per_prompt = prompt * (2 * MATRICES - head + norms + attention * prompt / 2) + head
    # The first token comes out of the prefill; the others see the prompt and half of what they write.
    steps = [(0, 5.5), (2, 6.5), (3, 7.0)]
    decoded = sum(n * (2 * MATRICES + norms + attention * c) for n, c in steps)
    assert cost.flops * 8 == pytest.approx(3 * per_prompt + decoded)
    cache = sum(n * c for n, c in steps) * cache_bytes(MODEL)
    assert cost.read_bytes * 8 == pytest.approx(5 / 3 * parameter_bytes(MODEL) + cache)


def test_a_shared_prompt_is_prefilled_once() -> None:
    """One token a completion: nothing is decoded."""
    alone, shared = (rollout_cost(MODEL, 5, np.full(8, 1), 8, group).flops for group in (1, 8))
    assert alone == pytest.approx(8 * shared)


def test_a_forward_pass_as_xla_counts_it() -> None:
    B, T = 4, 16
    ids = jnp.ones((B, T), jnp.int32)
    positions = jnp.tile(jnp.arange(T), (B, 1))
    params = jax.eval_shape(lambda key: jax.tree.map(lambda x: x.value, init_params(MODEL, key), is_leaf=_boxed),
                            jax.random.key(0))  # fmt: skip
    forward = jax.jit(lambda p: token_logps(p, MODEL, ids, positions, ids)[0].logps)
    counted = forward.lower(params).compile().cost_analysis()["flops"]
    flops = forward_flops(MODEL, [T] * B) * B * T
    # XLA counts norms, softmax and the masked half of the attention as well.
    assert flops == pytest.approx(counted, rel=0.35) and flops < counted


def _boxed(leaf: object) -> bool:
    return hasattr(leaf, "unbox")


def test_longer_sequences_cost_more_a_token() -> None:
    short, long, mixed = (forward_flops(MODEL, lengths) for lengths in ([8], [64], [8, 64]))
    assert short < mixed < long


def test_grpo_is_a_rollout_a_scoring_and_an_update() -> None:
    """Four forward passes of a completion token and a quarter of a prompt token."""
    sampling = rollout_cost(MODEL, 8, np.full(8, 8), 8, 4)
    cost = grpo_cost(MODEL, 8, 8, prompts=2, group_size=4)
    assert cost.flops - sampling.flops == pytest.approx(4 * 1.25 * forward_flops(MODEL, [16]))
    assert cost.read_bytes == sampling.read_bytes


def test_the_roofline_takes_the_slower_limit() -> None:
    limits = Limits(flops=1000.0, bandwidth=100.0)
    assert limit_rate(Cost(100.0, 30.0), limits) == pytest.approx(1 / 0.3)
    assert limit_rate(Cost(100.0), limits) == pytest.approx(1 / 0.1)
    assert shares(Cost(100.0, 30.0), 2.0, limits) == pytest.approx({"flops": 0.2, "bandwidth": 0.6})
