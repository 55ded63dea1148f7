"""The parts of a report as Markdown, and its main table as plain cells for other formats."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import yaml

from research.analysis.formatting import NOTHING, MetricFormat, format_count, format_p, format_seconds
from research.analysis.markdown import code, escape, table
from research.analysis.results import RunResult
from research.analysis.statistics import Comparison, PairedDifference, with_role
from research.core.errors import DataError

Runs = Mapping[str, Sequence[RunResult]]
"""The runs by arm, control first."""

_DIFFERENCE = ("difference", "95% t-interval", "p", "Holm p")
_BUDGET = {
    "tokens sampled": ("tokens_sampled", format_count),
    "completions sampled": ("completions_sampled", format_count),
    "tokens trained": ("tokens_trained", format_count),
    "FLOPs": ("flops", format_count),
    "wall clock": ("seconds", format_seconds),
}
"""Columns of the budget: fields of `Budget`, and how they are shown."""

FOOTNOTES = (
    "**Mean** and **std** are over seeds (finished runs only; std with n - 1).",
    "**95% t-interval**: Student's t over the seeds. It is exact if seeds scatter normally, and wide with few "
    "seeds, as it must be: with 3 seeds it reaches 4.3 standard errors to either side. It may pass the ends of a "
    "metric's range. In pictures an arrow marks an interval that goes on beyond the axis.",
    "**95% bootstrap**: percentile bootstrap over the seeds. It assumes no shape but is too narrow with few seeds: "
    "in truth it covers about 75% with 3 seeds, 85% with 5, 90% with 10. Read it beside the t-interval, not instead "
    "of it.",
    "**Differences** are paired: one arm minus the other at the same seed, then the mean over the seeds that both "
    "have finished; their intervals and **p** (two-sided paired t-test) are over these differences.",
    "**Holm p** is p corrected for the number of comparisons in this report, those with the control and those "
    "between other arms together (Holm 1979).",
    "If all differences are equal, the t-test is undefined and p is that of the exact sign-flip test.",
    "With one seed there is no interval and no p-value: the scatter between seeds is unknown.",
    "Failed and diverged runs are left out of all means. An arm that fails on hard seeds looks better than it is.",
    "Seeds speak for training noise only. How far the result carries to other problems is a question of the "
    "evaluation set and its size.",
)


class Headline(NamedTuple):
    """The main result in plain text: a verdict, a table (first column: arms), remarks."""

    verdict: str
    header: list[str]
    rows: list[list[str]]
    remarks: list[str]


def headline(comparison: Comparison, style: MetricFormat) -> Headline:
    """The main result."""
    rows = []
    for summary, difference in zip(comparison.arms, (None, *comparison.differences), strict=True):
        count = len(summary.values)
        rows.append(
            [
                with_role(summary.arm, comparison.control),
                str(count) if count == summary.planned else f"{count} of {summary.planned}",
                "failed" if summary.failed else style.value(summary.mean),
                style.interval(summary.t_interval),
                *([NOTHING] * 4 if difference is None else _difference_cells(difference, style)),
            ]
        )
    remarks = [f"{d.arm}: {d.note}" for d in comparison.differences if d.note and d.values]
    remarks += [f"{s.arm}: {'; '.join(s.missing)}" for s in comparison.arms if s.missing]
    better = "Higher" if style.higher_is_better else "Lower"
    header = ["arm", "n", f"{style.name}, mean", "95% t-interval", "difference to control", *_DIFFERENCE[1:]]
    return Headline(f"{better} is better. {_verdict(comparison, style)}", header, rows, remarks)


def result_section(head: Headline) -> str:
    """The main result as Markdown."""
    rows = [[escape(row[0]), row[1], f"**{row[2]}**", *row[3:]] for row in head.rows]
    parts = [escape(head.verdict), table([escape(cell) for cell in head.header], rows, right_from=1)]
    return "\n\n".join([*parts, *_bullets(head.remarks)])


def pairs_section(comparison: Comparison, style: MetricFormat) -> str:
    """Arms against each other."""
    pairs = [(f"{d.arm} minus {d.against}", d) for d in comparison.pairs]
    rows = [[escape(name), str(len(d.values)), *_difference_cells(d, style)] for name, d in pairs]
    notes = _bullets([f"{name}: {d.note}" for name, d in pairs if d.note])
    return "\n\n".join([table(["arms", "n", *_DIFFERENCE], rows, right_from=1), *notes])


def seeds_section(comparison: Comparison, style: MetricFormat) -> str:
    """Every seed's value."""
    seeds = sorted({seed for summary in comparison.arms for seed in summary.values})
    header = ["arm", *(f"seed {seed}" for seed in seeds), "std", "95% bootstrap", "difference, 95% bootstrap"]
    rows = [
        [
            escape(with_role(summary.arm, comparison.control)),
            *(style.value(summary.values.get(seed)) for seed in seeds),
            style.difference(summary.std).lstrip("+"),
            style.interval(summary.bootstrap_interval),
            style.interval(difference.bootstrap_interval) if difference else NOTHING,
        ]
        for summary, difference in zip(comparison.arms, (None, *comparison.differences), strict=True)
    ]
    return table(header, rows, right_from=1)


