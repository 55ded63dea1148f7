"""A comparison's result for a person: Markdown, JSON, and a plot of tokens/s against batch size under the roofline."""

import os
import platform
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from research.analysis import markdown
from research.analysis.figures import FAINT, INK, MARKERS, PALETTE, save
from research.comparisons.runner import Result
from research.core.files import make_folder, write_json_atomic, write_text_atomic
from research.core.versions import collect_versions

_ROWS: Mapping[str, Callable[[Result, str], str]] = {
    "tokens/s": lambda result, name: f"{result.series[name].rate:,.0f}",
    "slowest .. fastest": lambda r, name: "{:,.0f} .. {:,.0f}".format(*np.sort(r.series[name].rates)[[0, -1]]),
    "Temper / it": lambda result, name: f"{result.ratios(name)[0]:.2f}x" if result.ratios(name) else "",
    "median over rounds": lambda result, name: f"{result.ratios(name)[1]:.2f}x" if result.ratios(name) else "",
    "share of FLOP/s": lambda result, name: _percent(result.shares(name).get("flops")),
    "share of bandwidth": lambda result, name: _percent(result.shares(name).get("bandwidth")),
    "first run beyond second, s": lambda result, name: f"{result.series[name].compile_seconds:.1f}",
    "peak memory, MiB": lambda result, name: f"{result.series[name].peak_bytes / 2**20:,.0f}",
}
"""The table's rows: what they say of a system."""


def _percent(share: float | None) -> str:
    return f"{share:.0%}" if share else ""


def table(result: Result) -> str:
    """A workload's heading, its table with one column a system, and the limits that its shares are of."""
    work, names = result.workload, list(result.series)
    rows = [[label, *(cell(result, name) for name in names)] for label, cell in _ROWS.items()]
    rows = [row for row in rows if any(row[1:])]
    text = "The machine's limits could not be measured."
    if result.limits is not None:
        text = (
            f"Limit {result.limit:,.0f} tokens/s; measured: {result.limits.flops / 1e9:,.0f} GFLOP/s, "
            f"{result.limits.bandwidth / 1e9:,.1f} GB/s reading {work.read_bytes / 1e6:,.0f} MB."
        )
    grid = markdown.table(["median of the repetitions", *names], rows, right_from=1)
    missing = [f"Failed: {markdown.escape(sentence)}" for sentence in result.failures.values()]
    return "\n\n".join([f"## {work.name}", grid, text, *missing]) + "\n"


def write(results: Sequence[Result], folder: Path, *, config: Mapping[str, Any], load: float) -> tuple[str, list[Path]]:
    """Writes `comparison.json`, `comparison.md` and, for each case of several batch sizes, a plot.

    Args:
      results: what was measured.
      folder: where to; made if need be.
      config: what was asked for.
      load: the machine's load average before the first repetition.

    Returns:
      The Markdown, and the paths of all files.
    """
    paths = [make_folder(folder) / "comparison.json", folder / "comparison.md"]
    machine = {"cores": os.cpu_count(), "processor": platform.processor() or platform.machine()}
    record = {
        "config": dict(config),
        "machine": {**machine, "load_average_before": load},
        "versions": collect_versions(),
        "results": [result.record() for result in results],
    }
    write_json_atomic(paths[0], record)
    text = "\n".join(map(table, results))
    write_text_atomic(paths[1], text)
    for case in dict.fromkeys(result.workload.curve for result in results):
        points = [r for r in results if r.workload.curve == case and r.series]
        if case and points:
            paths.append(save(draw_curve(points), folder / f"{case}.png"))
    return text, paths


def draw_curve(points: Sequence[Result]) -> Figure:
    """Tokens/s of each system against the batch size, with the roofline of the measured limits."""
    figure = Figure(figsize=(7.0, 4.6), layout="constrained")
    axes = figure.subplots()
    limited = [(r.workload.batch_size, r.limit) for r in points if r.limit is not None]
    if limited:
        axes.plot(*zip(*limited, strict=True), color=INK, lw=1.5, label="roofline, measured limits")
    names = list(dict.fromkeys(name for r in points for name in r.series))
    for number, name in enumerate(names):
        own = [(r.workload.batch_size, r.series[name]) for r in points if name in r.series]
        rates = np.array([series.rate for _, series in own])
        spread = np.array([[series.rates.min(), series.rates.max()] for _, series in own]).T
        axes.errorbar(
            [size for size, _ in own],
            rates,
            yerr=np.abs(spread - rates),
            color=PALETTE[number % len(PALETTE)],
            marker=MARKERS[number % len(MARKERS)],
            capsize=3,
            label=name,
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks([r.workload.batch_size for r in points], [str(r.workload.batch_size) for r in points])
    axes.minorticks_off()
    axes.set_xlabel("rows in a batch")
    axes.set_ylabel("tokens/s")
    axes.set_title("Median of the repetitions; whiskers: slowest and fastest", fontsize=9, loc="left")
    axes.grid(color=FAINT)
    axes.legend(fontsize=8, frameon=False)
    return figure
