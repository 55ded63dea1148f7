"""The box answers every call with a text of bounded length, and never raises."""

import threading
import time
from dataclasses import replace

import pytest

from research.core.errors import ConfigError
from research.environments.base import Tool, ToolTimeout
from research.environments.calls import Call, CallError
from research.environments.toolbox import EMPTY, TRUNCATED, Result, Toolbox, clip_text


@pytest.fixture
def box(echo, tokenizer) -> Toolbox:
    return Toolbox([echo], tokenizer, max_result_tokens=60)


def test_a_good_call(box):
    assert box.run(Call("echo", {"word": "hi", "times": 2})) == Result("hi hi", "echo", "ok")


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (CallError("the call is odd"), "malformed", "error: the call is odd"),
        (Call("eval", {}), "unknown_tool", "error: no tool 'eval', expected one of echo"),
        (Call("echo", {}), "arguments", "error: echo: arguments: 'word' is a required property"),
        (Call("echo", {"word": 3}), "arguments", "error: echo: arguments.word: 3 is not of type 'string'"),
        (
            Call("echo", {"word": "a", "times": -1}),
            "arguments",
            "error: echo: arguments.times: -1 is less than the minimum of 0",
        ),
        (Call("echo", {"word": "no"}), "tool", "error: echo: not that word"),
        (Call("echo", {"word": "bug"}), "exception", "error: echo failed: KeyError: 'oh'"),
    ],
)
def test_errors_are_texts(box, call, error, text):
    result = box.run(call)
    assert (result.how, result.text) == (error, text)
    assert result.tool == ("echo" if isinstance(call, Call) and call.name == "echo" else "")


def test_of_several_misfits_the_same_one_is_told(box):
    texts = {box.run(Call("echo", dict([pair, ("times", "x")]))).text for pair in [("word", 1), ("word", 1)]}
    assert texts == {"error: echo: arguments.times: 'x' is not of type 'integer'"}
    unknown = box.run(Call("echo", {"word": "a", "loud": True}))
    assert unknown.how == "arguments" and "Additional properties are not al" in unknown.text


def test_a_long_wrong_value_does_not_hide_what_is_wrong(echo, tokenizer):
    box = Toolbox([echo], tokenizer, max_result_tokens=400)
    text = box.run(Call("echo", {"word": ["a" * 5000]})).text
    assert len(text) < 300 and text.endswith("is not of type 'string'")


@pytest.mark.parametrize("raised", [SystemExit(1), MemoryError(), RecursionError("deep"), TypeError()])
def test_whatever_a_tool_raises_is_text(echo, tokenizer, raised):
    def run(_):
        raise raised

    result = Toolbox([replace(echo, run=run)], tokenizer, max_result_tokens=60).run(Call("echo", {"word": ""}))
    assert result.how == "exception" and type(raised).__name__ in result.text


def test_a_tool_that_gives_no_text(echo, tokenizer):
    box = Toolbox([replace(echo, run=lambda _: 3)], tokenizer, max_result_tokens=60)
    result = box.run(Call("echo", {"word": ""}))
    assert result.how == "exception" and "gave int, expected str" in result.text
    box = Toolbox([replace(echo, run=lambda _: " \n")], tokenizer, max_result_tokens=60)
    assert box.run(Call("echo", {"word": ""})).text == EMPTY


def test_a_tool_that_hangs_is_left_behind(echo, tokenizer):
    let_go = threading.Event()

    def hang(_) -> str:
        let_go.wait(60)
        return "late"

    box = Toolbox([replace(echo, run=hang)], tokenizer, max_result_tokens=60, timeout_s=0.1)
    start = time.monotonic()
    result = box.run(Call("echo", {"word": ""}))
    let_go.set()
    assert (result.how, result.text) == ("timeout", "error: echo: took longer than 0.1 seconds")
    assert time.monotonic() - start < 10

    def own(_) -> str:
        raise ToolTimeout("stopped after 1 second")

    result = Toolbox([replace(echo, run=own)], tokenizer, max_result_tokens=60).run(Call("echo", {"word": ""}))
    assert (result.how, result.text) == ("timeout", "error: echo: stopped after 1 second")


