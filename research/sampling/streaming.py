"""Text from a policy as it is sampled: prompts in, pieces of text out, all samples of a prompt together.

Shapes: T tokens, S samples of a prompt.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np

from models.config import ModelConfig
from models.logprobs import token_logps
from models.transformer import Params
from research.config.schema import expect
from research.core.errors import ConfigError
from research.data.chat import Message, render_prompt
from research.data.tokenizer import IM_END, Tokenizer
from research.environments.interaction import Interaction
from research.sampling.callbacks import StopStrings, ToolCallback
from research.sampling.constraints import Grammars
from research.sampling.controls import make_controls
from research.sampling.drafts import Draft
from research.sampling.engine import Engine
from research.sampling.limits import REPETITION_PENALTY, SAMPLES, check_count, check_counts, check_number
from research.sampling.methods import SamplingMethod
from research.sampling.rows import Constraint, Request, Row, RowCallback
from research.sampling.sampler import Chunk
from research.sampling.speculative import SpeculativeStats, sample_speculative
from research.sampling.types import STOPPED, EngineSpec, Prompts, SamplerScalars, SamplerSpec, make_scalars


@dataclasses.dataclass(frozen=True)
class GenerationSettings:
    """How completions are drawn."""

    samples: int = 1  # S, completions of each prompt
    max_new_tokens: int = 128  # of a completion, results of tools included
    raw: bool = False  # continue texts without chat markup
    temperature: float = 1.0  # 0 is greedy
    top_k: int = 0  # 0 keeps all tokens
    top_p: float = 1.0  # 1 keeps all tokens
    seed: int = 0  # of the sampler
    stops: tuple[str, ...] = ()  # strings that end a completion
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)  # token id to what is added to its logit
    repetition_penalty: float = 1.0  # 1 is off
    min_new_tokens: int = 0  # tokens before an end token may be drawn
    constraint: Constraint | None = None  # what completions must match
    slots: int = 0  # rows decoded together; 0 is all samples
    chunk: int = 1  # decode steps between two pieces of text

    def __post_init__(self) -> None:
        check_counts(self, max_new_tokens=1, min_new_tokens=0, slots=0, chunk=1)
        check_count("samples", self.samples, 1, SAMPLES)
        check_number("repetition_penalty", self.repetition_penalty, REPETITION_PENALTY)
        _ = self.method, self.scalars  # which check themselves

    @property
    def method(self) -> SamplingMethod:
        """The static part of the distribution drawn from."""
        return SamplingMethod(self.temperature == 0, self.top_k, self.top_p < 1.0)

    @property
    def scalars(self) -> SamplerScalars:
        """The traced part."""
        return make_scalars(seed=self.seed, temperature=self.temperature, top_p=self.top_p)


class TextDelta(NamedTuple):
    """The next piece of a sample."""

    sample: int  # which, from 0
    text: str  # what is new; may be empty
    row: Row  # the sample so far
    ended: bool  # whether that is all of it


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
          params, model, tokenizer: the policy's.
          max_length: tokens that it can read, prompt and completion together.
          settings: how to draw.
          interaction: answers its turns; tools are described in the system turn.
          draft: proposes tokens; samples then come whole, and only `stops` may control them.

        Raises:
          ConfigError: a setting is out of range, or a constraint cannot be met.
        """
        self.params, self.model, self.tokenizer = params, model, tokenizer
        self.max_length, self.settings, self.interaction = max_length, settings, interaction
        how, new = settings, settings.max_new_tokens
        most = f"at most {max_length - 1} because the context is {max_length} tokens, the prompt's included"
        expect(new < max_length, "max_new_tokens", new, most)
        ends = (tokenizer.eos_id,) if how.raw else (tokenizer.im_end_id, tokenizer.eos_id)
        grammars = None
        if how.constraint is not None:
            grammars = Grammars(tokenizer, ends, model.vocab_size)
            grammars.matcher(how.constraint, new)  # refused before any prompt if it cannot be met
        controls = make_controls(
            model.vocab_size,
            max_new_tokens=new,
            logit_bias=how.logit_bias,
            repetition_penalty=how.repetition_penalty,
            min_new_tokens=how.min_new_tokens,
        )
        if draft is not None and (grammars is not None or jax.tree.leaves(controls)):
            raise ConfigError("controls: got some with a draft, expected none because proposals are not controlled")
        self._stop_strings()  # refuses empty ones
        # The samples of a prompt share its prefill: more than one row at a time would only be padding.
        sizes = EngineSpec(how.slots or how.samples, how.chunk, admit=1, max_forced=0 if interaction is None else new)
        self.engine = Engine(
            params,
            how.scalars,
            config=model,
            spec=SamplerSpec(new, how.samples, ends, tokenizer.pad_id, how.method, engine=sizes),
            controls=controls,
            grammars=grammars,
        )
        self.draft = None if draft is None else draft.laid_out(self.engine.spec.weights)
        self.proposals = None if draft is None else SpeculativeStats()

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
        """All samples of a prompt `[T]` as they are drawn, in any order of the samples; the id keys the randomness."""
        how, texts = self.settings, self._stop_strings()
        requests = [Request(prompt, prompt_id, i, how.max_new_tokens, how.constraint) for i in range(how.samples)]
        if self.draft is not None:
            chunks = self._speculative(self.draft, requests, texts)
        else:
            callback: RowCallback = texts
            if self.interaction is not None:
                make = self.interaction.make
                callback = ToolCallback(self.interaction.turns(how.max_new_tokens), lambda _: make(), texts)
            chunks = self.engine.chunks(requests, callback)
        for rows, ended in chunks:
            done = {row.number for row in ended}
            for row in rows:
                over = row.number in done
                yield TextDelta(row.number, texts.take(row.number, ended=over), row, over)

    def _speculative(
        self, draft: Draft, requests: Sequence[Request], texts: StopStrings
    ) -> Iterator[tuple[list[Row], list[Row]]]:
        """As `Engine.chunks`, one chunk with all of the samples."""
        prompt, engine = requests[0].prompt, self.engine
        prompts = Prompts.of_one(prompt, requests[0].prompt_id, _width(prompt))
        out, stats = jax.device_get(
            sample_speculative(engine.params, draft, prompts, engine.scalars, config=self.model, spec=engine.spec)
        )
        self.proposals = jax.tree.map(np.add, self.proposals, stats)
        chunk = Chunk(out.tokens.T, out.mask.T, out.mask.T, out.sampler_logps.T, out.policy_logps.T)
        rows = [Row(number, request) for number, request in enumerate(requests)]
        for row in rows:
            row.extend(chunk, row.number)
            row.stopped = bool(out.stop_reason[row.number] == STOPPED)
        for number, action in texts(rows).items():
            rows[number].length, rows[number].stopped = action.keep, True
        yield rows, rows

    def prompt_logps(self, prompt: np.ndarray) -> np.ndarray:
        """Log-probs `[T]` of a prompt's tokens under the plain model, nats, teacher-forced; NaN for the first."""
        width = _width(prompt)
        tokens, segments = np.zeros((2, 1, width), np.int32)
        tokens[0, : prompt.size], segments[0, : prompt.size] = prompt, 1
        positions = np.arange(width, dtype=np.int32)[None]
        found = _token_logps(self.params, self.model, tokens, positions, segments)[0].logps
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


_token_logps = jax.jit(token_logps, static_argnums=1)


def _width(prompt: np.ndarray) -> int:
    """To which a prompt is padded: one compiled program for many lengths."""
    return -(-prompt.size // 32) * 32


def in_order(deltas: Iterable[TextDelta], samples: int) -> Iterator[TextDelta]:
    """One sample after the other: the first as it is drawn, each next one once those before have ended."""
    waiting: list[list[TextDelta]] = [[] for _ in range(samples)]
    current = 0
    for delta in deltas:
        waiting[delta.sample].append(delta)
        while current < samples and (ready := waiting[current]):
            yield from ready
            if not ready[-1].ended:
                ready.clear()
                break
            current += 1
