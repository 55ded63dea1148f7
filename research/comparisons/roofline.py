"""What a useful token costs at least, and the rate that the machine's measured limits allow.

A roofline (Williams et al. 2009): work takes at least as long as its FLOPs at the measured FLOP/s and as its bytes at
the measured bandwidth, whichever is longer.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from models.config import ModelConfig

_BYTES = {"float32": 4, "bfloat16": 2}


class Cost(NamedTuple):
    """What one useful token costs: FLOPs, and bytes read (0 where FLOPs bind at any useful size)."""

    flops: float
    read_bytes: float = 0.0


class Limits(NamedTuple):
    """What the machine can do, measured: FLOP/s of a large matrix product, bytes/s of reading an array."""

    flops: float
    bandwidth: float


def parameter_bytes(model: ModelConfig) -> float:
    """Bytes of all parameters; a decode step reads each once (a tied embedding is the LM head)."""
    return float(model.num_params() * _BYTES[model.param_dtype])


def cache_bytes(model: ModelConfig) -> float:
    """Bytes of keys and values that one token of context adds."""
    return 2.0 * model.num_layers * model.num_kv_heads * model.head_dim * _BYTES[model.compute_dtype]


def decode_step_bytes(model: ModelConfig, rows: int, context: float) -> float:
    """Bytes that one decode step reads: the parameters once, the context of each row."""
    return parameter_bytes(model) + rows * context * cache_bytes(model)


def rollout_cost(model: ModelConfig, prompt_length: int, lengths: np.ndarray, rows: int, group_size: int = 1) -> Cost:
    """Prefill and decode, a completion token, if no slot is ever idle.

    Args:
      model: the decoder.
      prompt_length: tokens of each prompt.
      lengths: `[B]` tokens of each completion; the first comes out of the prefill.
      rows: sequences decoded at a time: each reading of the parameters serves so many.
      group_size: completions that share a prefill.
    """
    total, prompts = float(lengths.sum()), len(lengths) / group_size
    head = 2.0 * model.vocab_size * model.d_model
    flops = prompts * (prompt_length * (model.flops_per_token(prompt_length / 2) - head) + head)
    decoded, context = lengths - 1.0, prompt_length + lengths / 2.0
    flops += sum(n * model.flops_per_token(c) for n, c in zip(decoded, context, strict=True))
    read = decoded.sum() / rows * parameter_bytes(model) + (decoded * context).sum() * cache_bytes(model)
    return Cost(float(flops) / total, float(read) / total)


def forward_flops(model: ModelConfig, lengths: Sequence[int] | np.ndarray) -> float:
    """FLOPs of a forward pass, a token at the mean causal context of sequences of these lengths.

    An update takes three times as many: the backward pass is twice the forward pass.
    """
    sizes = np.asarray(lengths, np.float64)
    return model.flops_per_token(float((sizes * (sizes + 1) / 2).sum() / sizes.sum()))


def grpo_cost(model: ModelConfig, prompt_length: int, max_new_tokens: int, prompts: int, group_size: int) -> Cost:
    """Sampling, log-probs of the reference, one update; a completion token. Prompts are computed once a group."""
    rows = prompts * group_size
    sampling = rollout_cost(model, prompt_length, np.full(rows, max_new_tokens), rows, group_size)
    per_token = (prompt_length / group_size + max_new_tokens) / max_new_tokens
    forward = forward_flops(model, [prompt_length + max_new_tokens]) * per_token
    return Cost(sampling.flops + (1 + 3) * forward, sampling.read_bytes)


def limit_rate(cost: Cost, limits: Limits) -> float:
    """Tokens/s that the limits allow."""
    return 1.0 / max(cost.flops / limits.flops, cost.read_bytes / limits.bandwidth)


def shares(cost: Cost, rate: float, limits: Limits) -> dict[str, float]:
    """Shares of the FLOP/s (MFU, in training) and of the bandwidth that are used at `rate` tokens/s."""
    return {"flops": rate * cost.flops / limits.flops, "bandwidth": rate * cost.read_bytes / limits.bandwidth}
