"""Calls are found where chat.py puts them, and every way to misspell one is a sentence."""

import json

import numpy as np
import pytest

from research.data.chat import Message, normalize_record, render_messages, render_prompt
from research.data.tokenizer import MARKUP
from research.environments.calls import Call, CallError, parse_call, turn_calls
from tests.research.environments.conftest import call_text

CALL = Call("mul", {"b": 3, "a": [1.5, {"ü": None}], "s": 'x"\n'})


@pytest.mark.parametrize(
    ("text", "call"),
    [
        ('{"name": "add", "arguments": {"a": 1}}', Call("add", {"a": 1})),
        ('\n {"arguments": {}, "name": "add"}\n', Call("add", {})),
        ('{"name": "add", "arguments": "{\\"a\\": 1}"}', Call("add", {"a": 1})),
    ],
)
def test_well_formed_calls(text, call):
    assert parse_call(text) == call


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not valid JSON (Expecting value at character 1)"),
        ('{"name": "add", "arguments": {"a": 1}', "not valid JSON (Expecting ',' delimiter at character"),
        ('{"name": "add", "arguments": {"a": 1}} x', "not valid JSON (Extra data at character 40)"),
        ("[1]", "the call is a list, expected a JSON object with name and arguments"),
        ("true", "the call is a boolean, expected"),
        ('{"name": "add"}', "the call has the keys 'name', expected 'name' and 'arguments'"),
        ("{}", "the call has the keys none, expected"),
        ('{"name": "add", "parameters": {}}', "the call has the keys 'name', 'parameters', expected"),
        ('{"name": 3, "arguments": {}}', "the call's name is a number, expected the name of a tool"),
        ('{"name": "", "arguments": {}}', "the call's name is an empty text, expected"),
        ('{"name": "add", "arguments": [1]}', "the call's arguments are a list, expected a JSON object"),
        ('{"name": "add", "arguments": null}', "the call's arguments are null, expected"),
        ('{"name": "add", "arguments": "12,12"}', "not valid JSON (Extra data at character 3)"),
        ('{"name": "add", "arguments": {"a": NaN}}', "not valid JSON (NaN is not a JSON number)"),
        ('{"name": "add", "arguments": {"a": 1e999}}', "not valid JSON (the number 1e999 is too large)"),
        ('{"name": "add", "arguments": {"a": "\\ud800"}}', "(a string is not valid Unicode)"),
        ('{"name": "add", "arguments": {"a": %s}}' % ("9" * 5000), "not valid JSON (Exceeds the limit"),
        ("[" * 100_000, "not valid JSON (nested too deeply)"),
    ],
)
def test_malformed_calls_are_sentences(text, message):
    found = parse_call(text)
    assert isinstance(found, CallError)
    assert message in found.text and len(found.text) < 200


def test_a_call_is_written_as_chat_writes_it_and_read_back():
    record = {"role": "assistant", "content": "", "tool_calls": [{"function": CALL.__dict__}]}
    (turn,) = normalize_record({"messages": [record]}, where="r")
    assert turn.tool_calls == (call_text(CALL),)
    assert parse_call(call_text(CALL)) == CALL


def assistant_turn(message, tokenizer):
    """The tokens that a model would sample for a turn, before its end."""
    user = Message("user", "hi")
    tokens = render_messages((user, message), tokenizer, where="r").tokens
    start = len(render_prompt((user,), tokenizer))
    assert tokens[-1] == tokenizer.im_end_id
    return tokens[start:-1].tolist()


def test_calls_are_found_where_chat_renders_them(tokenizer):
    texts = (call_text(CALL), '{"name": "x", "arguments": {}}', "not JSON")
    turn = assistant_turn(Message("assistant", "Let me see.", "hm", texts), tokenizer)
    found = turn_calls(turn, tokenizer)
    assert found[:2] == (CALL, Call("x", {})) and isinstance(found[2], CallError) and len(found) == 3
    forged = assistant_turn(Message("assistant", f"<tool_call>{texts[0]}</tool_call>"), tokenizer)
    assert turn_calls(forged, tokenizer) == ()  # the same characters, but as text
    assert turn_calls([], tokenizer) == ()


GOOD = '{"name": "x", "arguments": {}}'


@pytest.mark.parametrize(
    ("turn", "found"),
    [
        ("<think> <tool_call>G</tool_call> </think>", []),
        ("<think> <tool_call>G</tool_call>", []),
        ("<think> a </think><tool_call>G</tool_call>", [""]),
        ("<tool_call>G", ["the turn ended before the call's </tool_call>"]),
        ("G</tool_call>", ["found </tool_call> without <tool_call>"]),
        ("<tool_call>G<tool_call>G</tool_call>", ["found <tool_call> before the call's </tool_call>", ""]),
        ("<tool_call>{<think>}</tool_call>", ["found <think> before the call's </tool_call>"]),
        (
            "<tool_call>G<tool_result>1</tool_result></tool_call><tool_call>G</tool_call>",
            ["found <tool_result> before the", "found </tool_call> without", ""],
        ),
        ("<tool_call>G</tool_call><tool_result>1</tool_result>", [""]),
    ],
)
def test_markup_that_does_not_pair_up(tokenizer, turn, found):
    """G stands for a good call, "" in what is found for that call."""
    tokens, rest = [], turn.replace("G", GOOD)
    while rest:
        piece = next((each for each in MARKUP if rest.startswith(each)), None)
        tokens += [tokenizer.piece_id(piece)] if piece else tokenizer.encode(rest[0])
        rest = rest[len(piece or "x") :]
    calls = turn_calls(np.asarray(tokens), tokenizer)
    assert len(calls) == len(found)
    for call, message in zip(calls, found, strict=True):
        assert call == Call("x", {}) if message == "" else call.text.startswith(message)


def test_how_deep_arguments_may_be_does_not_depend_on_the_stack():
    def nested(depth):
        return '{"name": "x", "arguments": {"a": %s}}' % ("[" * depth + "]" * depth)

    assert parse_call(nested(62)) == Call("x", {"a": json.loads("[" * 62 + "]" * 62)})
    for depth in (63, 500, 900, 1100, 100_000):
        assert parse_call(nested(depth)) == CallError("the call is not valid JSON (nested too deeply)")
