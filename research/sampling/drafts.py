"""Proposals for speculative decoding, by a smaller model or by n-grams of the text, and their verification.

Shapes: B rows, k proposed tokens, T = k + 1, S slots of text, V vocabulary.
"""

from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from models.config import ModelConfig
from models.decode.cache import KVCache
from models.softmax import compute_logits, likeliest_token
from models.transformer import Params, forward_cached, unembedding
from research.sampling.limits import DRAFT_TOKENS, check_count
from research.sampling.methods import SamplingMethod, draw, draw_size, gumbel_noise, scaled_logits
from research.sampling.programs import layout_program
from research.sampling.sampler import Slots
from research.sampling.types import SamplerScalars
from research.sampling.weights import Weights

LONGEST_MATCH = 3
"""Tokens of an n-gram that are matched at most."""


class Draft(flax.struct.PyTreeNode):
    """What proposes tokens: a smaller model, or n-grams of the row's own text."""

    params: Params | None  # the draft model's, as trained or laid out for decoding; None for n-grams
    config: ModelConfig | None = flax.struct.field(pytree_node=False)  # the draft model; None for n-grams
    tokens: int = flax.struct.field(pytree_node=False)  # k, proposals a round

    def __post_init__(self) -> None:
        check_count("draft_tokens", self.tokens, 1, DRAFT_TOKENS)

    def laid_out(self, weights: Weights) -> "Draft":
        """The same draft, its parameters laid out for decoding: once, not for every prompt."""
        return (
            self
            if self.config is None
            else self.replace(params=layout_program(self.params, config=self.config, weights=weights))
        )


class Categorical(NamedTuple):
    """Distributions over the vocabulary at T places of each row, unnormalised: `logps = logits - log_normalizer`."""

    logits: Float[Array, "B T V"]  # -inf where a token cannot be drawn
    log_normalizer: Float[Array, "B T"]  # `logsumexp` of the logits

    def logps_of(self, tokens_BT: Int[Array, "B T"]) -> Float[Array, "B T"]:
        """Of one token at each of the first places."""
        T = tokens_BT.shape[1]
        logits_BT = jnp.take_along_axis(self.logits[:, :T], tokens_BT[:, :, None], axis=2)[:, :, 0]
        return logits_BT - self.log_normalizer[:, :T]

    def logps_at(self, place_B: Int[Array, " B"]) -> Float[Array, "B V"]:
        """Of all tokens at one place of each row."""
        logits_BV = jnp.take_along_axis(self.logits, place_B[:, None, None], axis=1)[:, 0]
        return logits_BV - jnp.take_along_axis(self.log_normalizer, place_B[:, None], axis=1)


class Proposals(NamedTuple):
    """k proposed tokens a row, and q, what they were drawn from; None for point masses."""

    tokens: Int[Array, "B k"]
    distribution: Categorical | None


class Noise(NamedTuple):
    """The random numbers of one round, drawn in one call: on a CPU a call's cost hardly depends on its size."""

    draws: Float[Array, "B T X"]  # standard Gumbel, for each proposal and for the token after them
    accept: Float[Array, "B k"]  # logarithms of uniform numbers

    @classmethod
    def of(cls, keys_B: Array, draft_tokens: int, vocab_size: int) -> "Noise":
        """Each row's from its own key."""
        size = draw_size(vocab_size)
        gumbel = gumbel_noise(keys_B, (draft_tokens + 1) * size + draft_tokens)
        draws, accept = gumbel[:, :-draft_tokens], gumbel[:, -draft_tokens:]
        # Gumbel noise g is -log(-log(1 - u)), finest where u is near 0: tiny probabilities can be accepted.
        log_u = jnp.log(-jnp.expm1(-jnp.exp(-accept)))
        return cls(draws.reshape(len(gumbel), draft_tokens + 1, size), log_u)


