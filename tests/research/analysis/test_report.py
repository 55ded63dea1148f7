"""The report: says what it must, shows hostile text as text, and the HTML needs nothing from outside."""

import dataclasses
import io
import math
from html.parser import HTMLParser

import pytest
from markdown_it import MarkdownIt
from rich.console import Console

from research.analysis.report import ReportSpec, print_headline, rewrite_report, write_report
from research.analysis.results import StageUse, save_results
from research.analysis.sections import config_differences, flatten_config
from research.core.errors import DataError, WorkdirError
from tests.research.analysis.made_up import ARMS, BASE_CONFIG, failed, results, run, write_log

SPEC = ReportSpec(
    title="Which objective?",
    metric="eval/pass@1",
    control="sft",
    question="Does it pay to sample?",
    base_config_text=BASE_CONFIG,
    versions={"python": "3.11.7", "jax": "0.10.2", "git revision": "c32b079", "tag": None},
)


def _write(directory, runs, *, workdir=None, formats=(), **changes):
    spec = dataclasses.replace(SPEC, **changes)
    return write_report(runs, spec, workdir or directory, formats=formats, directory=directory)


def _printed(paths, width=80, terminal=False):
    console = Console(file=io.StringIO(), width=width, force_terminal=terminal, color_system=None)
    print_headline(console, paths)
    return console.file.getvalue()


class _Page(HTMLParser):
    """Collects what a browser would fetch or run, the text, and the tables by rows."""

    def __init__(self, text):
        super().__init__()
        self.links, self.tags, self.text, self.rows, self.in_cell = [], [], "", [], False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [v for k, v in attributes if k in ("src", "href", "srcset", "data", "action", "poster")]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self.in_cell = True

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.in_cell = False

    def handle_data(self, data):
        self.text += data
        if self.in_cell:
            self.rows[-1][-1] += data


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    runs = results()
    runs[4] = failed(runs[4])
    return _write(tmp_path_factory.mktemp("report") / "deep" / "report", runs)


def test_html_is_self_contained(report):
    text = report.html.read_text()
    page = _Page(text)
    assert page.tags.count("img") == 2
    assert page.links and all(link.startswith("data:image/png;base64,") for link in page.links)
    assert not {"script", "link", "iframe", "object", "base", "form"} & set(page.tags)
    style = text[text.index("<style>") : text.index("</style>")]
    assert "url(" not in style and "@import" not in style
    assert "http" not in text.replace("<!DOCTYPE html>", "")


def test_both_say_what_they_must(report):
    page = _Page(report.html.read_text())
    markdown = MarkdownIt("commonmark").enable("table").render(report.markdown.read_text())
    for text in (page.text, _Page(markdown).text):
        for part in (
            "Which objective?", "Does it pay to sample?", "Higher is better.", "Holm p", "2 of 3",
            "rejection_sampling", "seed 1 failed: loss", "loss is NaN at step 120 | see <log>",
            "runs/rejection_sampling/1", "rollout.group_size", "tokens sampled", "FLOPs",
            "git revision", "c32b079", "samples_per_prompt: 1",
            "fraction", "probability that at least one of k samples is correct",
        ):  # fmt: skip
            assert part in text, part
    for name in ("curves", "summary"):
        assert f"({name}.png)" in report.markdown.read_text()
        assert report.plots[name].parent == report.markdown.parent


def test_headline_numbers(report):
    rows = _Page(report.html.read_text()).rows
    assert [row[0] for row in rows[1:5]] == ["sft (control)", "rejection_sampling", "dpo", "grpo"]
    runs = results()
    grpo, sft = ([r.metrics["eval/pass@1"] for r in runs if r.arm == arm] for arm in ("grpo", "sft"))
    assert rows[4][1] == "3"
    assert rows[4][2] == f"{100 * sum(grpo) / 3:.1f}%"
    assert rows[4][4] == f"+{100 * (sum(grpo) - sum(sft)) / 3:.1f} pp"
    assert rows[1][4:] == ["–"] * 4


