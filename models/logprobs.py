"""What turns hidden states into token log-probs, entropy and divergences, a time chunk at a time.

Shapes: B batch, T time, C one chunk of it, D model (E the teacher's), V vocabulary. `[B, T, V]` never exists:
logits of one chunk of `logprob_chunk` positions do, and the backward pass recomputes them, unless they are few and all.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from models.axes import constrain
from models.config import ModelConfig
from models.groups import Group
from models.products import matrix_product
from models.transformer import Params, forward, unembedding

_KEPT_BYTES = 2**28
"""Logits of so much memory are kept for the backward pass, where all positions are one chunk."""

_CHUNKS, _LEAST_CHUNK = 8, 64
"""How finely a row is split so that chunks without a needed position can be left out."""


class TokenLogps(NamedTuple):
    """Per-token quantities, float32, nats; `x[b, t]` speaks of `tokens[b, t]` given the tokens before it.

    Attributes:
      logps: `[B, T]` log-probability of the token; 0 at t = 0, which nothing predicts.
      entropy: `[B, T]` entropy of the distribution that the token was predicted from; 0 at t = 0.
      logsumexp: `[B, T]` log-normaliser (for the z-loss).
      mean_logps: `[B, T]` mean over the vocabulary of the log-probs (for label smoothing).
      log_collision: `[B, T]` `log sum_v p_v^2`, the log-probability that two draws agree (for WPO).
    """

    logps: Float[Array, "B T"]
    entropy: Float[Array, "B T"]
    logsumexp: Float[Array, "B T"]
    mean_logps: Float[Array, "B T"]
    log_collision: Float[Array, "B T"]


def compute_logits(
    hidden: Float[Array, "... D"], unembed_DV: Float[Array, "D V"], config: ModelConfig
) -> Float[Array, "... V"]:
    """Float32 logits; the product runs in the compute dtype."""
    compute = jnp.dtype(config.compute_dtype)
    flat = hidden.astype(compute).reshape(-1, hidden.shape[-1])
    logits = matrix_product(flat, unembed_DV.astype(compute), jnp.float32)
    return logits.reshape(*hidden.shape[:-1], -1)


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
      hidden_BTD: states after the final norm.
      unembed_DV: read-out matrix.
      targets_BT: int32 token to score at each state.
      config: gives the chunk length and the compute dtype.
      temperature: divides the logits, exactly as it did when sampling; traced.
      needed_BT: where False, all quantities are 0. In rows of more than 64 positions those come last, and chunks that
        hold nothing else are not computed.
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
        return _score(hidden, unembed_DV, targets, temperature, used, config, keep)

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
    T = arrays[0].shape[1]
    if chunk == T:
        return fn(*arrays)
    padded = [jnp.pad(x, ((0, 0), (0, -T % chunk)) + ((0, 0),) * (x.ndim - 2)) for x in arrays]
    parts = [_split(x, chunk) for x in padded] + ([] if each is None else [each])
    return jax.tree.map(lambda x: _join(x, T), jax.lax.map(lambda part: fn(*part), parts))


@partial(jax.custom_vjp, nondiff_argnames=("config", "keep"))
def _score(
    hidden: Array,
    unembed_DV: Array,
    targets: Array,
    temperature: Array,
    used: Array | None,
    config: ModelConfig,
    keep: bool,
) -> TokenLogps:
    """One chunk. Its backward pass is written by hand: one pass over the logits for all five cotangents.

    Args:
      hidden: `[B, C, D]`.
      unembed_DV: read-out matrix.
      targets: `[B, C]` int32.
      temperature: scalar.
      used: scalar; where False nothing is computed, and all quantities and gradients are 0. None is True.
      config: static model description.
      keep: whether the logits are kept for the backward pass; else it computes them again.
    """
    return _score_fwd(hidden, unembed_DV, targets, temperature, used, config, keep)[0]


def _scaled_logits(hidden: Array, unembed_DV: Array, temperature: Array, config: ModelConfig) -> Array:
    logits = compute_logits(hidden, unembed_DV, config) / temperature
    return constrain(logits, "batch", "length", "activation_vocab")


def _score_logits(logits: Array, targets: Array) -> TokenLogps:
    top = jnp.max(logits, axis=-1)
    normaliser = top + jnp.log(_total(jnp.exp(logits - top[:, :, None])))
    # A masked sum, not a gather: it fuses, and it splits over a sharded vocabulary.
    logps = _total(jnp.where(_hits(logits, targets), logits, 0.0)) - normaliser
    probs = jnp.exp(logits - normaliser[:, :, None])
    entropy = normaliser - _total(probs * logits)
    mean_logps = _total(logits) / logits.shape[-1] - normaliser
    # The likeliest token has at least 1 / V: the sum cannot underflow.
    return TokenLogps(logps, entropy, normaliser, mean_logps, jnp.log(_total(probs * probs)))


def _total(x: Array) -> Array:
    """Sum over the last axis; on a CPU a product with ones, four times as fast as XLA's reduction."""

    def product(x: Array) -> Array:
        ones = jnp.ones((x.shape[-1],), x.dtype)
        return jnp.matmul(x.reshape(-1, x.shape[-1]), ones, precision=jax.lax.Precision.HIGHEST).reshape(
            x.shape[:-1]
        )

    return jax.lax.platform_dependent(x, cpu=product, default=partial(jnp.sum, axis=-1))


def _hits(logits: Array, targets: Array) -> Array:
    return targets[:, :, None] == jnp.arange(logits.shape[-1])[None, None, :]


