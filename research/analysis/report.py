"""The report of an ablation: `report.md` with its pictures, and one `report.html` that needs nothing else."""

import base64
import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, JustifyMethod
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from research.analysis import latex, sections
from research.analysis.formatting import MetricFormat, is_proportion
from research.analysis.glossary import glossary_table
from research.analysis.html import to_html
from research.analysis.logs import gather, is_loss
from research.analysis.markdown import code, escape, fenced, printable, table
from research.analysis.plots import write_plots
from research.analysis.results import RunResult, load_results
from research.analysis.statistics import compare_arms
from research.core.errors import DataError
from research.core.files import make_folder, read_json, write_json_atomic, write_text_atomic

RESULTS, REPORT, SPEC = "results.json", "report", "report.json"
FORMATS = ("latex", "pdf", "svg")
"""What a report can be written as besides Markdown, HTML and PNG."""

_PICTURES = {
    "summary": "Final values, differences and learning curves",
    "curves": "Learning curves",
    "training": "While training",
    "reward_against_kl": "Reward against KL",
    "grid": "Grid",
}


@dataclass(frozen=True)
class ReportSpec:
    """What a report is about; kept beside it as `report.json`, so that it can be written again.

    Attributes:
      title: heading.
      metric: key of `RunResult.metrics` that decides.
      control: the arm that the others are compared with.
      question: what the ablation asks, in a sentence or two.
      base_config_text: the resolved config that all arms start from.
      versions: package versions, git revision, data versions.
      higher_is_better: which way the metric is good.
      percent: show the metric as a percentage; None for "if the glossary and its values say so".
      pairs: (arm, other arm) that are compared too.
    """

    title: str
    metric: str
    control: str
    question: str = ""
    base_config_text: str = ""
    versions: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    higher_is_better: bool = True
    percent: bool | None = None
    pairs: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class ReportPaths:
    """What was written, and the main result in words.

    Attributes:
      markdown, html: the report.
      plots: PNGs by name.
      latex: the main table; None unless asked for.
      headline: the main result.
    """

    markdown: Path
    html: Path
    plots: Mapping[str, Path]
    latex: Path | None
    headline: sections.Headline


def write_report(
    results: Sequence[RunResult],
    spec: ReportSpec,
    workdir: Path | str,
    *,
    formats: Sequence[str] = (),
    directory: Path | str | None = None,
) -> ReportPaths:
    """Writes the report; each file is written beside its place and renamed into it.

    Args:
      results: all runs, failed ones included; arms appear control first, then in this order.
      spec: what it is about.
      workdir: where the runs lie; their training curves are read there.
      formats: of FORMATS, to be written too.
      directory: where to; `<workdir>/report` unless given.

    Raises:
      DataError: no such arm or metric, a seed twice, or a config text that is not YAML or JSON.
      WorkdirError: the disk is full or the directory cannot be written; names the file.
    """
    evidence = gather(results, Path(workdir), spec.metric)
    comparison = compare_arms(evidence.results, metric=spec.metric, control=spec.control, pairs=spec.pairs)
    values = [value for summary in comparison.arms for value in summary.values.values()]
    percent = is_proportion(spec.metric, values) if spec.percent is None else spec.percent
    style = MetricFormat(spec.metric, percent=percent, higher_is_better=spec.higher_is_better)
    head = sections.headline(comparison, style)
    head.remarks.extend(evidence.notes)

    folder = make_folder(directory or Path(workdir) / REPORT)
    kinds = ("png", *(kind for kind in formats if kind != "latex"))
    plots = write_plots(evidence, comparison, style, folder, kinds)
    by_arm = {arm.arm: [run for run in evidence.results if run.arm == arm.arm] for arm in comparison.arms}
    names = {key for run in evidence.results for key in run.metrics}
    names |= {key for rows in evidence.logs.values() for row in rows for key in row} - {"step"}
    picture = {name: f"![{_PICTURES[name]}]({path.name})" for name, path in plots.items()}
    versions = [[escape(key), code(str(value))] for key, value in sorted(spec.versions.items())]
    parts = {
        "Result": f"{sections.result_section(head)}\n\n{picture.pop('summary')}",
        "Arm against arm": sections.pairs_section(comparison, style) if comparison.pairs else "",
        "Grid": picture.pop("grid", ""),
        "Seeds": sections.seeds_section(comparison, style),
        "Budget": sections.budget_section(by_arm, spec.control),
        "Curves": "\n\n".join(picture.values()),
        "What differs between the arms": sections.differences_section(by_arm, spec.control),
        "Failed runs": sections.failures_section(evidence.results),
        "Where the runs lie": sections.places_section(evidence.results),
        "How to read the statistics": "\n".join(f"- {note}" for note in sections.FOOTNOTES),
        "Metrics": glossary_table(sorted(names)) if names else "",
        "Versions": table(["what", "version"], versions) if versions else "",
        "Base config": fenced(spec.base_config_text) if spec.base_config_text else "",
    }
    begin = f"# {escape(spec.title)}\n\n{escape(spec.question)}"
    markdown = "\n\n".join([begin, *(f"## {title}\n\n{text}" for title, text in parts.items() if text)]) + "\n"
    images = {
        path.name: "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode() for path in plots.values()
    }
    table_path = folder / "table.tex" if "latex" in formats else None
    paths = ReportPaths(folder / "report.md", folder / "report.html", plots, table_path, head)
    write_text_atomic(paths.markdown, markdown)
    write_text_atomic(paths.html, to_html(markdown, title=printable(spec.title), images=images))
    if table_path is not None:
        comment = f"{spec.title}: {style.label}; paired t-tests against {spec.control}, Holm-corrected"
        write_text_atomic(table_path, latex.booktabs(head.header, head.rows, comment=comment))
    write_json_atomic(folder / SPEC, dataclasses.asdict(spec))
    return paths


