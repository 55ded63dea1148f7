"""Rows with tools are the very tokens of training data; limits end them; threads change no order."""

import json
import threading
import time
from dataclasses import replace

import numpy as np
import pytest

from research.core.errors import ConfigError, DataError
from research.data.chat import Message, render_messages, render_prompt
from research.data.tokenizer import MARKUP
from research.environments.base import TRUNCATED, Toolbox
from research.environments.calculator import calculator
from research.environments.calls import Call, call_text
from research.environments.turns import Advance, RowTurns, TurnLimits, Turns, turn_metrics

LIMITS = TurnLimits(max_turns=3, max_calls_per_turn=2, max_new_tokens=1000, min_answer_tokens=4)
USER = Message("user", "six by seven")


@pytest.fixture
def box(echo, tokenizer) -> Toolbox:
    return Toolbox([echo, calculator()], tokenizer, max_result_tokens=60)


@pytest.fixture
def turns(box) -> Turns:
    return Turns(box, LIMITS)


def said(tokenizer, *calls, content="", thinking="", end=True):
    """Tokens that a model samples for one turn."""
    texts = tuple(call if isinstance(call, str) else call_text(call) for call in calls)
    turn = (USER, Message("assistant", content, thinking, texts))
    start = len(render_prompt(turn[:1], tokenizer))
    tokens = render_messages(turn, tokenizer, where="r").tokens[start:].tolist()
    return tokens if end else tokens[:-1]


def times(a, b):
    return Call("calculator", {"expression": f"{a}*{b}"})


def one(turns, state, tokens) -> Advance:
    (advance,) = turns.step([(state, tokens)])
    return advance


def results(forced, tokenizer):
    text = tokenizer.decode(forced, show_markup=True)
    return [part.split("</tool_result>")[0] for part in text.split("<tool_result>")[1:]]


@pytest.mark.parametrize("vocabulary", ["tokenizer", "characters"])
def test_a_whole_dialogue_is_the_training_data(vocabulary, echo, request):
    tokenizer = request.getfixturevalue(vocabulary)
    turns = Turns(Toolbox([echo], tokenizer, max_result_tokens=100), LIMITS)
    first = [Call("echo", {"word": "fox"}), Call("echo", {"word": "dog"})]
    second = [Call("echo", {"word": "no"})]
    dialogue = (
        Message("system", "a tool closes it"),
        Message("user", "jumps over"),
        Message("assistant", "let me see", "two calls", tuple(map(call_text, first))),
        Message("tool", "fox"),
        Message("tool", "dog"),
        Message("assistant", "", "", tuple(map(call_text, second))),
        Message("tool", "error: echo: not that word"),
        Message("assistant", "the fox"),
    )
    state, row, mask = RowTurns(), [], []
    for sampled in (
        said(tokenizer, *first, content="let me see", thinking="two calls"),
        said(tokenizer, *second),
        said(tokenizer, content="the fox"),
    ):
        row += sampled
        mask += [True] * len(sampled)
        advance = one(turns, state, row)
        row += advance.forced
        mask += [False] * len(advance.forced)
        state = advance.state
    assert advance.finish == state.finish == "answered" and advance.forced == ()
    prompt = render_prompt(dialogue[:2], tokenizer)
    rendered = render_messages(dialogue, tokenizer, where="r")
    np.testing.assert_array_equal([*prompt, *row], rendered.tokens)
    np.testing.assert_array_equal(mask, rendered.loss_mask[len(prompt) :])
    assert state.turns == 2 and state.forced_tokens == mask.count(False)
    assert state.calls == (("echo", "ok"), ("echo", "ok"), ("echo", "tool"))


def test_a_row_that_has_not_ended_its_turn_goes_on(turns, tokenizer):
    row = said(tokenizer, times(6, 7))
    for end in range(len(row)):
        assert one(turns, RowTurns(), row[:end]) == Advance(RowTurns())
    advance = one(turns, RowTurns(), row)
    assert results(advance.forced, tokenizer) == ["42"] and advance.finish is None
    fed = row + list(advance.forced)
    for end in range(len(row), len(fed) + 1):  # while it is fed what it was handed
        assert one(turns, advance.state, fed[:end]) == Advance(advance.state)
    assert one(turns, advance.state, [*fed, turns.stop_id]).finish == "answered"


