"""What a token costs at least: against counts by hand and against what XLA says of the same programs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.config import ModelConfig
from models.logprobs import token_logps
from models.transformer import init_params
from research.comparisons.roofline import (
    Limits,
    Phase,
    cache_bytes,
    decode_step_bytes,
    grpo_phases,
    limit_rate,
    parameter_bytes,
    rollout_phases,
    shares,
    train_phases,
)

MODEL = ModelConfig(
    vocab_size=64,
    num_layers=2,
    d_model=32,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    d_ff=48,
    logprob_chunk=16,
)
MATRICES = 2 * (32 * 8 * (4 + 2 + 2 + 4) + 3 * 32 * 48) + 64 * 32
"""Parameters of all matrices: attention, SwiGLU, the tied embedding once."""


def test_bytes() -> None:
    assert parameter_bytes(MODEL) == 4 * MODEL.num_params()
    assert cache_bytes(MODEL) == 2 * 2 * 2 * 8 * 4  # keys and values, layers, kv heads, head_dim, float32
    assert decode_step_bytes(MODEL, 3, 10.0) == parameter_bytes(MODEL) + 30 * cache_bytes(MODEL)


def test_a_rollout_by_hand() -> None:
    lengths, prompt = np.array([1, 3, 4]), 5
    prefill, decode = rollout_phases(MODEL, prompt, lengths, rows=3)
    attention = 4 * 2 * 4 * 8  # FLOPs a query and a slot: both products, layers, heads, head_dim
    norms = 2 * (MODEL.num_params() - MATRICES)
    read_out = 2 * 64 * 32
    per_prompt = prompt * (2 * MATRICES - read_out + norms + attention * prompt / 2) + read_out
    assert prefill.flops * 8 == pytest.approx(3 * per_prompt)
    # The first token comes out of the prefill; the others see the prompt and half of what they write.
    steps = [(0, 5.5), (2, 6.5), (3, 7.0)]
    assert decode.flops * 8 == pytest.approx(
        sum(n * (2 * MATRICES + norms + attention * c) for n, c in steps)
    )
    cache = sum(n * c for n, c in steps) * cache_bytes(MODEL)
    assert decode.read_bytes * 8 == pytest.approx(5 / 3 * parameter_bytes(MODEL) + cache)


def test_a_shared_prompt_is_prefilled_once() -> None:
    lengths = np.full(8, 4)
    alone, shared = (rollout_phases(MODEL, 5, lengths, 8, samples)[0].flops for samples in (1, 8))
    assert alone == pytest.approx(8 * shared)


def test_training_is_three_forward_passes_as_xla_counts_them() -> None:
    B, T = 4, 16
    ids = jnp.ones((B, T), jnp.int32)
    positions = jnp.tile(jnp.arange(T), (B, 1))
    params = jax.eval_shape(lambda key: jax.tree.map(lambda x: x.value, init_params(MODEL, key), is_leaf=_boxed),
                            jax.random.key(0))  # fmt: skip
    forward = jax.jit(lambda p: token_logps(p, MODEL, ids, positions, ids)[0].logps)
    counted = forward.lower(params).compile().cost_analysis()["flops"]
    (update,) = train_phases(MODEL, [T] * B)
    # XLA counts norms, softmax and the masked half of the attention as well.
    assert update.flops / 3 * B * T == pytest.approx(counted, rel=0.35)
    assert update.flops / 3 * B * T < counted


def _boxed(leaf: object) -> bool:
    return hasattr(leaf, "unbox")


def test_longer_sequences_cost_more_a_token() -> None:
    (short,), (long,), (mixed,) = (train_phases(MODEL, lengths) for lengths in ([8], [64], [8, 64]))
    assert short.flops < mixed.flops < long.flops


def test_grpo_is_a_rollout_a_scoring_and_an_update() -> None:
    phases = {phase.name: phase for phase in grpo_phases(MODEL, 8, 8, prompts=2, group_size=4)}
    assert list(phases) == ["prefill", "decode", "score", "update"]
    assert phases["update"].flops == pytest.approx(3 * phases["score"].flops)
    (train,) = train_phases(MODEL, [16])
    assert phases["update"].flops == pytest.approx(
        1.25 * train.flops
    )  # a completion token and a quarter of a prompt token


def test_the_roofline_takes_the_slower_limit_of_each_phase() -> None:
    phases, limits = (Phase("a", 100.0, 0.0), Phase("b", 50.0, 30.0)), Limits(flops=1000.0, bandwidth=100.0)
    assert limit_rate(phases, limits) == pytest.approx(1 / (0.1 + 0.3))
    assert shares(phases, 2.0, limits) == pytest.approx({"limit": 0.8, "flops": 0.3, "bandwidth": 0.6})
