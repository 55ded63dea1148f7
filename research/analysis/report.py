"""The report of an ablation: `report.md` with its pictures, and one `report.html` that needs nothing else."""

import base64
import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
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
from research.core.progress import say

RESULTS, REPORT, SPEC = "results.json", "report", "report.json"
FORMATS = ("latex", "pdf", "svg")
"""What a report can be written as besides Markdown, HTML and PNG."""


@dataclass(frozen=True)
class ReportSpec:
    """What a report is about; kept beside it as `report.json`, so that it can be written again."""

    title: str
    metric: str  # key of `RunResult.metrics` that decides
    control: str  # the arm that the others are compared with
    question: str = ""  # what the ablation asks, in a sentence or two
    base_config_text: str = ""  # the resolved config that all arms start from
    versions: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # packages, git revision, data
    higher_is_better: bool = True
    pairs: tuple[tuple[str, str], ...] = ()  # (arm, other arm) that are compared too


@dataclass(frozen=True)
class ReportPaths:
    """What was written, and the main result in words."""

    markdown: Path
    html: Path
    plots: Mapping[str, Path]  # PNGs by name
    latex: Path | None  # the main table; None unless asked for
    headline: sections.Headline


def write_report(
    results: Sequence[RunResult],
    spec: ReportSpec,
    workdir: Path | str,
    *,
    formats: Sequence[str] = (),
    directory: Path | str | None = None,
) -> ReportPaths:
    """Writes the report on all runs, failed ones included, whose training curves are read below `workdir`.

    It goes to `directory`, or `<workdir>/report`, in some of FORMATS too. DataError where there is no such arm or
    metric, a seed twice, or a config text that is not YAML or JSON; WorkdirError where a file cannot be written.
    """
    evidence = gather(results, Path(workdir), spec.metric)
    comparison = compare_arms(evidence.results, metric=spec.metric, control=spec.control, pairs=spec.pairs)
    values = [value for summary in comparison.arms for value in summary.values.values()]
    style = MetricFormat(spec.metric, is_proportion(spec.metric, values), spec.higher_is_better)
    head = sections.headline(comparison, style)
    head.remarks.extend(evidence.notes)

    folder = make_folder(directory or Path(workdir) / REPORT)
    plots = write_plots(evidence, comparison, style, folder, [kind for kind in formats if kind != "latex"])
    by_arm = {arm.arm: [run for run in evidence.results if run.arm == arm.arm] for arm in comparison.arms}
    names = {key for run in evidence.results for key in run.metrics}
    names |= {key for rows in evidence.logs.values() for row in rows for key in row} - {"step"}
    picture = {name: f"![{name.replace('_', ' ')}]({path.name})" for name, path in plots.items()}
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
    data = {path.name: base64.b64encode(path.read_bytes()).decode() for path in plots.values()}
    images = {name: f"data:image/png;base64,{text}" for name, text in data.items()}
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
    """Writes an ablation's report again from its `results.json`; what is None is as in the last report.

    Where the metric changes, higher is better unless it is a loss, or `higher_is_better` says otherwise. Each of the
    `pairs` is "arm:other arm". DataError, besides those of `write_report`, where there are no results, or no report yet
    that says which metric decides.
    """
    results = load_results(workdir / RESULTS)
    if not results:
        raise DataError(f"{workdir / RESULTS}: holds no run yet, expected at least one.")
    place = workdir / REPORT / SPEC
    earlier: dict[str, Any] = {"title": workdir.resolve().name, "metric": None, "control": results[0].arm}
    if place.exists():
        earlier |= read_json(place)
        earlier.pop("percent", None)  # of an earlier version
    if metric not in (None, earlier["metric"]):
        earlier |= {"metric": metric, "higher_is_better": not is_loss(str(metric))}
    if earlier["metric"] is None:
        known = sorted({key for result in results for key in result.metrics})
        raise DataError(f"{place}: is not there, so the metric must be given; expected one of {known}.")
    given = {"control": control, "higher_is_better": higher_is_better}
    earlier |= {key: value for key, value in given.items() if value is not None}
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
        grid.add_column(titles[place], overflow="fold", justify="right" if place else "left", no_wrap=place > 0)
    for row in head.rows:
        grid.add_row(*(Text(printable(row[place])) for place in shown))
    if not console.is_terminal:
        wide = Measurement.get(console, console.options.update(max_width=10_000), grid).maximum
        console = Console(file=console.file, width=max(wide, console.width))
    say(printable(f"{head.header[2]}. {head.verdict}"), console)
    console.print(grid)
    for line in (*head.remarks, f"report: {paths.html}"):
        say(printable(line), console)
