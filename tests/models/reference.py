"""The decoder again, in float64 NumPy, one position and one head at a time: what the Flax one must equal."""

from typing import Any

import numpy as np

from models.config import ModelConfig


def numpy_hidden(
    params: Any, config: ModelConfig, tokens: np.ndarray, positions: np.ndarray, segments: np.ndarray
) -> np.ndarray:
    """Hidden states `[B, T, D]` after the final norm."""
    params = _to_numpy(params)
    rows = [_row(params, config, tokens[b], positions[b], segments[b]) for b in range(tokens.shape[0])]
    return np.stack(rows)


def numpy_log_probs(params: Any, config: ModelConfig, tokens: list[int]) -> np.ndarray:
    """Log-probs `[V]` of the token after `tokens`, one document that starts at position 0."""
    ids = np.asarray(tokens)[None]
    positions = np.arange(len(tokens))[None]
    hidden = numpy_hidden(params, config, ids, positions, np.ones_like(ids))[0, -1]
    logits = hidden @ numpy_unembedding(params, config)
    shifted = logits - logits.max()
    return shifted - np.log(np.exp(shifted).sum())


def numpy_unembedding(params: Any, config: ModelConfig) -> np.ndarray:
    """The read-out matrix `[D, V]`."""
    table = np.asarray(params["embed"], np.float64).T
    return table if config.tie_embeddings else np.asarray(params["unembed"], np.float64)


def _to_numpy(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _to_numpy(value) for key, value in tree.items()}
    return np.asarray(tree, np.float64)


def _row(params: Any, c: ModelConfig, tokens: np.ndarray, positions: np.ndarray, segments: np.ndarray) -> np.ndarray:
    T, shared = len(tokens), c.num_heads // c.num_kv_heads
    x = params["embed"][tokens]
    for layer in range(c.num_layers):
        attention = {key: value[layer] for key, value in params["layers"]["attention"].items()}
        mlp = {key: value[layer] for key, value in params["layers"]["mlp"].items()}
        h = _norm(x, params["layers"]["attention_norm"]["scale"][layer], c.norm_eps)
        added = np.zeros_like(x)
        for head in range(c.num_heads):
            q = [_turn(h[t] @ attention["wq"][:, head], positions[t], c.rope_theta) for t in range(T)]
            k = [_turn(h[t] @ attention["wk"][:, head // shared], positions[t], c.rope_theta) for t in range(T)]
            v = h @ attention["wv"][:, head // shared]
            for t in range(T):
                seen = [s for s in range(t + 1) if segments[s] == segments[t]]
                scores = np.array([q[t] @ k[s] for s in seen]) / np.sqrt(c.head_dim)
                weights = np.exp(scores - scores.max())
                weights /= weights.sum()
                added[t] += sum(w * v[s] for w, s in zip(weights, seen, strict=True)) @ attention["wo"][head]
        x = x + added
        h = _norm(x, params["layers"]["mlp_norm"]["scale"][layer], c.norm_eps)
        gate = h @ mlp["gate"]
        x = x + (gate / (1.0 + np.exp(-gate)) * (h @ mlp["up"])) @ mlp["down"]
    return _norm(x, params["final_norm"]["scale"], c.norm_eps)


def _norm(x: np.ndarray, scale: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * scale


def _turn(x: np.ndarray, position: int, theta: float) -> np.ndarray:
    """Rotates the pair (i, i + N/2) by `position * theta^(-2i/N)`, as a complex number."""
    half = len(x) // 2
    angle = position * theta ** (-2.0 * np.arange(half) / len(x))
    turned = (x[:half] + 1j * x[half:]) * np.exp(1j * angle)
    return np.concatenate([turned.real, turned.imag])
