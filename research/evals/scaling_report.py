"""Test-time compute as JSON and as Markdown tables."""

import math
from dataclasses import asdict
from typing import Any

from research.analysis.formatting import NOTHING, MetricFormat, format_count
from research.analysis.markdown import escape, table
from research.analysis.statistics import Interval
from research.core.metrics import encode_numbers
from research.evals.passk import Estimate
from research.evals.scaling import PASS, Curve, Point, Scaling

_STYLE = MetricFormat("accuracy", percent=True, higher_is_better=True)

NOTES = """\
- **N** of the {samples} samples of each of the {problems} problems. Accuracies are expectations over all subsets of \
N: exact but for votes, which are the mean over {trials} random subsets where there are more than that.
- **±** is one standard deviation over draws: what the same problems would give if each were answered from another \
draw of N of its {samples} samples ({trials} trials). Draws share samples, so it is too small as N nears {samples}, \
and 0 there.
- **95% over problems**: bootstrap of the problems, samples held fixed: what other such problems would give.
- **Tokens** are drawn a problem: the prompt once, and N completions. **Scorer reads**: tokens of prompt and \
completion of each sample; these forward passes come on top.
- pass@N needs somebody who knows the answer: it bounds what a better choice could reach, and is no way to answer.
"""


def to_json(scaling: Scaling) -> dict[str, Any]:
    """Plain JSON: every curve with its points; NaN is "NaN"."""
    curves = {
        name: {"strategy": curve.strategy, "scorer": curve.scorer, "points": [asdict(point) for point in curve.points]}
        for name, curve in scaling.curves.items()
    }
    return encode_numbers({**vars(scaling), "curves": curves})


def to_markdown(scaling: Scaling, *, title: str) -> str:
    """Two tables and how to read them: accuracy at every N, and what more there is to say of the largest."""
    curves = list(scaling.curves.values())
    ns = [point.n for point in curves[0].points]
    every = [[_name(curve), *map(_cell, curve.points)] for curve in curves]
    largest = [
        [
            *(_name(curve), _STYLE.value(last.accuracy), _interval(last.problems), format_count(last.tokens)),
            format_count(last.scorer_tokens) if curve.scorer else NOTHING,
        ]
        for curve in curves
        for last in curve.points[-1:]
    ]
    header = ["strategy", "accuracy", "95% over problems", "tokens", "scorer reads"]
    parts = (
        f"# {escape(title)}",
        table(["strategy", *(f"N = {n}" for n in ns)], every, right_from=1),
        f"At N = {ns[-1]}:",
        table(header, largest, right_from=1),
        NOTES.format(samples=scaling.samples, problems=scaling.problems, trials=scaling.trials),
    )
    return "\n\n".join(parts)


def _name(curve: Curve) -> str:
    name = "pass@N" if curve.strategy == PASS else curve.strategy.replace("_", " ")
    return escape(f"{name}, {curve.scorer}" if curve.scorer else name)


def _cell(point: Point) -> str:
    shown = _STYLE.value(point.accuracy)
    return f"{shown} ± {100 * point.draws.std:.1f}" if point.draws.std > 1e-9 else shown


def _interval(estimate: Estimate) -> str:
    return NOTHING if math.isnan(estimate.low) else _STYLE.interval(Interval(estimate.low, estimate.high))