def budget_section(runs: Runs, control: str) -> str:
    """What the compared stage cost, and what the whole chain took."""
    rows = []
    for arm, its in runs.items():
        finished = [run for run in its if run.status == "finished"]
        chains = [run.stages for run in finished if run.stages]
        numbers = [(show, [getattr(run.budget, name) for run in finished]) for name, show in _BUDGET.values()]
        numbers.append((format_seconds, [sum(stage.seconds for stage in stages) for stages in chains]))
        cells = [show(float(np.mean(values))) if values else NOTHING for show, values in numbers]
        if any(stages[-1].reused for stages in chains):
            cells[-2] += " †"
        if any(stage.reused for stages in chains for stage in stages):
            cells[-1] += " †"
        rows.append([escape(with_role(arm, control)), *cells])
    grid = table(["arm", *_BUDGET, "all stages"], rows, right_from=1)
    text = (
        "The compared stage, mean over the finished runs of each arm. Time includes compilation, which the first of "
        f"the runs that share a program pays.\n\n{grid}"
    )
    if any("†" in cell for row in rows for cell in row[1:]):
        text += (
            "\n\n† A stage was read from disk, not run: its time was measured when it ran, perhaps on another machine."
        )
    return text


def differences_section(runs: Runs, control: str) -> str:
    """What differs between the resolved configs."""
    rows = []
    for arm, keys in config_differences(runs, control).items():
        declared = runs[arm][0].overrides.keys() | runs[control][0].overrides.keys()
        for key, (theirs, ours) in keys.items():
            rows.append([escape(arm), code(key), code(theirs), code(ours), "yes" if key in declared else "**no**"])
        if not keys:
            rows.append([escape(arm), NOTHING, NOTHING, NOTHING, NOTHING])
    if not rows:
        return "There is no arm but the control."
    header = ["arm", "key", f"{escape(control)} (control)", "arm's value", "declared by an arm"]
    text = "Resolved configs at the same seed; a key that no arm declares follows from another one or should not move."
    return f"{text}\n\n{table(header, rows)}"


