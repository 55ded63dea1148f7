"""What a person reads: the table's figures, the plot, the JSON."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from experiments.benchmarks import rollout
from research.analysis.figures import save
from research.benchmarks.report import draw_curve, show, write
from research.benchmarks.results import Result, Series
from research.benchmarks.spec import Benchmark, read_benchmark
from research.benchmarks.work import Limits, Phase
from research.benchmarks.workloads import Workload


@pytest.fixture
def benchmark() -> Benchmark:
    return read_benchmark(rollout.get_config("toy"))


LIMITS = Limits(1e9, 1e8)


def result(size: int = 4, limits: Limits | None = LIMITS) -> Result:
    """Temper at 2000 tokens/s, a peer at 1250, with one slow round in which both are slow."""
    phases = (Phase("decode", 1e5, 1e4 / size),)
    work = Workload(f"fixed, batch {size}", "fixed", ("tunix",), size, {}, phases, 2e6, "pass", 100.0, True)

    def series(name: str, seconds: tuple[float, ...]) -> Series:
        return Series(name, seconds, (100.0,) * 3, 5.0, 1.0, 300 * 2**20, 7, {"jax": "1"})

    own, peer = series("temper", (0.05, 0.05, 0.1)), series("tunix", (0.08, 0.08, 0.32))
    return Result(work, {"temper": own, "tunix": peer}, limits, {})


def printed(benchmark: Benchmark, one: Result) -> str:
    console = Console(file=io.StringIO(), width=80)
    show(benchmark, [one], console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def row(text: str, label: str) -> list[str]:
    (line,) = (line for line in text.splitlines() if label in line)
    return [cell.strip() for cell in line.strip("│").split("│")][1:]


def test_the_table_says_medians_ratios_and_shares(benchmark: Benchmark) -> None:
    text = printed(benchmark, result())
    assert "rollout: fixed, batch 4" in text
    assert row(text, "tokens/s  ") == ["2,000", "1,250"]
    assert row(text, "slowest") == ["1,000 .. 2,000", "312 .. 1,250"]
    assert row(text, "seconds per pass") == ["0.05", "0.08"]
    assert row(text, "Temper / it") == ["", "1.60x"]
    assert row(text, "median over rounds") == ["", "1.60x"]
    assert row(text, "share of the limit") == ["20%", "12%"]
    assert row(text, "of FLOP/s") == ["20%", "12%"] and row(text, "of bandwidth") == ["5%", "3%"]
    assert row(text, "first run") == ["4.0", "4.0"] and row(text, "peak memory") == ["300", "300"]
    assert "limit 10,000 tokens/s; measured: 1 GFLOP/s, 0.1 GB/s reading 2 MB\n" in text


def test_the_data_sheets_share_is_said_where_it_is_known(benchmark: Benchmark) -> None:
    config = rollout.get_config("toy").unlock()
    config.limits.peak_flops = 2e9
    text = printed(read_benchmark(config), result())
    assert "data sheet: 10% of FLOP/s, - of bandwidth" in text
    assert "data sheet" not in printed(benchmark, result())


def test_without_limits_the_rows_of_shares_are_left_out(benchmark: Benchmark) -> None:
    text = printed(benchmark, result(limits=None))
    assert "could not be measured" in text and "share of the limit" not in text


def test_json_and_plot_are_written(benchmark: Benchmark, tmp_path: Path) -> None:
    paths = write(benchmark, [result(1), result(4)], tmp_path / "new", load=0.3)
    assert [path.name for path in paths] == ["rollout.json", "rollout_fixed.png"]
    record = json.loads(paths[0].read_text(encoding="utf-8"))
    first = record["results"][1]
    assert first["systems"]["tunix"]["temper_over_it"] == pytest.approx([1.6, 1.6])
    assert first["systems"]["temper"]["seconds"] == [0.05, 0.05, 0.1]
    assert first["limit_tokens_per_second"] == pytest.approx(1e4)
    assert record["machine"]["load_average_before"] == 0.3 and record["config"]["repetitions"] == 2


def test_the_plot_shows_every_system_under_the_roofline(tmp_path: Path) -> None:
    drawn = []
    for name, points in (("with", [result(1), result(64)]), ("without", [result(1, None), result(64, None)])):
        figure = draw_curve(points)
        _, labels = figure.axes[0].get_legend_handles_labels()
        assert {"temper", "tunix"} <= set(labels)
        assert ("roofline, measured limits" in labels) == (name == "with")
        drawn.append(save(figure, tmp_path / f"{name}.png").read_bytes())
    assert all(png.startswith(b"\x89PNG") for png in drawn) and drawn[0] != drawn[1]


def test_a_ratio_of_medians_differs_from_the_median_over_rounds() -> None:
    """Noise that meets both systems of a round cancels in the latter."""
    one = result()
    noisy = Series("temper", (0.05, 0.2, 0.2), (100.0,) * 3, 5.0, 1.0, 1.0, 7, {})
    both = Result(one.workload, {**one.series, "temper": noisy}, None, {}).ratios("tunix")
    assert both == pytest.approx((500 / 1250, np.median([1.6, 0.4, 1.6])))
