"""One prompt after another: all samples of a prompt drawn together, and their texts as they come.

Shapes: T tokens, S samples of a prompt.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import jax
import numpy as np

from models.config import ModelConfig
from models.logprobs import token_logps
from models.transformer import Params
from research.core.errors import ConfigError
from research.data.chat import Message, render_prompt
from research.data.tokenizer import IM_END, Tokenizer
from research.environments.base import tool_schema_text
from research.environments.turns import Turns
from research.sampling.constraints import Constraint, Grammars
from research.sampling.controls import make_controls
from research.sampling.engine import End, Engine, Request, Row
from research.sampling.methods import SamplingMethod
from research.sampling.speculative import Draft, SpeculativeStats, sample_speculative
from research.sampling.stop_strings import StopLook
from research.sampling.tool_turns import ToolLook, most_given
from research.sampling.types import STOPPED, EngineSpec, Prompts, SamplerScalars, SamplerSpec


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a session draws.

    Attributes:
      samples: S, completions of each prompt.
      max_new_tokens: of a completion, results of tools included.
      raw: continue texts as they are, without chat markup.
      temperature: 0 is greedy.
      top_k: 0 keeps all tokens.
      top_p: 1 keeps all tokens.
      seed: of the sampler.
      stops: strings that end a completion.
      logit_bias: token id to what is added to its logit.
      repetition_penalty: 1 is off.
      min_new_tokens: tokens before an end token may be drawn.
      constraint: what completions must match.
      slots: rows decoded together; 0 is all samples.
      chunk: decode steps between two pieces of text.
    """

    samples: int = 1
    max_new_tokens: int = 128
    raw: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stops: tuple[str, ...] = ()
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
    repetition_penalty: float = 1.0
    min_new_tokens: int = 0
    constraint: Constraint | None = None
    slots: int = 0
    chunk: int = 1

    @property
    def method(self) -> SamplingMethod:
        """The static part of the distribution drawn from."""
        return SamplingMethod(self.temperature == 0, self.top_k, self.top_p < 1.0)


_WIDTH = 32
"""Prompts are padded to multiples of it: one compiled program for many lengths."""


class Piece(NamedTuple):
    """Some more of a sample.

    Attributes:
      sample: which, from 0.
      text: what is new; may be empty.
      row: the whole sample, once it has ended.
    """

    sample: int
    text: str
    row: Row | None


