"""A benchmark's result for a person: tables, JSON, and a plot of tokens/s against batch size under the roofline."""

import os
import platform
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from research.analysis.figures import CONTROL_COLOR, FAINT, INK, MARKERS, PALETTE, save
from research.benchmarks.results import TEMPER, Result
from research.benchmarks.spec import Benchmark
from research.benchmarks.work import Limits
from research.core.files import make_folder, write_json_atomic
from research.core.versions import collect_versions


def show(benchmark: Benchmark, results: Sequence[Result], console: Console) -> None:
    """Prints a table for each workload, and the limits that its shares are of."""
    for result in results:
        console.print(_table(benchmark, result))
        console.print(_limits(benchmark, result), highlight=False, soft_wrap=True)
        console.print()


def _table(benchmark: Benchmark, result: Result) -> Table:
    """One column a system: a terminal has room for its four, not for as many columns as there are numbers."""
    work = result.workload
    names = list(result.series)
    table = Table(
        "median of the repetitions",
        *names,
        title=f"{benchmark.kind}: {work.name}",
        title_justify="left",
    )
    for column in table.columns[1:]:
        column.justify = "right"
    for label, cell in _ROWS.items():
        cells = [cell(result, name) for name in names]
        if any(cells):
            table.add_row(label.format(unit=work.unit), *cells)
    return table


def _ratio(which: int) -> Callable[[Result, str], str]:
    def cell(result: Result, name: str) -> str:
        ratios = result.ratios(name)
        return "" if ratios is None else f"{ratios[which]:.2f}x"

    return cell


def _spread(result: Result, name: str) -> str:
    rates = result.series[name].rates
    return f"{rates.min():,.0f} .. {rates.max():,.0f}"


_ROWS: Mapping[str, Callable[[Result, str], str]] = {
    "tokens/s": lambda result, name: f"{result.series[name].rate:,.0f}",
    "  slowest .. fastest": _spread,
    "seconds per {unit}": lambda r, name: f"{r.workload.unit_tokens / r.series[name].rate:.3g}",
    "Temper / it": _ratio(0),
    "  median over rounds": _ratio(1),
    "share of the limit": lambda result, name: _percent(result.shares(name).get("limit")),
    "  of FLOP/s": lambda result, name: _percent(result.shares(name).get("flops")),
    "  of bandwidth": lambda result, name: _percent(result.shares(name).get("bandwidth")),
    "first run beyond second, s": lambda result, name: f"{result.series[name].compile_seconds:.1f}",
    "peak memory, MiB": lambda result, name: f"{result.series[name].peak_bytes / 2**20:,.0f}",
}
"""The table's rows: what they say of a system."""


def _percent(share: float | None) -> str:
    return "" if not share else f"{share:.0%}"


def _limits(benchmark: Benchmark, result: Result) -> str:
    """The limits, and the shares of the data sheet's where it is known."""
    if result.limits is None:
        return "the machine's limits could not be measured"
    limits, spec = result.limits, benchmark.limits
    lines = [
        f"limit {result.limit:,.0f} tokens/s; measured: {limits.flops / 1e9:,.0f} GFLOP/s, "
        f"{limits.bandwidth / 1e9:,.1f} GB/s reading {result.workload.read_bytes / 1e6:,.0f} MB"
    ]
    if (spec.peak_flops or spec.peak_bandwidth) and TEMPER in result.series:
        sheet = Limits(spec.peak_flops or np.inf, spec.peak_bandwidth or np.inf)
        used = Result(result.workload, result.series, sheet, {}).shares(TEMPER)
        lines.append(
            f"Temper's share of the data sheet: {_percent(used['flops']) or '-'} of FLOP/s, "
            f"{_percent(used['bandwidth']) or '-'} of bandwidth"
        )
    return "\n".join(lines)


def write(benchmark: Benchmark, results: Sequence[Result], folder: Path, load: float) -> list[Path]:
    """Writes `<kind>.json` and, where there is a curve, `<kind>.png`; returns their paths.

    Args:
      benchmark: what was run.
      results: what was measured.
      folder: where to; made if need be.
      load: the machine's load average before the first repetition.
    """
    folder = make_folder(folder)
    paths = [folder / f"{benchmark.kind}.json"]
    machine = {"cores": os.cpu_count(), "processor": platform.processor() or platform.machine()}
    record: dict[str, Any] = {
        "config": benchmark.tree,
        "machine": {**machine, "load_average_before": load},
        "versions": collect_versions(),
        "results": [result.record() for result in results],
    }
    write_json_atomic(paths[0], record)
    for case in dict.fromkeys(r.workload.case for r in results if r.workload.on_curve):
        points = [r for r in results if r.workload.case == case and r.series]
        if points:
            paths.append(save(draw_curve(points), folder / f"{benchmark.kind}_{case}.png"))
    return paths


def draw_curve(points: Sequence[Result]) -> Figure:
    """Tokens/s of each system against the batch size, with the roofline of the measured limits."""
    figure = Figure(figsize=(7.0, 4.6), layout="constrained")
    axes = figure.subplots()
    limited = [(r.workload.batch_size, r) for r in points if r.limits is not None]
    if limited:
        sizes = [size for size, _ in limited]
        axes.plot(
            sizes,
            [r.limit or np.nan for _, r in limited],
            color=INK,
            lw=1.5,
            label="roofline, measured limits",
        )
        for style, key in ((":", "bandwidth"), ("--", "flops")):
            alone = [_single_limit(r, key) for _, r in limited]
            axes.plot(sizes, alone, style, color=CONTROL_COLOR, lw=1.0, label=f"{_AXIS[key]} alone")
    names = list(dict.fromkeys(name for r in points for name in r.series))
    for name, color, marker in zip(names, PALETTE, MARKERS, strict=False):
        own = [(r.workload.batch_size, r.series[name]) for r in points if name in r.series]
        rates = np.array([series.rate for _, series in own])
        spread = np.array([[series.rates.min(), series.rates.max()] for _, series in own]).T
        axes.errorbar(
            [size for size, _ in own],
            rates,
            yerr=np.abs(spread - rates),
            color=color,
            marker=marker,
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


_AXIS = {"bandwidth": "bandwidth", "flops": "FLOP/s"}


def _single_limit(result: Result, key: str) -> float:
    """Tokens/s if one of the two limits were the only one."""
    assert result.limits is not None
    alone = Limits(**{k: v if k == key else np.inf for k, v in result.limits._asdict().items()})
    return Result(result.workload, {}, alone, {}).limit or np.inf
