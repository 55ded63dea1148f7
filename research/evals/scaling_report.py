"""Test-time compute as JSON and as Markdown tables."""

from dataclasses import asdict
from typing import Any

from research.analysis.formatting import NOTHING, MetricFormat, format_count
from research.analysis.markdown import escape, table
from research.analysis.statistics import Interval
from research.core.metrics import encode_numbers
from research.evals.passk import Estimate
from research.evals.scaling import MAJORITY, PASS, RANDOM, Curve, Scaling, difference

_STYLE = MetricFormat("accuracy", percent=True, higher_is_better=True)
_CONTROLS = (RANDOM, MAJORITY)

NOTES = (
    "**N** of the {samples} samples of each of the {problems} problems. Accuracies are expectations over all subsets "
    "of N: exact but for votes, which are the mean over {trials} random subsets where there are more than that.",
    "**±** is one standard deviation over draws: what the same problems would give if each were answered from another "
    "draw of N of its {samples} samples ({trials} trials). Draws share samples, so it is too small as N nears "
    "{samples}, and 0 there.",
    "**95% over problems**: bootstrap of the problems, samples held fixed: what other such problems would give.",
    "**Differences** are paired problem by problem, with the bootstrap interval over the problems; this, not the "
    "overlap of two strategies' own intervals, says whether they differ. Intervals are not corrected for their number.",
    "**Tokens** are drawn a problem: the prompt once, and N completions. **Scorer reads**: tokens of prompt and "
    "completion of each sample; these forward passes come on top.",
    "pass@N needs somebody who knows the answer: it bounds what a better choice could reach, and is no way to answer.",
)


def to_json(scaling: Scaling) -> dict[str, Any]:
    """Plain JSON: every curve with its points, and the paired differences at every N; NaN is "NaN"."""
    return encode_numbers(
        {
            "problems": scaling.problems,
            "samples": scaling.samples,
            "trials": scaling.trials,
            "seed": scaling.seed,
            "curves": {
                name: {
                    "strategy": curve.strategy,
                    "scorer": curve.scorer,
                    "points": [asdict(point) for point in curve.points],
                    "minus": {
                        control: [
                            asdict(difference(curve, scaling.curves[control], point.n, seed=scaling.seed))
                            for point in curve.points
                        ]
                        for control in _controls(scaling, curve)
                    },
                }
                for name, curve in scaling.curves.items()
            },
        }
    )


def to_markdown(scaling: Scaling, *, title: str) -> str:
    """Two tables and how to read them: accuracy at every N, and what more there is to say of the largest."""
    curves = list(scaling.curves.values())
    ns = [point.n for point in curves[0].points]
    every = table(
        ["strategy", *(f"N = {n}" for n in ns)],
        [[_name(curve), *(_cell(curve, place) for place in range(len(ns)))] for curve in curves],
        right_from=1,
    )
    controls = [name for name in _CONTROLS if name in scaling.curves]
    header = ["strategy", "accuracy", "95% over problems", "tokens", "scorer reads"]
    header += [f"minus {name}, 95%" for name in controls]
    rows = []
    for curve in curves:
        last = curve.points[-1]
        row = [_name(curve), _STYLE.value(last.accuracy), _interval(last.problems), format_count(last.tokens)]
        row.append(format_count(last.scorer_tokens) if curve.scorer else NOTHING)
        for control in controls:
            if control not in _controls(scaling, curve):
                row.append(NOTHING)
                continue
            gap = difference(curve, scaling.curves[control], ns[-1], seed=scaling.seed)
            row.append(f"{_STYLE.difference(gap.mean)} {_interval(gap)}")
        rows.append(row)
    facts = {"samples": scaling.samples, "problems": scaling.problems, "trials": scaling.trials}
    notes = "\n".join(f"- {note.format(**facts)}" for note in NOTES)
    parts = (f"# {escape(title)}", every, f"At N = {ns[-1]}:", table(header, rows, right_from=1), notes)
    return "\n\n".join(parts) + "\n"


def _controls(scaling: Scaling, curve: Curve) -> list[str]:
    """What a strategy is compared with; coverage answers nothing, and is compared with nothing."""
    if curve.name in (PASS, RANDOM):
        return []
    return [name for name in _CONTROLS if name in scaling.curves and name != curve.name]


def _name(curve: Curve) -> str:
    name = "pass@N" if curve.strategy == PASS else curve.strategy.replace("_", " ")
    return escape(f"{name}, {curve.scorer}" if curve.scorer else name)


def _cell(curve: Curve, place: int) -> str:
    point = curve.points[place]
    shown = _STYLE.value(point.accuracy)
    return f"{shown} ± {100 * point.draws.std:.1f}" if point.draws.std > 1e-9 else shown


def _interval(estimate: Estimate) -> str:
    if estimate.low != estimate.low:  # NaN: one problem
        return NOTHING
    return _STYLE.interval(Interval(estimate.low, estimate.high))
