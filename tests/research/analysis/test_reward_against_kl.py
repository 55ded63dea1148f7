"""Proxy and gold against KL: the right points, in order, and poor data is drawn too."""

import math

import numpy as np
import pytest
from matplotlib.image import imread

from research.analysis.plots import reward_curve, write_reward_against_kl
from tests.objectives.cases import SEEDS
from tests.research.analysis.made_up import log


@pytest.mark.parametrize("seed", SEEDS)
def test_points_are_the_steps_that_have_both_pooled_over_runs(seed):
    runs = [log(seed + i, steps=int(np.random.default_rng(seed + i).integers(0, 20))) for i in range(2)]
    for reward in ("reward/mean", "reward/gold"):
        expected = []
        for records in runs:
            kls = {r["step"]: r["kl/reference"] for r in records if "kl/reference" in r}
            expected += [(max(kls[r["step"]], 0.0), r[reward]) for r in records if reward in r]
        found = reward_curve(runs, reward)
        np.testing.assert_allclose(found, np.array(sorted(expected)).reshape(-1, 2))


def test_what_is_not_finite_is_left_out():
    records = [
        {"step": 0, "reward/mean": math.nan, "kl/reference": 1.0},
        {"step": 1, "reward/mean": 0.5, "kl/reference": math.inf},
        {"step": 2, "reward/mean": 0.7, "kl/reference": 2.0},
        {"step": 3, "reward/mean": 0.6, "kl/reference": -0.1},
    ]
    assert reward_curve([records], "reward/mean").tolist() == [[0.0, 0.6], [2.0, 0.7]]


@pytest.mark.parametrize(
    "runs",
    [
        {"no gold": [[r for r in log(0) if "reward/gold" not in r]], "short": [log(1, steps=1)]},
        {"nothing": [[]]},
        {f"a run with quite a long name, number {i}": [log(i), log(i + 9)] for i in range(5)},
    ],
    ids=["no gold", "nothing", "five"],
)
def test_pictures_are_written_and_the_same_each_time(tmp_path, runs):
    path = write_reward_against_kl(runs, tmp_path / "kl.png")
    first = path.read_bytes()
    assert min(imread(path).shape[:2]) > 400
    assert write_reward_against_kl(runs, path, ("png", "pdf", "svg")).read_bytes() == first
    assert sorted(p.name for p in tmp_path.iterdir()) == ["kl.pdf", "kl.png", "kl.svg"]
