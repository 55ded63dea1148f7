"""The parts of a report as Markdown, and its main table as plain cells for other formats."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from research.analysis.config_diff import config_differences
from research.analysis.formatting import NOTHING, MetricFormat, format_count, format_p, format_seconds
from research.analysis.markdown import code, escape, table
from research.analysis.results import Budget, RunResult
from research.analysis.statistics import ArmSummary, Comparison, PairedDifference

Runs = Mapping[str, Sequence[RunResult]]
"""The runs by arm, control first."""

FOOTNOTES = (
    "**Mean** and **std** are over seeds (finished runs only; std with n - 1).",
    "**95% t-interval**: Student's t over the seeds. It is exact if seeds scatter normally, and wide with "
    "few seeds, as it must be: with 3 seeds it reaches 4.3 standard errors to either side. It may pass the "
    "ends of a metric's range. In pictures an arrow marks an interval that goes on beyond the axis.",
    "**95% bootstrap**: percentile bootstrap over the seeds. It assumes no shape but is too narrow with few "
    "seeds: in truth it covers about 75% with 3 seeds, 85% with 5, 90% with 10. Read it beside the "
    "t-interval, not instead of it.",
    "**Differences** are paired: one arm minus the other at the same seed, then the mean over the seeds "
    "that both have finished; their intervals and **p** (two-sided paired t-test) are over these differences.",
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
    by_arm = {difference.arm: difference for difference in comparison.differences}
    header = ["arm", "n", f"{style.name}, mean", "95% t-interval", "difference to control", "95% t-interval", "p",
              "Holm p"]  # fmt: skip
    rows = []
    for summary in comparison.arms:
        count, difference = len(summary.values), by_arm.get(summary.arm)
        rows.append(
            [
                with_role(summary.arm, comparison.control),
                str(count) if count == summary.planned else f"{count} of {summary.planned}",
                "failed" if summary.failed else style.value(summary.mean),
                style.interval(summary.t_interval),
                *([NOTHING] * 4 if difference is None else _difference_cells(difference, style)),
            ]
        )
    remarks = [f"{d.arm}: {d.note}" for d in comparison.differences if d.note and d.differences]
    remarks += [f"{s.arm}: {'; '.join(s.missing)}" for s in comparison.arms if s.missing]
    better = "Higher" if style.higher_is_better else "Lower"
    return Headline(f"{better} is better. {_verdict(comparison, style)}", header, rows, remarks)


def result_section(head: Headline) -> str:
    """The main result as Markdown."""
    rows = [[escape(row[0]), row[1], f"**{row[2]}**", *row[3:]] for row in head.rows]
    parts = [escape(head.verdict), table([escape(cell) for cell in head.header], rows, right_from=1)]
    return "\n\n".join([*parts, bullets(head.remarks)] if head.remarks else parts)


def bullets(sentences: Sequence[str]) -> str:
    """A list, each item with a full stop."""
    return "\n".join(f"- {escape(sentence.rstrip('.'))}." for sentence in sentences)


def pairs_section(comparison: Comparison, style: MetricFormat) -> str:
    """Arms against each other."""
    rows = [[f"{escape(d.arm)} minus {escape(d.against)}", str(len(d.differences)), *_difference_cells(d, style)]
            for d in comparison.pairs]  # fmt: skip
    header = ["arms", "n", "difference", "95% t-interval", "p", "Holm p"]
    notes = [f"{d.arm} minus {d.against}: {d.note}" for d in comparison.pairs if d.note]
    return table(header, rows, right_from=1) + (f"\n\n{bullets(notes)}" if notes else "")


def seeds_section(comparison: Comparison, style: MetricFormat) -> str:
    """Every seed's value."""
    seeds = sorted({seed for summary in comparison.arms for seed in summary.values})
    header = ["arm", *(f"seed {seed}" for seed in seeds), "std", "95% bootstrap", "difference, 95% bootstrap"]
    by_arm = {difference.arm: difference for difference in comparison.differences}

    def row(summary: ArmSummary) -> list[str]:
        difference = by_arm.get(summary.arm)
        return [
            escape(with_role(summary.arm, comparison.control)),
            *(style.value(summary.values.get(seed)) for seed in seeds),
            style.difference(summary.std).lstrip("+"),
            style.interval(summary.bootstrap_interval),
            style.interval(difference.bootstrap_interval) if difference else NOTHING,
        ]

    return table(header, [row(summary) for summary in comparison.arms], right_from=1)


