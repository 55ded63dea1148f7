"""Speculative decoding beside plain decoding, one row at a time, in turn on the same prompts."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax

from models.config import ModelConfig
from models.transformer import Params
from research.analysis import markdown
from research.comparisons.timing import Series, turns
from research.core.errors import DataError
from research.data.chat import normalize_record, render_messages
from research.data.tokenizer import Tokenizer
from research.sampling.drafts import Draft
from research.sampling.programs import layout_program
from research.sampling.sampler import sample
from research.sampling.speculative import SpeculativeStats, sample_speculative
from research.sampling.types import Completions, Prompts, SamplerScalars, SamplerSpec

PLAIN = "plain"
"""The name of decoding without proposals."""


def compare(
    params: Params,
    prompts: Sequence[Prompts],
    drafts: Mapping[str, Draft],
    scalars: SamplerScalars,
    *,
    config: ModelConfig,
    spec: SamplerSpec,
) -> dict[str, Series]:
    """Times plain decoding and each draft: a repetition is one prompt.

    Every completion has `spec.max_new_tokens` tokens where `spec.stop_tokens` is empty, so that all do equal work.
    What is known of a draft is `SpeculativeStats.metrics` of all repetitions together; of plain decoding nothing.

    Args:
      params: the target's.
      prompts: of one row and one shape, one a repetition; the first also warms up.
      drafts: by name.
      scalars: seed, step, temperature, top_p.
      config: of the target.
      spec: of the rollout; one sample a prompt.
    """
    target = layout_program(params, config=config, weights=spec.weights)

    def plain(prompt: Prompts) -> tuple[Completions, None]:
        return sample(target, prompt, scalars, config=config, spec=spec), None

    def speculative(draft: Draft) -> Callable[[Prompts], tuple[Completions, SpeculativeStats]]:
        draft = draft.laid_out(spec.weights)
        return lambda prompt: sample_speculative(target, draft, prompt, scalars, config=config, spec=spec)

    runs: dict[str, Callable[[Prompts], tuple[Completions, SpeculativeStats | None]]]
    runs = {PLAIN: plain, **{name: speculative(draft) for name, draft in drafts.items()}}
    laps: dict[str, list[tuple[float, int, SpeculativeStats | None]]] = {name: [] for name in runs}
    for run in runs.values():
        jax.block_until_ready(run(prompts[0]))
    for number, prompt in enumerate(prompts):
        for name in turns(list(runs), number):
            began = time.perf_counter()
            completions, stats = jax.block_until_ready(runs[name](prompt))
            laps[name].append((time.perf_counter() - began, int(completions.lengths.sum()), stats))
    return {name: _series(found) for name, found in laps.items()}


def _series(laps: Sequence[tuple[float, int, SpeculativeStats | None]]) -> Series:
    seconds, tokens, stats = zip(*laps, strict=True)
    if stats[0] is None:
        return Series(seconds, tokens)
    return Series(seconds, tokens, jax.tree.map(lambda *counts: sum(map(int, counts)), *stats).metrics())


def problem_prompts(
    records: Iterable[Mapping[str, Any]], tokenizer: Tokenizer, *, count: int, length: int, new_tokens: int
) -> list[Prompts]:
    """Whole problems as rollouts pose them, padded on the left to `length` slots; longer ones are passed over.

    Raises:
      DataError: fewer than `count` have a worked answer of at least `new_tokens`.
    """
    found: list[Prompts] = []
    for record in records:
        whole = render_messages(normalize_record(record, where="problem"), tokenizer, where="problem")
        n = whole.prompt_length
        if n <= length and whole.tokens.size - n >= new_tokens:
            found.append(Prompts.of_one(whole.tokens[:n], len(found), length))
            if len(found) == count:
                return found
    raise DataError(
        f"held-out problems: {len(found)} have a prompt of at most {length} tokens and an answer of at least "
        f"{new_tokens}, expected {count}"
    )


def records(found: Mapping[str, Series], temperature: float) -> list[dict[str, Any]]:
    """Plain JSON, a record for each way of decoding at one temperature."""
    return [
        {
            "temperature": temperature,
            "proposals": name,
            "seconds": each.seconds,
            "tokens": each.tokens,
            "metrics": each.about,
            "tokens_per_second": each.rate,
            "speed_up": each.over(found[PLAIN]),
        }
        for name, each in found.items()
    ]


def table(found: Sequence[Mapping[str, Any]]) -> str:
    """The records as a Markdown table."""
    rows = []
    for each in found:
        metrics = each["metrics"]  # none of plain decoding
        accepted, drawn, rate = "", "", ""
        if metrics:
            accepted = f"{metrics['sampler/acceptance_rate']:.0%}"
            drawn, rate = f"{metrics['sampler/tokens_per_forward']:.2f}", f"{each['speed_up'][0]:.2f}x"
        cells = [f"{each['temperature']:g}", each["proposals"], accepted, drawn]
        rows.append([*cells, f"{each['tokens_per_second']:,.0f}", rate])
    header = ("temperature", "proposals by, a round", "accepted", "tokens a forward", "tokens/s", "speed-up")
    return markdown.table(header, rows, right_from=2) + "\n"