def test_config_differences_are_found_in_the_resolved_configs():
    by_arm = {arm: [r for r in results() if r.arm == arm] for arm in ARMS}
    found = config_differences(by_arm, "sft")
    assert found["dpo"] == {"objective.beta": ("0.0", "0.1"), "objective.name": ("sft", "dpo")}
    assert "sft" not in found
    moved = [dataclasses.replace(r, config_text=r.config_text + "extra: 1\n") for r in by_arm["dpo"]]
    assert config_differences({**by_arm, "dpo": moved}, "sft")["dpo"]["extra"] == ("–", "1")


def test_configs_in_yaml_json_and_lines_read_alike():
    expected = {"a.b": "1e-4", "a.c": "x: y", "d": "[1, 2]"}
    assert flatten_config("a:\n  b: 1e-4\n  c: 'x: y'\nd: !!python/tuple\n- 1\n- 2\n", "arm") == expected
    assert flatten_config('{"a": {"b": 1e-4, "c": "x: y"}, "d": [1, 2]}', "arm") == expected
    assert flatten_config('a.b: 1e-4\na.c: "x: y"\nd: [1, 2]\n', "arm") == expected
    with pytest.raises(DataError, match="config of arm 'grpo'"):
        flatten_config("a: [1", "grpo")


NASTY = ["beta=0.1,lr=3e-4", "$x^$", "$$", "[/b]", "a\0b", "größe 你好", "n" * 200, "_hidden", "1. x", "- x",
         "<i>x</i> | `y` *z*", "\\frac{a}", "a:b,c", "\ud800\u202ex", "%d & #1 ~^", "x" * 40]  # fmt: skip


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("names", [NASTY[:8], NASTY[8:]], ids=["first", "second"])
def test_names_are_text_wherever_they_are_shown(tmp_path, names):
    runs = [run(name, seed, 0.4 + 0.01 * place + 0.02 * seed) for place, name in enumerate(["sft", *names[:-1]])
            for seed in (0, 1)]  # fmt: skip
    runs += [failed(run(names[-1], 0, 0.5), error=f"{names[0]}: it broke")]
    settings = {"config_text": BASE_CONFIG, "run_dir": "runs/0", "overrides": {}}
    runs = [dataclasses.replace(r, grid={names[0]: r.arm, names[1]: r.seed}, **settings) for r in runs]
    write_log(tmp_path / "runs" / "0", 0)
    save_results(tmp_path / "results.json", runs)
    pairs = ((names[0], names[1]), (names[2], names[-1]))
    changes = {"title": names[0], "question": names[1], "versions": {name: name for name in names}}
    paths = _write(tmp_path / "report", runs, workdir=tmp_path, formats=("latex",), pairs=pairs, **changes)
    assert set(paths.plots) == {"summary", "curves", "training", "reward_against_kl", "grid"}
    shown = ["".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name) for name in names]
    page = _Page(paths.html.read_text())
    assert not {"script", "i", "em", "ol"} & set(page.tags)
    assert [row[0] for row in page.rows[1:10]] == ["sft (control)", *shown]
    assert {name for row in page.rows for name in row[:1]} >= {f"{shown[0]} minus {shown[1]}", *shown}
    printed = "".join(_printed(paths, width=60).split())
    for text in (*shown, f"{shown[-1]}: seed 0 failed: {shown[0]}: it broke"):
        assert "".join(text.split()) in printed, text
    rows = paths.latex.read_text().splitlines()[6:-2]
    assert len(rows) == 9 and all(row.count(" & ") == 7 and row.endswith(r" \\") for row in rows)
    texts = [f"{one}:{other}" for one, other in pairs]
    again = rewrite_report(tmp_path, pairs=texts, directory=tmp_path / "again")
    assert again.markdown.read_bytes() == paths.markdown.read_bytes()


def test_a_printed_name_is_whole_in_a_log_and_folded_in_a_terminal(tmp_path):
    name = "rl.optimizer.learning_rate=0.0001,rl.objective.dpo.beta=0.1,rl.objective.name=dpo"
    paths = _write(tmp_path, [run("sft", 0, 0.4), run(name, 0, 0.5)])
    assert f" {name} " in _printed(paths)
    folded = _printed(paths, width=70, terminal=True)
    assert max(map(len, folded.splitlines()[2:-3])) <= 70 and "…" not in folded
    first_column = "".join(line.split()[0] for line in folded.splitlines()[6:-1] if line.split())
    assert name in first_column
    assert "50.0%" in folded and "difference" in folded


