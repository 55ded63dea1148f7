"""Constrained decoding: masks against brute force, whole completions, and constraints that cannot be met."""

import json
import re
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.core.errors import ConfigError, DataError
from research.data.tokenizer import MARKUP, Tokenizer, train_tokenizer
from research.sampling.constraints import Grammars
from research.sampling.controls import NO_CONTROLS, control_logits
from research.sampling.methods import SamplingMethod, sample_token
from research.sampling.rows import Constraint, Request, Row, choice

TEXT = 'The quick brown fox says yes, no or maybe. 12 + 34 = 46\n{"name": "Bob", "age": 3} true false null\n'
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 5}, "age": {"type": "integer", "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False},
}
regex = partial(Constraint, "regex")


def json_schema(schema: Any) -> Constraint:
    return Constraint("json_schema", schema if isinstance(schema, str) else json.dumps(schema))


@pytest.fixture(scope="module", autouse=True)
def _needs_the_extra() -> None:
    pytest.importorskip("llguidance", reason="pip install 'temper[constrained]'")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """340 pieces with byte fallback."""
    return train_tokenizer([TEXT * 3], vocab_size=340, path=tmp_path_factory.mktemp("t") / "bpe.model")


@pytest.fixture(scope="module")
def characters(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Only the characters of "abc 123", no bytes."""
    return train_tokenizer(
        ["abc 123\n"],
        vocab_size=None,
        path=tmp_path_factory.mktemp("t") / "char.model",
        model_type="char",
        byte_fallback=False,
        required_characters="",
    )


def grammars_of(tokenizer: Tokenizer, vocab_size: int | None = None) -> Grammars:
    return Grammars(tokenizer, (tokenizer.im_end_id, tokenizer.eos_id), vocab_size or tokenizer.vocab_size)


class Rows:
    """Rows by number, a token at a time."""

    def __init__(self, grammars: Grammars) -> None:
        self.grammars, self.rows = grammars, dict[int, Row]()

    def start(self, number: int, constraint: Constraint | None, new: int = 99) -> None:
        row = self.rows[number] = Row(number, Request(np.array([1]), 17, number, new, constraint))
        row.matcher = None if constraint is None else self.grammars.matcher(constraint, new)

    def advance(self, number: int, token: int) -> None:
        row = self.rows[number]
        row.tokens[row.length] = token
        row.length += 1
        self.grammars.advance(row)

    def masks(self, numbers: Sequence[int]) -> np.ndarray:
        return self.grammars.masks([self.rows.get(number) for number in numbers])


def started(grammars: Grammars, constraint: Constraint | None, text: str = "", new: int = 99) -> Rows:
    rows = Rows(grammars)
    rows.start(0, constraint, new)
    for token in grammars.tokenizer.encode(text):
        rows.advance(0, token)
    return rows


def allowed(rows: Rows, row: int = 0) -> set[int]:
    words = rows.masks([row])
    assert words.dtype == np.int32
    return set(np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")).tolist())


def brute_force(tokenizer: Tokenizer, language: list[str], text: str) -> set[int]:
    """Ids whose bytes go on to some member of the language; stop tokens after a member."""
    stops = {tokenizer.im_end_id, tokenizer.eos_id}
    found = set(stops) if text in language else set()
    for token in range(tokenizer.vocab_size):
        spelled = tokenizer.token_bytes[token]
        if spelled and any(member.encode().startswith(text.encode() + spelled) for member in language):
            found.add(token)
    return found


LANGUAGE = ["yes", "yesterday", "yak", "no", "nö", "maybe", 'q"\\/\n', "日本", "\u2581", "<pad>", "a b"]


@pytest.mark.parametrize("text", ["", "y", "n", "yes", "no"])
def test_masks_of_a_choice_equal_brute_force(tokenizer: Tokenizer, text: str) -> None:
    rows = started(grammars_of(tokenizer), choice(LANGUAGE), text)
    assert allowed(rows) == brute_force(tokenizer, LANGUAGE, text)


@pytest.mark.parametrize("text", ["", "a", "ab", "abab"])
def test_masks_of_a_regex_equal_brute_force(tokenizer: Tokenizer, text: str) -> None:
    language = [("ab" * n) + end for n in range(12) for end in ("", "a", "é", "1")]
    rows = started(grammars_of(tokenizer), regex("(ab)*[aé1]?"), text)
    assert allowed(rows) == brute_force(tokenizer, language, text)


@pytest.mark.parametrize("option", LANGUAGE)
def test_forced_text_follows_its_own_tokenization(tokenizer: Tokenizer, option: str) -> None:
    """And each option of a choice can be spelled to its end, whatever characters it has."""
    rows = started(grammars_of(tokenizer), choice([option]))
    for token in tokenizer.encode(option):
        assert allowed(rows) == {token}
        rows.advance(0, token)
    assert allowed(rows) == {tokenizer.im_end_id, tokenizer.eos_id}
    rows.advance(0, tokenizer.im_end_id)
    np.testing.assert_array_equal(rows.masks([0]), -1)


def test_markup_is_never_text(tokenizer: Tokenizer) -> None:
    """Anything goes, yet no control piece, not even where the text names one."""
    control = {token for token, text in enumerate(tokenizer.token_bytes) if not text}
    stops = {tokenizer.im_end_id, tokenizer.eos_id}
    assert {tokenizer.piece_id(name) for name in MARKUP} <= control
    grammars = grammars_of(tokenizer)
    assert allowed(started(grammars, regex(r"(?s:.*)"))) & control == stops
    assert not allowed(started(grammars, choice(["<tool_call>", "<pad>"]))) & control


def generate(tokenizer: Tokenizer, asked: list[Constraint | None], seed: int, steps: int) -> list[list[int]]:
    """Random logits through the masks: what an engine does, one step at a time."""
    V = tokenizer.vocab_size + 20
    stops = (tokenizer.im_end_id, tokenizer.eos_id)
    rows = Rows(grammars_of(tokenizer, V))
    for row, constraint in enumerate(asked):
        rows.start(row, constraint, steps)
    # Ends are likely, so that most completions close.
    logits = np.random.default_rng(seed).standard_normal((steps, len(asked), V)).astype(np.float32)
    logits[..., [*stops, *tokenizer.encode('"}]')]] += 4.0
    one = jnp.float32(1.0)

    @jax.jit
    def step(x: jax.Array, mask: jax.Array, keys: jax.Array) -> Any:
        after = control_logits(x, NO_CONTROLS, allowed=mask)
        return sample_token(x, SamplingMethod(), one, one, keys, controlled_BV=after), after

    drawn: list[list[int]] = [[] for _ in asked]
    for t in range(steps):
        keys = jax.random.split(jax.random.key(seed * 1000 + t), len(asked))
        out, after = jax.device_get(step(logits[t], rows.masks(range(len(asked))), keys))
        assert np.isfinite(out.sampler_logps).all()
        for row, token in enumerate(out.tokens.tolist()):
            if drawn[row] and drawn[row][-1] in stops:
                continue
            left = after[row].astype(np.float64)
            expected = left[token] - np.log(np.exp(left).sum())
            np.testing.assert_allclose(out.sampler_logps[row], expected, atol=1e-5)
            rows.advance(row, token)
            drawn[row].append(token)
    return drawn


def test_completions_match_or_are_reported_as_cut_off(tokenizer: Tokenizer) -> None:
    options = ["yes", "no", "maybe not"]
    asked = [json_schema(PERSON), regex(r"[a-z]{2,4}-\d+"), choice(options), None] * 8
    drawn = generate(tokenizer, asked, seed=1, steps=24)
    stops, closed = {tokenizer.im_end_id, tokenizer.eos_id}, 0
    for constraint, tokens in zip(asked, drawn, strict=True):
        if constraint is None:
            continue
        if tokens[-1] not in stops:
            assert len(tokens) == 24
            continue
        closed += 1
        text = tokenizer.decode(tokens)
        if constraint.kind == "json_schema":
            value = json.loads(text)
            assert set(value) == {"name", "age"} and len(value["name"]) <= 5
            assert isinstance(value["age"], int) and value["age"] <= 99
        elif constraint.kind == "regex":
            assert re.fullmatch(r"[a-z]{2,4}-\d+", text)
        else:
            assert text in options
    assert 12 <= closed <= 24


def test_rows_are_apart_and_can_be_refilled(tokenizer: Tokenizer) -> None:
    grammars = grammars_of(tokenizer, 400)
    rows = Rows(grammars)
    rows.start(3, choice(["ab", "ac"]))
    rows.start(5, choice(["ab", "ac"]))
    rows.start(7, None)
    a, b = tokenizer.piece_id("a"), tokenizer.piece_id("b")
    rows.advance(3, a)
    assert a not in allowed(rows, 3) and a in allowed(rows, 5)
    masks = rows.masks([7, 5, 3, 99])
    assert masks.shape == (4, 13)
    np.testing.assert_array_equal(masks[[0, 3]], -1)
    assert allowed(rows, 3) | allowed(rows, 5) <= set(range(tokenizer.vocab_size)), "no padding column"
    rows.advance(7, a)
    rows.advance(3, b)
    rows.advance(3, tokenizer.eos_id)
    np.testing.assert_array_equal(rows.masks([3]), -1)
    rows.start(3, regex("b+"))
    assert b in allowed(rows, 3) and a not in allowed(rows, 3)


@pytest.mark.parametrize(
    ("constraint", "message"),
    [
        (regex("(a"), r"regex \(a is not valid: unclosed group"),
        (regex("a(?=b)"), r"is not valid: look-around, including look-ahead and look-behind, is not supported"),
        (json_schema('{"type":'), r"json_schema .* is not valid: not JSON \(Expecting value"),
        (json_schema({"type": "strin"}), r"json_schema .* is not valid: Invalid type: strin"),
        (json_schema({"not": {"type": "null"}}), r'is not valid: Unimplemented keys: \["not"\]'),
        (
            json_schema({"type": "integer", "minimum": 5, "maximum": 3}),
            r"is not valid: Unsatisfiable schema: minimum \(5\) is greater than maximum \(3\)",
        ),
        (json_schema({"enum": []}), r"Unsatisfiable schema"),
        (regex("[a&&b]"), r"regex \[a&&b\] cannot be satisfied|is not valid"),
    ],
)
def test_invalid_constraints_are_one_sentence(tokenizer: Tokenizer, constraint: Constraint, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        started(grammars_of(tokenizer), constraint)
    assert "\n" not in str(caught.value)


def test_a_choice_that_does_not_fit(tokenizer: Tokenizer) -> None:
    grammars = grammars_of(tokenizer)
    options = ["\u2603\u2603", "\u2603\u2603\u2603"]  # three bytes each, of which none is in the corpus
    message = "shortest option '\u2603\u2603' takes at least 6 tokens and a stop token, expected .* >= 7, got 6"
    with pytest.raises(ConfigError, match=message):
        started(grammars, choice(options), new=6)
    started(grammars, choice(options), new=7)
    assert grammars._fewest_tokens("") == 0
    for text in ("yes", "The quick", "maybe \u2603"):
        assert grammars._fewest_tokens(text) <= len(tokenizer.encode(text))


def test_a_vocabulary_without_bytes(characters: Tokenizer) -> None:
    """What it cannot spell is refused at the start, or never begun, or named when a row is stuck."""
    grammars = grammars_of(characters)
    a, b, c = (characters.piece_id(name) for name in "abc")
    with pytest.raises(ConfigError, match="choice 'aé' cannot be spelled with this vocabulary of 2[0-9] pieces"):
        started(grammars, choice(["ab", "aé"]))
    with pytest.raises(ConfigError, match="regex aé cannot be satisfied: no token of this vocabulary"):
        started(grammars, regex("aé"))
    assert allowed(started(grammars, regex("(aé|b)"))) == {b}
    assert allowed(started(grammars, regex("a(éc|b)"), "a")) == {b}
    assert c in allowed(started(grammars, regex("[^ab]/?")))


@pytest.fixture(scope="module")
def json_characters(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """JSON's punctuation and a few letters, no bytes; without "-", "_" and the backslash."""
    return train_tokenizer(
        ['abcxy 0123456789 {}[]":,.eE+ true false null\n'],
        vocab_size=None,
        path=tmp_path_factory.mktemp("t") / "json.model",
        model_type="char",
        byte_fallback=False,
        required_characters="",
    )


def keys(**more: Any) -> dict[str, Any]:
    return {"type": "object", "properties": {"a": {"type": "integer"}, "x-a": {"type": "integer"}}} | more


@pytest.mark.parametrize(
    "schema",
    [
        keys(patternProperties={"^x-": {"type": "integer"}}, additionalProperties=False),
        keys(patternProperties={"^x": {"type": "integer"}}, additionalProperties=False),
        {"type": "array", "items": keys(required=["a"], additionalProperties=False), "minItems": 1},
        {"enum": ["a-b", "ab", "x_y"]},
        {"type": "string", "pattern": "^(a-|b)[xy]$"},
        {"anyOf": [{"type": "string", "format": "ipv4"}, {"type": "null"}]},
    ],
    ids=str,
)
def test_rows_never_start_towards_what_the_vocabulary_lacks(json_characters: Tokenizer, schema: dict[str, Any]) -> None:
    """Random walks through the masks end in values of the schema; none gets stuck or takes what does not match."""
    jsonschema = pytest.importorskip("jsonschema")
    grammars, rng = grammars_of(json_characters), np.random.default_rng(0)
    stops, closed = set(grammars.stop_tokens), 0
    preferred = {json_characters.piece_id(piece) for piece in '"}]:x1'} | stops
    for _ in range(30):
        rows, tokens = started(grammars, json_schema(schema)), list[int]()
        while len(tokens) < 60 and not (tokens and tokens[-1] in stops):
            options = sorted(allowed(rows))
            likely = [token for token in options if token in preferred]
            tokens.append(int(rng.choice(likely if likely and rng.random() < 0.8 else options)))
            rows.advance(0, tokens[-1])
        if tokens[-1] in stops:
            jsonschema.validate(json.loads(json_characters.decode(tokens)), schema)
            closed += 1
    assert closed > 5


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        (keys(required=["x-a"]), r'required property "x-a" cannot be spelled with this vocabulary'),
        ({"const": "a-b"}, r'const "a-b" cannot be spelled'),
        ({"items": {"enum": ["a-b", "-"]}}, r'every value of enum \["a-b","-"\] cannot be spelled'),
        ({"type": "string", "format": "date"}, r"Regex is empty"),
        ({"type": "object", "minProperties": 1}, r"minProperties: got 1, expected at most the 0 properties"),
        (
            keys(patternProperties={"^a": {"type": "integer"}, "a$": {"type": "integer"}}),
            r"patternProperty regexes .* are not disjoint",
        ),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, r"oneOf constraints are not supported"),
    ],
    ids=str,
)
def test_schemas_that_could_only_fail_later_are_refused_at_once(
    json_characters: Tokenizer, schema: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        started(grammars_of(json_characters), json_schema(schema))
    assert "\n" not in str(caught.value)


def test_a_token_that_is_not_allowed_is_named(tokenizer: Tokenizer) -> None:
    x = tokenizer.piece_id("x")
    message = rf"prompt 17, sample 0: token {x} \('x'\) is not allowed by choice .* after 'ye'"
    with pytest.raises(DataError, match=message):
        started(grammars_of(tokenizer), choice(["yes"]), "ye").advance(0, x)
    with pytest.raises(DataError, match=r"is not allowed by choice \[\"yes\"\] after 'y'"):
        started(grammars_of(tokenizer), choice(["yes"]), "y").advance(0, tokenizer.eos_id)


def test_without_the_extra(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    monkeypatch.setitem(sys.modules, "llguidance.numpy", None)
    with pytest.raises(ConfigError, match=r"pip install 'temper\[constrained\]'"):
        grammars_of(tokenizer)
