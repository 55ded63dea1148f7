"""Statistics against plain loops, closed forms and published examples."""

import dataclasses
import math

import numpy as np
import pytest
from scipy import stats

from research.analysis.statistics import bootstrap_interval, compare_arms, holm, t_interval
from research.core.errors import DataError
from tests.research.analysis.made_up import failed, results, run

METRIC = "eval/pass@1"


def _runs(**arms):
    return [run(arm, seed, value) for arm, values in arms.items() for seed, value in enumerate(values)]


def test_t_interval_by_hand():
    values = [0.50, 0.53, 0.59]
    mean = sum(values) / 3
    std = math.sqrt(sum((value - mean) ** 2 for value in values) / 2)
    quantile = 0.95 * math.sqrt(2 / (4 * 0.975 * 0.025))  # closed form for 2 degrees of freedom; 4.3027 in tables
    half = quantile * std / math.sqrt(3)
    interval = t_interval(values)
    np.testing.assert_allclose([interval.low, interval.high], [mean - half, mean + half], rtol=1e-12)


def test_bootstrap_of_three_is_near_the_exact_distribution_of_27_resamples():
    values = [0.50, 0.53, 0.59]
    exact = sorted(sum((a, b, c)) / 3 for a in values for b in values for c in values)
    interval = bootstrap_interval(values)
    assert interval.low == pytest.approx(exact[0], abs=1e-12)  # 1/27 = 3.7% of resamples are all the smallest
    assert interval.high == pytest.approx(exact[-1], abs=1e-12)
    assert interval == bootstrap_interval(values)


def test_bootstrap_of_many_against_a_plain_loop():
    values = np.random.default_rng(0).normal(size=30)
    rng = np.random.default_rng(1)
    means = [np.mean(rng.choice(values, size=30)) for _ in range(8000)]
    interval = bootstrap_interval(values)
    np.testing.assert_allclose([interval.low, interval.high], np.percentile(means, [2.5, 97.5]), atol=0.02)


def test_paired_difference_against_closed_form():
    control, arm = [0.30, 0.45, 0.41, 0.57], [0.36, 0.50, 0.48, 0.59]
    differences = [a - c for a, c in zip(arm, control, strict=True)]
    mean = sum(differences) / 4
    error = math.sqrt(sum((d - mean) ** 2 for d in differences) / 3 / 4)
    p = 2 * stats.t.sf(abs(mean / error), 3)
    comparison = compare_arms(_runs(arm=arm, control=control), metric=METRIC, control="control")
    (found,) = comparison.differences
    assert [summary.arm for summary in comparison.arms] == ["control", "arm"]
    np.testing.assert_allclose(list(found.values.values()), differences)
    assert found.mean == pytest.approx(mean)
    assert found.p == found.p_holm == pytest.approx(p)
    np.testing.assert_allclose(
        [found.t_interval.low, found.t_interval.high],
        [mean - 3.182446305284263 * error, mean + 3.182446305284263 * error],
    )
    # Pairing matters: the unpaired test on the same numbers sees far less.
    assert stats.ttest_ind(arm, control).pvalue > 5 * found.p


@pytest.mark.parametrize(
    ("p_values", "expected"),
    [
        # Wikipedia, "Holm-Bonferroni method": rejects H4 and H1 at 0.05, keeps H3 and H2.
        ([0.01, 0.04, 0.03, 0.005], [0.03, 0.06, 0.06, 0.02]),
        # R: p.adjust(c(0.01, 0.02, 0.03, 0.04, 0.05), "holm")
        ([0.01, 0.02, 0.03, 0.04, 0.05], [0.05, 0.08, 0.09, 0.09, 0.09]),
        ([0.6, 0.7], [1.0, 1.0]),
        ([0.2], [0.2]),
        ([], []),
    ],
)
def test_holm_examples(p_values, expected):
    np.testing.assert_allclose(holm(p_values), expected)


def test_holm_counts_only_arms_with_a_p_value():
    comparison = compare_arms(
        [*_runs(c=[0.1, 0.2, 0.4], a=[0.3, 0.35, 0.5], b=[0.2, 0.24, 0.5]), run("lone", 7, 0.5)],
        metric=METRIC,
        control="c",
    )
    a, b, lone = comparison.differences
    assert (lone.p, lone.p_holm) == (None, None)
    assert [a.p_holm, b.p_holm] == holm([a.p, b.p])
    assert lone.note.startswith("no seed has finished in both")


def test_one_seed_has_no_interval_and_does_not_crash():
    comparison = compare_arms(_runs(c=[0.4], a=[0.5]), metric=METRIC, control="c")
    (difference,) = comparison.differences
    assert difference.mean == pytest.approx(0.1)
    assert (difference.t_interval, difference.bootstrap_interval, difference.p) == (None, None, None)
    assert difference.note == "one shared seed: no interval and no p-value"
    assert comparison.arms[0].std is None and comparison.arms[0].t_interval is None


@pytest.mark.parametrize(("shift", "p"), [(0.01, 0.25), (0.0, 1.0)])
def test_equal_differences_use_the_sign_flip_test(shift, p):
    control = [0.60, 0.50, 0.40]
    runs = _runs(c=control, a=[value + shift for value in control])
    (difference,) = compare_arms(runs, metric=METRIC, control="c").differences
    values = np.array(list(difference.values.values()))
    flips = stats.permutation_test((values,), np.mean, permutation_type="samples", n_resamples=np.inf)
    assert difference.p == pytest.approx(flips.pvalue) == p
    assert difference.t_interval is None
    assert "all differences are equal" in difference.note


def test_failed_missing_and_nan_runs_are_left_out_and_said():
    runs = _runs(c=[0.4, 0.42, 0.45, 0.5], a=[0.5, 0.55, 0.5, 0.6])
    runs[1] = failed(runs[1])
    runs[4] = dataclasses.replace(runs[4], metrics={METRIC: math.nan})
    runs[6] = dataclasses.replace(runs[6], metrics={"other": 1.0})
    comparison = compare_arms(runs, metric=METRIC, control="c")
    control, arm = comparison.arms
    assert list(control.values) == [0, 2, 3] and control.planned == 4
    assert control.missing == ("seed 1 failed: loss is NaN at step 120 | see <log>",)
    assert arm.missing == (f"seed 0 ended with {METRIC} = nan", f"seed 2 without {METRIC}")
    (difference,) = comparison.differences
    assert list(difference.values) == [3]
    assert difference.note == "one shared seed: no interval and no p-value; compared on seeds 3 only"


def test_everything_failed_still_reports():
    runs = [failed(result) for result in _runs(c=[0.4, 0.4], a=[0.5, 0.5])]
    comparison = compare_arms(runs, metric=METRIC, control="c")
    assert [summary.mean for summary in comparison.arms] == [None, None]


def test_refusals_name_what_is_wrong():
    with pytest.raises(DataError, match="control arm 'base'.*'sft'"):
        compare_arms(results(), metric=METRIC, control="base")
    with pytest.raises(DataError, match="metric 'accuracy'.*eval/pass@1"):
        compare_arms(results(), metric="accuracy", control="sft")
    with pytest.raises(DataError, match="'sft': has two results for seed 0"):
        compare_arms([*results(), run("sft", 0, 0.1)], metric=METRIC, control="sft")
