"""A frozen SentencePiece tokenizer whose markup can never be produced by text."""

import hashlib
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import sentencepiece

from research.core.errors import DataError
from research.core.files import make_folder, write_bytes_atomic
from research.data.jsonl import reading

PAD, BOS, EOS, UNK = "<pad>", "<bos>", "<eos>", "<unk>"
IM_START, IM_SEP, IM_END = "<|im_start|>", "<|im_sep|>", "<|im_end|>"
THINK, END_THINK = "<think>", "</think>"
TOOL_CALL, END_TOOL_CALL = "<tool_call>", "</tool_call>"
TOOL_RESULT, END_TOOL_RESULT = "<tool_result>", "</tool_result>"
_SPECIAL = {"pad": PAD, "bos": BOS, "eos": EOS, "unk": UNK}
MARKUP = (*(IM_START, IM_SEP, IM_END, THINK, END_THINK), *(TOOL_CALL, END_TOOL_CALL, TOOL_RESULT, END_TOOL_RESULT))

# SentencePiece writes a space as this character inside its pieces, so a literal one must travel as bytes.
_SPACE = "\u2581"
_MAX_LINES = 200_000  # of a training corpus
_SENTENCE_CHARACTERS = 2000  # a longer line is cut for training only: BPE training is superlinear in it


def _id_of(name: str) -> "cached_property[int]":
    """The id of a piece, as a property."""

    def read(tokenizer: "Tokenizer") -> int:
        return tokenizer.piece_id(name)

    return cached_property(read)


