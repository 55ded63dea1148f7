"""Numbers as people read them."""

import pytest

from research.analysis.formatting import MetricFormat, format_count, format_p, format_seconds, is_proportion
from research.analysis.statistics import Interval

PERCENT = MetricFormat("eval/pass@1", percent=True, higher_is_better=True)
PLAIN = MetricFormat("eval/loss", percent=False, higher_is_better=False)


def test_metric_values():
    assert PERCENT.value(0.4123) == "41.2%" and PLAIN.value(2.34567) == "2.346"
    assert PERCENT.difference(-0.031) == "−3.1 pp" and PLAIN.difference(0.5) == "+0.5"
    assert PERCENT.interval(Interval(-0.01, 0.2)) == "[−1.0, 20.0]"
    assert PLAIN.interval(Interval(1e-5, 2.0)) == "[1e-05, 2]"
    assert PERCENT.value(None) == PERCENT.difference(None) == PERCENT.interval(None) == "–"


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0"), (950, "950"), (999.9, "1 k"), (1234, "1.23 k"), (999_900, "1 M"), (2.4e6, "2.4 M"),
     (31.5e9, "31.5 G"), (1.44e16, "1.44e16"), (float("nan"), "–")],
)  # fmt: skip
def test_counts(count, text):
    assert format_count(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.42, "0.4 s"), (45.2, "45 s"), (59.7, "1 min 0 s"), (725, "12 min 5 s"), (11_520, "3 h 12 min")],
)
def test_seconds(seconds, text):
    assert format_seconds(seconds) == text


@pytest.mark.parametrize(("p", "text"), [(None, "–"), (0.0004, "< 0.001"), (0.0123, "0.012"), (0.25, "0.25")])
def test_p(p, text):
    assert format_p(p) == text


@pytest.mark.parametrize(
    ("metric", "values", "expected"),
    [("eval/pass@8", [0.1, 1.0], True), ("reward_accuracy", [0.5], True), ("loss", [0.5], False),
     ("accuracy", [41.2], False), ("reward/mean", [0.5], False)],
)  # fmt: skip
def test_proportions_are_known_by_name_and_range(metric, values, expected):
    assert is_proportion(metric, values) is expected
