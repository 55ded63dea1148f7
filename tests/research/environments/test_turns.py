"""Rows with tools are the very tokens of training data; limits end them; threads change no order."""

import threading
import time
from dataclasses import replace

import numpy as np
import pytest

from research.data.chat import Message, render_messages, render_prompt
from research.data.tokenizer import MARKUP
from research.environments.base import Completion, Turn
from research.environments.calculator import calculator
from research.environments.calls import Call
from research.environments.toolbox import TRUNCATED, Toolbox
from research.environments.turns import Advance, RowTurns, Turns, turn_metrics
from tests.research.environments.conftest import call_text

LIMITS = {"max_turns": 3, "max_new_tokens": 1000}
USER = Message("user", "six by seven")


@pytest.fixture
def box(echo, tokenizer) -> Toolbox:
    return Toolbox([echo, calculator()], tokenizer, max_result_tokens=60)


class Episodes:
    """The tools of one box, for every row."""

    def __init__(self, box, **how):
        self.tools, self.turns = box, Turns(box.tokenizer, **{**LIMITS, **how})
        self.stop_id = self.turns.stop_id

    def step(self, rows):
        return self.turns.step([(self.tools, state, tokens) for state, tokens in rows])


@pytest.fixture
def turns(box) -> Episodes:
    return Episodes(box)


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
    turns = Episodes(Toolbox([echo], tokenizer, max_result_tokens=100))
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
    assert state.finish == "answered" and advance.forced == ()
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
    assert results(advance.forced, tokenizer) == ["42"] and advance.state.finish is None
    fed = row + list(advance.forced)
    for end in range(len(row), len(fed) + 1):  # while it is fed what it was handed
        assert one(turns, advance.state, fed[:end]) == Advance(advance.state)
    assert one(turns, advance.state, [*fed, turns.stop_id]).state.finish == "answered"


def test_numpy_tokens_and_lists_are_one(turns, tokenizer):
    row = said(tokenizer, times(6, 7))
    advance = one(turns, RowTurns(), np.asarray(row, np.int32))
    assert advance == one(turns, RowTurns(), row)


def test_errors_are_fed_back(turns, tokenizer):
    row = said(tokenizer, "not JSON", Call("eval", {}))
    advance = one(turns, RowTurns(), row)
    texts = results(advance.forced, tokenizer)
    assert texts[0].startswith("error: the call is not valid JSON")
    assert texts[1].startswith("error: no tool 'eval'")
    assert advance.state.finish is None and advance.state.calls == (("", "malformed"), ("", "unknown_tool"))


def test_calls_beyond_the_limit_of_a_turn_are_not_run(turns, tokenizer):
    advance = one(turns, RowTurns(), said(tokenizer, *(times(n, 1) for n in range(6))))
    assert results(advance.forced, tokenizer) == [
        "0",
        "1",
        "2",
        "3",
        *["error: not run: at most 4 calls in one turn"] * 2,
    ]
    assert advance.state.calls[4:] == (("", "too_many"),) * 2


def test_turn_limit(box, tokenizer):
    turns = Episodes(box, max_turns=2)
    state, row = RowTurns(), []
    for _ in range(2):
        row += said(tokenizer, times(6, 7))
        advance = one(turns, state, row)
        assert advance.forced and advance.state.finish is None
        row, state = row + list(advance.forced), advance.state
    advance = one(turns, state, row + said(tokenizer, times(6, 7)))
    assert advance == Advance(replace(state, finish="turn_limit"))
    assert one(turns, state, row + said(tokenizer, content="42")).state.finish == "answered"


def test_the_budget_shortens_results_and_then_ends_the_row(echo, tokenizer):
    runs = []
    counted = replace(echo, run=lambda arguments: runs.append(1) or echo.run(arguments))
    box = Toolbox([counted], tokenizer, max_result_tokens=60)
    row = said(tokenizer, *[Call("echo", {"word": "fox", "times": 500})] * 2)
    seen = set()
    for budget in range(len(row) + 1, len(row) + 250):
        runs.clear()
        advance = one(Episodes(box, max_new_tokens=budget), RowTurns(), row)
        left = budget - len(row) - len(advance.forced)
        if advance.state.finish:
            assert advance.state.finish == "no_room" and not runs, "no tool runs for nothing"
            assert advance.forced == () and advance.state.calls == ()
        else:
            texts = results(advance.forced, tokenizer)
            assert left >= 1 and len(runs) == 2
            assert all(text.endswith(TRUNCATED) and len(tokenizer.encode(text)) <= 60 for text in texts)
        seen.add((advance.state.finish, len(advance.forced)))
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
    serial = Episodes(box, workers=1).step(rows)
    assert Episodes(box, workers=8).step(rows) == serial
    assert [len(advance.state.calls) for advance in serial] == [0 if n % 3 == 0 else 1 + n % 2 for n in range(12)]
    assert results(serial[7].forced, tokenizer) == ["a 7", "b 7"]
    # Nor does a row's answer depend on who is asked with it.
    assert [one(Episodes(box), *row) for row in rows] == serial
    assert Episodes(box).step([]) == []


