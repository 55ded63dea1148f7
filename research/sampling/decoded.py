"""Completions of a batch of prompts, sampled and decoded: shared by rollouts and evaluations.

Shapes: P prompts, G samples a prompt, B = P * G rows [p1, p1, ..., p2, p2], L prompt slots, N completion slots.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from models.config import ModelConfig
from models.transformer import Params
from research.algorithms.base import completion_rows
from research.config.sections import Sampler
from research.core.batch import SequenceBatch
from research.core.mesh import to_device
from research.data.records import Records
from research.data.tokenizer import Tokenizer
from research.environments.interaction import Interaction
from research.environments.turns import RowTurns
from research.sampling.callbacks import ToolCallback
from research.sampling.engine import sample_refilled
from research.sampling.methods import SamplingMethod
from research.sampling.sampler import sample
from research.sampling.types import STOPPED, Completions, EngineSpec, Prompts, SamplerScalars, SamplerSpec


class Decoded(NamedTuple):
    """Completions on the host, and what drawing them cost."""

    arrays: Completions  # what was sampled
    # what is judged: each completion after the last message that it was given, without markup, so that a call's
    # arguments and a tool's words are never taken for an answer
    texts: list[str]
    stopped: np.ndarray  # False where a completion was cut: at its limit of tokens, or at a turn that was not answered
    metrics: dict[str, float]  # of the sampler
    given: np.ndarray | None = None  # the tokens that it was given; None without environments
    dialogues: list[str] | None = None  # whole completions with their markup; None without environments
    turns: tuple[RowTurns, ...] = ()  # where each sampled row stood at its end; empty without environments

    @property
    def lengths(self) -> np.ndarray:
        """`[B]` tokens that the model drew, the stop token included."""
        return self.arrays.lengths if self.given is None else self.arrays.lengths - self.given.sum(axis=1)

    @property
    def shown(self) -> list[str]:
        """The completions as a person should read them."""
        return self.texts if self.dialogues is None else self.dialogues


def sampler_spec(
    tokenizer: Tokenizer,
    sampler: Sampler,
    *,
    samples: int,
    max_new_tokens: int,
    method: SamplingMethod,
    interactive: bool = False,
) -> SamplerSpec:
    """A chat model's completions, which end with the end-of-turn piece; environments (`interactive`) need slots."""
    forced = max_new_tokens if interactive else 0  # answers are cut to what is left of it
    return SamplerSpec(
        max_new_tokens=max_new_tokens,
        samples_per_prompt=samples,
        stop_tokens=(tokenizer.im_end_id, tokenizer.eos_id),
        pad_id=tokenizer.pad_id,
        method=method,
        cache_bucket=sampler.cache_bucket,
        int8_cache=sampler.int8_cache,
        weights=sampler.weights,
        engine=EngineSpec(sampler.slots, sampler.chunk, sampler.admit, max_forced=forced) if sampler.slots else None,
    )


def sample_prompts(
    params: Params,
    prompts: Mapping[str, np.ndarray],
    scalars: SamplerScalars,
    *,
    model: ModelConfig,
    spec: SamplerSpec,
    mesh: Mesh,
    tokenizer: Tokenizer,
    interaction: Interaction | None = None,
    records: Records | None = None,
) -> Decoded:
    """Draws completions of a batch of prompts {prompt_tokens, prompt_mask, prompt_id} and decodes them.

    An id of -1 fills the batch. `interaction` answers turns; its episodes begin with `records`, by prompt id.
    """
    batch = Prompts(prompts["prompt_tokens"], prompts["prompt_mask"], prompts["prompt_id"])
    metrics: dict[str, float] = {}
    callback: ToolCallback | None = None
    if spec.engine is None:
        out = jax.device_get(sample(params, to_device(mesh, batch), scalars, config=model, spec=spec))
    else:
        if interaction is not None and records is not None:
            begin, source, G = interaction.begin, records, spec.samples_per_prompt
            turns = interaction.turns(spec.max_new_tokens)
            callback = ToolCallback(turns, lambda row: begin(source[int(batch.prompt_ids[row // G])])[0])
        out, stats = sample_refilled(params, batch, scalars, config=model, spec=spec, callback=callback)
        metrics = stats.metrics()
    if callback is not None:
        return decode_dialogues(out, tuple(callback.states[row] for row in range(len(out.tokens))), tokenizer, metrics)
    texts = [tokenizer.decode(tokens[:length].tolist()) for tokens, length in zip(out.tokens, out.lengths, strict=True)]
    return Decoded(out, texts, out.stop_reason == STOPPED, metrics)


def decode_dialogues(
    out: Completions, turns: tuple[RowTurns, ...], tokenizer: Tokenizer, metrics: dict[str, float]
) -> Decoded:
    """Completions with given messages among their tokens."""
    N = out.tokens.shape[1]
    given = (np.arange(N) < out.lengths[:, None]) & ~out.mask
    starts = np.where(given.any(axis=1), N - given[:, ::-1].argmax(axis=1), 0)  # of the last assistant turn
    rows = [
        (tokens[:length].tolist(), int(start))
        for tokens, length, start in zip(out.tokens, out.lengths, starts, strict=True)
    ]
    cut = np.array([state.cut for state in turns], bool)
    return Decoded(
        out,
        texts=[tokenizer.decode(tokens[start:]) for tokens, start in rows],
        stopped=(out.stop_reason == STOPPED) & ~cut,
        metrics=metrics,
        given=given,
        dialogues=[tokenizer.decode(tokens, show_markup=True) for tokens, _ in rows],
        turns=turns,
    )


def decoded_rows(prompts: Mapping[str, np.ndarray], out: Decoded, group_size: int) -> SequenceBatch:
    """Prompt + completion rows `[B, L + N]` of sampled completions, on the host."""
    prompt_tokens, prompt_mask = (np.repeat(prompts[f"prompt_{key}"], group_size, axis=0) for key in ("tokens", "mask"))
    weights, drawn = np.ones(len(prompt_mask)), out.arrays
    return completion_rows(
        prompt_tokens, prompt_mask, drawn.tokens, drawn.mask, weights, out.given, group_size=group_size
    )
