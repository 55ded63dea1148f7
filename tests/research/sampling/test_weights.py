"""Sampling with bfloat16 and int8 weights: everything drawn and reported is the rounded model's.

Each matrix has one large row, so that the rounded model is far from the trained one: V = 7.
"""

import dataclasses
import re
import sys
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chisquare

from models.logprobs import token_logps
from models.transformer import Params, forward, unembedding
from research.config.identity import stage_identity
from research.config.resolve import resolve
from research.core.errors import ConfigError
from research.sampling.engine import sample_refilled
from research.sampling.programs import layout_program
from research.sampling.sampler import sample
from research.sampling.types import Completions, EngineSpec
from research.sampling.weights import Weights, sampling_params
from tests.models.tiny import ONE_LAYER, make_params
from tests.research.sampling.tiny import make_prompts, make_spec, scalars
from tests.tiny import tiny_config

SMALL = dataclasses.replace(ONE_LAYER, vocab_size=7)
PROMPT, G, N, TEMPERATURE = np.array([1, 4, 2, 5], np.int32), 10_000, 3, 0.7
PROMPTS = make_prompts([PROMPT], 4)


@cache
def trained() -> Params:
    params = make_params(SMALL)
    spoil = lambda w: w.at[:, 0].multiply(60.0)  # noqa: E731  of the stacked layers' inputs, the first
    layers = params["layers"]
    return {**params, "layers": {**layers, "mlp": jax.tree.map(spoil, layers["mlp"])}}


@cache
def rounded(weights: Weights) -> Params:
    return layout_program(trained(), config=SMALL, weights=weights)


@cache
def drawn(weights: Weights) -> Completions:
    spec = dataclasses.replace(make_spec(N, G), weights=weights)
    numbers = scalars(seed=3, temperature=TEMPERATURE)
    return jax.device_get(sample(trained(), PROMPTS, numbers, config=SMALL, spec=spec))


def rescored(params: Params, temperature: float) -> np.ndarray:
    """Teacher-forced log-probs of the first 50 completions."""
    tokens = np.concatenate([np.tile(PROMPT, (50, 1)), drawn("int8").tokens[:50]], axis=1)
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    score = jax.jit(token_logps, static_argnames="config")
    found, _ = score(params, SMALL, tokens, positions, np.ones_like(tokens), temperature=jnp.float32(temperature))
    return np.asarray(found.logps[:, len(PROMPT) :])


def first_probs(params: Params) -> np.ndarray:
    """The distribution of the first token."""
    at = np.arange(len(PROMPT), dtype=np.int32)[None]
    hidden, _ = jax.jit(forward, static_argnames="config")(params, SMALL, PROMPT[None], at, np.ones_like(at))
    logits = np.asarray(hidden[0, -1] @ unembedding(params), np.float64) / TEMPERATURE
    return np.exp(logits) / np.exp(logits).sum()


def test_tokens_are_drawn_from_the_int8_model() -> None:
    counts = np.bincount(drawn("int8").tokens[:, 0], minlength=7)
    assert chisquare(counts, G * first_probs(rounded("int8"))).pvalue > 1e-3


def test_log_probs_are_those_of_the_int8_model() -> None:
    """So the trainer, which scores with the trained parameters, sees a gap."""
    out = drawn("int8")
    np.testing.assert_allclose(out.policy_logps[:50], rescored(rounded("int8"), 1.0), atol=1e-4)
    np.testing.assert_allclose(out.sampler_logps[:50], rescored(rounded("int8"), TEMPERATURE), atol=1e-4)
    assert np.abs(out.sampler_logps[:50] - rescored(trained(), TEMPERATURE)).mean() > 0.02


@pytest.mark.parametrize("weights", ["bfloat16", "int8"])
def test_the_engine_draws_the_same(weights: Weights) -> None:
    spec = dataclasses.replace(make_spec(N, 4), weights=weights)
    numbers = scalars(seed=3, temperature=TEMPERATURE)
    apart = jax.device_get(sample(trained(), PROMPTS, numbers, config=SMALL, spec=spec))
    refilled = dataclasses.replace(spec, engine=EngineSpec(slots=2, chunk=2, admit=1))
    found, _ = sample_refilled(trained(), PROMPTS, numbers, config=SMALL, spec=refilled)
    np.testing.assert_array_equal(found.tokens, apart.tokens)
    np.testing.assert_allclose(found.policy_logps, apart.policy_logps, atol=1e-5)
    # Laid out beforehand, once for many rollouts, it is the same.
    again = jax.device_get(sample(rounded(weights), PROMPTS, numbers, config=SMALL, spec=spec))
    np.testing.assert_array_equal(again.tokens, apart.tokens)


@pytest.mark.parametrize("weights,small", [("bfloat16", "bf16"), ("int8", "s8")])
def test_the_loop_over_steps_carries_the_small_weights(weights: Weights, small: str) -> None:
    """Converted before the loop, they would take the memory and the traffic of the large ones."""
    spec = dataclasses.replace(make_spec(N, 4), weights=weights)
    compiled = sample.lower(rounded(weights), PROMPTS, scalars(), config=SMALL, spec=spec).compile()
    loops = [line.split(" while(")[0] for line in compiled.as_text().splitlines() if " while(" in line]
    gate_up = lambda dtype: sum(  # noqa: E731
        len(re.findall(rf"\b{dtype}\[(?:32,2,48|32,96)\]", line)) for line in loops
    )
    assert gate_up("f32") == 0 and gate_up(small) > 0


def test_layout_is_what_it_says() -> None:
    dtypes = {
        weights: {leaf.dtype.name for leaf in jax.tree.leaves(rounded(weights)["layers"][0]["mlp"])}
        for weights in ("compute", "bfloat16", "int8")
    }
    assert dtypes == {"compute": {"float32"}, "bfloat16": {"bfloat16"}, "int8": {"int8", "float32"}}


def test_without_qwix_one_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "qwix", None)
    with pytest.raises(ConfigError, match=r"^sampler\.weights: int8 needs .*'temper\[int8\]'\.$"):
        sampling_params(trained(), SMALL, "int8")


def test_the_config_says_which_and_it_is_part_of_a_runs_identity() -> None:
    def identity(weights: str) -> dict:
        config = tiny_config()
        config.sampler.weights = weights
        experiment = resolve(config)
        return stage_identity(experiment, experiment.stage("rl"))["sampler"]

    assert {**identity("compute"), "weights": "int8"} == identity("int8")
    with pytest.raises(ConfigError, match=r"sampler\.weights: got 'int4', expected"):
        identity("int4")
