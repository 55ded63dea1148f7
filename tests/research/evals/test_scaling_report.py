"""Picture, tables and JSON of test-time compute: the right numbers, poor data too, the same bytes each time."""

import json

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from research.core.metrics import decode_numbers
from research.evals.scaling import scaling_curves
from research.evals.scaling_plot import draw_against_samples, draw_against_tokens, write_scaling_plot
from research.evals.scaling_report import to_json, to_markdown
from tests.research.evals.test_scaling import made_up


@pytest.fixture(scope="module")
def scaling():
    data = made_up(0, P=10, M=8)
    data["scores"]["prm|min"] = np.round(data["weights"]["rm"], 1)
    data["weights"]["prm|min"] = data["scores"]["prm|min"]
    return scaling_curves(**data, trials=60)


def test_the_picture_is_written_and_the_same_each_time(scaling, tmp_path):
    first, second = (
        write_scaling_plot(scaling, tmp_path / f"{i}.png", title="sft") for i in range(2)
    )  # fmt: skip
    assert first.read_bytes() == second.read_bytes()
    assert min(imread(first).shape[:2]) > 400


def test_lines_bands_and_whiskers_are_where_the_points_are(scaling):
    left, right = Figure().subplots(1, 2)
    draw_against_samples(left, scaling, title="sft")
    draw_against_tokens(right, scaling)
    for axes, x in ((left, lambda point: point.n), (right, lambda point: point.tokens)):
        lines = [line for line in axes.lines if len(line.get_xdata()) == 4]
        for line, curve in zip(lines, scaling.curves.values(), strict=True):
            np.testing.assert_allclose(line.get_xdata(), [x(point) for point in curve.points])
            np.testing.assert_allclose(line.get_ydata(), [point.accuracy for point in curve.points])
    looks = {(line.get_color(), line.get_linestyle(), line.get_marker()) for line in lines}
    assert len(looks) == len(scaling.curves) == 7
    assert len({color for color, _, _ in looks}) == 5  # one a scorer, whatever is done with its scores
    whiskers = [segments.get_segments()[0] for segments in (c[2][0] for c in left.containers)]
    for (below, above), curve in zip(whiskers, scaling.curves.values(), strict=True):
        error = curve.points[-1].problems
        np.testing.assert_allclose([below[1], above[1]], [error.low, error.high])
        assert below[0] > curve.points[-1].n
    band = left.collections[0].get_paths()[0].vertices
    spread = scaling.curves["pass"].points[1].draws
    at_two = sorted({y for x, y in band if x == 2})
    np.testing.assert_allclose([at_two[0], at_two[-1]], [spread.low, spread.high])


def test_tables_say_what_the_points_say(scaling):
    text = to_markdown(scaling, title="a_b")
    lines = {line.split("|")[1].strip(): line for line in reversed(text.splitlines()) if line.startswith("|")}
    assert "10 problems" in text and "60 random subsets" in text
    cells = [cell.strip() for cell in lines["best of n, rm"].split("|")[2:-1]]
    points = scaling.curves["best_of_n:rm"].points
    for cell, point in zip(cells[:3], points, strict=False):
        assert cell == f"{100 * point.accuracy:.1f}% ± {100 * point.draws.std:.1f}"
    assert "prm\\|min" in text
    last = [line for line in text.splitlines() if line.startswith("| best of n, rm |")][1]
    assert f"[{100 * points[-1].problems.low:.1f}" in last
    widths = [line.replace("\\|", "").count("|") for line in text.splitlines() if line.startswith("|")]
    assert len(set(widths[:9])) == 1 and len(set(widths[9:])) == 1


def test_json_has_every_point(scaling):
    found = json.loads(json.dumps(to_json(scaling), allow_nan=False))
    for name, curve in scaling.curves.items():
        there = found["curves"][name]
        assert [point["accuracy"] for point in there["points"]] == [p.accuracy for p in curve.points]
        assert [point["problems"]["low"] for point in there["points"]] == [p.problems.low for p in curve.points]


def test_one_problem(tmp_path):
    data = made_up(0, P=1, M=2)
    one = scaling_curves(**data | {"scores": {}, "weights": {}})
    write_scaling_plot(one, tmp_path / "one.png", title="one")
    assert "–" in to_markdown(one, title="one") and "nan" not in to_markdown(one, title="one")
    low = decode_numbers(json.loads(json.dumps(to_json(one), allow_nan=False)))["curves"]["pass"]["points"][0]
    assert np.isnan(low["problems"]["low"])
