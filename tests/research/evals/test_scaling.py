"""Curves of test-time compute: limits that must hold, error bars against what they claim to be, bad input."""

import itertools
import math

import numpy as np
import pytest

from research.core.errors import DataError
from research.evals.draws import shuffles, subsets, vote
from research.evals.passk import best_of_n, majority_at_k
from research.evals.scaling import powers_of_two, scaling_curves


def made_up(seed=0, P=12, M=6):
    """Problems of all difficulties; a scorer that is better than chance."""
    rng = np.random.default_rng(seed)
    truth = rng.random((P, 1))
    correct = rng.random((P, M)) < truth
    wrong = rng.integers(0, 3, size=(P, M))
    answers = [
        ["yes" if c else (None if w == 2 else f"no{w}") for c, w in zip(row, other, strict=True)]
        for row, other in zip(correct, wrong, strict=True)
    ]
    return {
        "correct": correct,
        "answers": answers,
        "lengths": rng.integers(1, 30, size=(P, M)),
        "prompt_lengths": rng.integers(5, 10, size=P),
        "scores": {"rm": (correct + rng.normal(size=(P, M))).round(1)},
        "weights": {"rm": rng.random((P, M))},
    }


def accuracies(curve):
    return np.array([point.accuracy for point in curve.points])


def test_points_are_the_estimators_and_exact_where_all_subsets_are_tried():
    data = made_up()
    found = scaling_curves(**data, ns=range(1, 7), trials=20)
    assert (found.problems, found.samples, found.trials) == (12, 6, 20)
    assert list(found.curves) == ["pass", "random", "majority", "best_of_n:rm", "weighted:rm"]
    correct, curves = data["correct"], found.curves
    for i, n in enumerate(range(1, 7)):
        draws = list(itertools.combinations(range(6), n))
        any_right = [np.mean([row[list(s)].any() for s in draws]) for row in correct]
        np.testing.assert_allclose(curves["pass"].values[:, i], any_right, atol=1e-12)
        np.testing.assert_allclose(curves["random"].values[:, i], correct.mean(axis=1))
        expected = {
            "majority": majority_at_k(data["answers"], correct, n, trials=20),
            "best_of_n:rm": best_of_n(data["scores"]["rm"], correct, n),
            "weighted:rm": np.array(
                [
                    vote(
                        subsets(shuffles(len(row), 20, seed=0, problem=p), n), *row_of, data["weights"]["rm"][p]
                    ).mean()
                    for p, row in enumerate(correct)
                    for row_of in [(data["answers"][p], row)]
                ]
            ),
        }
        for name, values in expected.items():
            np.testing.assert_allclose(curves[name].values[:, i], values, atol=1e-12)
            assert curves[name].points[i].accuracy == pytest.approx(values.mean())


def test_pass_rises_bounds_all_and_everything_starts_at_random():
    curves = scaling_curves(**made_up(1, P=40, M=16)).curves
    assert [point.n for point in curves["pass"].points] == [1, 2, 4, 8, 16]
    assert (np.diff(accuracies(curves["pass"])) >= -1e-12).all()
    for name, curve in curves.items():
        assert (curve.values <= curves["pass"].values + 1e-12).all(), name
        assert accuracies(curve)[0] == pytest.approx(curves["random"].points[0].accuracy), name


@pytest.mark.parametrize("right", [False, True])
def test_all_wrong_and_all_right(right):
    data = made_up(P=3, M=4) | {"correct": np.full((3, 4), right), "answers": [["a"] * 4] * 3}
    for curve in scaling_curves(**data).curves.values():
        for point in curve.points:
            error, spread = point.problems, point.draws
            found = [point.accuracy, error.low, error.high, spread.low, spread.high]
            np.testing.assert_allclose(found, [float(right)] * 5, atol=1e-12)
            np.testing.assert_allclose([error.standard_error, spread.std], [0.0, 0.0], atol=1e-12)