class Session:
    """A policy that answers prompts."""

    def __init__(
        self,
        params: Params,
        model: ModelConfig,
        tokenizer: Tokenizer,
        *,
        max_length: int,
        settings: Settings,
        turns: Turns | None = None,
        draft: Draft | None = None,
    ) -> None:
        """Lays the parameters out for decoding, once for all prompts.

        Args:
          params: the policy's.
          model: its static description.
          tokenizer: the one it was trained with.
          max_length: tokens that it can read, prompt and completion together.
          settings: how to draw.
          turns: answers tool calls, its `max_new_tokens` the settings'; None for a model without tools.
          draft: proposes tokens; samples then come whole, and nothing but `stops` may control them.

        Raises:
          ConfigError: a setting is out of range, or a constraint cannot be met.
        """
        self.params, self.model, self.tokenizer = params, model, tokenizer
        self.max_length, self.settings, self.turns = max_length, settings, turns
        how = settings
        ends = (tokenizer.eos_id,) if how.raw else (tokenizer.im_end_id, tokenizer.eos_id)
        grammars = None
        if how.constraint is not None:
            grammars = Grammars(tokenizer, ends, model.vocab_size)
            grammars.matcher(
                how.constraint, how.max_new_tokens
            )  # refuses what cannot be met, before any prompt
        spec, controls = make_controls(
            model.vocab_size,
            stop_tokens=ends,
            max_new_tokens=how.max_new_tokens,
            logit_bias=how.logit_bias,
            repetition_penalty=how.repetition_penalty,
            min_new_tokens=how.min_new_tokens,
            constrained=grammars is not None,
        )
        self._new_look()  # refuses empty stop strings
        self.engine = Engine(
            params,
            SamplerScalars(
                np.int32(how.seed), np.int32(0), np.float32(how.temperature or 1.0), np.float32(how.top_p)
            ),
            config=model,
            spec=SamplerSpec(
                max_new_tokens=how.max_new_tokens,
                samples_per_prompt=1,
                stop_tokens=ends,
                pad_id=tokenizer.pad_id,
                method=how.method,
                controls=spec,
                # The samples of a prompt share its prefill: more than one row at a time would only be padding.
                engine=EngineSpec(
                    slots=how.slots or how.samples,
                    chunk=how.chunk,
                    admit=1,
                    give=0 if turns is None else most_given(turns),
                ),
            ),
            controls=controls if spec.any else None,
            grammars=grammars,
        )
        self.draft = None if draft is None else draft.laid_out(self.engine.spec.weights)
        self.proposals = None if draft is None else SpeculativeStats.zero()

    def prompt(self, text: str) -> np.ndarray:
        """The tokens `[T]` that ask for a completion of a text.

        Raises:
          ConfigError: they and a completion are more than the model can read.
          DataError: the vocabulary cannot spell the text.
        """
        if self.settings.raw:
            tokens = np.array([self.tokenizer.bos_id, *self.tokenizer.encode(text)], np.int32)
        else:
            tools = () if self.turns is None else tuple(self.turns.toolbox.tools.values())
            system = [Message("system", tool_schema_text(tools))] if tools else []
            tokens = render_prompt([*system, Message("user", text)], self.tokenizer)
        limit = self.max_length - self.settings.max_new_tokens
        if len(tokens) > limit:
            tools_too = "" if self.turns is None else " with the description of the tools"
            raise ConfigError(
                f"--prompt: has {len(tokens)} tokens{tools_too}, expected at most {limit} "
                f"because the context is {self.max_length} and --max_new_tokens={self.settings.max_new_tokens}"
            )
        return tokens

    def draw(self, prompt: np.ndarray, prompt_id: int) -> Iterator[Piece]:
        """Pieces of all samples of a prompt as they are drawn, in any order of the samples.

        Args:
          prompt: `[T]` tokens, from `prompt`.
          prompt_id: keys the randomness.
        """
        if self.draft is not None:
            yield from self._draw_speculative(prompt, prompt_id, self.draft)
            return
        how = self.settings
        requests = [
            Request(prompt, prompt_id, sample, how.max_new_tokens, how.constraint)
            for sample in range(how.samples)
        ]
        texts = self._new_look()
        look = texts if self.turns is None else ToolLook(self.turns, texts)
        for rows, ended in self.engine.chunks(requests, look):
            done = {row.number for row in ended}
            for row in rows:
                over = row.number in done
                yield Piece(row.number, texts.take(row.number, ended=over), row if over else None)

    def _draw_speculative(self, prompt: np.ndarray, prompt_id: int, draft: Draft) -> Iterator[Piece]:
        how, engine = self.settings, self.engine
        width = -(-prompt.size // _WIDTH) * _WIDTH
        tokens, mask = np.zeros((1, width), np.int32), np.zeros((1, width), bool)
        tokens[0, width - prompt.size :], mask[0, width - prompt.size :] = prompt, True
        out, stats = jax.device_get(
            sample_speculative(
                engine.params,
                draft.params,
                Prompts(tokens, mask, np.array([prompt_id], np.int32)),
                engine.scalars,
                config=self.model,
                spec=dataclasses.replace(engine.spec, engine=None, samples_per_prompt=how.samples),
                speculative=draft.spec,
            )
        )
        self.proposals = jax.tree.map(np.add, self.proposals, stats)
        look = self._new_look()
        for sample in range(how.samples):
            row = Row(sample, Request(prompt, prompt_id, sample, how.max_new_tokens))
            row.tokens, row.mask, row.length = out.tokens[sample], out.mask[sample], int(out.lengths[sample])
            row.sampler_logps, row.policy_logps = out.sampler_logps[sample], out.policy_logps[sample]
            row.stopped = bool(out.stop_reason[sample] == STOPPED)
            end = look([row]).get(sample)
            if isinstance(end, End):
                row.length, row.stopped = end.keep, True
            yield Piece(sample, look.take(sample, ended=True), row)

    def prompt_logps(self, prompt: np.ndarray) -> np.ndarray:
        """Log-probs `[T]` of a prompt's tokens under the plain model, nats, teacher-forced; NaN for the first."""
        width = -(-prompt.size // _WIDTH) * _WIDTH
        tokens, segments = np.zeros((2, 1, width), np.int32)
        tokens[0, : prompt.size], segments[0, : prompt.size] = prompt, 1
        positions = np.arange(width, dtype=np.int32)[None]
        found = _token_logps(self.params, tokens, positions, segments, config=self.model)
        logps = np.array(jax.device_get(found)[0, : prompt.size])
        logps[0] = np.nan  # nothing predicts it
        return logps

    def _new_look(self) -> StopLook:
        """With tools, markup is part of the text, so that one sees what was called and what came back."""
        if self.turns is None:
            return StopLook(self.tokenizer.token_bytes, self.settings.stops)
        table = list(self.tokenizer.markup_bytes)
        table[self.tokenizer.im_end_id] = f"{IM_END}\n".encode()
        return StopLook(table, self.settings.stops)


@partial(jax.jit, static_argnames="config")
def _token_logps(
    params: Params, tokens: jax.Array, positions: jax.Array, segments: jax.Array, *, config: ModelConfig
) -> jax.Array:
    return token_logps(params, config, tokens, positions, segments).logps


def in_order(pieces: Iterable[Piece], samples: int) -> Iterator[Piece]:
    """One sample after the other: the first as it comes, each next one once those before have ended."""
    waiting: list[list[Piece]] = [[] for _ in range(samples)]
    current = 0
    for piece in pieces:
        waiting[piece.sample].append(piece)
        while current < samples and waiting[current]:
            ended = waiting[current][-1].row is not None
            yield from waiting[current]
            waiting[current] = []
            if not ended:
                break
            current += 1


def piece_bias(entries: Sequence[str], tokenizer: Tokenizer) -> dict[int, float]:
    """Logit biases from texts of the form TOKEN=VALUE.

    TOKEN is an id, or else the text of a piece (markup by its name); in double quotes it is a text even where it is
    a number: `"7"=-inf`. All pieces that spell the text are meant: the byte <0x0A> spells a newline too.

    Raises:
      ConfigError: an entry of another form, an unknown piece, or a token named twice.
    """
    biases: dict[int, float] = {}
    for entry in entries:
        name, _, number = entry.rpartition("=")
        try:
            value = float(number)
        except ValueError as error:
            raise ConfigError(
                f"--logit_bias: got {entry!r}, expected TOKEN=NUMBER, such as 17=-2.5"
            ) from error
        if not name:
            raise ConfigError(f"--logit_bias: got {entry!r}, expected TOKEN=NUMBER, such as 17=-2.5")
        for token in _tokens_named(name, tokenizer):
            if token in biases:
                raise ConfigError(
                    f"--logit_bias: token {token} ({tokenizer.pieces[token]!r}) is named twice, expected once"
                )
            biases[token] = value
    return biases


def _tokens_named(name: str, tokenizer: Tokenizer) -> list[int]:
    if name.isdecimal():
        return [int(name)]
    text = name[1:-1] if len(name) > 2 and name[0] == name[-1] == '"' else name
    found = [token for token, spelled in enumerate(tokenizer.markup_bytes) if spelled == text.encode()]
    if not found:
        raise ConfigError(
            f"--logit_bias: {text!r} is no piece of this vocabulary of {tokenizer.vocab_size}, expected one piece "
            "or a token id"
        )
    return found