def _score_fwd(
    hidden: Array,
    unembed_DV: Array,
    targets: Array,
    temperature: Array,
    used: Array | None,
    config: ModelConfig,
    keep: bool,
) -> tuple[TokenLogps, tuple[Any, ...]]:
    def compute() -> tuple[TokenLogps, Array | None]:
        logits = _scaled_logits(hidden, unembed_DV, temperature, config)
        return _score_logits(logits, targets), logits if keep else None

    out, logits = _if_used(used, compute)
    return out, (hidden, unembed_DV, targets, temperature, used, out, logits)


def _score_bwd(
    config: ModelConfig, keep: bool, kept: tuple[Any, ...], d: TokenLogps
) -> tuple[Array, Array, None, Array, None]:
    """With p = softmax(l), of each output's gradient with respect to the logits l_v:

    logps `1[v = target] - p`, entropy `-p (l - (logsumexp - entropy))`, logsumexp `p`, mean_logps `1 / V - p`,
    log_collision `2 p (p / sum p^2 - 1)`.
    """
    hidden, unembed_DV, targets, temperature, used, out, kept_logits = kept
    dtype = jnp.dtype(config.compute_dtype)
    wide = lambda x: x[:, :, None]  # noqa: E731

    def compute() -> tuple[Array, Array, Array]:
        logits = kept_logits if keep else _scaled_logits(hidden, unembed_DV, temperature, config)
        probs = jnp.exp(logits - wide(out.logsumexp))
        mean = out.logsumexp - out.entropy
        constant = d.logsumexp + d.entropy * mean - d.logps - d.mean_logps - 2.0 * d.log_collision
        squared = 2.0 * d.log_collision * jnp.exp(-out.log_collision)
        d_logits = probs * (wide(constant) - wide(d.entropy) * logits + wide(squared) * probs)
        d_logits += (
            jnp.where(_hits(logits, targets), wide(d.logps), 0.0) + wide(d.mean_logps) / logits.shape[-1]
        )
        d_temperature = -jnp.sum(d_logits * logits) / temperature
        flat = (d_logits / temperature).astype(dtype).reshape(-1, logits.shape[-1])
        rows = hidden.astype(dtype).reshape(-1, hidden.shape[-1])
        d_hidden = jnp.matmul(flat, unembed_DV.astype(dtype).T, preferred_element_type=jnp.float32)
        d_unembed = jnp.matmul(rows.T, flat, preferred_element_type=jnp.float32)
        return (
            d_hidden.reshape(hidden.shape).astype(hidden.dtype),
            d_unembed.astype(unembed_DV.dtype),
            d_temperature,
        )

    d_hidden, d_unembed, d_temperature = _if_used(used, compute)
    return d_hidden, d_unembed, None, d_temperature, None


def _if_used(used: Array | None, compute: Callable[[], Any]) -> Any:
    """`compute()`, or zeros of its shape where `used` is False."""
    if used is None:
        return compute()
    shapes = jax.eval_shape(compute)
    return jax.lax.cond(used, compute, lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes))


_score.defvjp(_score_fwd, _score_bwd)


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
      student_BTD: states after the final norm; carries the gradient.
      student_unembed_DV: read-out matrix; carries the gradient.
      student_config: gives the chunk length C and the student's compute dtype.
      teacher_BTE: the teacher's states, slot t aligned with the student's slot t; another width is fine. No
        gradient passes.
      teacher_unembed_EV: the teacher's read-out matrix. No gradient passes.
      teacher_config: gives the teacher's compute dtype.
      fn: from the float32 logits of one chunk, `[B, C, V]` each, to a tree of `[B, C]`; must be finite on
        logits of zeros, which fill the last chunk.

    Returns:
      The tree of `fn` with leaves `[B, T]`.

    Raises:
      ValueError: the two vocabularies differ.
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
        return fn(
            *(constrain(x, "batch", "length", "activation_vocab") for x in (student_logits, teacher_logits))
        )

    return _over_chunks(compare, chunk, student_BTD, teacher_BTE)


def _split(x: Array, chunk: int) -> Array:
    """`[B, n * chunk, ...]` to `[n, B, chunk, ...]`."""
    return x.reshape(x.shape[0], -1, chunk, *x.shape[2:]).swapaxes(0, 1)


def _join(x: Array, length: int) -> Array:
    """`[n, B, chunk]` back to `[B, length]`."""
    return x.swapaxes(0, 1).reshape(x.shape[1], -1)[:, :length]


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
) -> TokenLogps:
    """Teacher-forced log-probs of every token from slot `first` on, aligned with the tokens.

    `first` is static; slots before it hold 0 and cost no logits. Nothing predicts slot 0. Slots that are not `needed`
    hold 0 too. The prompt of a `group` of adjacent rows is computed once for all of them.
    """
    hidden = forward(params, config, tokens_BT, positions_BT, segment_ids_BT, group=group)
    first = max(first, 1)
    scored = hidden_logps(
        hidden[:, first - 1 : -1],
        unembedding(params),
        tokens_BT[:, first:],
        config,
        temperature=temperature,
        needed_BT=None if needed_BT is None else needed_BT[:, first:],
    )
    return TokenLogps(*(jnp.pad(x, ((0, 0), (first, 0))) for x in scored))


def likeliest_token(logits: Float[Array, "*batch V"]) -> Int[Array, "*batch"]:
    """The first of the most likely tokens, int32; 0 in a row of -inf, the last token in one with a NaN.

    `jnp.argmax` reduces pairs, which XLA's CPU backend does one entry at a time; it vectorises these two
    reductions, and the first of them is one that `logsumexp` needs as well.
    """
    last = logits.shape[-1] - 1
    ids = jnp.arange(last + 1, dtype=jnp.int32)
    return jnp.min(jnp.where(logits == jnp.max(logits, axis=-1, keepdims=True), ids, last), axis=-1)
