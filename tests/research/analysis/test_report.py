"""The report: says what it must, shows hostile text as text, and the HTML needs nothing from outside."""

import dataclasses
from html.parser import HTMLParser

import pytest
from markdown_it import MarkdownIt

from research.analysis.config_diff import config_differences, flatten_config
from research.analysis.report import write_report
from research.core.errors import DataError, WorkdirError
from tests.research.analysis.made_up import ARMS, BASE_CONFIG, failed, results, run


def _write(directory, runs, **changes):
    arguments = {
        "title": "Which objective?",
        "question": "Does it pay to sample?",
        "metric": "eval/pass@1",
        "control": "sft",
        "base_config_text": BASE_CONFIG,
        "versions": {"python": "3.11.7", "jax": "0.10.2", "git revision": "c32b079"},
    }
    return write_report(runs, directory=directory, **{**arguments, **changes})


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
    assert page.tags.count("img") == 4
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
            "rejection_sampling", "seed 1 failed", "loss is NaN at step 120 | see <log>",
            "runs/rejection_sampling/1", "rollout.group_size", "tokens sampled", "FLOPs",
            "git revision", "c32b079", "samples_per_prompt: 1",
        ):  # fmt: skip
            assert part in text, part
    for name in ("bars", "curves", "tokens", "summary"):
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


def test_an_undeclared_difference_stands_out(tmp_path):
    runs = [run("sft", 0, 0.4), dataclasses.replace(run("dpo", 0, 0.5), overrides={"objective.name": "dpo"})]
    text = _write(tmp_path, runs).markdown.read_text()
    assert "| dpo | `objective.beta` | `0.0` | `0.1` | **no** |" in text
    assert "| dpo | `objective.name` | `sft` | `dpo` | yes |" in text


def test_hostile_text_stays_text(tmp_path):
    bad = "<script>alert(1)</script> | *x* `y` _z_ ![p](http://evil/p.png)\nsecond line"
    runs = [run("sft", 0, 0.4), failed(run("dpo", 0, 0.5), error=bad)]
    paths = _write(
        tmp_path, runs, title=bad, question=bad, base_config_text=f"```\n{bad}", versions={bad: bad}
    )
    page = _Page(paths.html.read_text())
    assert "script" not in page.tags and page.tags.count("img") == 4
    cells = [cell.strip() for row in page.rows for cell in row]
    assert cells.count(" ".join(bad.split())) == 3  # the error, and the version's name and value


@pytest.mark.parametrize(
    ("metric", "percent", "shown"),
    [("eval/loss", None, "**2.6**"), ("eval/pass@1", None, "**40.0%**"), ("eval/pass@1", False, "**0.4**")],
)
def test_percent_only_for_proportions(tmp_path, metric, percent, shown):
    paths = _write(tmp_path, [run("sft", 0, 0.4)], metric=metric, percent=percent)
    assert shown in paths.markdown.read_text()


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
    assert set(first) == {"report.md", "report.html", "bars.png", "curves.png", "tokens.png", "summary.png"}


def test_a_directory_that_cannot_be_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(WorkdirError, match="file/report: cannot be written"):
        _write(tmp_path / "file" / "report", results())
