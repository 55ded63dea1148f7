"""From cases to workloads: what every system is told to do, and what a token of it costs at least."""

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from research.comparisons.roofline import (
    Phase,
    decode_step_bytes,
    grpo_phases,
    parameter_bytes,
    rollout_phases,
    train_phases,
)
from research.comparisons.sections import Comparison, GRPOCase, RolloutCase, TrainCase

FIRST_ID = 5
"""Ids below are left to padding and markup."""
LEARNING_RATE = 1e-3
_PROMPTS_OF_A_RUN = 256
"""GRPO's prompts; TRL wants a data set."""


class Workload(NamedTuple):
    """The same work for every system.

    Attributes:
      name: the case's dotted name, with the batch size where it varies.
      peers: which may take part besides Temper.
      batch_size: rows at a time.
      message: what the systems are told, as JSON.
      phases: the least that a useful token costs.
      read_bytes: what one pass over memory reads: the size at which the bandwidth is measured.
      unit: what takes `unit_tokens` useful tokens: a step, a pass, an iteration.
      curve: the case, where this is a point of a plot over batch sizes.
    """

    name: str
    peers: tuple[str, ...]
    batch_size: int
    message: dict[str, Any]
    phases: tuple[Phase, ...]
    read_bytes: float
    unit: str
    unit_tokens: float
    curve: str = ""


def make_workloads(comparison: Comparison) -> list[Workload]:
    """All workloads of a comparison."""
    found: list[Workload] = []
    for name, case in comparison.cases.items():
        if isinstance(case, RolloutCase):
            found += _rollouts(comparison, name, case)
        elif isinstance(case, TrainCase):
            found.append(_train(comparison, name, case))
        else:
            found.append(_grpo(comparison, name, case))
    return found


def _message(comparison: Comparison, name: str, **details: Any) -> dict[str, Any]:
    """The settings, the kind of work, and its details."""
    settings = dataclasses.asdict(comparison.settings)
    return {**settings, "kind": name.partition(".")[0], "learning_rate": LEARNING_RATE, **details}


def _prompts(comparison: Comparison, count: int, length: int) -> list[list[int]]:
    rng = np.random.default_rng(comparison.settings.seed)
    return rng.integers(FIRST_ID, comparison.settings.vocab_size, (count, length)).tolist()


def _rollouts(comparison: Comparison, name: str, case: RolloutCase) -> Iterator[Workload]:
    several, model = len(case.batch_sizes) > 1, comparison.model
    for size in case.batch_sizes:
        lengths = np.full(case.batches * size, case.max_new_tokens)
        if case.mean_new_tokens:
            rng = np.random.default_rng(comparison.settings.seed)
            drawn = np.ceil(rng.exponential(case.mean_new_tokens, len(lengths)))
            lengths = np.clip(drawn, 1, case.max_new_tokens).astype(int)
        yield Workload(
            name=f"{name}, batch {size}" if several else name,
            peers=case.peers,
            batch_size=size,
            message=_message(
                comparison,
                name,
                prompts=_prompts(comparison, len(lengths), case.prompt_length),
                lengths=lengths.tolist(),
                batch_size=size,
                max_new_tokens=case.max_new_tokens,
                greedy=case.greedy,
            ),
            phases=rollout_phases(model, case.prompt_length, lengths, size),
            read_bytes=decode_step_bytes(model, size, case.prompt_length + float(lengths.mean()) / 2),
            unit="pass",
            unit_tokens=float(lengths.sum()),
            curve=name if several else "",
        )


def _train(comparison: Comparison, name: str, case: TrainCase) -> Workload:
    examples = []
    lengths, unit, unit_tokens = [case.length], "step", float(case.batch_size * case.length)
    if case.examples:
        rng = np.random.default_rng(comparison.settings.seed)
        drawn = np.rint(rng.normal(case.mean_length, case.mean_length / 3, case.examples))
        lengths = np.clip(drawn, 4, case.length).astype(int).tolist()
        unit, unit_tokens = "pass", float(sum(lengths))
        for n in lengths:  # the loss is on the last two thirds
            tokens = rng.integers(FIRST_ID, comparison.settings.vocab_size, n).tolist()
            examples.append({"tokens": tokens, "loss_mask": [int(i >= n // 3) for i in range(n)]})
    return Workload(
        name=name,
        peers=case.peers,
        batch_size=case.batch_size,
        message=_message(
            comparison,
            name,
            batch_size=case.batch_size,
            length=case.length,
            steps=case.steps,
            examples=examples,
        ),
        phases=train_phases(comparison.model, lengths),
        read_bytes=parameter_bytes(comparison.model),
        unit=unit,
        unit_tokens=unit_tokens,
    )


def _grpo(comparison: Comparison, name: str, case: GRPOCase) -> Workload:
    rows, new = case.prompts * case.group_size, case.max_new_tokens
    return Workload(
        name=name,
        peers=case.peers,
        batch_size=rows,
        message=_message(
            comparison,
            name,
            prompts=_prompts(comparison, max(_PROMPTS_OF_A_RUN, case.prompts), case.prompt_length),
            batch_size=case.prompts,
            group_size=case.group_size,
            max_new_tokens=new,
            iterations=case.iterations,
            beta=case.beta,
        ),
        phases=grpo_phases(comparison.model, case.prompt_length, new, case.prompts, case.group_size),
        read_bytes=decode_step_bytes(comparison.model, rows, case.prompt_length + new / 2),
        unit="iteration",
        unit_tokens=float(rows * new),
    )
