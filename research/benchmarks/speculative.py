"""Speculative decoding beside plain decoding, one row at a time, in turn on the same prompts."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from models.config import ModelConfig
from models.transformer import Params
from research.sampling.programs import layout_program
from research.sampling.sampler import sample
from research.sampling.speculative import SpeculativeSpec, SpeculativeStats, sample_speculative
from research.sampling.types import Prompts, SamplerScalars, SamplerSpec

PLAIN = "plain"
"""The name of decoding without proposals."""


class Contender(NamedTuple):
    """Who proposes: a draft's parameters, as trained (None without a draft model), and the static part."""

    draft_params: Params | None
    speculative: SpeculativeSpec


class Timing(NamedTuple):
    """What all repetitions of one way of decoding took.

    Attributes:
      seconds: of each repetition.
      tokens: completion tokens of each repetition.
      metrics: of all repetitions together (`SpeculativeStats.metrics`); empty for plain decoding.
    """

    seconds: tuple[float, ...]
    tokens: tuple[int, ...]
    metrics: Mapping[str, float]

    def rate(self) -> float:
        """Median tokens/s."""
        return float(np.median(np.divide(self.tokens, self.seconds)))


def compare(
    params: Params,
    prompts: Sequence[np.ndarray],
    contenders: Mapping[str, Contender],
    scalars: SamplerScalars,
    *,
    config: ModelConfig,
    spec: SamplerSpec,
) -> dict[str, Timing]:
    """Times plain decoding and each contender: a repetition is one prompt, the first of a round changing.

    Every completion has `spec.max_new_tokens` tokens where `spec.stop_tokens` is empty, so that all do equal work.

    Args:
      params: the target's.
      prompts: token ids of one length, one array a repetition; the first also warms up.
      contenders: by name.
      scalars: seed, step, temperature, top_p.
      config: of the target.
      spec: of the rollout; one sample a prompt.
    """
    target = layout_program(params, config=config, weights=spec.weights)
    runs: dict[str, Callable[[Prompts], tuple[Any, SpeculativeStats | None]]] = {
        PLAIN: lambda prompt: (sample(target, prompt, scalars, config=config, spec=spec), None)
    }
    for name, contender in contenders.items():
        runs[name] = _speculative(target, contender, scalars, config, spec)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    tokens: dict[str, list[int]] = {name: [] for name in runs}
    stats: dict[str, list[SpeculativeStats]] = {name: [] for name in contenders}
    rows = [_one_row(ids, number) for number, ids in enumerate(prompts)]
    for run in runs.values():
        jax.block_until_ready(run(rows[0]))
    names = list(runs)
    for number, row in enumerate(rows):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            began = time.perf_counter()
            completions, found = jax.block_until_ready(runs[name](row))
            seconds[name].append(time.perf_counter() - began)
            tokens[name].append(int(completions.lengths.sum()))
            if found is not None:
                stats[name].append(found)
    return {
        name: Timing(tuple(seconds[name]), tuple(tokens[name]), _metrics(stats.get(name, [])))
        for name in names
    }


def speed_up(timings: Mapping[str, Timing], name: str) -> tuple[float, float]:
    """Tokens/s over plain decoding's: the ratio of the medians, and the median of the ratios prompt by prompt."""
    plain, other = timings[PLAIN], timings[name]
    rates = [np.divide(timing.tokens, timing.seconds) for timing in (other, plain)]
    return other.rate() / plain.rate(), float(np.median(rates[0] / rates[1]))


def _speculative(
    target: Params, contender: Contender, scalars: SamplerScalars, config: ModelConfig, spec: SamplerSpec
) -> Callable[[Prompts], tuple[Any, SpeculativeStats | None]]:
    draft_params, speculative = contender
    if isinstance(speculative.draft, ModelConfig):
        draft_params = layout_program(draft_params, config=speculative.draft, weights=spec.weights)
    return lambda prompt: sample_speculative(
        target, draft_params, prompt, scalars, config=config, spec=spec, speculative=speculative
    )


def _one_row(tokens: np.ndarray, number: int) -> Prompts:
    return Prompts(
        tokens[None].astype(np.int32), np.ones((1, tokens.size), bool), np.array([number], np.int32)
    )


def _metrics(stats: Sequence[SpeculativeStats]) -> dict[str, float]:
    return jax.tree.map(lambda *counts: sum(int(n) for n in counts), *stats).metrics() if stats else {}