def rewrite_report(
    workdir: Path,
    *,
    metric: str | None = None,
    control: str | None = None,
    higher_is_better: bool | None = None,
    pairs: Sequence[str] | None = None,
    formats: Sequence[str] = (),
    directory: Path | None = None,
) -> ReportPaths:
    """Writes an ablation's report again from what is on disk; what is None is as in the last report.

    Args:
      workdir: the ablation's; holds `results.json`.
      metric: another metric.
      control: another control.
      higher_is_better: where the metric changes, None is True unless it is a loss.
      pairs: each "arm:other arm".
      formats, directory: see `write_report`.

    Raises:
      DataError: there are no results, or no report yet that says which metric decides; see also `write_report`.
    """
    results = load_results(workdir / RESULTS)
    if not results:
        raise DataError(f"{workdir / RESULTS}: holds no run yet, expected at least one.")
    place = workdir / REPORT / SPEC
    earlier: dict[str, Any] = {"title": workdir.resolve().name, "metric": None, "control": results[0].arm}
    if place.exists():
        earlier |= read_json(place)
    if metric not in (None, earlier["metric"]):
        earlier |= {"metric": metric, "higher_is_better": not is_loss(str(metric)), "percent": None}
    if earlier["metric"] is None:
        known = sorted({key for result in results for key in result.metrics})
        raise DataError(f"{place}: is not there, so the metric must be given; expected one of {known}.")
    if control is not None:
        earlier["control"] = control
    if higher_is_better is not None:
        earlier["higher_is_better"] = higher_is_better
    kept = [pair for pair in earlier.get("pairs", ()) if earlier["control"] not in pair]
    names = {result.arm for result in results}
    earlier["pairs"] = tuple(map(tuple, kept)) if pairs is None else tuple(_pair(text, names) for text in pairs)
    return write_report(results, ReportSpec(**earlier), workdir, formats=formats, directory=directory)


def _pair(text: str, names: Collection[str]) -> tuple[str, str]:
    """The two arms of "one:other"; names may hold colons themselves."""
    for place, character in enumerate(text):
        if character == ":" and text[:place] in names and text[place + 1 :] in names:
            return text[:place], text[place + 1 :]
    raise DataError(f"pairs: got {text!r}, expected one:other with arms of {sorted(names)}.")


def print_headline(console: Console, paths: ReportPaths) -> None:
    """Prints the main result; no name is cut: a terminal folds it, a log gets the width that the table takes."""
    head = paths.headline
    titles = ["arm", "n", "mean", "95%\nt-interval", "difference\nto control", "95%\nt-interval", "", "Holm p"]
    grid = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    shown = [place for place, title in enumerate(titles) if title]  # without p: Holm's counts
    for place in shown:
        justify: JustifyMethod = "right" if place else "left"
        grid.add_column(titles[place], overflow="fold", justify=justify, no_wrap=place > 0)
    for row in head.rows:
        grid.add_row(*(Text(printable(row[place])) for place in shown))
    if not console.is_terminal:
        wide = Measurement.get(console, console.options.update(max_width=10_000), grid).maximum
        console = Console(file=console.file, width=max(wide, console.width))
    first = f"{head.header[2]}. {head.verdict}"
    lines = [printable(line) for line in (first, *head.remarks, f"report: {paths.html}")]
    console.print(lines[0], markup=False, highlight=False, soft_wrap=True)
    console.print(grid)
    for line in lines[1:]:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
