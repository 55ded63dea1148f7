"""Prompts, scalars and specs for the sampler tests."""

import numpy as np

from research.sampling.methods import SamplingMethod
from research.sampling.types import Prompts, SamplerScalars, SamplerSpec
from tests.models.tiny import left_padded

TEMPERATURE = SamplingMethod()
GREEDY = SamplingMethod(greedy=True)
TOP_K = SamplingMethod(top_k=3)
TOP_P = SamplingMethod(nucleus=True)
TOP_K_TOP_P = SamplingMethod(top_k=5, nucleus=True)


def make_prompts(rows: list[np.ndarray], width: int, ids: list[int] | None = None) -> Prompts:
    """Left-padded prompts, numbered from 0 unless told; the padding holds a token that also occurs in text."""
    tokens, _, segments = left_padded(rows, width, fill=3)
    return Prompts(tokens, segments.astype(bool), np.asarray(ids or range(len(rows)), np.int32))


def scalars(seed: int = 0, step: int = 0, temperature: float = 1.0, top_p: float = 1.0) -> SamplerScalars:
    """The traced numbers of a rollout."""
    return SamplerScalars(np.int32(seed), np.int32(step), np.float32(temperature), np.float32(top_p))


def make_spec(
    new: int = 6, samples: int = 1, *, stops: tuple[int, ...] = (), pad: int = 0, method: SamplingMethod = TEMPERATURE
) -> SamplerSpec:
    """The static part of a rollout."""
    return SamplerSpec(new, samples, stops, pad, method)
