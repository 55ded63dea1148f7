"""Text from a policy as it is sampled: prompts in, pieces of text out, all samples of a prompt together.

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
from research.environments.interaction import Interaction
from research.sampling.constraints import Constraint, Grammars
from research.sampling.controls import make_controls
from research.sampling.engine import Engine
from research.sampling.limits import (
    REPETITION_PENALTY,
    SAMPLES,
    TOP_P,
    check_count,
    check_counts,
    check_number,
    check_temperature,
)
from research.sampling.methods import SamplingMethod
from research.sampling.rows import Request, Row, RowCallback
from research.sampling.speculative import Draft, SpeculativeStats, sample_speculative
from research.sampling.stop_strings import StopStrings
from research.sampling.tool_turns import ToolCallback
from research.sampling.types import STOPPED, EngineSpec, Prompts, SamplerSpec, make_scalars


@dataclasses.dataclass(frozen=True)
class GenerationSettings:
    """How completions are drawn.

    Attributes:
      samples: S, completions of each prompt.
      max_new_tokens: of a completion, results of tools included.
      raw: continue texts without chat markup.
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

    def __post_init__(self) -> None:
        check_counts(self, max_new_tokens=1, top_k=0, seed=0, min_new_tokens=0, slots=0, chunk=1)
        check_count("samples", self.samples, 1, SAMPLES)
        check_temperature(self.temperature)
        check_number("top_p", self.top_p, TOP_P)
        check_number("repetition_penalty", self.repetition_penalty, REPETITION_PENALTY)

    @property
    def method(self) -> SamplingMethod:
        """The static part of the distribution drawn from."""
        return SamplingMethod(self.temperature == 0, self.top_k, self.top_p < 1.0)


_MULTIPLE = 32
"""Prompts are padded to multiples of it: one compiled program for many lengths."""


class TextDelta(NamedTuple):
    """The next piece of a sample.

    Attributes:
      sample: which, from 0.
      text: what is new; may be empty.
      row: the sample so far.
      ended: whether that is all of it.
    """

    sample: int
    text: str
    row: Row
    ended: bool