def test_the_sampler_stops_where_a_turn_ends(turns, tokenizer):
    assert turns.stop_id == tokenizer.im_end_id
    row = said(tokenizer, content="hi")
    with pytest.raises(ValueError, match="2 tokens follow the end of a turn"):
        one(turns, RowTurns(), [*row, 5, 6])
    ended = one(turns, RowTurns(), row).state
    with pytest.raises(ValueError, match=r"the row has ended \(answered\)"):
        one(turns, ended, row)


def test_numpy_tokens_and_lists_are_one(turns, tokenizer):
    row = said(tokenizer, times(6, 7))
    advance = one(turns, RowTurns(), np.asarray(row, np.int32))
    assert advance == one(turns, RowTurns(), row)
    json.dumps([advance.state.record(), advance.forced])


def test_errors_are_fed_back(turns, tokenizer):
    row = said(tokenizer, "not JSON", Call("eval", {}))
    advance = one(turns, RowTurns(), row)
    texts = results(advance.forced, tokenizer)
    assert texts[0].startswith("error: the call is not valid JSON")
    assert texts[1].startswith("error: no tool 'eval'")
    assert advance.finish is None and advance.state.calls == (("", "malformed"), ("", "unknown_tool"))


def test_calls_beyond_the_limit_of_a_turn_are_not_run(turns, tokenizer):
    advance = one(turns, RowTurns(), said(tokenizer, *(times(n, 1) for n in range(4))))
    assert results(advance.forced, tokenizer) == [
        "0",
        "1",
        *["error: not run: at most 2 calls in one turn"] * 2,
    ]
    assert advance.state.calls[2:] == (("", "too_many"),) * 2


def test_turn_limit(box, tokenizer):
    turns = Turns(box, replace(LIMITS, max_turns=2))
    state, row = RowTurns(), []
    for _ in range(2):
        row += said(tokenizer, times(6, 7))
        advance = one(turns, state, row)
        assert advance.forced and advance.finish is None
        row, state = row + list(advance.forced), advance.state
    advance = one(turns, state, row + said(tokenizer, times(6, 7)))
    assert advance == Advance(replace(state, finish="turn_limit"), (), "turn_limit")
    assert one(turns, state, row + said(tokenizer, content="42")).finish == "answered"


def test_the_budget_shortens_results_and_then_ends_the_row(echo, tokenizer):
    runs = []
    counted = replace(echo, run=lambda arguments: runs.append(1) or echo.run(arguments))
    box = Toolbox([counted], tokenizer, max_result_tokens=60)
    row = said(tokenizer, *[Call("echo", {"word": "fox", "times": 500})] * 2)
    seen = set()
    for budget in range(len(row) + 1, len(row) + 250):
        runs.clear()
        advance = one(Turns(box, replace(LIMITS, max_new_tokens=budget)), RowTurns(), row)
        left = budget - len(row) - len(advance.forced)
        if advance.finish:
            assert advance.finish == "no_room" and not runs, "no tool runs for nothing"
            assert advance.forced == () and advance.state.calls == ()
        else:
            texts = results(advance.forced, tokenizer)
            assert left >= LIMITS.min_answer_tokens and len(runs) == 2
            assert all(text.endswith(TRUNCATED) and len(tokenizer.encode(text)) <= 60 for text in texts)
        seen.add((advance.finish, len(advance.forced)))
    lengths = sorted(length for finish, length in seen if finish is None)
    assert ("no_room", 0) in seen and len(lengths) > 20, "from barely a mark up to the limit of a result"
    assert lengths[-1] - lengths[0] > 60


def test_results_of_many_rows_are_in_order_whoever_is_first(echo, tokenizer):
    def slow(arguments):
        time.sleep(0.002 * (arguments["times"] % 7))
        return f"{arguments['word']} {arguments['times']}"

    box = Toolbox([replace(echo, run=slow)], tokenizer, max_result_tokens=60)
    plain = said(tokenizer, content="hi", end=False)
    rows = []
    for n in range(12):
        calls = [Call("echo", {"word": word, "times": n}) for word in ("a", "b")[: 1 + n % 2]]
        rows.append((RowTurns(), said(tokenizer, *calls) if n % 3 else plain))
    serial = Turns(box, LIMITS, workers=1).step(rows)
    assert Turns(box, LIMITS, workers=8).step(rows) == serial
    assert [len(advance.state.calls) for advance in serial] == [
        0 if n % 3 == 0 else 1 + n % 2 for n in range(12)
    ]
    assert results(serial[7].forced, tokenizer) == ["a 7", "b 7"]
    # Nor does a row's answer depend on who is asked with it.
    assert [one(Turns(box, LIMITS), *row) for row in rows] == serial
    assert Turns(box, LIMITS).step([]) == []


