"""The report of an ablation: `report.md` with its pictures, and one `report.html` that needs nothing else."""

import base64
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from research.analysis.config_diff import config_differences
from research.analysis.formatting import (
    NOTHING,
    MetricFormat,
    format_count,
    format_p,
    format_seconds,
    is_proportion,
)
from research.analysis.html import to_html
from research.analysis.markdown import escape, table
from research.analysis.plots import write_plots
from research.analysis.results import Budget, RunResult
from research.analysis.statistics import ArmSummary, Comparison, PairedDifference, compare_arms
from research.core.errors import WorkdirError
from research.core.files import explain_os_error, write_text_atomic

FOOTNOTES = (
    "**Mean** and **std** are over seeds (finished runs only; std with n - 1).",
    "**95% t-interval**: Student's t over the seeds. It is exact if seeds scatter normally, and wide with "
    "few seeds, as it must be: with 3 seeds it reaches 4.3 standard errors to either side. It may pass the "
    "ends of a metric's range.",
    "**95% bootstrap**: percentile bootstrap over the seeds. It assumes no shape but is too narrow with few "
    "seeds: in truth it covers about 75% with 3 seeds, 85% with 5, 90% with 10. Read it beside the "
    "t-interval, not instead of it.",
    "**Difference to control** is paired: arm minus control at the same seed, then the mean over the seeds "
    "that both have finished; its intervals and **p** (two-sided paired t-test) are over these differences.",
    "**Holm p** is p corrected for the number of arms compared with the control (Holm 1979).",
    "If all differences are equal, the t-test is undefined and p is that of the exact sign-flip test.",
    "With one seed there is no interval and no p-value: the scatter between seeds is unknown.",
    "Failed runs are left out of all means. An arm that fails on hard seeds looks better than it is.",
    "Seeds speak for training noise only. How far the result carries to other problems is a question of the "
    "evaluation set and its size.",
)


@dataclass(frozen=True)
class ReportPaths:
    """What was written; `plots` has "bars", "curves", "tokens" and "summary"."""

    markdown: Path
    html: Path
    plots: Mapping[str, Path]


def write_report(
    results: Sequence[RunResult],
    *,
    directory: Path | str,
    title: str,
    question: str,
    metric: str,
    control: str,
    base_config_text: str,
    versions: Mapping[str, str],
    higher_is_better: bool = True,
    percent: bool | None = None,
) -> ReportPaths:
    """Writes the report; each file is written beside its place and renamed into it.

    Args:
      results: all runs, failed ones included; arms appear control first, then in this order.
      directory: where to; created if need be.
      title: heading.
      question: what the ablation asks, in a sentence or two.
      metric: key of `RunResult.metrics` that decides.
      control: the arm that the others are compared with.
      base_config_text: the resolved config that all arms start from.
      versions: package versions, git revision, data versions.
      higher_is_better: which way the metric is good.
      percent: show the metric as a percentage; None for "if its name and values are those of a proportion".

    Raises:
      DataError: no such control arm or metric, a seed twice, or a config text that is not YAML or JSON.
      WorkdirError: the disk is full or the directory cannot be written; names the file.
    """
    comparison = compare_arms(results, metric=metric, control=control)
    values = [value for summary in comparison.arms for value in summary.values.values()]
    as_percent = is_proportion(metric, values) if percent is None else percent
    style = MetricFormat(metric, percent=as_percent, higher_is_better=higher_is_better)
    by_arm = {summary.arm: [run for run in results if run.arm == summary.arm] for summary in comparison.arms}
    sections = [
        f"# {escape(title)}\n\n{escape(question)}",
        f"## Result\n\n{_headline(comparison, style)}\n\n![All panels](summary.png)",
        f"## Seeds\n\n{_seeds(comparison, style)}",
        f"## Budget\n\nMean over the finished runs of each arm.\n\n{_budgets(by_arm)}",
        f"## What differs between the arms\n\n{_config_differences(by_arm, control)}",
        "## Plots\n\n![Final values](bars.png)\n\n![Learning curves](curves.png)\n\n"
        "![Against tokens](tokens.png)",
        f"## Failed runs\n\n{_failures(results)}",
        "## How to read the statistics\n\n" + "\n".join(f"- {note}" for note in FOOTNOTES),
        "## Versions\n\n"
        + table(["what", "version"], [[escape(k), _code(v)] for k, v in sorted(versions.items())]),
        f"## Base config\n\n{_fenced(base_config_text)}",
    ]
    markdown = "\n\n".join(sections) + "\n"

    folder = Path(directory)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WorkdirError(explain_os_error(error, folder)) from error
    plots = write_plots(results, comparison, style, folder)
    images = {
        path.name: "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
        for path in plots.values()
    }
    paths = ReportPaths(markdown=folder / "report.md", html=folder / "report.html", plots=plots)
    write_text_atomic(paths.markdown, markdown)
    write_text_atomic(paths.html, to_html(markdown, title=title, images=images))
    return paths


