"""From a benchmark's cases to workloads: what every system is told, and what a token of it costs at least."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from research.benchmarks.spec import Benchmark, GRPOCase, RolloutCase, TrainCase
from research.benchmarks.work import (
    Phase,
    decode_step_bytes,
    grpo_phases,
    parameter_bytes,
    rollout_phases,
    train_phases,
)
from research.config.sections import Data, Text, TokenizerSection
from research.data.examples import Examples, sft_examples
from research.data.records import View
from research.tasks.jsonl import Jsonl
from research.tasks.sources import Sources

FIRST_ID = 5
"""Ids below are left to padding and markup."""

_PROMPTS_OF_A_RUN = 256
"""GRPO's prompts; TRL wants a data set."""


@dataclasses.dataclass(frozen=True)
class Workload:
    """The same work for every system.

    Attributes:
      name: as the report shows it.
      case: the case's key in the config.
      peers: which may take part besides Temper.
      batch_size: rows at a time.
      message: what the systems are told, as JSON.
      phases: the least that a useful token costs.
      read_bytes: bytes that one pass over memory reads: the size at which the bandwidth is measured.
      unit: what takes `unit_tokens` useful tokens: a step, a batch, an iteration.
      on_curve: whether it is a point of the plot over batch sizes.
    """

    name: str
    case: str
    peers: tuple[str, ...]
    batch_size: int
    message: dict[str, Any]
    phases: tuple[Phase, ...]
    read_bytes: float
    unit: str
    unit_tokens: float
    on_curve: bool = False


def make_workloads(benchmark: Benchmark, data_dir: Path, say: Callable[[str], None]) -> list[Workload]:
    """All workloads of a benchmark; a case that needs a file which is not given is left out, and `say` says so."""
    found: list[Workload] = []
    for name, case in benchmark.cases.items():
        if isinstance(case, RolloutCase):
            found += _rollouts(benchmark, name, case)
        elif isinstance(case, GRPOCase):
            found.append(_grpo(benchmark, name, case))
        elif case.examples and not benchmark.data["problems"]["path"]:
            say(f"{name}: left out, --config.data.problems.path names no JSONL file")
        else:
            found.append(_train(benchmark, name, case, data_dir))
    return found


def draw_lengths(count: int, mean: int, longest: int, seed: int) -> np.ndarray:
    """`[count]` lengths from 1 to `longest`, exponentially distributed and cut, whose mean is `mean` +- 1/2."""
    if mean == 0:
        return np.full(count, longest, np.int64)
    draws = np.random.default_rng(seed).exponential(size=count)
    low, high = 0.0, 1e3 * longest

    def lengths(scale: float) -> np.ndarray:
        return np.clip(np.ceil(scale * draws), 1, longest).astype(np.int64)

    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if lengths(middle).mean() < mean else (low, middle)
    return lengths(high)


def _message(benchmark: Benchmark, **details: Any) -> dict[str, Any]:
    return {
        "kind": benchmark.kind,
        "model": dataclasses.asdict(benchmark.model),
        "platform": benchmark.platform,
        "threads": benchmark.threads,
        "seed": benchmark.seed,
        "sampler": dataclasses.asdict(benchmark.sampler),
        "optimizer": dict(benchmark.optimizer),
        **details,
    }


def _prompts(benchmark: Benchmark, count: int, length: int) -> list[list[int]]:
    rng = np.random.default_rng(benchmark.seed)
    return rng.integers(FIRST_ID, benchmark.model.vocab_size, (count, length)).tolist()


def _rollouts(benchmark: Benchmark, name: str, case: RolloutCase) -> Iterator[Workload]:
    for size in case.batch_sizes:
        count = case.batches * size
        lengths = draw_lengths(count, case.mean_new_tokens, case.max_new_tokens, benchmark.seed)
        mean = float(lengths.mean())
        yield Workload(
            name=f"{name}, batch {size}" if len(case.batch_sizes) > 1 else name,
            case=name,
            peers=case.peers,
            batch_size=size,
            message=_message(
                benchmark,
                prompts=_prompts(benchmark, count, case.prompt_length),
                lengths=lengths.tolist(),
                batch_size=size,
                max_new_tokens=case.max_new_tokens,
                greedy=case.greedy,
            ),
            phases=rollout_phases(benchmark.model, case.prompt_length, lengths, size),
            read_bytes=decode_step_bytes(benchmark.model, size, case.prompt_length + mean / 2),
            unit="pass",
            unit_tokens=float(lengths.sum()),
            on_curve=len(case.batch_sizes) > 1,
        )


def _train(benchmark: Benchmark, name: str, case: TrainCase, data_dir: Path) -> Workload:
    examples = None
    lengths: Sequence[int] = [case.length]
    unit, unit_tokens = "step", float(case.batch_size * case.length)
    if case.examples:
        found = _examples(benchmark, case, data_dir)
        examples = [
            {"tokens": tokens.tolist(), "loss_mask": mask.astype(int).tolist()}
            for tokens, mask in zip(found.tokens, found.loss_masks, strict=True)
        ]
        lengths = found.lengths.tolist()
        unit, unit_tokens = "pass", float(sum(lengths))
    return Workload(
        name=name,
        case=name,
        peers=case.peers,
        batch_size=case.batch_size,
        message=_message(
            benchmark, batch_size=case.batch_size, length=case.length, steps=case.steps, examples=examples
        ),
        phases=train_phases(benchmark.model, lengths),
        read_bytes=parameter_bytes(benchmark.model),
        unit=unit,
        unit_tokens=unit_tokens,
    )


def _examples(benchmark: Benchmark, case: TrainCase, data_dir: Path) -> Examples:
    """The first examples of the file as the chat pipelines tokenise them, once for all systems."""
    given = benchmark.data
    section = Data(text=Text(**given["text"]), tokenizer=TokenizerSection(**given["tokenizer"]))
    sources = Sources(Jsonl(given["problems"]["path"]), section, data_dir)
    records = View(sources.problems.train, case.examples)
    return sft_examples(
        records, sources.tokenizer, length=case.length, name="data.problems", limits=sources.limits
    )


def _grpo(benchmark: Benchmark, name: str, case: GRPOCase) -> Workload:
    rows = case.prompts * case.group_size
    context = case.prompt_length + case.max_new_tokens / 2
    return Workload(
        name=name,
        case=name,
        peers=case.peers,
        batch_size=rows,
        message=_message(
            benchmark,
            prompts=_prompts(benchmark, max(_PROMPTS_OF_A_RUN, case.prompts), case.prompt_length),
            prompts_per_step=case.prompts,
            group_size=case.group_size,
            max_new_tokens=case.max_new_tokens,
            iterations=case.iterations,
            objective=dict(benchmark.objective),
        ),
        phases=grpo_phases(
            benchmark.model, case.prompt_length, case.max_new_tokens, case.prompts, case.group_size
        ),
        read_bytes=decode_step_bytes(benchmark.model, rows, context),
        unit="iteration",
        unit_tokens=float(rows * case.max_new_tokens),
    )