@dataclass(frozen=True)
class Tokenizer:
    """Text to token ids and back: `decode(encode(text)) == text` for every string with byte fallback.

    Markup pieces (`<|im_start|>` ...) are control symbols. `encode` treats the same characters in a text as
    ordinary characters; only `piece_id` gives a markup id. A newline is always one piece of its own, so that
    a line (a reasoning step) ends at a token boundary. Digits are single pieces.
    """

    model: bytes = field(repr=False)

    @cached_property
    def _processor(self) -> sentencepiece.SentencePieceProcessor:
        return sentencepiece.SentencePieceProcessor(model_proto=self.model)

    @cached_property
    def token_bytes(self) -> tuple[bytes, ...]:
        """The UTF-8 bytes that each id stands for; empty for control symbols."""

        def spelled(token: int, piece: str) -> bytes:
            if self._processor.is_control(token) or self._processor.is_unknown(token):
                return b""
            if self._processor.is_byte(token):
                return bytes([int(piece[3:5], 16)])
            return piece.replace(_SPACE, " ").encode()

        return tuple(spelled(token, piece) for token, piece in enumerate(self.pieces))

    @cached_property
    def markup_bytes(self) -> tuple[bytes, ...]:
        """`token_bytes`, with the names of control symbols as their bytes."""
        return tuple(text or piece.encode() for text, piece in zip(self.token_bytes, self.pieces, strict=True))

    @cached_property
    def _space_ids(self) -> tuple[int, ...] | None:
        """The ids that spell U+2581 itself; None where the vocabulary has no bytes."""
        if not self._processor.is_byte(self._processor.piece_to_id("<0x00>")):
            return None
        return tuple(self.piece_id(f"<0x{byte:02X}>") for byte in _SPACE.encode())

    @cached_property
    def pieces(self) -> tuple[str, ...]:
        """All pieces in the order of their ids."""
        return tuple(self._processor.id_to_piece(list(range(self.vocab_size))))

    @property
    def vocab_size(self) -> int:
        """Number of pieces."""
        return int(self._processor.vocab_size())

    def piece_id(self, name: str) -> int:
        """The id of a piece, markup included; DataError if the vocabulary has no such piece."""
        token = int(self._processor.piece_to_id(name))
        if token == self._processor.unk_id() and name != UNK:
            raise DataError(f"tokenizer: the vocabulary of {self.vocab_size} pieces has no piece {name!r}.")
        return token

    pad_id = _id_of(PAD)  # fills rows; never a target
    bos_id = _id_of(BOS)  # stands once at the start of each document or conversation
    eos_id = _id_of(EOS)  # ends a document of raw text
    im_start_id = _id_of(IM_START)  # opens a turn
    im_sep_id = _id_of(IM_SEP)  # separates a turn's role from its content
    im_end_id = _id_of(IM_END)  # ends a turn; what the sampler stops at

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without BOS or EOS; never a markup id.

        Raises:
            DataError: the vocabulary has no byte fallback and lacks a character of the text.
        """
        if _SPACE in text and self._space_ids is not None:
            first, *rest = (self.encode(part) for part in text.split(_SPACE))
            return [*first, *(token for part in rest for token in (*self._space_ids, *part))]
        try:
            text.encode()  # SentencePiece's own complaint about a lone surrogate is not readable
        except UnicodeEncodeError as error:
            raise DataError(f"tokenizer: {text[:40]!r} is not valid Unicode ({error.reason}).") from error
        ids: list[int] = self._processor.encode(text)
        if self._space_ids is None:
            self._refuse_unknown(text, ids)
        return ids

    def _refuse_unknown(self, text: str, ids: list[int]) -> None:
        if _SPACE in text or self._processor.unk_id() in ids:
            known = set(self.pieces) - {_SPACE} | {" "}
            missing = next((character for character in text if character not in known), _SPACE)
            raise DataError(
                f"tokenizer: character {missing!r} is not in this vocabulary of {self.vocab_size} pieces, "
                "which has no byte fallback."
            )

    def decode(self, ids: Sequence[int], *, show_markup: bool = False) -> str:
        """Text of ids; markup, BOS, EOS and padding vanish unless `show_markup`."""
        table = self.markup_bytes if show_markup else self.token_bytes
        return b"".join(table[token] for token in ids).decode("utf-8", errors="replace")

    def save(self, path: str | Path) -> None:
        """Writes the model; see `write_bytes_atomic`."""
        make_folder(Path(path).parent)
        write_bytes_atomic(path, self.model)

    @cached_property
    def sha256(self) -> str:
        """Of the model: equal tokenizers have equal ones."""
        return hashlib.sha256(self.model).hexdigest()


def load_tokenizer(path: str | Path, *, sha256: str = "") -> Tokenizer:
    """Loads a SentencePiece model written by `train_tokenizer`, whose hash begins with `sha256`.

    Raises:
        DataError: the file is missing or damaged, is no such model, or lacks the markup.
    """
    path = Path(path)
    with reading(path, "the tokenizer cannot be read"):
        tokenizer = Tokenizer(path.read_bytes())
    if not tokenizer.sha256.startswith(sha256):
        raise DataError(f"{path}: is damaged, its hash is not {sha256}; delete it, or restore it.")
    try:
        # SentencePiece loads an empty file, and then logs an error for every question about it.
        pieces = tokenizer.pieces if tokenizer.model else ()
        missing = [name for name in (PAD, BOS, EOS, *MARKUP) if name not in pieces]
        if pieces and not missing:
            _ = tokenizer.token_bytes  # damage inside a piece shows here
    except (RuntimeError, ValueError) as error:
        raise DataError(f"{path}: is not a SentencePiece model, or is damaged.") from error
    if not pieces:
        raise DataError(f"{path}: holds no pieces, expected a SentencePiece model.")
    if missing:
        raise DataError(f"{path}: its {len(pieces)} pieces lack the markup {' '.join(missing)}.")
    return tokenizer


def train_tokenizer(
    texts: Iterable[str],
    *,
    vocab_size: int | None,
    path: str | Path | None = None,
    model_type: Literal["bpe", "unigram", "char"] = "bpe",
    byte_fallback: bool = True,
    required_characters: str = "0123456789",
) -> Tokenizer:
    """Trains a tokenizer deterministically, writes it to `path`, if given, and returns it.

    Args:
        texts: the corpus; only its first `_MAX_LINES` lines are read.
        vocab_size: number of pieces, markup and the 256 byte pieces included. None (with "char" only): as
            many as the corpus has characters.
        path: where the model goes.
        model_type: "char" with `byte_fallback=False` gives a pure character vocabulary.
        byte_fallback: rare characters go as bytes; without it, encoding one that has no piece raises.
        required_characters: get a piece even where the corpus lacks them.

    Raises:
        DataError: the corpus is empty, or the vocabulary is too small or too large for it.
    """
    if vocab_size is None and model_type != "char":
        raise DataError(f"tokenizer: vocab_size must be given for model_type {model_type!r}.")
    sentences = list(islice(_sentences(texts), _MAX_LINES))
    if not any(sentence.strip() for sentence in sentences):
        raise DataError("tokenizer: its training corpus is empty.")
    special: dict[str, Any] = {f"{name}_id": number for number, name in enumerate(_SPECIAL)}
    special |= {f"{name}_piece": piece for name, piece in _SPECIAL.items()}
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=model,
            model_type=model_type,
            vocab_size=vocab_size or 1_000_000,
            hard_vocab_limit=vocab_size is not None,
            character_coverage=1.0 if model_type == "char" else 0.9995,
            byte_fallback=byte_fallback,
            required_chars=required_characters,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            split_digits=True,
            max_sentence_length=16 * _SENTENCE_CHARACTERS,
            control_symbols=list(MARKUP),
            user_defined_symbols=["\n"],
            **special,
            num_threads=1,
            shuffle_input_sentence=False,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise DataError(_vocabulary_message(vocab_size, str(error))) from error
    tokenizer = Tokenizer(model.getvalue())
    if path is not None:
        tokenizer.save(path)
    return tokenizer


def _sentences(texts: Iterable[str]) -> Iterator[str]:
    """Lines, their line break kept, cut where they are very long."""
    for text in texts:
        for line in text.replace(_SPACE, "").split("\n"):
            for start in range(0, len(line), _SENTENCE_CHARACTERS):
                yield line[start : start + _SENTENCE_CHARACTERS]


def _vocabulary_message(vocab_size: int | None, error: str) -> str:
    small = re.search(r"smaller than required_chars\. \d+ vs (\d+)", error)
    large = re.search(r"too high \(\d+\)\. Please set it to a value <= (\d+)", error)
    found = f"tokenizer: vocab_size {vocab_size} is too"
    if small:
        return f"{found} small for the characters of this corpus, expected at least {small.group(1)}."
    if large:
        return f"{found} large for this corpus, expected at most {large.group(1)}."
    return f"tokenizer: could not be trained ({error.strip()})."