class TextGenerator:
    """A policy that answers prompts with streamed text."""

    def __init__(
        self,
        params: Params,
        model: ModelConfig,
        tokenizer: Tokenizer,
        *,
        max_length: int,
        settings: GenerationSettings,
        interaction: Interaction | None = None,
        draft: Draft | None = None,
    ) -> None:
        """Lays the parameters out for decoding, once for all prompts.

        Args:
          params: the policy's.
          model: its static description.
          tokenizer: the one it was trained with.
          max_length: tokens that it can read, prompt and completion together.
          settings: how to draw.
          interaction: answers its turns; tools are described in the system turn.
          draft: proposes tokens; samples then come whole, and only `stops` may control them.

        Raises:
          ConfigError: a setting is out of range, or a constraint cannot be met.
        """
        self.params, self.model, self.tokenizer = params, model, tokenizer
        self.max_length, self.settings, self.interaction = max_length, settings, interaction
        how = settings
        if how.max_new_tokens >= max_length:
            raise ConfigError(
                f"max_new_tokens: got {how.max_new_tokens}, expected at most {max_length - 1} because the context is "
                f"{max_length} tokens, the prompt's included"
            )
        ends = (tokenizer.eos_id,) if how.raw else (tokenizer.im_end_id, tokenizer.eos_id)
        grammars = None
        if how.constraint is not None:
            grammars = Grammars(tokenizer, ends, model.vocab_size)
            grammars.matcher(how.constraint, how.max_new_tokens)  # refused before any prompt if it cannot be met
        spec, controls = make_controls(
            model.vocab_size,
            stop_tokens=ends,
            max_new_tokens=how.max_new_tokens,
            logit_bias=how.logit_bias,
            repetition_penalty=how.repetition_penalty,
            min_new_tokens=how.min_new_tokens,
            constrained=grammars is not None,
        )
        self._stop_strings()  # refuses empty ones
        self.engine = Engine(
            params,
            make_scalars(seed=how.seed, temperature=how.temperature, top_p=how.top_p),
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
                    max_forced=0 if interaction is None else how.max_new_tokens,
                ),
            ),
            controls=controls if spec.any else None,
            grammars=grammars,
        )
        self.draft = None if draft is None else draft.laid_out(self.engine.spec.weights)
        self.proposals = None if draft is None else SpeculativeStats.zero()

    @property
    def prompt_limit(self) -> int:
        """Tokens of a prompt that leave room for a whole completion."""
        return self.max_length - self.settings.max_new_tokens

    def prompt(self, text: str) -> np.ndarray:
        """The tokens `[T]` that ask for a completion of a text, or for an answer to it.

        Raises:
          ConfigError: they and a completion are more than the model can read.
          DataError: the vocabulary cannot spell the text.
        """
        if self.settings.raw:
            tokens = np.array([self.tokenizer.bos_id, *self.tokenizer.encode(text)], np.int32)
        else:
            tokens = render_prompt(self.described([Message("user", text)]), self.tokenizer)
        if len(tokens) > self.prompt_limit:
            described = "" if self.interaction is None else " with the description of the tools"
            raise ConfigError(
                f"--prompt: has {len(tokens)} tokens{described}, expected at most {self.prompt_limit} because the "
                f"context is {self.max_length} and --max_new_tokens={self.settings.max_new_tokens}"
            )
        return tokens

    def described(self, messages: Sequence[Message]) -> list[Message]:
        """The messages, the tools described in the system turn."""
        tools = None if self.interaction is None else self.interaction.tools
        return list(messages) if tools is None else tools.described(messages)

    def stream(self, prompt: np.ndarray, prompt_id: int) -> Iterator[TextDelta]:
        """All samples of a prompt as they are drawn, in any order of the samples.

        Args:
          prompt: `[T]` tokens.
          prompt_id: keys the randomness.
        """
        if self.draft is not None:
            yield from self._stream_speculative(prompt, prompt_id, self.draft)
            return
        how = self.settings
        requests = [
            Request(prompt, prompt_id, sample, how.max_new_tokens, how.constraint) for sample in range(how.samples)
        ]
        texts = self._stop_strings()
        callback: RowCallback = texts
        if self.interaction is not None:
            make = self.interaction.make
            callback = ToolCallback(self.interaction.turns(how.max_new_tokens), lambda _: make(), texts)
        for rows, ended in self.engine.chunks(requests, callback):
            done = {row.number for row in ended}
            for row in rows:
                over = row.number in done
                yield TextDelta(row.number, texts.take(row.number, ended=over), row, over)

    def _stream_speculative(self, prompt: np.ndarray, prompt_id: int, draft: Draft) -> Iterator[TextDelta]:
        how, engine = self.settings, self.engine
        width = -(-prompt.size // _MULTIPLE) * _MULTIPLE
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
        texts = self._stop_strings()
        for sample in range(how.samples):
            row = Row(sample, Request(prompt, prompt_id, sample, how.max_new_tokens))
            row.tokens, row.mask, row.length = out.tokens[sample], out.mask[sample], int(out.lengths[sample])
            row.sampler_logps, row.policy_logps = out.sampler_logps[sample], out.policy_logps[sample]
            row.stopped = bool(out.stop_reason[sample] == STOPPED)
            if sample in (actions := texts([row])):
                row.length, row.stopped = actions[sample].keep, True
            yield TextDelta(sample, texts.take(sample, ended=True), row, True)

    def prompt_logps(self, prompt: np.ndarray) -> np.ndarray:
        """Log-probs `[T]` of a prompt's tokens under the plain model, nats, teacher-forced; NaN for the first."""
        width = -(-prompt.size // _MULTIPLE) * _MULTIPLE
        tokens, segments = np.zeros((2, 1, width), np.int32)
        tokens[0, : prompt.size], segments[0, : prompt.size] = prompt, 1
        positions = np.arange(width, dtype=np.int32)[None]
        found = _token_logps(self.params, tokens, positions, segments, config=self.model)
        logps = np.array(jax.device_get(found)[0, : prompt.size])
        logps[0] = np.nan  # nothing predicts it
        return logps

    def _stop_strings(self) -> StopStrings:
        """With tools, markup is part of the text, so that calls and their results can be seen."""
        if self.interaction is None:
            return StopStrings(self.tokenizer.token_bytes, self.settings.stops)
        table = list(self.tokenizer.markup_bytes)
        table[self.tokenizer.im_end_id] = f"{IM_END}\n".encode()
        return StopStrings(table, self.settings.stops)


@partial(jax.jit, static_argnames="config")
def _token_logps(
    params: Params, tokens: jax.Array, positions: jax.Array, segments: jax.Array, *, config: ModelConfig
) -> jax.Array:
    return token_logps(params, config, tokens, positions, segments)[0].logps


def in_order(deltas: Iterable[TextDelta], samples: int) -> Iterator[TextDelta]:
    """One sample after the other: the first as it is drawn, each next one once those before have ended."""
    waiting: list[list[TextDelta]] = [[] for _ in range(samples)]
    current = 0
    for delta in deltas:
        waiting[delta.sample].append(delta)
        while current < samples and waiting[current]:
            ended = waiting[current][-1].ended
            yield from waiting[current]
            waiting[current] = []
            if not ended:
                break
            current += 1
