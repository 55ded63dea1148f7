"""Constrained decoding: the tokens that may come next, so that a completion matches a JSON schema, regex or choice.

Host side. llguidance (extra `constrained`) follows each row's text and gives a bit mask a step; `control_logits`
applies it. A token is allowed if its bytes can be continued to a match; where the constraint leaves one text only,
its own tokenization (`Tokenizer.encode`) is followed. Markup and other control pieces are never text. A stop token
is allowed where the text so far is a match.

Shapes: R rows, V vocabulary, W = ceil(V / 32) int32 words, bit v % 32 of word v // 32 for token v.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from research.core.errors import ConfigError, DataError
from research.data.tokenizer import Tokenizer
from research.sampling.schemas import prepare_schema

_SHOWN = 80
"""Characters of a constraint or a text that a message quotes."""


@dataclasses.dataclass(frozen=True)
class Constraint:
    """What a completion, up to its stop token, must match as a whole.

    Attributes:
      kind: what `value` is.
      value: "json_schema": a schema as JSON text; its key `x-guidance` takes llguidance's options, such as
        `{"whitespace_flexible": false}`. "regex": a pattern in the syntax of Rust's `regex`, without look-around.
        "choice": the strings to choose from.
    """

    kind: Literal["json_schema", "regex", "choice"]
    value: str | tuple[str, ...]

    def __str__(self) -> str:
        text = self.value if isinstance(self.value, str) else json.dumps(self.value, ensure_ascii=False)
        text = text.replace("\n", "\\n")
        return f"{self.kind} {text if len(text) <= _SHOWN else text[:_SHOWN] + ' ...'}"


def json_schema(schema: Mapping[str, Any] | str) -> Constraint:
    """A completion that is one JSON value of this schema."""
    return Constraint("json_schema", schema if isinstance(schema, str) else json.dumps(schema))


def regex(pattern: str) -> Constraint:
    """A completion that matches the pattern from its first to its last character."""
    return Constraint("regex", pattern)


def choice(options: Sequence[str]) -> Constraint:
    """A completion that is one of the options."""
    return Constraint("choice", tuple(options))


class Grammars:
    """Compiles constraints for one vocabulary; each distinct one once.

    Args:
      tokenizer: spells the tokens.
      stop_tokens: ids that end a completion; never part of the constrained text.
      vocab_size: V of the logits, which may have more columns than the tokenizer has pieces; those are never
        allowed. None: the tokenizer's.

    Raises:
      ConfigError: llguidance is not installed, there is no stop token, or V is smaller than the tokenizer's.
    """

    def __init__(self, tokenizer: Tokenizer, stop_tokens: Sequence[int], vocab_size: int | None = None) -> None:
        self.llguidance = _import_llguidance()
        self.tokenizer = tokenizer
        self.vocab_size = tokenizer.vocab_size if vocab_size is None else vocab_size
        self.stop_tokens = tuple(stop_tokens)
        if self.vocab_size < tokenizer.vocab_size:
            raise ConfigError(
                f"constraint: the logits have {self.vocab_size} columns, "
                f"expected at least the tokenizer's {tokenizer.vocab_size}."
            )
        if not self.stop_tokens or not all(0 <= token < tokenizer.vocab_size for token in self.stop_tokens):
            raise ConfigError(
                f"constraint: got stop tokens {list(self.stop_tokens)}, expected at least one of the tokenizer's "
                f"{tokenizer.vocab_size} ids, because a constrained completion ends with one."
            )
        vocabulary = _Vocabulary(tokenizer, self.stop_tokens)
        self._pieces = {
            text for token, text in enumerate(vocabulary.tokens) if token not in vocabulary.special_token_ids
        }
        self._longest = max(map(len, self._pieces), default=0)
        self._alphabet = _alphabet(self._pieces)
        self._ll_tokenizer = self.llguidance.LLTokenizer(vocabulary, eos_token=list(self.stop_tokens))
        self._compiled: dict[Constraint, Any] = {}

    def matcher(self, constraint: Constraint, max_new_tokens: int | None = None) -> Any:
        """A fresh llguidance matcher.

        Args:
          constraint: what to follow.
          max_new_tokens: the completion's bound; checked where the shortest match is known (a choice).

        Raises:
          ConfigError: the constraint is invalid, or nothing that this vocabulary spells satisfies it.
        """
        if constraint.kind == "choice":
            self._check_options(constraint, max_new_tokens)
        if constraint not in self._compiled:
            self._compiled[constraint] = self._compile(constraint)
        return self._compiled[constraint].deep_copy()

    def _compile(self, constraint: Constraint) -> Any:
        matcher = self._matcher(self._grammar(constraint))
        if matcher.is_error():
            raise ConfigError(f"constraint: {constraint} is not valid: {_reason(matcher.get_error())}.")
        probe = matcher.deep_copy()
        probe.compute_bitmask()
        if probe.is_error():
            raise ConfigError(
                f"constraint: {constraint} cannot be satisfied: no token of this vocabulary of "
                f"{self.tokenizer.vocab_size} pieces can begin a match."
            )
        return matcher

    def _matcher(self, grammar: str) -> Any:
        limits = self.llguidance.LLParserLimits(verbose_errors=False)
        return self.llguidance.LLMatcher(self._ll_tokenizer, grammar, log_level=0, limits=limits)

    def _grammar(self, constraint: Constraint) -> str:
        compiler, value = self.llguidance.LLMatcher, constraint.value
        if constraint.kind == "choice":
            return compiler.grammar_from_lark("start: " + " | ".join(map(json.dumps, value)))
        if not isinstance(value, str):
            raise ConfigError(f"constraint: {constraint.kind} got {type(value).__name__}, expected a string.")
        if constraint.kind == "json_schema":
            try:
                schema = json.loads(value)
            except (ValueError, RecursionError) as error:
                raise ConfigError(f"constraint: {constraint} is not valid: not JSON ({error}).") from error
            prepared = prepare_schema(
                schema,
                spells=lambda text: self._fewest_tokens(text) is not None,
                satisfiable=lambda part: (
                    not self._matcher(compiler.grammar_from_json_schema(json.dumps(part))).is_error()
                ),
                alphabet=self._alphabet,
            )
            # Text that the schema forces is not tokenized by the vocabulary's own rules where it may not spell it:
            # llguidance then skips what is missing, and allows tokens that do not match.
            forcing = json.dumps({"no_forcing": self._alphabet is not None})
            return compiler.grammar_from_lark(f"%llguidance {forcing}\nstart: %json {json.dumps(prepared)}")
        if self._alphabet is None:
            return compiler.grammar_from_regex(value)
        # A match may need a character that no piece spells; without it in the grammar no row starts towards it.
        pattern = self.llguidance.regex_to_lark(value, "")
        return compiler.grammar_from_lark(f"start: TEXT\nTEXT: /{pattern}/ & /{self._alphabet}/")

    def _check_options(self, constraint: Constraint, max_new_tokens: int | None) -> None:
        options = constraint.value
        if isinstance(options, str) or not options or not all(isinstance(o, str) for o in options):
            raise ConfigError(f"constraint: {constraint.kind} got {options!r}, expected strings to choose from.")
        lengths: dict[str, int] = {}
        for option in options:
            fewest = self._fewest_tokens(option)
            if fewest is None:
                raise ConfigError(
                    f"constraint: choice {option!r} cannot be spelled with this vocabulary of "
                    f"{self.tokenizer.vocab_size} pieces, which has no byte fallback."
                )
            lengths[option] = fewest
        option = min(lengths, key=lengths.__getitem__)
        least = lengths[option]
        if max_new_tokens is not None and least + 1 > max_new_tokens:
            raise ConfigError(
                f"constraint: choice cannot be satisfied: its shortest option {option!r} takes at least {least} "
                f"tokens and a stop token, expected max_new_tokens >= {least + 1}, got {max_new_tokens}."
            )

    def _fewest_tokens(self, text: str) -> int | None:
        """Fewest tokens that spell the text; None if none do."""
        spelled = text.encode()
        fewest: list[int | None] = [0]
        for end in range(1, len(spelled) + 1):
            starts = range(max(0, end - self._longest), end)
            steps = [
                before + 1
                for start in starts
                if (before := fewest[start]) is not None and spelled[start:end] in self._pieces
            ]
            fewest.append(min(steps, default=None))
        return fewest[-1]


@dataclasses.dataclass
class _Row:
    """One row's progress: `ended` once a stop token closed a match."""

    name: str
    constraint: Constraint
    matcher: Any
    tokens: list[int] = dataclasses.field(default_factory=list)
    ended: bool = False


