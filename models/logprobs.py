"""Token log-probs, entropy and divergences from hidden states, one time chunk after another.

Shapes: B batch, T time, C one chunk of it, D model (E the teacher's), V vocabulary. `[B, T, V]` is never materialised:
the logits of `logprob_chunk` positions exist at once, and the backward pass recomputes them unless they are small.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from models.axes import constrain
from models.config import ModelConfig
from models.groups import Group
from models.layers import AuxSums
from models.softmax import TokenLogps, compute_logits, score_chunk
from models.transformer import Params, forward, unembedding

_KEPT_BYTES = 2**28  # up to this size logits are kept for the backward pass, where all positions are one chunk
_CHUNKS, _LEAST_CHUNK = 8, 64  # at most so many chunks of at least so many positions, where some can be skipped


def hidden_logps(
    hidden_BTD: Float[Array, "B T D"],
    unembed_DV: Float[Array, "D V"],
    targets_BT: Int[Array, "B T"],
    config: ModelConfig,
    *,
    temperature: float | Float[Array, ""] = 1.0,
    needed_BT: Bool[Array, "B T"] | None = None,
) -> TokenLogps:
    """Log-probs of `targets[b, t]` under the logits at hidden state `[b, t]` divided by `temperature`.

    Args:
      hidden_BTD, unembed_DV: states after the final norm, and the LM head.
      targets_BT: int32 token to score at each state.
      config: gives the chunk length and the compute dtype.
      temperature: divides the logits, exactly as it did when sampling; traced.
      needed_BT: where False, all quantities are 0. Rows of more than 64 positions are sorted so that those come last,
        and chunks that hold nothing else are not computed.
    """
    B, T, _ = hidden_BTD.shape
    chunk = min(config.logprob_chunk, T)
    if needed_BT is not None:
        chunk = min(chunk, max(_LEAST_CHUNK, -(-T // _CHUNKS)))
    keep = chunk == T and B * T * config.vocab_size * 4 <= _KEPT_BYTES
    temperature = jnp.asarray(temperature, jnp.float32)
    # Gathered over fsdp once, not in each chunk.
    unembed_DV = constrain(unembed_DV, "activation_embed", "vocab")

    def score(hidden: Array, targets: Array, used: Array | None = None) -> TokenLogps:
        return score_chunk(hidden, unembed_DV, targets, temperature, used, config, keep)

    if needed_BT is None:
        return _over_chunks(score, chunk, hidden_BTD, targets_BT)
    if chunk == T:
        scored = score(hidden_BTD, targets_BT)
    else:
        order_BT = jnp.argsort(~needed_BT, axis=1)
        hidden_BTD = jnp.take_along_axis(hidden_BTD, order_BT[:, :, None], axis=1)
        targets_BT = jnp.take_along_axis(targets_BT, order_BT, axis=1)
        used = jnp.max(jnp.sum(needed_BT, axis=1)) > jnp.arange(0, T, chunk)
        scored = _over_chunks(score, chunk, hidden_BTD, targets_BT, each=used)
        back_BT = jnp.argsort(order_BT, axis=1)
        scored = TokenLogps(*(jnp.take_along_axis(x, back_BT, axis=1) for x in scored))
    return TokenLogps(*(jnp.where(needed_BT, x, 0.0) for x in scored))


def _over_chunks(fn: Callable[..., Any], chunk: int, *arrays: Array, each: Array | None = None) -> Any:
    """`fn` of arrays `[B, T, ...]`, so many positions at a time, with its entry of `each` `[n]`: a tree of `[B, T]`."""
    B, T = arrays[0].shape[:2]
    if chunk == T:
        return fn(*arrays)
    padded = [jnp.pad(x, ((0, 0), (0, -T % chunk)) + ((0, 0),) * (x.ndim - 2)) for x in arrays]
    parts = [x.reshape(B, -1, chunk, *x.shape[2:]).swapaxes(0, 1) for x in padded] + ([] if each is None else [each])
    mapped = jax.lax.map(lambda part: fn(*part), parts)
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(B, -1)[:, :T], mapped)


def hidden_divergence(
    student_BTD: Float[Array, "B T D"],
    student_unembed_DV: Float[Array, "D V"],
    student_config: ModelConfig,
    teacher_BTE: Float[Array, "B T E"],
    teacher_unembed_EV: Float[Array, "E V"],
    teacher_config: ModelConfig,
    fn: Callable[[Float[Array, "B C V"], Float[Array, "B C V"]], Any],
) -> Any:
    """`fn(student_logits, teacher_logits)` at every state, without `[B, T, V]` of either model.

    Args:
      student_BTD, student_unembed_DV: states after the final norm, and the LM head; they carry the gradient.
      student_config: gives the chunk length C and the student's compute dtype.
      teacher_BTE, teacher_unembed_EV: the teacher's, slot t aligned with the student's slot t; another width is fine.
        No gradient passes.
      teacher_config: gives the teacher's compute dtype.
      fn: from the float32 logits of one chunk, `[B, C, V]` each, to a tree of `[B, C]`; must be finite on logits of
        zeros, which fill the last chunk.
    Returns the tree of `fn` with leaves `[B, T]`. Raises ValueError where the two vocabularies differ.
    """
    if student_config.vocab_size != teacher_config.vocab_size:
        raise ValueError(
            f"teacher: got a vocabulary of {teacher_config.vocab_size} tokens, expected the student's "
            f"{student_config.vocab_size} because their distributions are compared token by token"
        )
    chunk = min(student_config.logprob_chunk, student_BTD.shape[1])
    teacher_BTE, teacher_unembed_EV = jax.lax.stop_gradient((teacher_BTE, teacher_unembed_EV))

    @jax.checkpoint
    def compare(student: Array, teacher: Array) -> Any:
        student_logits = compute_logits(student, student_unembed_DV, student_config)
        teacher_logits = compute_logits(teacher, teacher_unembed_EV, teacher_config)
        return fn(*(constrain(x, "batch", "length", "activation_vocab") for x in (student_logits, teacher_logits)))

    return _over_chunks(compare, chunk, student_BTD, teacher_BTE)


def token_logps(
    params: Params,
    config: ModelConfig,
    tokens_BT: Int[Array, "B T"],
    positions_BT: Int[Array, "B T"],
    segment_ids_BT: Int[Array, "B T"],
    *,
    temperature: float | Float[Array, ""] = 1.0,
    first: int = 1,
    needed_BT: Bool[Array, "B T"] | None = None,
    group: Group | None = None,
) -> tuple[TokenLogps, AuxSums]:
    """Teacher-forced log-probs of every token from slot `first` on, aligned with the tokens; and auxiliary sums.

    Args:
      params, config, tokens_BT, positions_BT, segment_ids_BT, group: as `forward` takes them.
      temperature, needed_BT: as `hidden_logps` takes them.
      first: static; slots before it hold 0 and cost no logits. Nothing predicts slot 0.
    """
    hidden, aux = forward(params, config, tokens_BT, positions_BT, segment_ids_BT, group=group)
    first = max(first, 1)
    scored = hidden_logps(
        hidden[:, first - 1 : -1],
        unembedding(params),
        tokens_BT[:, first:],
        config,
        temperature=temperature,
        needed_BT=None if needed_BT is None else needed_BT[:, first:],
    )
    return TokenLogps(*(jnp.pad(x, ((0, 0), (first, 0))) for x in scored)), aux