def test_workers_run_at_once(echo, tokenizer):
    together = threading.Barrier(4)

    def wait(_):
        together.wait(60)  # for all four
        return "x"

    box = Toolbox([replace(echo, run=wait)], tokenizer, max_result_tokens=60, timeout_s=90)
    rows = [(RowTurns(), said(tokenizer, Call("echo", {"word": "a"})))] * 4
    assert all(
        advance.state.calls == (("echo", "ok"),) for advance in Turns(box, LIMITS, workers=4).step(rows)
    )


def test_state_survives_json(turns, tokenizer):
    row = said(tokenizer, times(6, 7), "odd")
    state = one(turns, RowTurns(), row).state
    ended = one(turns, RowTurns(), said(tokenizer, content="hi")).state
    for each in (RowTurns(), state, ended):
        assert RowTurns.restored(json.loads(json.dumps(each.record()))) == each
    assert state.turns == 1 and state.calls and state.forced_tokens and state.turn_start > len(row)


def test_random_tokens_never_raise(turns, tokenizer):
    """Whatever a policy samples, the markup above all, is answered."""
    rng = np.random.default_rng(0)
    markup = [tokenizer.piece_id(piece) for piece in MARKUP if tokenizer.piece_id(piece) != turns.stop_id]
    parts = [
        *([token] for token in markup),
        *(tokenizer.encode(text) for text in ('{"name": "x', '"}', "[", "é")),
    ]
    finishes = set()
    for _ in range(300):
        row = [
            token for index in rng.integers(0, len(parts), size=rng.integers(0, 12)) for token in parts[index]
        ]
        advance = one(
            turns,
            RowTurns(),
            [*row, int(rng.integers(turns.stop_id + 1, tokenizer.vocab_size)), turns.stop_id],
        )
        finishes.add(advance.finish)
        assert (advance.finish is None) == bool(advance.forced)
    assert finishes == {None, "answered"}


def test_metrics():
    rows = [
        RowTurns(
            turns=2,
            forced_tokens=10,
            calls=(("echo", "ok"), ("echo", "tool"), ("", "malformed")),
            finish="answered",
        ),
        RowTurns(turns=1, forced_tokens=20, calls=(("calculator", "ok"),), finish="no_room"),
        RowTurns(),
        RowTurns(finish="turn_limit"),
    ]
    assert turn_metrics(rows) == {
        "tools/turns": 0.75,
        "tools/calls": 1.0,
        "tools/forced_tokens": 7.5,
        "tools/error_rate": 0.5,
        "tools/none/calls": 0.25,
        "tools/none/error_rate": 1.0,
        "tools/calculator/calls": 0.25,
        "tools/calculator/error_rate": 0.0,
        "tools/echo/calls": 0.5,
        "tools/echo/error_rate": 0.5,
        "tools/errors/malformed": 1.0,
        "tools/errors/tool": 1.0,
        "tools/frac_answered": 0.25,
        "tools/frac_turn_limit": 0.25,
        "tools/frac_no_room": 0.25,
    }
    assert turn_metrics(rows[2:3])["tools/error_rate"] == 0.0
    with pytest.raises(DataError, match="got no rows"):
        turn_metrics([])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_turns": 0}, "tools: max_turns: got 0, expected >= 1"),
        ({"max_calls_per_turn": 0}, "max_calls_per_turn: got 0"),
        ({"min_answer_tokens": 0}, "min_answer_tokens: got 0"),
        (
            {"min_answer_tokens": 1000},
            r"min_answer_tokens: got 1000, expected less than max_new_tokens \(1000\)",
        ),
    ],
)
def test_limits_out_of_range(changes, message, box):
    with pytest.raises(ConfigError, match=message):
        replace(LIMITS, **changes)
    with pytest.raises(ConfigError, match="workers: got 0"):
        Turns(box, LIMITS, workers=0)
