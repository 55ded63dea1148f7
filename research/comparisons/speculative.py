"""Speculative decoding beside plain decoding, one row at a time, in turn on the same prompts."""

import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from models.config import ModelConfig
from models.transformer import Params
from research.analysis.figures import FAINT, INK, MARKERS, PALETTE, save
from research.core.errors import DataError
from research.core.files import write_json_atomic
from research.data.chat import normalize_record, render_messages
from research.data.tokenizer import Tokenizer
from research.sampling.programs import layout_program
from research.sampling.sampler import sample
from research.sampling.speculative import Draft, SpeculativeStats, sample_speculative
from research.sampling.types import Prompts, SamplerScalars, SamplerSpec

PLAIN = "plain"
"""The name of decoding without proposals."""


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
    prompts: Sequence[Prompts],
    contenders: Mapping[str, Draft],
    scalars: SamplerScalars,
    *,
    config: ModelConfig,
    spec: SamplerSpec,
) -> dict[str, Timing]:
    """Times plain decoding and each contender: a repetition is one prompt, the first of a round changing.

    Every completion has `spec.max_new_tokens` tokens where `spec.stop_tokens` is empty, so that all do equal work.

    Args:
      params: the target's.
      prompts: of one row and one shape, one a repetition; the first also warms up.
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
    for run in runs.values():
        jax.block_until_ready(run(prompts[0]))
    names = list(runs)
    for number, row in enumerate(prompts):
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


def speed_up(plain: Timing, other: Timing) -> tuple[float, float]:
    """Tokens/s over plain decoding's: the ratio of the medians, and the median of the ratios prompt by prompt."""
    rates = [np.divide(timing.tokens, timing.seconds) for timing in (other, plain)]
    return other.rate() / plain.rate(), float(np.median(rates[0] / rates[1]))


@dataclasses.dataclass(frozen=True)
class Trial:
    """One way of decoding at one temperature.

    Attributes:
      proposer: the draft's name, or `PLAIN`.
      draft_tokens: proposals a round; 0 for plain decoding.
      temperature: 0 is greedy.
      timing: of its repetitions.
      speed_up: over plain decoding, of the medians and median prompt by prompt.
    """

    proposer: str
    draft_tokens: int
    temperature: float
    timing: Timing
    speed_up: tuple[float, float]


def trials_of(
    timings: Mapping[str, Timing], names: Mapping[str, tuple[str, int]], temperature: float
) -> list[Trial]:
    """The rows of a report.

    Args:
      timings: from `compare`.
      names: draft and proposals a round of each contender.
      temperature: that all were drawn at.
    """
    names = {PLAIN: (PLAIN, 0), **names}
    return [
        Trial(*names[name], temperature, timing, speed_up(timings[PLAIN], timing))
        for name, timing in timings.items()
    ]


def text_prompts(
    records: Iterable[Mapping[str, Any]], tokenizer: Tokenizer, *, count: int, length: int, longest: int
) -> list[Prompts]:
    """The first `length` tokens of `count` texts {text} that go on for `longest` tokens at least, each as it begins.

    Raises:
      DataError: there are not so many.
    """
    texts = (np.asarray(tokenizer.encode(record["text"]), np.int32) for record in records)
    found = [tokens[:length] for tokens in islice((text for text in texts if text.size >= longest), count)]
    if len(found) < count:
        raise DataError(
            f"held-out texts: {len(found)} have {longest} tokens or more, expected at least {count}"
        )
    return [_one_row(tokens, length, tokenizer.pad_id, number) for number, tokens in enumerate(found)]


def problem_prompts(
    records: Iterable[Mapping[str, Any]], tokenizer: Tokenizer, *, count: int, length: int, new_tokens: int
) -> list[Prompts]:
    """Whole problems as rollouts pose them, padded on the left; only those whose worked answer is long enough.

    Args:
      records: problems with worked answers.
      tokenizer: its markup opens the answer.
      count: problems.
      length: slots of a prompt; longer ones are passed over.
      new_tokens: an answer has so many tokens at least.

    Raises:
      DataError: there are not so many.
    """
    found: list[Prompts] = []
    for record in records:
        whole = render_messages(normalize_record(record, where="problem"), tokenizer, where="problem")
        if whole.prompt_length <= length and whole.tokens.size - whole.prompt_length >= new_tokens:
            found.append(_one_row(whole.tokens[: whole.prompt_length], length, tokenizer.pad_id, len(found)))
            if len(found) == count:
                return found
    raise DataError(
        f"held-out problems: {len(found)} have a prompt of at most {length} tokens and an answer of at least "
        f"{new_tokens}, expected {count}"
    )