def _headline(comparison: Comparison, style: MetricFormat) -> str:
    by_arm = {difference.arm: difference for difference in comparison.differences}
    header = ["arm", "n", f"{escape(style.name)}, mean", "95% t-interval", "difference to control",
              "95% t-interval", "p", "Holm p"]  # fmt: skip
    rows = []
    for summary in comparison.arms:
        count = len(summary.values)
        row = [
            _arm(summary.arm, comparison.control),
            str(count) if count == summary.planned else f"{count} of {summary.planned}",
        ]
        row += [f"**{style.value(summary.mean)}**", style.interval(summary.t_interval)]
        difference = by_arm.get(summary.arm)
        rows.append(row + ([NOTHING] * 4 if difference is None else _difference_cells(difference, style)))
    better = "Higher" if style.higher_is_better else "Lower"
    text = f"{better} is better. {_verdict(comparison, style)}\n\n{table(header, rows, right_from=1)}"
    notes = [f"{escape(d.arm)}: {escape(d.note)}" for d in comparison.differences if d.note]
    notes += [f"{escape(s.arm)}: {escape('; '.join(s.missing))}" for s in comparison.arms if s.missing]
    return text + ("\n\n" + "\n".join(f"- {note}." for note in notes) if notes else "")


def _difference_cells(difference: PairedDifference, style: MetricFormat) -> list[str]:
    return [style.difference(difference.mean), style.interval(difference.t_interval),
            format_p(difference.p), format_p(difference.p_holm)]  # fmt: skip


def _verdict(comparison: Comparison, style: MetricFormat) -> str:
    """One plain sentence: which arms differ from the control at 5% after Holm's correction."""
    sign = 1.0 if style.higher_is_better else -1.0
    better: list[PairedDifference] = []
    worse: list[PairedDifference] = []
    open_: list[PairedDifference] = []
    for difference in comparison.differences:
        if difference.p_holm is not None and difference.mean is not None and difference.p_holm < 0.05:
            (better if sign * difference.mean > 0 else worse).append(difference)
        else:
            open_.append(difference)
    parts = [
        f"{word}: {', '.join(f'{escape(d.arm)} ({style.difference(d.mean)})' for d in group)}."
        for word, group in (("Better than the control", better), ("Worse than the control", worse),
                            ("Not told apart from the control", open_))
        if group
    ]  # fmt: skip
    return " ".join(parts) + (" (Holm p < 0.05.)" if better or worse else "")


def _seeds(comparison: Comparison, style: MetricFormat) -> str:
    seeds = sorted({seed for summary in comparison.arms for seed in summary.values})
    header = ["arm", *(f"seed {seed}" for seed in seeds), "std", "95% bootstrap", "difference, 95% bootstrap"]
    by_arm = {difference.arm: difference for difference in comparison.differences}

    def row(summary: ArmSummary) -> list[str]:
        difference = by_arm.get(summary.arm)
        return [
            _arm(summary.arm, comparison.control),
            *(style.value(summary.values.get(seed)) for seed in seeds),
            style.difference(summary.std).lstrip("+"),
            style.interval(summary.bootstrap_interval),
            style.interval(difference.bootstrap_interval) if difference else NOTHING,
        ]

    return table(header, [row(summary) for summary in comparison.arms], right_from=1)


def _budgets(by_arm: Mapping[str, Sequence[RunResult]]) -> str:
    header = ["arm", "tokens sampled", "completions sampled", "tokens trained", "FLOPs", "wall clock"]
    control = next(iter(by_arm))
    columns: list[tuple[Callable[[Budget], float], Callable[[float], str]]] = [
        (lambda budget: budget.tokens_sampled, format_count),
        (lambda budget: budget.completions_sampled, format_count),
        (lambda budget: budget.tokens_trained, format_count),
        (lambda budget: budget.flops, format_count),
        (lambda budget: budget.seconds, format_seconds),
    ]
    rows = []
    for arm, runs in by_arm.items():
        spent = [run.budget for run in runs if run.status == "finished"]
        cells = [
            show(float(np.mean([read(budget) for budget in spent]))) if spent else NOTHING
            for read, show in columns
        ]
        rows.append([_arm(arm, control), *cells])
    return table(header, rows, right_from=1)


def _config_differences(by_arm: Mapping[str, Sequence[RunResult]], control: str) -> str:
    rows = []
    for arm, keys in config_differences(by_arm, control).items():
        declared = by_arm[arm][0].overrides.keys() | by_arm[control][0].overrides.keys()
        for key, (theirs, ours) in keys.items():
            rows.append(
                [escape(arm), _code(key), _code(theirs), _code(ours), "yes" if key in declared else "**no**"]
            )
        if not keys:
            rows.append([escape(arm), NOTHING, NOTHING, NOTHING, NOTHING])
    if not rows:
        return "There is no arm but the control."
    header = ["arm", "key", f"{escape(control)} (control)", "arm's value", "declared by an arm"]
    return (
        "Resolved configs at the same seed; a key that no arm declares follows from another one or should "
        f"not move.\n\n{table(header, rows)}"
    )


def _failures(results: Sequence[RunResult]) -> str:
    rows = [
        [escape(run.arm), str(run.seed), escape(run.error or "no message"), _code(run.run_dir)]
        for run in results
        if run.status == "failed"
    ]
    return table(["arm", "seed", "error", "directory"], rows) if rows else "None."


def _arm(arm: str, control: str) -> str:
    return f"{escape(arm)} (control)" if arm == control else escape(arm)


def _code(text: str) -> str:
    """A code span for a table cell; a pipe must be escaped even there."""
    one_line = " ".join(str(text).split()).replace("|", "\\|") or " "
    fence, blank = "`", " " if "`" in one_line else ""  # Markdown strips one blank at either end
    while fence in one_line:
        fence += "`"
    return f"{fence}{blank}{one_line}{blank}{fence}"


def _fenced(text: str) -> str:
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}text\n{text.rstrip()}\n{fence}"
