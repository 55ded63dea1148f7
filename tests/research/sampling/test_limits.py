"""Numbers that would overflow, or leave nothing to draw, are refused where the sampler's types are made."""

import math
from typing import Any

import jax
import numpy as np
import pytest

from research.core.errors import ConfigError
from research.sampling.drafts import Draft
from research.sampling.limits import LOGIT_BIAS, TEMPERATURE, TOP_P
from research.sampling.methods import SamplingMethod, sample_token
from research.sampling.streaming import GenerationSettings
from research.sampling.types import EngineSpec, make_scalars
from tests.research.sampling.tiny import make_spec

BAD = (math.nan, math.inf, -math.inf, -1.0)


@pytest.mark.parametrize(
    ("make", "name", "numbers"),
    [
        (lambda x: make_scalars(seed=0, temperature=x), "temperature", (*BAD, 1e-40, 1e38)),
        (lambda x: make_scalars(seed=0, top_p=x), "top_p", (*BAD, 0.0, 1.1)),
        (lambda x: make_scalars(seed=x), "seed", (-1, 2**31)),
        (lambda x: GenerationSettings(temperature=x), "temperature", (*BAD, 1e-40, 1e38)),
        (lambda x: GenerationSettings(top_p=x), "top_p", (*BAD, 0.0, 1.1)),
        (lambda x: GenerationSettings(repetition_penalty=x), "repetition_penalty", (*BAD, 0.0, 1e39)),
        (lambda x: GenerationSettings(samples=x), "samples", (0, 10**9)),
        (lambda x: SamplingMethod(top_k=x), "top_k", (-1, 2**31)),
        (lambda x: make_spec(x), "max_new_tokens", (0, 2**31)),
        (lambda x: EngineSpec(slots=x), "slots", (0, -3)),
        (lambda x: Draft(None, None, x), "draft_tokens", (0, 10_000)),
    ],
)
def test_out_of_range(make: Any, name: str, numbers: tuple[Any, ...]) -> None:
    for number in numbers:
        with pytest.raises(ConfigError, match=f"^{name}: got .*, expected "):
            make(number)


def test_zero_is_greedy() -> None:
    assert make_scalars(seed=0, temperature=0.0).temperature == 1.0
    assert GenerationSettings(temperature=0.0).method.greedy


@pytest.mark.parametrize("temperature", TEMPERATURE)
@pytest.mark.parametrize("method", [SamplingMethod(), SamplingMethod(nucleus=True), SamplingMethod(top_k=3)])
def test_at_the_bounds_every_token_is_one_of_the_vocabulary(temperature: float, method: SamplingMethod) -> None:
    """Logits as large as a bias makes them; 130 tokens take two blocks, the second hardly filled."""

    size = 130
    logits = np.random.default_rng(0).normal(size=(64, size)).astype(np.float32)
    logits[:, 0] = LOGIT_BIAS[1]
    logits[32:] = -logits[32:]
    out = jax.jit(sample_token, static_argnames="method")(
        logits, method, np.float32(temperature), np.float32(TOP_P[0]), jax.random.split(jax.random.key(0), 64)
    )
    assert (np.asarray(out.tokens) < size).all() and np.isfinite(out.sampler_logps).all()