def config_differences(runs: Mapping[str, Sequence[RunResult]], control: str) -> dict[str, dict[str, tuple[str, str]]]:
    """By arm: dotted config key -> (control's value, arm's value), as the resolved configs have them.

    The whole resolved configs are compared, not only what the arm declares, so that a second variable that moved shows;
    and runs of one seed, so that what follows from the seed does not. DataError where one is not YAML or JSON.
    """
    differences: dict[str, dict[str, tuple[str, str]]] = {}
    controls = {run.seed: run for run in runs[control]}
    for arm, its in runs.items():
        if arm != control:
            run = next((run for run in its if run.seed in controls), its[0])
            reference = controls.get(run.seed, runs[control][0])
            theirs, ours = (flatten_config(which.config_text, which.arm) for which in (reference, run))
            pairs = {k: (theirs.get(k, NOTHING), ours.get(k, NOTHING)) for k in sorted(theirs.keys() | ours.keys())}
            differences[arm] = {k: pair for k, pair in pairs.items() if theirs.get(k) != ours.get(k)}
    return differences


def flatten_config(text: str, source: str) -> dict[str, str]:
    """A config in YAML, JSON or `dotted.key: value` lines as {dotted key: value as text}."""
    try:
        tree = yaml.load(text, Loader=yaml.BaseLoader)  # all scalars as text; runs no constructors
    except yaml.YAMLError as error:
        raise DataError(f"config of arm {source!r}: neither YAML nor JSON ({error}).") from error
    return _flatten("", tree)


def _flatten(prefix: str, node: object) -> dict[str, str]:
    if not isinstance(node, dict) or not node:
        return {prefix: node if isinstance(node, str) else str(node).replace("'", "")} if prefix else {}
    parts = (_flatten(f"{prefix}.{key}" if prefix else str(key), value) for key, value in node.items())
    return {key: text for part in parts for key, text in part.items()}


def places_section(results: Sequence[RunResult]) -> str:
    """Where every run's stages lie."""
    rows = []
    for run in results:
        who = [escape(run.arm), str(run.seed)]
        rows += [[*who, escape(s.name), code(s.folder), "read from disk" if s.reused else "run"] for s in run.stages]
        if run.run_dir not in [stage.folder for stage in run.stages]:
            what = "traceback" if run.status == "failed" and not run.run_dir.startswith("stages") else "compared"
            rows.append([*who, what, code(run.run_dir), NOTHING])
    grid = table(["arm", "seed", "stage", "folder", "by the last command"], rows)
    return f"Relative to the working directory.\n\n{grid}"


def failures_section(results: Sequence[RunResult]) -> str:
    """Why runs failed."""
    failed = [run for run in results if run.status == "failed"]
    rows = [[escape(r.arm), str(r.seed), escape(r.error or "no message"), code(r.run_dir)] for r in failed]
    return table(["arm", "seed", "error", "directory"], rows) if rows else "None."


def _bullets(sentences: Sequence[str]) -> list[str]:
    """A list, each item with a full stop, as one part of a text; no part where there is no sentence."""
    return ["\n".join(f"- {escape(sentence.rstrip('.'))}." for sentence in sentences)] if sentences else []


def _difference_cells(difference: PairedDifference, style: MetricFormat) -> list[str]:
    shown = style.difference(difference.mean), style.interval(difference.t_interval)
    return [*shown, format_p(difference.p), format_p(difference.p_holm)]


def _verdict(comparison: Comparison, style: MetricFormat) -> str:
    """One plain sentence: which arms differ from the control at 5% after Holm's correction."""
    better, worse, same = (f"{how} the control" for how in ("Better than", "Worse than", "Not told apart from"))
    groups: dict[str, list[str]] = {better: [], worse: [], same: [], "Failed": []}
    for summary, difference in zip(comparison.arms, (None, *comparison.differences), strict=True):
        if summary.failed:
            groups["Failed"].append(summary.arm if difference else f"{summary.arm}, the control")
        elif difference:
            told = difference.p_holm is not None and difference.p_holm < 0.05
            up = ((difference.mean or 0.0) > 0) == style.higher_is_better
            group = same if not told else better if up else worse
            groups[group].append(f"{difference.arm} ({style.difference(difference.mean)})")
    text = " ".join(f"{group}: {', '.join(arms)}." for group, arms in groups.items() if arms)
    return text + (" (Holm p < 0.05.)" if groups[better] or groups[worse] else "")
