"""What the sampler ought to draw from, in float64 NumPy, one token at a time."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models.config import ModelConfig
from research.sampling.methods import SamplingMethod, scaled_logits
from tests.models.reference import numpy_log_probs


def numpy_distribution(
    logits: np.ndarray, method: SamplingMethod, temperature: float = 1.0, top_p: float = 1.0
) -> np.ndarray:
    """Probabilities `[V]`: temperature, then top-k, then top-p, each on what the one before has left.

    Of equally likely tokens the first ids stay.
    """
    if method.greedy:
        return np.eye(len(logits))[int(np.argmax(logits))]
    scaled = np.asarray(logits, np.float64) / temperature
    probs = np.exp(scaled - scaled.max())
    if method.top_k:
        best = sorted(range(len(probs)), key=lambda i: (-probs[i], i))[: method.top_k]
        probs = np.array([p if token in best else 0.0 for token, p in enumerate(probs)])
    probs = probs / probs.sum()
    if method.nucleus and top_p < 1.0:
        mass, kept = 0.0, []
        for token in sorted(range(len(probs)), key=lambda i: (-probs[i], i)):
            kept.append(token)
            mass += probs[token]
            if mass >= top_p:
                break
        probs = np.array([p if token in kept else 0.0 for token, p in enumerate(probs)])
    return probs / probs.sum()


def sampling_logps(logits_BV: Any, method: SamplingMethod, temperature: Any, top_p: Any) -> jax.Array:
    """Normalised log-probs of the sampler's distribution; -inf for removed tokens, and for all of an empty row."""
    left = scaled_logits(logits_BV, method, temperature, top_p)
    return jnp.where(left == -jnp.inf, -jnp.inf, jax.nn.log_softmax(left, axis=-1))


def numpy_two_tokens(
    params: Any, config: ModelConfig, prompt: list[int], method: SamplingMethod, temperature: float, top_p: float
) -> np.ndarray:
    """Exact probabilities `[V, V]` of the first two tokens of a completion."""
    first = numpy_distribution(numpy_log_probs(params, config, prompt), method, temperature, top_p)
    second = [
        numpy_distribution(numpy_log_probs(params, config, [*prompt, token]), method, temperature, top_p)
        for token in range(config.vocab_size)
    ]
    return first[:, None] * np.stack(second)
