"""Writes an ablation's report again from its results on disk, by another metric or control if wanted; runs nothing.

Examples:
  python -m launch.report --workdir=runs/quickstart --metric=eval/maj@4 --pairs=dpo:grpo,dpo:rejection_sampling
  python -m launch.report --workdir=runs/quickstart --format=latex,pdf --output=paper/figures

Without flags the metric, control and pairs are those of the last report. `--format` adds a LaTeX table (booktabs,
table.tex) and the figures as PDF or SVG.
"""

from pathlib import Path

from absl import flags
from rich import get_console

from launch import common
from research.analysis.report import FORMATS, print_headline, rewrite_report

_WORKDIR = flags.DEFINE_string("workdir", None, "the ablation's folder, with results.json in it", required=True)
_METRIC = flags.DEFINE_string("metric", None, "which final metric decides")
_LOWER = flags.DEFINE_bool("lower_is_better", None, "which way is up; default: a loss is better lower")
_CONTROL = flags.DEFINE_string("control", None, "the arm that the others are compared with")
_PAIRS = flags.DEFINE_list("pairs", None, "further arms to compare, each one:other; a pair with a comma in quotes")
_FORMAT = flags.DEFINE_list("format", [], f"besides HTML, Markdown and PNG: some of {','.join(FORMATS)}")
_OUTPUT = flags.DEFINE_string("output", None, "folder to write to; default: <workdir>/report")


def main() -> None:
    """Prints the main result and where the report is."""
    for name in _FORMAT.value:
        common.refuse(name not in FORMATS, f"--format: got {name}, expected some of {','.join(FORMATS)}")
    paths = rewrite_report(
        Path(_WORKDIR.value),
        metric=_METRIC.value,
        control=_CONTROL.value,
        higher_is_better=None if _LOWER.value is None else not _LOWER.value,
        pairs=_PAIRS.value,
        formats=_FORMAT.value,
        directory=None if _OUTPUT.value is None else Path(_OUTPUT.value),
    )
    print_headline(get_console(), paths)


if __name__ == "__main__":
    common.run(main)