class ConstraintRows:
    """The constraints of the rows in flight, keyed by the caller's row (slot) number.

    Per step: `masks` for the rows to draw, then `advance` with each drawn token. A row that was not started, was
    started without a constraint, or has ended, is free: its mask allows all.
    """

    def __init__(self, grammars: Grammars) -> None:
        self._grammars = grammars
        self._executor = grammars.llguidance.LLExecutor()
        self._rows: dict[int, _Row] = {}
        self._stops = set(grammars.stop_tokens)

    def start(self, row: int, constraint: Constraint | None, *, name: str, max_new_tokens: int | None = None) -> None:
        """Puts a new completion into a row, in place of what was there.

        Args:
          row: the caller's number.
          constraint: None for a free row.
          name: of the row in messages, such as "prompt 17".
          max_new_tokens: see `Grammars.matcher`.

        Raises:
          ConfigError: see `Grammars.matcher`.
        """
        self._rows.pop(row, None)
        if constraint is not None:
            matcher = self._grammars.matcher(constraint, max_new_tokens)
            self._rows[row] = _Row(name, constraint, matcher)

    def masks(self, rows: Sequence[int]) -> np.ndarray:
        """Allowed next tokens, int32 `[R, W]`; at least one bit a row is set.

        Raises:
          DataError: a row is stuck: it has not matched, and no token leads on.
        """
        grammars = self._grammars
        inside = np.zeros((len(rows), -(-grammars.tokenizer.vocab_size // 32)), np.int32)
        live = [(row, i) for i, number in enumerate(rows) if (row := self._live(number))]
        jobs = [(row.matcher, i) for row, i in live]
        if jobs:
            grammars.llguidance.numpy.fill_next_token_bitmask_par(self._executor, jobs, inside)
        for row, _ in live:
            self._refuse_stuck(row)
        masks = np.zeros((len(rows), -(-grammars.vocab_size // 32)), np.int32)
        masks[:, : inside.shape[1]] = inside
        free = np.ones(len(rows), bool)
        free[[i for _, i in live]] = False
        masks[free] = -1
        return masks

    def advance(self, row: int, token: int) -> None:
        """Appends a drawn token to a row; nothing happens in a free one.

        Raises:
          DataError: the row's constraint does not allow the token here.
        """
        live = self._live(row)
        if live is None:
            return
        if token in self._stops:
            allowed = live.ended = live.matcher.is_accepting()
        else:
            allowed = live.matcher.consume_token(token)
        if not allowed:
            raise DataError(
                f"{live.name}: token {token} ({self._grammars.tokenizer.pieces[token]!r}) is not allowed by "
                f"{live.constraint} after {self._text(live)!r}."
            )
        live.tokens.append(token)

    def satisfied(self, row: int) -> bool:
        """Whether a stop token closed a match; False for a completion that `max_new_tokens` cut off.

        True in a row that was started without a constraint.
        """
        return row not in self._rows or self._rows[row].ended

    def _live(self, number: int) -> _Row | None:
        row = self._rows.get(number)
        return None if row is None or row.ended else row

    def _text(self, row: _Row) -> str:
        return self._grammars.tokenizer.decode(row.tokens, show_markup=True)[-_SHOWN:]

    def _refuse_stuck(self, row: _Row) -> None:
        # llguidance then allows the stop tokens, although the text is no match.
        if row.matcher.is_error():
            reason = _reason(row.matcher.get_error())
            if reason.startswith("NoExtension"):
                reason = "this vocabulary cannot spell what the constraint requires next"
            raise DataError(f"{row.name}: no token is allowed by {row.constraint} after {self._text(row)!r}: {reason}.")


class _Vocabulary:
    """What llguidance asks of a tokenizer (the attributes' names are its own)."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, stop_tokens: tuple[int, ...]) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id = stop_tokens[0]
        spelled = tokenizer.token_bytes
        self.tokens = [text or piece.encode() for text, piece in zip(spelled, tokenizer.pieces, strict=True)]
        control = {token for token, text in enumerate(spelled) if not text}
        self.special_token_ids = sorted(control | set(stop_tokens))
        self._stops = set(stop_tokens)
        # The byte piece <0x0A> spells a newline too.
        self._others = {text: token for token, text in enumerate(spelled) if text and token not in self._stops}

    def __call__(self, text: str) -> list[int]:
        """The tokens of a forced text; none where the vocabulary does not spell it.

        A stop token may be text, such as a newline: other pieces then spell it, as far as there are any.
        """
        try:
            ids = self._tokenizer.encode(text)
        except DataError:
            return []
        kept: list[int] = []
        for token in ids:
            if token not in self._stops:
                kept.append(token)
            elif (other := self._others.get(self.tokens[token])) is not None:
                kept.append(other)
            else:
                break
        return kept


def _import_llguidance() -> Any:
    try:
        import llguidance.numpy
    except ImportError as error:
        raise ConfigError(
            "constraint: constrained decoding needs the package llguidance: pip install 'temper[constrained]'."
        ) from error
    return llguidance


def _alphabet(pieces: set[bytes]) -> str | None:
    """A regex of the texts that one-character pieces spell; None where bytes are pieces and spell all."""
    if all(bytes([byte]) in pieces for byte in range(0x80, 0x100)):
        return None
    characters = sorted({character for piece in pieces for character in piece.decode()})
    single = [character for character in characters if character.encode() in pieces]
    return "[" + "".join(f"\\x{{{ord(character):x}}}" for character in single) + "]*"


def _reason(error: str) -> str:
    """The sentence in an llguidance message, without its position marks and the repeated grammar."""
    lines = [line.strip() for line in error.split("<state>")[0].splitlines() if line.strip()]
    said = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    reason = said[0] if said else lines[0].split("): ", 1)[-1]
    return reason.removeprefix("failed to compile JSON schema: ").rstrip(".:")
