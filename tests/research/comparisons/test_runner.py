"""The harness with systems that only sleep: whose turn it is, what a failure does, what the ratios say."""

import io
import re
import sys
from pathlib import Path

import pytest
from rich.console import Console

from experiments.comparisons import speed
from research.comparisons.roofline import Cost, Limits
from research.comparisons.runner import Result, Series, run_workload, taking_part
from research.comparisons.workers import System
from research.comparisons.workloads import Comparison, Workload, read_comparison
from research.core.progress import Progress

FAKE = Path(__file__).with_name("fake.py")
SECONDS = {"temper": 0.02, "transformers": 0.04, "tunix": 0.03, "machine": 0.01}
COMPARISON = read_comparison(speed.get_config("toy"), ["repetitions=3", "timeout=20"])
WORK = Workload("fixed", ("transformers", "tunix"), 4, {"tokens": 60}, Cost(1e5, 1e4), 1e6)


def systems(folder: Path, **modes: str) -> dict[str, System]:
    found = {}
    for name, seconds in SECONDS.items():
        parameters = 0 if name == "machine" else COMPARISON.model.num_params()
        if modes.get(name) == "other":
            parameters = 2 * parameters
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
    names = ["temper", "transformers", "tunix", "machine"]
    assert diary[:12] == [f"{name} {what}" for name in names for what in ("built", "warm", "warm")]
    turns = diary[12 : 12 + 2 * 3 * len(names)]
    starts, ends = turns[::2], turns[1::2]
    assert [line.replace("end", "start") for line in ends] == starts  # one ends before the next starts
    rounds = [[line.split()[0] for line in starts[i : i + 4]] for i in range(0, 12, 4)]
    assert all(sorted(each) == sorted(names) for each in rounds)
    assert len({each[0] for each in rounds}) == 3  # nobody always goes first
    assert sorted(diary[-4:]) == sorted(f"{name} bye" for name in names)  # and all were asked to end
    assert list(result.series) == ["temper", "transformers", "tunix"] and result.limits == Limits(1e9, 1e8)
    for name, series in result.series.items():
        assert len(series.seconds) == 3 and min(series.seconds) >= SECONDS[name]
        assert series.tokens == (60,) * 3 and series.peak_bytes == 3 * 1024 and len(series.warm_up) == 2
        assert series.parameters == COMPARISON.model.num_params()


def series(*seconds: float) -> Series:
    return Series(seconds, (60.0,) * len(seconds), (0.5, 0.1), 1.0, 7, {})


def test_medians_ratios_and_shares() -> None:
    """Noise that meets both systems of a round cancels in the median over rounds."""
    found = {"temper": series(0.02, 0.04, 0.06), "tunix": series(0.03, 0.06, 0.09)}
    result = Result(WORK, found, Limits(1e9, 1e8), {})
    own = result.series["temper"]
    assert own.rate == pytest.approx(60 / 0.04) and own.compile_seconds == pytest.approx(0.4)
    assert result.ratios("tunix") == pytest.approx((1.5, 1.5))
    assert result.ratios("temper") == result.ratios("trl") == ()
    assert result.limit == pytest.approx(1e4)  # 1e4 tokens/s by FLOPs and by bytes
    assert result.shares("temper") == pytest.approx({"flops": 0.15, "bandwidth": 0.15})
    noisy = Result(WORK, {**found, "temper": series(0.02, 0.2, 0.2)}, None, {})
    assert noisy.ratios("tunix") == pytest.approx((0.3, 0.45))
    assert noisy.limit is None and noisy.shares("temper") == {}


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


def test_without_limits_there_are_no_shares(tmp_path: Path) -> None:
    result, _, _ = run(tmp_path, machine="crash")
    assert result.limits is None and result.shares("temper") == {} and len(result.ratios("tunix")) == 2
