"""The harness with systems that only sleep: whose turn it is, what a failure does, what a person reads."""

import io
import json
import re
import sys
from pathlib import Path

import pytest
from rich.console import Console

from experiments.comparisons import speed
from research.comparisons.runner import Result, run_workload, taking_part, write
from research.comparisons.timing import Series
from research.comparisons.workers import System
from research.comparisons.workloads import Comparison, Workload, read_comparison
from research.core.progress import Progress

FAKE = Path(__file__).with_name("fake.py")
SECONDS = {"temper": 0.02, "transformers": 0.04, "tunix": 0.03}
COMPARISON = read_comparison(speed.get_config("toy"), ["repetitions=3", "timeout=20"])
WORK = Workload("fixed", ("transformers", "tunix"), {"tokens": 60})


def systems(folder: Path, **modes: str) -> dict[str, System]:
    found = {}
    for name, seconds in SECONDS.items():
        parameters = COMPARISON.model.num_params() * (2 if modes.get(name) == "other" else 1)
        arguments = (name, str(seconds), str(folder / "diary"), modes.get(name, "well"), str(parameters))
        found[name] = System(name, (sys.executable, str(FAKE), *arguments))
    return found


def run(folder: Path, comparison: Comparison = COMPARISON, **modes: str) -> tuple[Result, list[str], str]:
    """The result, the diary's lines, what was said on the way."""
    said, chosen = io.StringIO(), taking_part(WORK, systems(folder, **modes))
    total = len(chosen) * (1 + comparison.settings.repetitions)
    with Progress("speed", total, unit="runs", console=Console(file=said, width=200)) as progress:
        result = run_workload(comparison, WORK, chosen, progress, folder)
        if not modes:
            assert progress.done == total
    return result, (folder / "diary").read_text(encoding="utf-8").splitlines(), said.getvalue()


def test_systems_take_turns_and_only_one_works_at_a_time(tmp_path: Path) -> None:
    result, diary, _ = run(tmp_path)
    names = ["temper", "transformers", "tunix"]
    assert diary[:9] == [f"{name} {what}" for name in names for what in ("built", "warm", "warm")]
    turns = diary[9 : 9 + 2 * 3 * len(names)]
    starts, ends = turns[::2], turns[1::2]
    assert [line.replace("end", "start") for line in ends] == starts  # one ends before the next starts
    rounds = [[line.split()[0] for line in starts[i : i + 3]] for i in range(0, 9, 3)]
    assert all(sorted(each) == sorted(names) for each in rounds)
    assert len({each[0] for each in rounds}) == 3  # nobody always goes first
    assert sorted(diary[-3:]) == sorted(f"{name} bye" for name in names)  # and all were asked to end
    assert list(result.series) == names
    for name, series in result.series.items():
        assert len(series.seconds) == 3 and min(series.seconds) >= SECONDS[name] and series.tokens == (60,) * 3
        assert series.about["peak_bytes"] == 3 * 1024 and len(series.about["warm_up"]) == 2
        assert series.about["parameters"] == COMPARISON.model.num_params() and series.about["versions"] == {"fake": "1"}


def series(*seconds: float) -> Series:
    about = {"warm_up": [5.0, 1.0], "peak_bytes": 300 * 2**20, "parameters": 7, "versions": {"jax": "1"}}
    return Series(seconds, (100.0,) * len(seconds), about)


def test_medians_and_ratios() -> None:
    """Noise that meets both systems of a round cancels in the median over rounds."""
    tunix = series(0.03, 0.06, 0.09)
    assert series(0.02, 0.04, 0.06).rate == pytest.approx(100 / 0.04)
    assert series(0.02, 0.04, 0.06).over(tunix) == pytest.approx((1.5, 1.5))
    assert series(0.02, 0.2, 0.2).over(tunix) == pytest.approx((0.3, 0.45))


def test_what_a_person_reads_and_the_record(tmp_path: Path) -> None:
    """Temper at 2000 tokens/s, a peer at 1250, with one slow round in which both are slow."""
    found = {"temper": series(0.05, 0.05, 0.1), "tunix": series(0.08, 0.08, 0.32)}
    result = Result("rollout.fixed", found, {"trl": "it fell"})
    text, paths = write([result, result], tmp_path / "new", config={"repetitions": 3}, load=0.3)
    assert text == "\n".join([result.table()] * 2) == paths[1].read_text(encoding="utf-8")
    lines = result.table().splitlines()
    rows = {cells[0]: cells[1:] for cells in ([c.strip() for c in line.strip("|").split("|")] for line in lines)}
    assert lines[0] == "## rollout.fixed" and lines[-1] == "Failed: it fell"
    assert rows["median of the repetitions"] == ["temper", "tunix"] and rows["tokens/s"] == ["2,000", "1,250"]
    assert rows["slowest .. fastest"] == ["1,000 .. 2,000", "312 .. 1,250"]
    assert rows["Temper / it"] == rows["median over rounds"] == ["", "1.60x"]
    assert rows["first run beyond second, s"] == ["4.0", "4.0"] and rows["peak memory, MiB"] == ["300", "300"]
    assert [path.name for path in paths] == ["comparison.json", "comparison.md"]
    record = json.loads(paths[0].read_text(encoding="utf-8"))
    second = record["results"][1]
    assert second["systems"]["tunix"]["temper_over_it"] == pytest.approx([1.6, 1.6])
    assert second["systems"]["temper"]["seconds"] == [0.05, 0.05, 0.1] and second["failures"] == {"trl": "it fell"}
    assert record["machine"]["load_average_before"] == 0.3 and record["config"]["repetitions"] == 3
    alone = Result("rollout.fixed", {"tunix": series(0.08)}, {"temper": "it fell"})
    assert alone.record()["systems"]["tunix"]["temper_over_it"] is None and "Temper / it" not in alone.table()


def test_a_crash_is_one_sentence_with_what_the_peer_wrote_and_the_others_go_on(tmp_path: Path) -> None:
    result, diary, said = run(tmp_path, transformers="crash")
    sentence = "fixed: transformers: ended with exit status 3: RuntimeError: the wheel came off (more in "
    assert list(result.failures) == ["transformers"] and result.failures["transformers"].startswith(sentence)
    assert result.failures["transformers"] in said
    log = Path(result.failures["transformers"].removeprefix(sentence).removesuffix(")"))
    assert log.read_text(encoding="utf-8").startswith("loading shards")
    assert set(result.series) == {"temper", "tunix"}
    assert len(result.series["tunix"].seconds) == 3 and diary.count("transformers start") == 2


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("hang", r"did not answer within 1 seconds"),
        ("chatter", r"answered 'Loading checkpoint shards: 100%', expected JSON"),
        ("other", r"its model has [\d,]+ parameters, expected Temper's [\d,]+"),
    ],
)
def test_other_failures_are_named_too(tmp_path: Path, mode: str, message: str) -> None:
    quick = read_comparison(speed.get_config("toy"), ["repetitions=1", "timeout=1"])
    result, _, _ = run(tmp_path, quick, tunix=mode)
    assert re.search(message, result.failures["tunix"])
    assert "temper" in result.series and "tunix" not in result.series