def propose_by_model(
    draft: Draft,
    slots: Slots,
    newest_B2: Int[Array, "B 2"],
    noise: Noise,
    scalars: SamplerScalars,
    method: SamplingMethod,
) -> tuple[Proposals, KVCache]:
    """A draft model's own k tokens, drawn as the target's would be, and the cache with all of them but the last.

    Re-feed the second-to-last token (`newest_B2` are the last two): if it was the draft's own last proposal, its KV
    entry was never written to the draft's cache, which `slots` hold. Elsewhere that writes what is there already.
    """
    assert draft.config is not None
    unembed_DV, cache = unembedding(draft.params), slots.cache
    before_B1 = jax.lax.dynamic_slice_in_dim(cache.segment_ids, cache.length - 1, 1, axis=1)
    cache = cache.replace(length=cache.length - 1)
    tokens, positions = newest_B2, jnp.stack([slots.positions - 1, slots.positions], axis=1)
    segment_ids = jnp.concatenate([before_B1, slots.live[:, None].astype(jnp.int32)], axis=1)
    drawn, drawn_from, normalizers = [], [], []
    for i in range(draft.tokens):
        hidden, cache = forward_cached(draft.params, draft.config, tokens, positions, segment_ids, cache)
        logits_BV = compute_logits(hidden[:, -1], unembed_DV, draft.config)
        if method.greedy:
            token = likeliest_token(logits_BV)
        else:
            drawn_from.append(scaled_logits(logits_BV, method, scalars.temperature, scalars.top_p))
            token, normalizer_B = draw(noise.draws[:, i], drawn_from[-1])
            normalizers.append(normalizer_B)
        drawn.append(token)
        tokens, positions, segment_ids = token[:, None], positions[:, -1:] + 1, segment_ids[:, -1:]
    q = None if method.greedy else Categorical(jnp.stack(drawn_from, axis=1), jnp.stack(normalizers, axis=1))
    return Proposals(jnp.stack(drawn, axis=1), q), cache


def propose_by_ngram(
    text_BS: Int[Array, "B S"], first_B: Int[Array, " B"], last_B: Int[Array, " B"], count: int
) -> Proposals:
    """The `count` tokens that followed the last earlier occurrence of the text's last tokens (Saxena 2023).

    Of several places the one that matches more tokens wins, then the later. A match near the end goes on in its own
    rhythm. `first_B` and `last_B` are the slots of a text's first and its last token.
    """
    S = text_BS.shape[1]
    slot = jnp.arange(S)[None, :]
    first_B1, last_B1 = first_B[:, None], last_B[:, None]
    run = (slot >= first_B1) & (slot < last_B1)
    score = jnp.where(run, slot, -1)
    for i in range(LONGEST_MATCH):
        wanted = jnp.take_along_axis(text_BS, jnp.maximum(last_B1 - i, 0), axis=1)
        run = run & (jnp.roll(text_BS, i, axis=1) == wanted) & (slot - i >= first_B1)
        score = score + S * run
    match_B1 = jnp.argmax(score, axis=1).astype(jnp.int32)[:, None]
    period = jnp.maximum(last_B1 - match_B1, 1)
    follows = match_B1 + 1 + jnp.arange(count, dtype=jnp.int32)[None, :] % period
    return Proposals(jnp.take_along_axis(text_BS, jnp.minimum(follows, S - 1), axis=1), None)


def verify(
    proposals: Proposals, target: Categorical, noise: Noise, *, greedy: bool
) -> tuple[Int[Array, " B"], Int[Array, "B T"]]:
    """Accepts the first proposals of each row, as many as rejection sampling allows, and draws the token after them.

    `target` is p at each proposal and after the last; where `greedy`, p and q are point masses and no noise is read.
    Returns how many were accepted, and tokens: those, then the one drawn, then undefined ones.
    """
    k = proposals.tokens.shape[1]
    if greedy:
        best_BT = likeliest_token(target.logits)
        return _leading(best_BT[:, :k] == proposals.tokens), best_BT
    ratio_Bk = target.logps_of(proposals.tokens)
    if proposals.distribution is not None:
        ratio_Bk = ratio_Bk - proposals.distribution.logps_of(proposals.tokens)
    accepted_B = _leading(noise.accept < ratio_Bk)

    p_BV = target.logps_at(accepted_B)
    rejected_B, at_B = accepted_B < k, jnp.minimum(accepted_B, k - 1)
    if proposals.distribution is None:
        rejected_token = jnp.take_along_axis(proposals.tokens, at_B[:, None], axis=1)
        left_BV = jnp.where(jnp.arange(p_BV.shape[1])[None, :] == rejected_token, -jnp.inf, p_BV)
    else:
        q_BV = proposals.distribution.logps_at(at_B)
        more = q_BV < p_BV
        # log(p - q) without the cancellation.
        left_BV = jnp.where(more, p_BV + jnp.log(-jnp.expm1(jnp.where(more, q_BV - p_BV, -1.0))), -jnp.inf)
    # Where p and q are equal but for rounding, a rejection may leave nothing to draw.
    residual_B = rejected_B & jnp.any(left_BV > -jnp.inf, axis=1)
    token_B, _ = draw(noise.draws[:, k], jnp.where(residual_B[:, None], left_BV, p_BV))
    padded_BT = jnp.pad(proposals.tokens, ((0, 0), (0, 1)))
    at_end = jnp.arange(k + 1)[None, :] == accepted_B[:, None]
    return accepted_B, jnp.where(at_end, token_B[:, None], padded_BT)


def _leading(hit_Bk: Array) -> Int[Array, " B"]:
    """How many are True before the first that is not."""
    return jnp.sum(jnp.cumprod(hit_Bk.astype(jnp.int32), axis=1), axis=1)
