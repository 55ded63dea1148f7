"""Rows that pause for tools: what they are given, who is asked, and that it fits what the engine keeps room for."""

from collections.abc import Callable

import numpy as np
import pytest

from research.data.chat import Message, render_messages, render_prompt
from research.data.tokenizer import Tokenizer, train_tokenizer
from research.environments.base import Environment
from research.environments.calculator import calculator
from research.environments.calls import Call
from research.environments.toolbox import Toolbox
from research.environments.turns import Turns
from research.sampling.callbacks import StopStrings, ToolCallback
from research.sampling.rows import ForceTokens, Request, Row, StopRow
from tests.research.environments.conftest import call_text

USER = (Message("user", "six by seven"),)
N = 1200


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return train_tokenizer(
        ["six by seven is 42\n" * 20], vocab_size=300, path=tmp_path_factory.mktemp("t") / "small.model"
    )


@pytest.fixture
def turns(tokenizer: Tokenizer) -> Turns:
    return Turns(tokenizer, 2, N)


def begin(tokenizer: Tokenizer) -> Callable[[int], Environment]:
    pytest.importorskip("jsonschema", reason="pip install 'temper[tools]'")
    tools = Toolbox([calculator()], tokenizer, max_result_tokens=30)
    return lambda _: tools


def row_of(number: int, tokens: list[int], *, stopped: bool) -> Row:
    row = Row(number, Request(np.array([1]), 0, number, N))
    row.tokens[: len(tokens)], row.mask[: len(tokens)] = tokens, True
    row.length, row.stopped = len(tokens), stopped
    return row


def said(tokenizer: Tokenizer, *expressions: str, text: str = "") -> list[int]:
    calls = tuple(call_text(Call("calculator", {"expression": each})) for each in expressions)
    turn = (*USER, Message("assistant", text, "", calls))
    return render_messages(turn, tokenizer, where="r").tokens[len(render_prompt(USER, tokenizer)) :].tolist()


def test_a_paused_row_is_given_its_result_and_the_next_turn(tokenizer: Tokenizer, turns: Turns) -> None:
    callback = ToolCallback(turns, begin(tokenizer))
    first = said(tokenizer, "6*7")
    rows = [
        row_of(0, first, stopped=True),
        row_of(1, said(tokenizer, text="42"), stopped=True),
        row_of(2, first[:3], stopped=False),
    ]
    found = callback(rows)
    assert set(found) == {0} and isinstance(found[0], ForceTokens)
    given = list(found[0].tokens)
    shown = tokenizer.decode(given, show_markup=True)
    assert shown == ("<|im_start|>tool<|im_sep|><tool_result>42</tool_result><|im_end|><|im_start|>assistant<|im_sep|>")
    assert callback.states[1].finish == "answered" and callback.states[0].turns == 1
    whole = first + given
    assert callback([row_of(0, whole[:-2], stopped=False)]) == {}, "it has not yet been fed all of it"
    assert isinstance(callback([row_of(0, whole + first, stopped=True)])[0], ForceTokens)
    assert callback([row_of(0, whole + first + given + first, stopped=True)]) == {}
    assert callback.states[0].finish == "turn_limit"


def test_a_row_that_a_stop_string_ends_is_not_asked(tokenizer: Tokenizer, turns: Turns) -> None:
    callback = ToolCallback(turns, begin(tokenizer), StopStrings(tokenizer.token_bytes, ("6*",)))
    found = callback([row_of(0, said(tokenizer, "6*7"), stopped=True)])
    assert isinstance(found[0], StopRow) and callback.states == {}
