"""Per-token controls against NumPy and, where it is installed, transformers."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.core.errors import ConfigError
from research.sampling.controls import (
    NO_CONTROLS,
    Controls,
    control_logits,
    make_controls,
    mark_seen,
    seen_tokens,
    unpack_mask,
)
from research.sampling.methods import SamplingMethod, sample_token
from tests.research.sampling.reference import sampling_logps

B, V, L = 4, 37, 6
STOPS = (5, 36)
RNG = np.random.default_rng(0)
LOGITS = (RNG.standard_normal((B, V)) * 3).astype(np.float32)
TOKENS = RNG.integers(0, V, (B, L)).astype(np.int32)
TOKENS[:, -1] = [0, 7, 0, 7]  # each row has seen a biased token
MASK = np.arange(L)[None, :] >= np.array([0, 2, 4, 1])[:, None]
"""Left-padded contexts; the padding holds tokens too."""
ALLOWED = RNG.random((B, V)) < 0.5
BIAS = {0: 4.0, 7: -3.0, 36: -np.inf}
PENALTY = 1.7
DRAWN = np.array([0, 1, 2, 3], np.int32)
NAMES = ("logit_bias", "repetition_penalty", "min_new_tokens", "allowed")
controlled = jax.jit(control_logits, static_argnames="stop_tokens")
sample = jax.jit(sample_token, static_argnames="method")
distribution = jax.jit(sampling_logps, static_argnames="method")


def packed(allowed: np.ndarray, dtype: Any = np.int32) -> np.ndarray:
    """Bit v % 32 of word v // 32, as llguidance lays its masks out."""
    words = np.zeros((len(allowed), -(-allowed.shape[1] // 32)), np.uint32)
    for row, v in np.argwhere(allowed):
        words[row, v // 32] |= np.uint32(1 << (v % 32))
    return words.view(dtype)


def numpy_controls(logits: np.ndarray, on: Sequence[str], least: int = 2) -> np.ndarray:
    """One entry at a time."""
    out = logits.astype(np.float64)
    for row in range(B):
        context = {int(t) for t, real in zip(TOKENS[row], MASK[row], strict=True) if real}
        for v in range(V):
            if "logit_bias" in on:
                out[row, v] += BIAS.get(v, 0.0)
            if "repetition_penalty" in on and v in context:
                out[row, v] = out[row, v] / PENALTY if out[row, v] > 0 else out[row, v] * PENALTY
            if "min_new_tokens" in on and v in STOPS and DRAWN[row] < least:
                out[row, v] = -np.inf
            if "allowed" in on and not ALLOWED[row, v]:
                out[row, v] = -np.inf
    return out


def settings(**changes: Any) -> Controls:
    chosen = {"logit_bias": BIAS, "repetition_penalty": PENALTY, "min_new_tokens": 2}
    return make_controls(V, max_new_tokens=8, **{**chosen, **changes})


def apply(*on: str, drawn: np.ndarray = DRAWN) -> np.ndarray:
    controls = settings()
    controls = controls.replace(**{name: None for name in NAMES[:3] if name not in on})
    allowed = packed(ALLOWED) if "allowed" in on else None
    seen = seen_tokens(TOKENS, MASK, V)
    return np.asarray(controlled(LOGITS, controls, stop_tokens=STOPS, seen=seen, drawn=drawn, allowed=allowed), "d")


@pytest.mark.parametrize("on", [NAMES, (), *((name,) for name in NAMES), NAMES[:2]], ids=str)
def test_equals_numpy(on: tuple[str, ...]) -> None:
    np.testing.assert_allclose(apply(*on), numpy_controls(LOGITS, on), rtol=1e-6)


def test_the_order_matters_in_this_data() -> None:
    biased = apply("logit_bias", "repetition_penalty")
    penalised = apply("repetition_penalty")
    other_order = penalised + np.array([BIAS.get(v, 0.0) for v in range(V)])[None, :]
    assert np.abs(biased[:, :8] - other_order[:, :8]).max() > 0.1


@pytest.mark.parametrize("dtype", [np.int32, np.uint32])
@pytest.mark.parametrize("width", [1, 31, 32, 33, 64, 100])
def test_unpacks_every_bit(width: int, dtype: Any) -> None:
    allowed = np.random.default_rng(width).random((3, width)) < 0.5
    allowed[0] = True
    found = jax.jit(unpack_mask, static_argnums=1)(packed(allowed, dtype), width)
    np.testing.assert_array_equal(found, allowed)


def test_seen_leaves_padding_out_and_grows() -> None:
    seen = jax.jit(seen_tokens, static_argnums=2)(TOKENS, MASK, V)
    for row in range(B):
        assert set(np.flatnonzero(seen[row])) == set(TOKENS[row][MASK[row]])
    more = jax.jit(mark_seen)(seen, np.array([1, 2, 3, 4], np.int32))
    for row in range(B):
        assert set(np.flatnonzero(more[row])) == set(TOKENS[row][MASK[row]]) | {row + 1}


def test_a_control_that_is_off_costs_nothing() -> None:
    """The compiled step holds nothing of it."""
    text = str(jax.make_jaxpr(lambda x: control_logits(x, NO_CONTROLS, stop_tokens=STOPS))(jnp.zeros((B, V))))
    assert "where" not in text and "select_n" not in text and "add" not in text
    assert make_controls(V, max_new_tokens=8) == NO_CONTROLS


def test_a_sweep_compiles_once_and_vmaps() -> None:
    seen = seen_tokens(TOKENS, MASK, V)
    sweep = Controls(None, np.array([1.2, PENALTY], np.float32), np.array([1, 3], np.int32))

    def step(controls: Controls) -> jax.Array:
        return control_logits(LOGITS, controls, seen=seen, drawn=DRAWN, stop_tokens=STOPS)

    found = jax.jit(jax.vmap(step))(sweep)
    one = numpy_controls(LOGITS, ("repetition_penalty", "min_new_tokens"), least=3)
    np.testing.assert_allclose(found[1], one, rtol=1e-6)


def test_log_probs_are_those_of_the_masked_distribution() -> None:
    after = apply(*NAMES)
    keys = jax.random.split(jax.random.key(3), B)
    number = jnp.float32(0.8)
    out = sample(LOGITS, SamplingMethod(), number, number, keys, controlled_BV=jnp.asarray(after, "f"))
    scaled = after / 0.8
    expected = scaled - np.log(np.exp(scaled).sum(axis=-1, keepdims=True))
    plain = LOGITS - np.log(np.exp(LOGITS.astype(np.float64)).sum(axis=-1, keepdims=True))
    rows = np.arange(B)
    assert np.isfinite(after[rows, out.tokens]).all()
    np.testing.assert_allclose(out.sampler_logps, expected[rows, out.tokens], atol=1e-5)
    np.testing.assert_allclose(out.policy_logps, plain[rows, out.tokens], atol=1e-5)


@pytest.mark.parametrize(
    "method",
    [
        SamplingMethod(),
        SamplingMethod(greedy=True),
        SamplingMethod(top_k=3),
        SamplingMethod(nucleus=True),
        SamplingMethod(top_k=3, nucleus=True),
    ],
)
def test_a_row_without_tokens_is_marked_and_never_nan(method: SamplingMethod) -> None:
    empty = LOGITS.copy()
    empty[2] = -np.inf
    keys, number = jax.random.split(jax.random.key(0), B), jnp.float32(0.9)
    out = sample(LOGITS, method, number, number, keys, controlled_BV=jnp.asarray(empty))
    np.testing.assert_array_equal(np.isneginf(out.sampler_logps), [False, False, True, False])
    assert not np.isnan(np.stack(out[1:])).any()
    assert out.tokens[2] == 0
    table = distribution(jnp.asarray(empty), method, number, number)
    assert np.isneginf(table[2]).all() and not np.isnan(table).any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logit_bias": {V: 1.0}}, "logit_bias: got token 37, expected 0 to 36"),
        ({"logit_bias": {-1: 1.0}}, "logit_bias: got token -1"),
        ({"logit_bias": {3: float("nan")}}, "logit_bias: token 3: got nan"),
        ({"logit_bias": {3: float("inf")}}, "logit_bias: token 3: got inf"),
        ({"repetition_penalty": 0.0}, "repetition_penalty: got 0, expected 1 \\(off\\) or a number from 0.01"),
        ({"repetition_penalty": float("nan")}, "repetition_penalty: got nan"),
        ({"min_new_tokens": -1}, "min_new_tokens: got -1"),
        ({"min_new_tokens": 8}, "min_new_tokens: got 8, expected 0 to 7"),
    ],
)
def test_bad_settings_are_one_sentence(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settings(**changes)


def _processors(torch: Any, which: str) -> list[Callable[[Any, Any], Any]]:
    from transformers.generation import logits_process as hf

    bias = hf.SequenceBiasLogitsProcessor({(token,): float(value) for token, value in BIAS.items()})
    left = torch.tensor((~MASK).sum(axis=1))
    penalty = hf.RepetitionPenaltyLogitsProcessor(PENALTY, prompt_ignore_length=left)
    least = hf.MinNewTokensLengthLogitsProcessor(L - 1, 2, list(STOPS))
    only = hf.PrefixConstrainedLogitsProcessor(lambda row, _: np.flatnonzero(ALLOWED[row]).tolist(), 1)
    every = dict(zip(NAMES, (bias, penalty, least, only), strict=True))
    return list(every.values()) if which == "all" else [every[which]]


@pytest.mark.parametrize("which", [*NAMES, "all"])
def test_equals_transformers(which: str) -> None:
    """One completion token drawn; transformers runs its processors in this order."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    scores = torch.tensor(LOGITS)
    for processor in _processors(torch, which):
        scores = processor(torch.tensor(TOKENS, dtype=torch.long), scores)
    found = apply(*(NAMES if which == "all" else (which,)), drawn=np.ones(B, np.int32))
    np.testing.assert_allclose(found, scores.numpy(), rtol=1e-6)


@pytest.mark.parametrize("temperature,top_k,top_p", [(0.7, 0, 1.0), (1.3, 5, 1.0), (1.0, 0, 0.8), (0.9, 9, 0.7)])
def test_warpers_equal_transformers(temperature: float, top_k: int, top_p: float) -> None:
    """Temperature, top-k, top-p in that order, after the controls."""
    torch = pytest.importorskip("torch")
    hf = pytest.importorskip("transformers.generation.logits_process")
    scores = torch.tensor(LOGITS)
    warpers = [hf.TemperatureLogitsWarper(temperature)]
    warpers += [hf.TopKLogitsWarper(top_k)] if top_k else []
    warpers += [hf.TopPLogitsWarper(top_p)] if top_p < 1 else []
    for warper in warpers:
        scores = warper(None, scores)
    expected = torch.log_softmax(scores, dim=-1).numpy()
    method = SamplingMethod(top_k=top_k, nucleus=top_p < 1)
    found = distribution(jnp.asarray(LOGITS), method, jnp.float32(temperature), jnp.float32(top_p))
    np.testing.assert_allclose(found, expected, atol=1e-5)