def show(trials: Sequence[Trial], console: Console) -> None:
    """Prints a line a trial."""
    table = Table(title="one row at a time, medians over the prompts", title_justify="left")
    for name in (
        "temperature",
        "proposals by",
        "a round",
        "accepted",
        "tokens a forward",
        "tokens/s",
        "speed-up",
    ):
        table.add_column(name, justify="left" if name == "proposals by" else "right")
    for trial in trials:
        found = trial.timing.metrics
        cells = ["", "", "", f"{trial.timing.rate():,.0f}", ""]
        if found:
            cells[0], cells[1] = str(trial.draft_tokens), f"{found['sampler/acceptance_rate']:.0%}"
            cells[2], cells[4] = f"{found['sampler/tokens_per_forward']:.2f}", f"{trial.speed_up[0]:.2f}x"
        table.add_row(f"{trial.temperature:g}", trial.proposer, *cells)
    console.print(table)


def write(trials: Sequence[Trial], folder: Path, *, run: Mapping[str, Any]) -> list[Path]:
    """Writes `speculative.json` and `speculative.png`; returns their paths.

    Args:
      trials: what was measured.
      folder: where to; must exist.
      run: what else the record should say.
    """
    record = {"run": dict(run), "trials": [_record(trial) for trial in trials]}
    write_json_atomic(folder / "speculative.json", record)
    return [folder / "speculative.json", save(draw_speed_ups(trials), folder / "speculative.png")]


def draw_speed_ups(trials: Sequence[Trial]) -> Figure:
    """Speed-up against proposals a round, a line for each proposer and temperature."""
    figure = Figure(figsize=(7.0, 4.4), layout="constrained")
    axes = figure.subplots()
    lines: dict[tuple[str, float], list[Trial]] = {}
    for trial in trials:
        if trial.draft_tokens:
            lines.setdefault((trial.proposer, trial.temperature), []).append(trial)
    for number, ((proposer, temperature), line) in enumerate(lines.items()):
        axes.plot(
            [trial.draft_tokens for trial in line],
            [trial.speed_up[0] for trial in line],
            color=PALETTE[number % len(PALETTE)],
            marker=MARKERS[number % len(MARKERS)],
            label=f"{proposer}, {'greedy' if temperature == 0 else f'temperature {temperature:g}'}",
        )
    axes.axhline(1.0, color=INK, linestyle=(0, (4, 3)), linewidth=1.0)
    axes.set_xticks(sorted({trial.draft_tokens for trial in trials if trial.draft_tokens}))
    axes.set_xlabel("proposals a round")
    axes.set_ylabel("tokens/s over plain decoding")
    axes.set_title(
        "Medians over the prompts, one row at a time; dashed: plain decoding", fontsize=9, loc="left"
    )
    axes.grid(color=FAINT)
    axes.legend(fontsize=8, frameon=False)
    return figure


def _record(trial: Trial) -> dict[str, Any]:
    return {
        **dataclasses.asdict(trial),
        "timing": trial.timing._asdict(),
        "tokens_per_second": trial.timing.rate(),
    }


def _speculative(
    target: Params, contender: Draft, scalars: SamplerScalars, config: ModelConfig, spec: SamplerSpec
) -> Callable[[Prompts], tuple[Any, SpeculativeStats | None]]:
    draft = contender.laid_out(spec.weights)
    return lambda prompt: sample_speculative(
        target, draft.params, prompt, scalars, config=config, spec=spec, speculative=draft.spec
    )


def _one_row(tokens: np.ndarray, length: int, pad_id: int, number: int) -> Prompts:
    padding = (length - tokens.size, 0)
    return Prompts(
        np.pad(tokens, padding, constant_values=pad_id)[None].astype(np.int32),
        np.pad(np.ones(tokens.size, bool), padding)[None],
        np.array([number], np.int32),
    )


def _metrics(stats: Sequence[SpeculativeStats]) -> dict[str, float]:
    return jax.tree.map(lambda *counts: sum(int(n) for n in counts), *stats).metrics() if stats else {}
