"""What a person reads: the table's figures, the plot, the JSON."""

import json
from pathlib import Path

import pytest

from research.comparisons.report import draw_curve, table, write
from research.comparisons.roofline import Cost, Limits
from research.comparisons.runner import Result, Series
from research.comparisons.workloads import Workload

LIMITS = Limits(1e9, 1e8)


def result(size: int = 4, limits: Limits | None = LIMITS) -> Result:
    """Temper at 2000 tokens/s, a peer at 1250, with one slow round in which both are slow."""
    work = Workload(f"rollout.fixed, batch {size}", ("tunix",), size, {}, Cost(1e5, 1e4 / size), 2e6, "rollout.fixed")

    def series(*seconds: float) -> Series:
        return Series(seconds, (100.0,) * 3, (5.0, 1.0), 300 * 2**20, 7, {"jax": "1"})

    return Result(
        work, {"temper": series(0.05, 0.05, 0.1), "tunix": series(0.08, 0.08, 0.32)}, limits, {"trl": "it fell"}
    )


def row(text: str, label: str) -> list[str]:
    (line,) = (line for line in text.splitlines() if line.startswith(f"| {label}"))
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def test_the_table_says_medians_ratios_and_shares() -> None:
    text = table(result())
    assert text.startswith("## rollout.fixed, batch 4\n")
    assert row(text, "median of the repetitions") == ["temper", "tunix"]
    assert row(text, "tokens/s") == ["2,000", "1,250"]
    assert row(text, "slowest") == ["1,000 .. 2,000", "312 .. 1,250"]
    assert row(text, "Temper / it") == ["", "1.60x"]
    assert row(text, "median over rounds") == ["", "1.60x"]
    assert row(text, "share of FLOP/s") == ["20%", "12%"] and row(text, "share of bandwidth") == ["5%", "3%"]
    assert row(text, "first run") == ["4.0", "4.0"] and row(text, "peak memory") == ["300", "300"]
    assert "Limit 10,000 tokens/s; measured: 1 GFLOP/s, 0.1 GB/s reading 2 MB." in text
    assert "Failed: it fell" in text


def test_without_limits_the_rows_of_shares_are_left_out() -> None:
    text = table(result(limits=None))
    assert "could not be measured" in text and "share of" not in text


def test_markdown_json_and_plot_are_written(tmp_path: Path) -> None:
    results = [result(1), result(4)]
    text, paths = write(results, tmp_path / "new", config={"repetitions": 3}, load=0.3)
    assert [path.name for path in paths] == ["comparison.json", "comparison.md", "rollout.fixed.png"]
    record = json.loads(paths[0].read_text(encoding="utf-8"))
    second = record["results"][1]
    assert second["systems"]["tunix"]["temper_over_it"] == pytest.approx([1.6, 1.6])
    assert second["systems"]["temper"]["seconds"] == [0.05, 0.05, 0.1]
    assert second["limit_tokens_per_second"] == pytest.approx(1e4) and second["failures"] == {"trl": "it fell"}
    assert record["machine"]["load_average_before"] == 0.3 and record["config"]["repetitions"] == 3
    assert paths[1].read_text(encoding="utf-8") == text == "\n".join(map(table, results))
    assert paths[2].read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("limits", [LIMITS, None])
def test_the_plot_shows_every_system_under_the_roofline(limits: Limits | None) -> None:
    figure = draw_curve([result(1, limits), result(64, limits)])
    _, labels = figure.axes[0].get_legend_handles_labels()
    assert {"temper", "tunix"} <= set(labels)
    assert ("roofline, measured limits" in labels) == (limits is not None)
