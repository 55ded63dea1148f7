"""Constrained decoding: the tokens that may come next, so that a completion matches a JSON schema, regex or choice.

Host side. llguidance (extra `constrained`) follows each row's text and gives a bit mask a step; `control_logits`
applies it. A token is allowed if its bytes can be continued to a match; where the constraint leaves one text only,
its own tokenization (`Tokenizer.encode`) is followed. Markup and other control pieces are never text. A stop token
is allowed where the text so far is a match.

Shapes: R rows, V vocabulary, W = ceil(V / 32) int32 words, bit v % 32 of word v // 32 for token v.
"""

import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from research.core.errors import ConfigError, DataError
from research.data.tokenizer import Tokenizer
from research.sampling.rows import SHOWN, Constraint, Row
from research.sampling.schemas import prepare_schema


class Grammars:
    """Compiles constraints for one vocabulary; each distinct one once.

    Args:
      tokenizer: spells the tokens.
      stop_tokens: control pieces that end a completion.
      vocab_size: V of the logits, which may have more columns than the tokenizer has pieces; those are never allowed.

    Raises:
      ConfigError: llguidance is not installed.
    """

    def __init__(self, tokenizer: Tokenizer, stop_tokens: Sequence[int], vocab_size: int) -> None:
        try:
            import llguidance.numpy
        except ImportError as error:
            raise ConfigError(
                "constraint: constrained decoding needs the package llguidance: pip install 'temper[constrained]'."
            ) from error
        self.llguidance: Any = llguidance
        self.tokenizer, self.stop_tokens, self.vocab_size = tokenizer, tuple(stop_tokens), vocab_size
        self._pieces = {text for text in tokenizer.token_bytes if text}
        self._longest = max(map(len, self._pieces), default=0)
        self._alphabet = _alphabet(self._pieces)
        vocabulary = _Vocabulary(tokenizer, self.stop_tokens, vocab_size)
        self._ll_tokenizer = self.llguidance.LLTokenizer(vocabulary, eos_token=list(stop_tokens))
        self._executor = self.llguidance.LLExecutor()
        self._compiled: dict[Constraint, Any] = {}

    def matcher(self, constraint: Constraint, max_new_tokens: int) -> Any:
        """A fresh llguidance matcher.

        Raises:
          ConfigError: the constraint is invalid, nothing that this vocabulary spells satisfies it, or a choice has no
            option that `max_new_tokens` hold.
        """
        if constraint.kind == "choice":
            self._check_options(json.loads(constraint.value), max_new_tokens)
        if constraint not in self._compiled:
            self._compiled[constraint] = self._compile(constraint)
        return self._compiled[constraint].deep_copy()

    def masks(self, rows: Sequence[Row | None]) -> np.ndarray:
        """Allowed next tokens, int32 `[R, W]`: all of them where nothing is followed, and at least one.

        Raises:
          DataError: a row is stuck: it has not matched, and no token leads on.
        """
        masks = self.llguidance.numpy.allocate_token_bitmask(len(rows), self.vocab_size)
        live = [(row, i) for i, row in enumerate(rows) if row is not None and row.matcher is not None]
        if live:
            jobs = [(row.matcher, i) for row, i in live]
            self.llguidance.numpy.fill_next_token_bitmask_par(self._executor, jobs, masks)
        for row, _ in live:
            # llguidance allows the stop tokens in a row that is stuck, although its text is no match.
            if row.matcher.is_error():
                reason = _reason(row.matcher.get_error())
                if reason.startswith("NoExtension"):
                    reason = "this vocabulary cannot spell what the constraint requires next"
                text, asked = self._shown(row.tokens[: row.length].tolist()), row.request
                raise DataError(f"{asked}: no token is allowed by {asked.constraint} after {text}: {reason}.")
        return masks

    def advance(self, row: Row) -> None:
        """Tells a row's matcher the last token; a stop token ends what it follows.

        Raises:
          DataError: the row's constraint does not allow the token here.
        """
        if row.matcher is None:
            return
        *before, token = row.tokens[: row.length].tolist()
        stops = token in self.stop_tokens
        if not (row.matcher.is_accepting() if stops else row.matcher.consume_token(token)):
            raise DataError(
                f"{row.request}: token {token} ({self.tokenizer.pieces[token]!r}) is not allowed by "
                f"{row.request.constraint} after {self._shown(before)}."
            )
        if stops:
            row.matcher = None

    def _shown(self, tokens: Sequence[int]) -> str:
        return repr(self.tokenizer.decode(tokens, show_markup=True)[-SHOWN:])

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
            return compiler.grammar_from_lark("start: " + " | ".join(map(json.dumps, json.loads(value))))
        if constraint.kind == "regex":
            if self._alphabet is None:
                return compiler.grammar_from_regex(value)
            # A match may need a character that no piece spells; without it in the grammar no row starts towards it.
            pattern = self.llguidance.regex_to_lark(value, "")
            return compiler.grammar_from_lark(f"start: TEXT\nTEXT: /{pattern}/ & /{self._alphabet}/")
        try:
            schema = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"constraint: {constraint} is not valid: not JSON ({error}).") from error

        def satisfiable(part: Any) -> bool:
            return not self._matcher(compiler.grammar_from_json_schema(json.dumps(part))).is_error()

        def spells(text: str) -> bool:
            return self._fewest_tokens(text) < math.inf

        prepared = prepare_schema(schema, spells=spells, satisfiable=satisfiable, alphabet=self._alphabet)
        # Text that the schema forces is not tokenized by the vocabulary's own rules where it may not spell it:
        # llguidance then skips what is missing, and allows tokens that do not match.
        forcing = json.dumps({"no_forcing": self._alphabet is not None})
        return compiler.grammar_from_lark(f"%llguidance {forcing}\nstart: %json {json.dumps(prepared)}")

    def _check_options(self, options: Sequence[str], max_new_tokens: int) -> None:
        lengths = {option: self._fewest_tokens(option) for option in options}
        for option, length in lengths.items():
            if length == math.inf:
                raise ConfigError(
                    f"constraint: choice {option!r} cannot be spelled with this vocabulary of "
                    f"{self.tokenizer.vocab_size} pieces, which has no byte fallback."
                )
        option, least = min(lengths.items(), key=lambda item: item[1])
        if least + 1 > max_new_tokens:
            raise ConfigError(
                f"constraint: choice cannot be satisfied: its shortest option {option!r} takes at least {least:g} "
                f"tokens and a stop token, expected max_new_tokens >= {least + 1:g}, got {max_new_tokens}."
            )

    def _fewest_tokens(self, text: str) -> float:
        """Fewest tokens that spell the text; infinity if none do."""
        spelled, fewest = text.encode(), [0.0]
        for end in range(1, len(spelled) + 1):
            starts = range(max(0, end - self._longest), end)
            fewest.append(min((fewest[i] + 1 for i in starts if spelled[i:end] in self._pieces), default=math.inf))
        return fewest[-1]


class _Vocabulary:
    """What llguidance asks of a tokenizer (the attributes' names are its own)."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, stop_tokens: tuple[int, ...], vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id = stop_tokens[0]
        spelled = tokenizer.token_bytes
        self.tokens = [text or piece.encode() for text, piece in zip(spelled, tokenizer.pieces, strict=True)]
        unused = range(tokenizer.vocab_size, vocab_size)
        self.tokens += [f"<unused {token}>".encode() for token in unused]
        self.special_token_ids = [*(token for token, text in enumerate(spelled) if not text), *unused]

    def __call__(self, text: str) -> list[int]:
        """The tokens of a forced text; none where the vocabulary does not spell it."""
        try:
            return self._tokenizer.encode(text)
        except DataError:
            return []


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
