"""What the runs' own records add to their results: training curves, divergence, curves of another evaluation."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from research.analysis.results import RunResult
from research.core.errors import DataError
from research.core.metrics import METRICS, load_metrics

Rows = Sequence[Mapping[str, float]]
"""Records of a metrics.jsonl; several may share a step."""


class Evidence(NamedTuple):
    """Results with what was found about them."""

    results: list[RunResult]  # diverged runs marked as failed, curves that another evaluation measured emptied
    logs: Mapping[tuple[str, int], Rows]  # records of the compared stage by (arm, seed), where they are there
    notes: list[str]  # what was changed or could not be read, in sentences


def gather(results: Sequence[RunResult], workdir: Path, metric: str) -> Evidence:
    """Reads the runs' records below `workdir` and judges the results, as the runner left them, by them."""
    found: list[RunResult] = []
    logs: dict[tuple[str, int], Rows] = {}
    notes = []
    for run in results:
        who, path = f"{run.arm}, seed {run.seed}", workdir / run.run_dir / METRICS
        try:
            if run.status == "finished" and path.is_file():
                logs[run.arm, run.seed] = load_metrics(path)
        except DataError as error:
            notes.append(f"{who}: its training curves are left out ({error})")
        reason = diverged(run, logs.get((run.arm, run.seed), ()), metric) if run.status == "finished" else None
        if reason is not None:
            run = dataclasses.replace(run, status="failed", error=f"diverged: {reason}")
        if run.curve and run.evaluation and run.curve_evaluation not in ("", run.evaluation):
            run = dataclasses.replace(run, curve=[])
            notes.append(f"{who}: its learning curve was measured by another evaluation and is left out")
        found.append(run)
    return Evidence(found, logs, notes)


def diverged(run: RunResult, rows: Rows, metric: str) -> str | None:
    """Why a finished run counts as failed: its metric or a loss ended as NaN or infinity; else None.

    A policy with NaN parameters still answers, at 0%; its losses tell.
    """
    last = next((row for row in reversed(rows) if "loss" in row), {})
    for where, values in (("", run.metrics), ("", run.curve[-1] if run.curve else {}), ("training ", last)):
        for name, value in values.items():
            if (is_loss(name) or name == metric) and not math.isfinite(value):
                return f"{where}{name} ended as {value}"
    return None


def is_loss(metric: str) -> bool:
    """Whether lower is better, by its name."""
    return metric.rpartition("/")[2] in ("loss", "nll")
