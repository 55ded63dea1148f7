"""The distribution that the sampler draws from, and the draw itself.

`scaled_logits` defines the distribution; `sample_token` draws from it without materialising it.

Shapes: B rows, V vocabulary, N blocks of K tokens, C candidates left by top-k.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from models.softmax import likeliest_token
from research.sampling.limits import check_counts

# One vector register row on a TPU, one warp's load on a GPU; on a CPU 64 to 256 are equally quick.
_BLOCK = 128


@dataclasses.dataclass(frozen=True)
class SamplingMethod:
    """The static part of a sampling method; its numbers (temperature, top_p) are traced.

    Of equally likely tokens the first ids stay, so that k is never exceeded and `top_k=1` is greedy.
    """

    greedy: bool = False  # take the most likely token; the distribution is then a point mass, its log-prob 0
    top_k: int = 0  # keep the k most likely tokens (Fan et al. 2018); 0 keeps all
    nucleus: bool = False  # keep the smallest set of tokens whose mass reaches `top_p` (Holtzman et al. 2020)

    def __post_init__(self) -> None:
        check_counts(self, top_k=0)

    @property
    def truncates(self) -> bool:
        """Whether some tokens get probability 0, so that log-probs are renormalised ones."""
        return self.greedy or self.top_k > 0 or self.nucleus


class SampledTokens(NamedTuple):
    """One drawn token a row, with its log-probs in nats."""

    tokens: Int[Array, " B"]
    # under the distribution drawn from. -inf only in a row where no token was left to draw; its token is then 0 and
    # means nothing
    sampler_logps: Float[Array, " B"]
    policy_logps: Float[Array, " B"]  # under the plain model


def scaled_logits(
    logits_BV: Float[Array, "B V"], method: SamplingMethod, temperature: Float[Array, ""], top_p: Float[Array, ""]
) -> Float[Array, "B V"]:
    """Unnormalised log-probs of the distribution drawn from: temperature, then top-k, then top-p.

    Removed tokens have -inf. Greedy gives a point mass at the first of the most likely tokens.
    """
    logits_BV = logits_BV.astype(jnp.float32)
    B, V = logits_BV.shape
    if method.greedy:
        best_B = likeliest_token(logits_BV)
        return jnp.where(jnp.arange(V)[None, :] == best_B[:, None], logits_BV, -jnp.inf)
    if 0 < method.top_k < V:
        scaled_BC, ids_BC = _candidates(logits_BV, method, temperature, top_p)
        return jnp.full((B, V), -jnp.inf).at[jnp.arange(B)[:, None], ids_BC].set(scaled_BC)
    return _without_tail(logits_BV / temperature, method, top_p)


def sample_token(
    logits_BV: Float[Array, "B V"],
    method: SamplingMethod,
    temperature: Float[Array, ""],
    top_p: Float[Array, ""],
    keys_B: Array,
    *,
    controlled_BV: Float[Array, "B V"] | None = None,
) -> SampledTokens:
    """Draws a token a row from the softmax of `scaled_logits` and scores it, in few passes over `[B, V]`.

    `policy_logps` are those of `logits_BV`, the model's, also where controls changed what to draw from
    (`controlled_BV`, see `control_logits`). `keys_B` are one key a row, of this position.
    """
    logits_BV = logits_BV.astype(jnp.float32)
    drawn_BV = logits_BV if controlled_BV is None else controlled_BV.astype(jnp.float32)
    V = logits_BV.shape[-1]
    if method.truncates or controlled_BV is not None:
        policy_mass = jax.nn.logsumexp(logits_BV, axis=-1)
    if method.greedy:
        tokens = likeliest_token(drawn_BV)
        sampler_logps = _relative(_pick(drawn_BV, tokens), _pick(drawn_BV, tokens))
    elif 0 < method.top_k < V:
        scaled_BC, ids_BC = _candidates(drawn_BV, method, temperature, top_p)
        place, mass = draw(gumbel_noise(keys_B, draw_size(method.top_k)), scaled_BC)
        tokens = _pick(ids_BC, place)
        sampler_logps = _relative(_pick(scaled_BC, place), mass)
    else:
        if method.nucleus:
            drawn_BV = _without_tail(drawn_BV / temperature, method, top_p)
            temperature = jnp.ones_like(temperature)
        # Log-mass of each block at the temperature and at temperature 1, from one maximum.
        blocks_BNK = _blocks(drawn_BV)
        top_BN = _finite(jnp.max(blocks_BNK, axis=-1))
        below_BNK = blocks_BNK - top_BN[..., None]
        scaled_BN = top_BN / temperature + jnp.log(jnp.sum(jnp.exp(below_BNK / temperature), axis=-1))
        plain_BN = top_BN + jnp.log(jnp.sum(jnp.exp(below_BNK), axis=-1))
        tokens = _draw_in_blocks(gumbel_noise(keys_B, draw_size(V)), blocks_BNK, scaled_BN, temperature)
        sampler_logps = _relative(_pick(drawn_BV, tokens) / temperature, jax.nn.logsumexp(scaled_BN, axis=-1))
        if not method.truncates and controlled_BV is None:
            policy_mass = jax.nn.logsumexp(plain_BN, axis=-1)
    return SampledTokens(tokens, sampler_logps, _pick(logits_BV, tokens) - policy_mass)


def draw(gumbel_BX: Float[Array, "B X"], logits_BV: Float[Array, "B V"]) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """One token a row from the softmax of its logits, 0 where all are -inf, and the rows' log-normalisers.

    Gumbel-max (Maddison et al. 2014) in two levels: a block of tokens by its mass, then a token in it, so that a row
    takes `draw_size(V)`, V / 128 + 128, random numbers (`gumbel_noise`) and not V. There is no cumulative sum over the
    vocabulary, whose rounding would swallow the tokens below 1e-7, and -inf plus noise stays -inf.
    """
    blocks_BNK = _blocks(logits_BV)
    mass_BN = jax.nn.logsumexp(blocks_BNK, axis=-1)
    tokens_B = _draw_in_blocks(gumbel_BX, blocks_BNK, mass_BN, jnp.float32(1.0))
    return tokens_B, jax.nn.logsumexp(mass_BN, axis=-1)


def draw_size(vocab_size: int) -> int:
    """How many random numbers `draw` takes a row: one a block and one a token of a block."""
    return -(-vocab_size // _BLOCK) + min(vocab_size, _BLOCK)


def gumbel_noise(keys_B: Array, count: int) -> Float[Array, "B count"]:
    """Standard Gumbel noise whose upper end, which decides about unlikely tokens, has 46 bits and not 23."""
    return jax.vmap(lambda key: jax.random.gumbel(key, (count,), jnp.float32, mode="high"))(keys_B)


def nucleus_mask(logits_BV: Float[Array, "B V"], top_p: Float[Array, ""]) -> Bool[Array, "B V"]:
    """True on the smallest set of tokens whose mass reaches `top_p`; of equal tokens the first ids stay.

    At least one token stays. At 1 all do: rounding must not cost the tail its place. The least logit that stays
    is found bit by bit, each a masked sum: 32 passes over `[B, V]` cost a tenth of a sort.
    """
    logits_BV = logits_BV.astype(jnp.float32)
    mass_BV = jnp.exp(logits_BV - _finite(jnp.max(logits_BV, axis=-1, keepdims=True)))
    bits_BV = jax.lax.bitcast_convert_type(logits_BV, jnp.uint32)
    # Unsigned integers in the order of the floats.
    order_BV = jnp.where(bits_BV >> 31 == 1, ~bits_BV, bits_BV | jnp.uint32(1 << 31))
    wanted = top_p * jnp.sum(mass_BV, axis=-1)

    def set_bit(i: Array, bound: Array) -> Array:
        higher = bound | (jnp.uint32(1) << (31 - i).astype(jnp.uint32))
        mass = jnp.sum(jnp.where(order_BV >= higher[:, None], mass_BV, 0.0), axis=-1)
        return jnp.where(mass >= wanted, higher, bound)

    # The largest bound reached by the mass may lie above every logit where `top_p` is 0.
    bound = jax.lax.fori_loop(0, 32, set_bit, jnp.zeros(logits_BV.shape[0], jnp.uint32))
    bound = jnp.minimum(bound, jnp.max(order_BV, axis=-1))
    above, tied = order_BV > bound[:, None], order_BV == bound[:, None]
    one = jnp.max(jnp.where(tied, mass_BV, 0.0), axis=-1)
    missing = wanted - jnp.sum(jnp.where(above, mass_BV, 0.0), axis=-1)
    room = jnp.maximum(jnp.ceil(missing / jnp.maximum(one, jnp.finfo(jnp.float32).tiny)), 1.0)
    crowded = jnp.any(jnp.sum(tied, axis=-1) > room)
    first = jax.lax.cond(crowded, lambda: tied & (jnp.cumsum(tied, axis=-1) <= room[:, None]), lambda: tied)
    return above | first | (top_p >= 1.0)


def row_keys(
    seed: Int[Array, ""], step: Int[Array, ""], prompt_ids_B: Int[Array, " B"], sample_ids_B: Int[Array, " B"]
) -> Array:
    """One key a row from counters alone, so that a completion does not depend on its batch or slot."""
    run = jax.random.fold_in(jax.random.key(seed), step)
    return jax.vmap(lambda p, s: jax.random.fold_in(jax.random.fold_in(run, p), s))(prompt_ids_B, sample_ids_B)


def _pick(table_BV: Array, index_B: Int[Array, " B"]) -> Array:
    return jnp.take_along_axis(table_BV, index_B[:, None], axis=1)[:, 0]


def _finite(x: Array) -> Array:
    """-inf becomes 0: the maximum of a row, or a block, in which nothing is left."""
    return jnp.where(x == -jnp.inf, 0.0, x)


def _relative(logits: Array, mass: Array) -> Array:
    """`logits - mass`, -inf and not NaN where both are -inf."""
    return logits - _finite(mass)


def _candidates(
    logits_BV: Float[Array, "B V"], method: SamplingMethod, temperature: Array, top_p: Array
) -> tuple[Float[Array, "B C"], Int[Array, "B C"]]:
    """Scaled logits and ids of the k most likely tokens in falling order, -inf outside of the nucleus."""
    top_BC, ids_BC = jax.lax.top_k(logits_BV, method.top_k)
    scaled_BC = top_BC / temperature
    if method.nucleus:
        probs = jnp.exp(_relative(scaled_BC, jax.nn.logsumexp(scaled_BC, axis=-1, keepdims=True)))
        before = jnp.cumsum(probs, axis=-1) - probs
        first = jnp.arange(method.top_k)[None, :] == 0
        scaled_BC = jnp.where((before < top_p) | first | (top_p >= 1.0), scaled_BC, -jnp.inf)
    return scaled_BC, ids_BC


def _without_tail(scaled_BV: Float[Array, "B V"], method: SamplingMethod, top_p: Array) -> Array:
    return jnp.where(nucleus_mask(scaled_BV, top_p), scaled_BV, -jnp.inf) if method.nucleus else scaled_BV


def _blocks(logits_BV: Float[Array, "B V"]) -> Float[Array, "B N K"]:
    B, V = logits_BV.shape
    if V <= _BLOCK:
        return logits_BV[:, None, :]
    padded = jnp.pad(logits_BV, ((0, 0), (0, -V % _BLOCK)), constant_values=-jnp.inf)
    return padded.reshape(B, -1, _BLOCK)


def _draw_in_blocks(
    gumbel_BX: Array, blocks_BNK: Float[Array, "B N K"], mass_BN: Float[Array, "B N"], temperature: Array
) -> Int[Array, " B"]:
    """See `draw`; `mass_BN` are the blocks' log-masses at this temperature."""
    _, N, K = blocks_BNK.shape
    block_B = jnp.argmax(mass_BN + gumbel_BX[:, :N], axis=-1)
    block_BK = jnp.take_along_axis(blocks_BNK, block_B[:, None, None], axis=1)[:, 0]
    place_B = jnp.argmax(block_BK / temperature + gumbel_BX[:, N:], axis=-1)
    return (block_B * K + place_B).astype(jnp.int32)