def test_workers_run_at_once(echo, tokenizer):
    together = threading.Barrier(4)

    def wait(_):
        together.wait(60)  # for all four
        return "x"

    box = Toolbox([replace(echo, run=wait)], tokenizer, max_result_tokens=60, timeout_s=90)
    rows = [(RowTurns(), said(tokenizer, Call("echo", {"word": "a"})))] * 4
    assert all(advance.state.calls == (("echo", "ok"),) for advance in Episodes(box, workers=4).step(rows))


def test_random_tokens_never_raise(turns, tokenizer):
    """Whatever a policy samples, the markup above all, is answered."""
    rng = np.random.default_rng(0)
    markup = [tokenizer.piece_id(piece) for piece in MARKUP if tokenizer.piece_id(piece) != turns.stop_id]
    parts = [*([token] for token in markup), *(tokenizer.encode(text) for text in ('{"name": "x', '"}', "[", "é"))]
    finishes = set()
    for _ in range(300):
        row = [token for index in rng.integers(0, len(parts), size=rng.integers(0, 12)) for token in parts[index]]
        advance = one(
            turns, RowTurns(), [*row, int(rng.integers(turns.stop_id + 1, tokenizer.vocab_size)), turns.stop_id]
        )
        finishes.add(advance.state.finish)
        assert (advance.state.finish is None) == bool(advance.forced)
    assert finishes == {None, "answered"}


def test_the_budget_is_of_the_whole_row_not_of_its_last_turn(echo, tokenizer):
    box = Toolbox([echo], tokenizer, max_result_tokens=60)
    turn = said(tokenizer, Call("echo", {"word": "fox", "times": 500}))
    first = one(Episodes(box), RowTurns(), turn)
    row = [*turn, *first.forced, *turn]
    for left in (0, 5, 20, 40, 200):  # after two turns and the first result
        budget = len(row) + 1 + left
        second = one(Episodes(box, max_new_tokens=budget), first.state, row)
        assert len(second.forced) <= left
        assert (second.state.finish is None) == bool(second.forced)
    assert len(second.forced) > 60


class Guess:
    """Says higher or lower until its number is found; remembers what it was asked."""

    def reset(self, record, seed):
        self.number, self.asked = record["number"] + seed, []
        return [Message("user", "guess")]

    def step(self, completion: Completion) -> Turn:
        self.asked.append((completion.text, completion.room))
        if completion.text == str(self.number):
            return Turn(done=True, reward=1.0, info={"guesses": 1})
        hint = "higher" if int(completion.text) < self.number else "lower"
        return Turn([Message("user", hint)], reward=-0.25, info={"guesses": 1})


def test_an_environment_of_ones_own_answers_in_turn_and_gives_rewards(tokenizer):
    games = [Guess(), Guess()]
    for game in games:
        game.reset({"number": 2}, 3)
    turns = Turns(tokenizer, **{**LIMITS, "max_turns": 1, "max_new_tokens": 100})
    row = said(tokenizer, content="4")
    first = turns.step([(game, RowTurns(), row) for game in games])[0]
    assert tokenizer.decode(first.forced, show_markup=True) == (
        "<|im_start|>user<|im_sep|>higher<|im_end|><|im_start|>assistant<|im_sep|>"
    )
    row = [*row, *first.forced]
    right, wrong = turns.step(
        [(game, first.state, row + said(tokenizer, content=text)) for game, text in zip(games, "56", strict=True)]
    )
    assert (right.state.finish, right.state.reward) == ("answered", 0.75)
    assert (wrong.state.finish, wrong.state.reward, wrong.forced) == ("turn_limit", -0.5, ())
    assert not right.state.cut and wrong.state.cut
    assert games[0].asked == [("4", 100 - len(said(tokenizer, content="4")) - 1), ("5", 0)]
    metrics = turn_metrics([right.state, wrong.state])
    assert metrics["environment/reward"] == 0.125 and metrics["environment/guesses"] == 2.0
    tight = Turns(tokenizer, **{**LIMITS, "max_new_tokens": len(first.forced) + 2})
    (cut,) = tight.step([(games[0], RowTurns(), said(tokenizer, content="4"))])
    assert cut.state.finish == "no_room" and cut.forced == ()


def test_metrics():
    rows = [
        RowTurns(
            turns=2, forced_tokens=10, calls=(("echo", "ok"), ("echo", "tool"), ("", "malformed")), finish="answered"
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