def test_an_undeclared_difference_stands_out(tmp_path):
    runs = [run("sft", 0, 0.4), dataclasses.replace(run("dpo", 0, 0.5), overrides={"objective.name": "dpo"})]
    text = _write(tmp_path, runs).markdown.read_text()
    assert "| dpo | `objective.beta` | `0.0` | `0.1` | **no** |" in text
    assert "| dpo | `objective.name` | `sft` | `dpo` | yes |" in text


def test_hostile_text_stays_text(tmp_path):
    bad = "<script>alert(1)</script> | *x* `y` _z_ ![p](http://evil/p.png)\nsecond line"
    runs = [run("sft", 0, 0.4), failed(run("dpo", 0, 0.5), error=bad)]
    paths = _write(tmp_path, runs, title=bad, question=bad, base_config_text=f"```\n{bad}", versions={bad: bad})
    page = _Page(paths.html.read_text())
    assert "script" not in page.tags and page.tags.count("img") == 2
    cells = [cell.strip() for row in page.rows for cell in row]
    assert cells.count(" ".join(bad.split())) == 3  # the error, and the version's name and value


@pytest.mark.parametrize(("metric", "shown"), [("eval/loss", "**2.6**"), ("eval/pass@1", "**40.0%**")])
def test_percent_only_for_proportions(tmp_path, metric, shown):
    assert shown in _write(tmp_path, [run("sft", 0, 0.4)], metric=metric).markdown.read_text()


def test_lower_is_better_turns_the_verdict(tmp_path):
    runs = results()
    up = _write(tmp_path, runs, metric="eval/loss").markdown.read_text()
    assert "Worse than the control: rejection_sampling (" in up
    down = _write(tmp_path, runs, metric="eval/loss", higher_is_better=False).markdown.read_text()
    assert "Lower is better. Better than the control: rejection_sampling (" in down


def test_writing_twice_gives_the_same_bytes_and_leaves_nothing_beside(tmp_path):
    first = {p.name: p.read_bytes() for p in (_write(tmp_path, results()).html.parent).iterdir()}
    _write(tmp_path, results())
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == first
    assert set(first) == {"report.md", "report.html", "report.json", "curves.png", "summary.png"}


def test_a_directory_that_cannot_be_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(WorkdirError, match="file/report"):
        _write(tmp_path / "file" / "report", results())


def test_a_failed_arm_is_failed_and_never_a_number(tmp_path):
    runs = [*results(), failed(run("bad", 0, 0.1)), run("nan", 0, 0.0), run("diverged", 0, 0.0)]
    runs[-2].metrics["eval/loss"] = math.nan
    runs[-1] = dataclasses.replace(runs[-1], run_dir="stages/rl-1")
    write_log(tmp_path / "stages/rl-1", 0, loss=math.inf)
    paths = _write(tmp_path, runs)
    rows = {row[0]: row for row in _Page(paths.html.read_text()).rows[1:8]}
    for name in ("bad", "nan", "diverged"):
        assert rows[name][1:] == ["0 of 1", "failed", *["–"] * 5], name
    text = paths.markdown.read_text()
    assert "Failed: bad, nan, diverged." in text and "bad (" not in text
    assert "diverged: eval/loss ended as nan" in text and "diverged: training loss ended as inf" in text


def test_pairs_are_tested_and_corrected_together_with_the_comparisons_to_the_control(tmp_path):
    alone = _write(tmp_path, results()).headline
    paths = _write(tmp_path, results(), pairs=(("grpo", "dpo"),))
    page = _Page(paths.html.read_text())
    row = next(row for row in page.rows if row[0] == "grpo minus dpo")
    grpo, dpo = ([r.metrics["eval/pass@1"] for r in results() if r.arm == arm] for arm in ("grpo", "dpo"))
    assert row[1:3] == ["3", f"+{100 * (sum(grpo) - sum(dpo)) / 3:.1f} pp"]
    assert [r[7] for r in paths.headline.rows] != [r[7] for r in alone.rows]  # one more test: larger p
    with pytest.raises(DataError, match="pairs: got the arm 'x', expected one of"):
        _write(tmp_path, results(), pairs=(("x", "dpo"),))
    for pair in (("dpo", "dpo"), ("dpo", "sft")):
        with pytest.raises(DataError, match=f"pairs: got 'dpo' against '{pair[1]}', expected two arms"):
            _write(tmp_path, results(), pairs=(pair,))