def test_long_results_are_cut_visibly(box, tokenizer):
    result = box.run(Call("echo", {"word": "fox é", "times": 10_000}))
    assert result.how == "ok" and result.text.startswith("fox é fox é") and result.text.endswith(TRUNCATED)
    assert 50 <= len(tokenizer.encode(result.text)) <= 60
    less = box.run(Call("echo", {"word": "fox", "times": 10_000}), max_tokens=30)
    assert less.text.endswith(TRUNCATED) and 20 <= len(tokenizer.encode(less.text)) <= 30
    errors = box.run(Call("x" * 10_000, {}))
    assert len(tokenizer.encode(errors.text)) <= 60 and errors.text.endswith(TRUNCATED)


def test_every_limit_holds_for_every_text(tokenizer, characters):
    texts = ("fox é 漢字" * 30, "\n" * 100, "the quick " * 50, "a\u2581b" * 40, "\ud800 ab" * 30)
    for each in (tokenizer, characters):
        least = len(each.encode(clip_text(TRUNCATED, each, 1000)))
        for text in texts:
            whole = clip_text(text, each, 10_000)
            for limit in range(least, 80):
                clipped = clip_text(text, each, limit)
                tokens = each.encode(clipped)
                assert len(tokens) <= limit
                assert each.decode(tokens) == clipped and "\ufffd" not in clipped
                assert clipped == whole or clipped.endswith(clip_text(TRUNCATED, each, 1000))
            assert clip_text(whole, each, len(each.encode(whole))) == whole


def test_clipping_reads_only_the_beginning(tokenizer, monkeypatch):
    read = []
    encode = type(tokenizer).encode
    monkeypatch.setattr(type(tokenizer), "encode", lambda self, text: read.append(text) or encode(self, text))
    clip_text("a b " * 1_000_000, tokenizer, 50)
    assert max(map(len, read)) < 2000


def test_dropped_characters_do_not_hide_that_a_text_was_cut(characters):
    assert clip_text("é" * 5000 + "ab" * 500, characters, 60).startswith("abab")
    assert clip_text("é" * 5000 + "ab" * 500, characters, 60).endswith("[truncated]")
    assert clip_text("é" * 5000 + "ab", characters, 60) == "ab"


def test_characters_without_a_piece_are_dropped(echo, characters):
    box = Toolbox([echo], characters, max_result_tokens=100)
    assert box.run(Call("echo", {"word": "é!a"})).text == "a"
    assert box.run(Call("X'", {})).text == 'error: no tool "", expected one of echo'


def test_refusals(echo, tokenizer, characters):
    def refused(match, *tools, vocabulary=tokenizer, max_result_tokens=60):
        with pytest.raises(ConfigError, match=match):
            Toolbox(tools, vocabulary, max_result_tokens=max_result_tokens)

    refused("got echo, echo, expected tools of different", echo, echo)
    refused("the name 'a b' has other characters", replace(echo, name="a b"))
    refused(r"max_result_tokens: got 2, expected >= \d+, the tokens of '...\[truncated\]'", echo, max_result_tokens=2)
    refused("echo: parameters is not a JSON schema", replace(echo, parameters={"type": "objekt"}))
    refused("the vocabulary cannot spell a call", replace(echo, name="ECHO"), vocabulary=characters)


def test_the_system_prompt_lists_the_tools(echo, tokenizer):
    tools = [echo, Tool("b", "B.", {"type": "object"}, echo.run)]
    text = Toolbox(tools, tokenizer, max_result_tokens=60).system
    lines = text.splitlines()
    assert lines[1].startswith('{"type": "function", "function": {"name": "echo", "description": "Says a word."')
    assert lines[2] == (
        '{"type": "function", "function": {"name": "b", "description": "B.", "parameters": {"type": "object"}}}'
    )
    assert len(lines) == 4 and '{"name": ..., "arguments": {...}}' in lines[3]
