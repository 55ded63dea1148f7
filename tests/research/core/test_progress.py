"""Progress: the right rates, plain lines without escape codes in logs, nested bars on a terminal."""

import io

import pytest
from rich.console import Console

from research.core.progress import LINE_SECONDS, Progress


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def _log() -> Console:
    return Console(file=io.StringIO(), force_terminal=False, width=40)


def test_log_gets_plain_lines_at_intervals_with_rates_and_time_left():
    console, clock = _log(), Clock()
    with Progress("grpo [seed 1]", total=100, unit="steps", console=console, clock=clock) as bar:
        for _ in range(50):
            clock.now += 1.0
            bar.advance(2, tokens=1000, metrics={"loss": 0.123456})
    lines = console.file.getvalue().splitlines()
    assert lines[0] == "grpo [seed 1]: 2/100 steps (2%), 2 steps/s, 1,000 tokens/s, 0:49 left, loss 0.1235"
    assert lines[-1] == "grpo [seed 1]: 100/100 steps (100%), 2 steps/s, 1,000 tokens/s, loss 0.1235"
    assert len(lines) == 1 + 49 // LINE_SECONDS + 1
    assert "\x1b" not in console.file.getvalue()


def test_rates_forget_the_first_slow_step_and_do_not_count_resumed_work():
    console, clock = _log(), Clock()
    with Progress("sft", total=1000, initial=500, console=console, clock=clock) as bar:
        clock.now += 120.0  # compilation
        bar.advance(1)
        assert "501/1000" in bar.summary()
        assert "2:00 each" in bar.summary()
        for _ in range(100):
            clock.now += 1.0
            bar.advance(1)
        assert "1 steps/s" in bar.summary()
        assert "6:39 left" in bar.summary()


@pytest.mark.parametrize("total", [None, 0])
def test_unknown_or_empty_total(total):
    console, clock = _log(), Clock()
    with Progress("download", total=total, unit="files", console=console, clock=clock) as bar:
        clock.now += 1.0
        bar.advance(3)
    assert console.file.getvalue().splitlines() == ["download: 3 files, 3 files/s"]


def test_nested_bars_on_a_terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    with Progress("ablation", total=2, unit="runs", console=console) as overall:
        with Progress("grpo, seed 0", total=1, console=console) as bar:
            bar.advance(1, tokens=10, metrics={"loss": 1.5})
        overall.advance(1)
    text = console.file.getvalue()
    assert "\x1b[" in text
    for part in ("ablation", "1/2 runs (50%)", "grpo, seed 0", "1/1 steps (100%)", "loss 1.5"):
        assert part in text


def test_an_error_inside_is_not_swallowed():
    with pytest.raises(RuntimeError, match="boom"), Progress("sft", total=2, console=_log()):
        raise RuntimeError("boom")


def test_time_that_went_into_something_else_is_in_no_rate():
    console, clock = _log(), Clock()
    with Progress("sft", total=20, console=console, clock=clock) as bar:
        for _ in range(10):
            clock.now += 1.0
            bar.advance(1)
        clock.now += 50.0  # an evaluation
        bar.exclude(50.0)
        clock.now += 1.0
        bar.advance(1)
        assert "1 steps/s" in bar.summary() and "0:09 left" in bar.summary()
