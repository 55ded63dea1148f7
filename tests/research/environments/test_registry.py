"""Tools by name."""

import sys

import pytest

from research.core.errors import ConfigError
from research.environments.base import Toolbox
from research.environments.calls import Call
from research.environments.registry import NAMES, make_tools


def test_every_name_makes_the_tool_of_that_name(tmp_path, tokenizer):
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("The sea is deep.\n\nThe fox is quick.")
    tools = make_tools(NAMES, corpus=corpus, search_results=1, isolation="best_effort")
    assert tuple(tool.name for tool in tools) == NAMES
    box = Toolbox(tools, tokenizer, max_result_tokens=60)
    calls = (
        Call("calculator", {"expression": "6*7"}),
        Call("python", {"code": "print(6*7)"}),
        Call("search", {"query": "fox"}),
    )
    assert [box.run(call).text for call in calls] == ["42", "42\n", "[2]\nThe fox is quick."]
    assert [tool.name for tool in make_tools(["calculator"])] == ["calculator"]


@pytest.mark.parametrize(
    ("names", "corpus", "message"),
    [
        (["eval"], None, "tools: got 'eval', expected one of calculator, python, search"),
        (["search"], None, "found no corpus, expected a corpus where 'search' is among the tools"),
        (["calculator"], "c.txt", "found the corpus c.txt, which no tool reads"),
    ],
)
def test_refusals(names, corpus, message):
    with pytest.raises(ConfigError, match=message):
        make_tools(names, corpus=corpus)


def test_a_missing_package_names_the_extra(monkeypatch, echo, tokenizer):
    monkeypatch.setitem(sys.modules, "jsonschema", None)
    with pytest.raises(ConfigError, match=r"jsonschema is missing; pip install 'temper\[tools\]'"):
        Toolbox([echo], tokenizer, max_result_tokens=60)
