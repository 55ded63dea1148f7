"""What is drawn and what is reported about it, per method: 10,000 completions of each of two prompts.

One sampled batch a method and temperature serves all tests of this file; V = 7, three tokens each.
"""

import dataclasses
from functools import cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chisquare

from models.logprobs import token_logps
from models.transformer import forward, unembedding
from research.sampling.methods import SamplingMethod
from research.sampling.sampler import sample
from research.sampling.types import Completions
from tests.models.tiny import CONFIG, make_params
from tests.research.sampling.reference import numpy_distribution, numpy_two_tokens
from tests.research.sampling.tiny import TEMPERATURE, TOP_K, TOP_K_TOP_P, TOP_P, make_prompts, make_spec, scalars

SMALL = dataclasses.replace(CONFIG, vocab_size=7)
PROMPTS = [np.array([1, 4, 2, 5], np.int32), np.array([6, 2], np.int32)]
G, N, WIDTH = 10_000, 3, 5


class Case(NamedTuple):
    method: SamplingMethod
    temperature: float = 1.0
    top_p: float = 1.0


CASES = {
    "plain": Case(TEMPERATURE),
    "cold": Case(TEMPERATURE, temperature=0.6),
    "hot": Case(TEMPERATURE, temperature=1.8),
    "top_k": Case(TOP_K),
    "top_p": Case(TOP_P, top_p=0.8),
    "top_k_top_p_hot": Case(TOP_K_TOP_P, temperature=1.4, top_p=0.9),
}
every_case = pytest.mark.parametrize("name", CASES)


@cache
def drawn(name: str) -> Completions:
    """Numpy arrays of 2 * G rows."""
    case = CASES[name]
    spec = make_spec(N, G, method=case.method)
    numbers = scalars(seed=11, temperature=case.temperature, top_p=case.top_p)
    return jax.device_get(sample(make_params(SMALL), make_prompts(PROMPTS, WIDTH), numbers, config=SMALL, spec=spec))


@cache
def exact(name: str, prompt: int) -> np.ndarray:
    case = CASES[name]
    tokens = PROMPTS[prompt].tolist()
    return numpy_two_tokens(make_params(SMALL), SMALL, tokens, case.method, case.temperature, case.top_p)


@pytest.mark.parametrize("prompt", range(2))
@every_case
def test_first_two_tokens_follow_the_exact_distribution(name: str, prompt: int) -> None:
    tokens = drawn(name).tokens[prompt * G : (prompt + 1) * G]
    counts = np.bincount(tokens[:, 0] * 7 + tokens[:, 1], minlength=49)
    expected = G * exact(name, prompt).ravel()
    assert counts[expected == 0].sum() == 0, "a removed token was drawn"
    assert (expected == 0).any() == CASES[name].method.truncates
    rare = (expected > 0) & (expected < 5)
    observed, wanted = counts[expected >= 5], expected[expected >= 5]
    if rare.any():
        observed, wanted = np.append(observed, counts[rare].sum()), np.append(wanted, expected[rare].sum())
    assert len(wanted) >= 4
    assert chisquare(observed, wanted).pvalue > 1e-3


@cache
def teacher_forced() -> tuple[np.ndarray, ...]:
    """A few rows of each prompt, as a trainer would lay them out: left-padded, then the completion."""
    rows = np.r_[0:30, G : G + 30]
    prompts = make_prompts(PROMPTS, WIDTH)
    mask = np.concatenate([np.repeat(prompts.mask, 30, axis=0), np.ones((60, N), bool)], axis=1)
    return (
        rows,
        np.repeat(prompts.tokens, 30, axis=0),
        np.maximum(np.cumsum(mask, axis=1, dtype=np.int32) - 1, 0),
        mask,
    )


def rescored(name: str, temperature: float) -> np.ndarray:
    rows, prompts, positions, mask = teacher_forced()
    tokens = np.concatenate([prompts, drawn(name).tokens[rows]], axis=1)
    score = jax.jit(token_logps, static_argnames="config")
    batch = (tokens, positions, mask.astype(np.int32))
    found, _ = score(make_params(SMALL), SMALL, *batch, temperature=jnp.float32(temperature))
    return np.asarray(found.logps[:, WIDTH:])


@every_case
def test_policy_logps_are_the_plain_models(name: str) -> None:
    """Whatever the temperature and the truncation were."""
    found = drawn(name).policy_logps[teacher_forced()[0]]
    np.testing.assert_allclose(found, rescored(name, 1.0), atol=1e-4)


@pytest.mark.parametrize("name", ["plain", "cold", "hot"])
def test_sampler_logps_are_token_logps_at_the_temperature(name: str) -> None:
    found = drawn(name).sampler_logps[teacher_forced()[0]]
    np.testing.assert_allclose(found, rescored(name, CASES[name].temperature), atol=1e-4)
    if name != "plain":
        assert np.abs(found - rescored(name, 1.0)).max() > 0.1


@every_case
def test_sampler_logps_are_those_of_the_renormalised_distribution(name: str) -> None:
    """All three tokens, from the uncached model's logits and NumPy's truncation."""
    case, (rows, prompts, positions, mask) = CASES[name], teacher_forced()
    params, completions = make_params(SMALL), drawn(name).tokens[rows]
    tokens = np.concatenate([prompts, completions], axis=1)
    hidden, _ = jax.jit(forward, static_argnames="config")(params, SMALL, tokens, positions, mask.astype(np.int32))
    logits = np.asarray(hidden[:, WIDTH - 1 : -1] @ unembedding(params), np.float64)
    expected = np.array([
        [np.log(numpy_distribution(logits[row, t], case.method, case.temperature, case.top_p)[token])
         for t, token in enumerate(completion)]
        for row, completion in enumerate(completions)
    ])  # fmt: skip
    found = drawn(name).sampler_logps[rows]
    np.testing.assert_allclose(found, expected, atol=1e-4)
    if case.method.truncates:
        assert (np.abs(found - drawn(name).policy_logps[rows]) > 1e-3).mean() > 0.9


@every_case
def test_sampler_logps_of_every_row_are_exact(name: str) -> None:
    """Log-probs of the first two tokens of all 20,000 rows, from the NumPy decoder alone."""
    out = drawn(name)
    for prompt in range(2):
        here = slice(prompt * G, (prompt + 1) * G)
        first, second = out.tokens[here, :2].T
        expected = np.log(exact(name, prompt)[first, second])
        np.testing.assert_allclose(out.sampler_logps[here, :2].sum(axis=1), expected, atol=1e-4)