def test_where_runs_lie_and_what_was_read_from_disk(tmp_path):
    runs = [
        dataclasses.replace(
            r,
            run_dir=f"stages/rl-{r.arm}{r.seed}",
            stages=(
                StageUse("sft", "stages/sft-0a", 40.0, r.arm != "sft"),
                StageUse("rl", f"stages/rl-{r.arm}{r.seed}", 20.0, r.arm == "dpo"),
            ),
        )
        for r in results()
    ]
    page = _Page(_write(tmp_path, runs).html.read_text())
    assert ["dpo", "1", "rl", "stages/rl-dpo1", "read from disk"] in page.rows
    assert ["grpo", "1", "sft", "stages/sft-0a", "read from disk"] in page.rows
    budgets = {row[0]: row[-2:] for row in page.rows if len(row) == 7}
    assert budgets["sft (control)"][1] == "1 min 0 s" and "†" not in budgets["sft (control)"][0]
    assert budgets["grpo"][1] == "1 min 0 s †" and "†" not in budgets["grpo"][0]
    assert all("†" in cell for cell in budgets["dpo"])
    assert "read from disk, not run: its time was measured when it ran" in page.text


def test_a_curve_of_another_evaluation_is_dropped_with_a_note(tmp_path):
    runs = [dataclasses.replace(r, evaluation="b", curve_evaluation="b") for r in results()]
    kept = _write(tmp_path / "kept", runs).plots["curves"].read_bytes()
    runs[4] = dataclasses.replace(runs[4], curve_evaluation="a")
    paths = _write(tmp_path / "dropped", runs)
    assert (
        "rejection_sampling, seed 1: its learning curve was measured by another" in _Page(paths.html.read_text()).text
    )
    assert paths.plots["curves"].read_bytes() != kept
    runs[4] = dataclasses.replace(runs[4], evaluation="a")
    with pytest.raises(DataError, match="'rejection_sampling', seed 1 were measured by different evaluations"):
        _write(tmp_path, runs)


def test_records_that_cannot_be_read_cost_their_curves_only(tmp_path):
    runs = [dataclasses.replace(r, run_dir="stages/rl-1") for r in results()]
    (tmp_path / "stages" / "rl-1").mkdir(parents=True)
    (tmp_path / "stages" / "rl-1" / "metrics.jsonl").write_text("{\n")
    text = _Page(_write(tmp_path, runs).html.read_text()).text
    assert "dpo, seed 0: its training curves are left out" in text and "line 1: not JSON" in text


def test_a_report_is_rewritten_from_disk_by_another_metric_and_control(tmp_path):
    save_results(tmp_path / "results.json", results())
    with pytest.raises(DataError, match=r"so the metric must be given; expected one of .'eval/loss', 'eval/pass@1'"):
        rewrite_report(tmp_path)
    first = rewrite_report(tmp_path, metric="eval/loss")
    assert "Lower is better." in first.markdown.read_text()  # a loss, unless told otherwise
    write_report(results(), dataclasses.replace(SPEC, pairs=(("dpo", "grpo"),)), tmp_path)
    same = rewrite_report(tmp_path)
    text = same.markdown.read_text()
    assert "Does it pay to sample?" in text and "dpo minus grpo" in text and "c32b079" in text
    other = rewrite_report(
        tmp_path, metric="eval/loss", control="dpo", formats=("latex", "pdf"), directory=tmp_path / "x"
    )
    assert same.markdown.read_text() == text  # the report in its place is untouched
    assert [row[0] for row in other.headline.rows] == ["dpo (control)", "sft", "rejection_sampling", "grpo"]
    assert "minus" not in "".join(other.markdown.read_text().split("##")[1:3])  # the pair had the new control in it
    assert {"table.tex", "summary.pdf", "curves.pdf"} <= {path.name for path in (tmp_path / "x").iterdir()}
    assert rewrite_report(tmp_path, pairs=[]).markdown.read_text() != text
    with pytest.raises(DataError, match="pairs: got 'dpo', expected one:other with arms of"):
        rewrite_report(tmp_path, pairs=["dpo"])
