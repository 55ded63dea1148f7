"""Which distribution the sampler draws from, and the draw itself.

Shapes: B rows, V vocabulary.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


@dataclasses.dataclass(frozen=True)
class SamplingMethod:
    """The static part of a sampling method; its numbers (temperature, top_p) are traced.

    Attributes:
      greedy: take the most likely token; the distribution is then a point mass, its log-prob 0.
      top_k: keep the k most likely tokens (Fan et al. 2018); 0 keeps all. Ties with the k-th stay.
      nucleus: keep the smallest set of tokens whose mass reaches `top_p` (Holtzman et al. 2020);
        of equal tokens the first ids stay.
    """

    greedy: bool = False
    top_k: int = 0
    nucleus: bool = False

    @property
    def truncates(self) -> bool:
        """Whether some tokens get probability 0, so that log-probs are renormalised ones."""
        return self.greedy or self.top_k > 0 or self.nucleus


def sampling_logps(
    logits_BV: Float[Array, "B V"],
    method: SamplingMethod,
    temperature: Float[Array, ""],
    top_p: Float[Array, ""],
) -> Float[Array, "B V"]:
    """Normalised log-probs of the distribution drawn from: temperature, then top-k, then top-p.

    Removed tokens have -inf. Greedy gives a point mass at the first of the most likely tokens.
    """
    V = logits_BV.shape[-1]
    if method.greedy:
        best = jnp.argmax(logits_BV, axis=-1)
        return jnp.where(jnp.arange(V)[None, :] == best[:, None], 0.0, -jnp.inf)
    logits_BV = logits_BV.astype(jnp.float32) / temperature
    if 0 < method.top_k < V:
        kth = jax.lax.top_k(logits_BV, method.top_k)[0][:, -1:]
        logits_BV = jnp.where(logits_BV >= kth, logits_BV, -jnp.inf)
    if method.nucleus:
        logits_BV = jnp.where(nucleus_mask(logits_BV, top_p), logits_BV, -jnp.inf)
    return jax.nn.log_softmax(logits_BV, axis=-1)


def nucleus_mask(logits_BV: Float[Array, "B V"], top_p: Float[Array, ""]) -> Bool[Array, "B V"]:
    """True on the smallest set of tokens whose mass reaches `top_p`; of equal tokens the first ids stay.

    At least one token stays. At 1 all do: rounding must not cost the tail its place.
    """
    ranked = -jnp.sort(-logits_BV, axis=-1)
    probs = jax.nn.softmax(ranked, axis=-1)
    before = jnp.cumsum(probs, axis=-1) - probs
    size = jnp.maximum(jnp.sum(before < top_p, axis=-1, keepdims=True), 1)
    threshold = jnp.take_along_axis(ranked, size - 1, axis=-1)
    above, tied = logits_BV > threshold, logits_BV == threshold
    room = size - jnp.sum(above, axis=-1, keepdims=True)
    return above | (tied & (jnp.cumsum(tied, axis=-1) <= room)) | (top_p >= 1.0)


def draw(keys_B: Array, logps_BV: Float[Array, "B V"]) -> Int[Array, " B"]:
    """One token a row by the Gumbel-max trick, each row from its own key."""
    V = logps_BV.shape[-1]
    gumbel = jax.vmap(lambda key: jax.random.gumbel(key, (V,), jnp.float32))(keys_B)
    return jnp.argmax(logps_BV + gumbel, axis=-1).astype(jnp.int32)


def row_keys(
    seed: Int[Array, ""], step: Int[Array, ""], prompt_ids_B: Int[Array, " B"], sample_ids_B: Int[Array, " B"]
) -> Array:
    """One key a row from counters alone, so that a completion does not depend on its batch or slot."""
    run = jax.random.fold_in(jax.random.key(seed), step)
    return jax.vmap(lambda p, s: jax.random.fold_in(jax.random.fold_in(run, p), s))(
        prompt_ids_B, sample_ids_B
    )