def test_the_spread_is_that_of_whole_sets_of_draws():
    """By enumeration: problems are drawn independently, so variances of a problem's outcome add."""
    data, P = made_up(2, P=5, M=5), 5
    scores = data["scores"]["rm"] = np.random.default_rng(0).random((P, 5))  # no ties
    found = scaling_curves(**data, ns=(1, 2, 3, 5), trials=20_000).curves
    for i, n in enumerate((1, 2, 3, 5)):
        draws = [list(s) for s in itertools.combinations(range(5), n)]
        rows = list(zip(data["correct"], scores, strict=True))
        outcomes = {
            "pass": [[row[s].any() for s in draws] for row, _ in rows],
            "best_of_n:rm": [[row[s][score[s].argmax()] for s in draws] for row, score in rows],
        }
        for name, each in outcomes.items():
            point = found[name].points[i]
            std = math.sqrt(np.var(each, axis=1).sum()) / P
            assert point.draws.std == pytest.approx(std, rel=0.03, abs=1e-12), name
            assert point.draws.low <= point.accuracy + 1e-12 and point.accuracy <= point.draws.high + 1e-12
    mean = data["correct"].mean(axis=1)
    for point in found["random"].points:  # one blind pick a problem, whatever the others
        assert point.draws.std == pytest.approx(math.sqrt((mean * (1 - mean)).sum()) / P, rel=0.03)
    for name in ("majority", "best_of_n:rm", "weighted:rm"):
        points = found[name].points
        one, last = points[0].draws.std, points[-1].draws.std
        assert one == pytest.approx(found["random"].points[0].draws.std, rel=0.03)
        assert last == pytest.approx(0.0, abs=1e-12)  # one draw, one value


def test_the_error_over_problems_does_not_see_the_draws():
    data = made_up(4, P=2, M=4) | {"correct": np.array([[True] * 4, [False] * 4])}
    data["answers"] = [["yes"] * 4, ["no"] * 4]
    point = scaling_curves(**data).curves["majority"].points[1]
    assert point.draws.std == pytest.approx(0.0, abs=1e-12)
    assert (point.problems.low, point.problems.high) == (0.0, 1.0)
    assert point.problems.standard_error == pytest.approx(0.5)


def test_tokens_count_the_prompt_once_and_the_scorer_reads_it_every_time():
    data = made_up(P=2, M=4)
    data["lengths"] = np.array([[1, 2, 3, 4], [10, 10, 10, 10]])
    data["prompt_lengths"] = np.array([5, 7])
    curves = scaling_curves(**data, ns=(1, 4)).curves
    for name, curve in curves.items():
        assert [point.tokens for point in curve.points] == [6 + 6.25, 6 + 25.0], name
        read = [12.25, 49.0] if ":" in name else [0.0, 0.0]
        assert [point.scorer_tokens for point in curve.points] == read, name


def test_the_same_seed_repeats_and_another_does_not():
    data = made_up(P=6, M=12)
    one, two, other = (scaling_curves(**data, trials=50, seed=seed).curves for seed in (0, 0, 1))
    for name, curve in one.items():
        assert curve.points == two[name].points, name
        assert curve.points != other[name].points, name


def test_powers_of_two():
    assert [powers_of_two(n) for n in (1, 2, 6, 8)] == [(1,), (1, 2), (1, 2, 4, 6), (1, 2, 4, 8)]


def test_without_a_scorer_there_are_three_curves():
    data = made_up() | {"scores": {}, "weights": {}}
    assert list(scaling_curves(**data).curves) == ["pass", "random", "majority"]


def test_bad_input_is_named():
    data = made_up()
    with pytest.raises(DataError, match=r"pass@7: problem 0 .* expected at least 7 samples"):
        scaling_curves(**data, ns=(1, 7))
    for value, where, message in (
        (math.nan, (3, 4), r"rm: problem 3, sample 4: got nan, expected a score"),
        (math.inf, (0, 0), r"rm: problem 0, sample 0: got inf"),
    ):
        scores = data["scores"]["rm"].copy()
        scores[where] = value
        with pytest.raises(DataError, match=message):
            scaling_curves(**(data | {"scores": {"rm": scores}}))