def budget_section(runs: Runs, control: str) -> str:
    """What the compared stage cost, and what the whole chain took."""
    header = ["arm", "tokens sampled", "completions sampled", "tokens trained", "FLOPs", "wall clock", "all stages"]
    columns: list[tuple[Callable[[Budget], float], Callable[[float], str]]] = [
        (lambda budget: budget.tokens_sampled, format_count),
        (lambda budget: budget.completions_sampled, format_count),
        (lambda budget: budget.tokens_trained, format_count),
        (lambda budget: budget.flops, format_count),
        (lambda budget: budget.seconds, format_seconds),
    ]
    rows, marked = [], False
    for arm, its in runs.items():
        finished = [run for run in its if run.status == "finished"]
        cells = [
            show(float(np.mean([read(run.budget) for run in finished]))) if finished else NOTHING
            for read, show in columns
        ]
        chains = [run.stages for run in finished if run.stages]
        whole = [sum(stage.seconds for stage in stages) for stages in chains]
        cells.append(format_seconds(float(np.mean(whole))) if whole else NOTHING)
        for place, reused in (
            (-2, any(stages[-1].reused for stages in chains)),
            (-1, any(stage.reused for stages in chains for stage in stages)),
        ):
            if reused:
                cells[place], marked = cells[place] + " †", True
        rows.append([escape(with_role(arm, control)), *cells])
    text = f"The compared stage, mean over the finished runs of each arm.\n\n{table(header, rows, right_from=1)}"
    note = "† A stage was read from disk, not run: its time was measured when it ran, perhaps on another machine."
    return f"{text}\n\n{note}" if marked else text


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
    return (
        "Resolved configs at the same seed; a key that no arm declares follows from another one or should "
        f"not move.\n\n{table(header, rows)}"
    )


def places_section(results: Sequence[RunResult]) -> str:
    """Where every run's stages lie."""
    rows = []
    for run in results:
        who = [escape(run.arm), str(run.seed)]
        for stage in run.stages:
            rows.append([*who, escape(stage.name), code(stage.folder), "read from disk" if stage.reused else "run"])
        if not any(stage.folder == run.run_dir for stage in run.stages):
            what = "traceback" if run.status == "failed" and not run.run_dir.startswith("stages") else "compared"
            rows.append([*who, what, code(run.run_dir), NOTHING])
    text = "Relative to the working directory.\n\n"
    return text + table(["arm", "seed", "stage", "folder", "by the last command"], rows)


def failures_section(results: Sequence[RunResult]) -> str:
    """Why runs failed."""
    rows = [
        [escape(run.arm), str(run.seed), escape(run.error or "no message"), code(run.run_dir)]
        for run in results
        if run.status == "failed"
    ]
    return table(["arm", "seed", "error", "directory"], rows) if rows else "None."


def with_role(arm: str, control: str) -> str:
    """The arm's name, the control marked."""
    return f"{arm} (control)" if arm == control else arm


def _difference_cells(difference: PairedDifference, style: MetricFormat) -> list[str]:
    return [style.difference(difference.mean), style.interval(difference.t_interval),
            format_p(difference.p), format_p(difference.p_holm)]  # fmt: skip


def _verdict(comparison: Comparison, style: MetricFormat) -> str:
    """One plain sentence: which arms differ from the control at 5% after Holm's correction."""
    sign = 1.0 if style.higher_is_better else -1.0
    groups: dict[str, list[str]] = {"Better than the control": [], "Worse than the control": [],
                                    "Not told apart from the control": [], "Failed": []}  # fmt: skip
    failed = {summary.arm for summary in comparison.arms if summary.failed}
    for difference in comparison.differences:
        if difference.arm in failed:
            group, shown = "Failed", difference.arm
        else:
            shown = f"{difference.arm} ({style.difference(difference.mean)})"
            group = "Not told apart from the control"
            if difference.p_holm is not None and difference.mean is not None and difference.p_holm < 0.05:
                group = "Better than the control" if sign * difference.mean > 0 else "Worse than the control"
        groups[group].append(shown)
    if comparison.control in failed:
        groups["Failed"].insert(0, f"{comparison.control}, the control")
    text = " ".join(f"{group}: {', '.join(arms)}." for group, arms in groups.items() if arms)
    told = groups["Better than the control"] or groups["Worse than the control"]
    return text + (" (Holm p < 0.05.)" if told else "")
