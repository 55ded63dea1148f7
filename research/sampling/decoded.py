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
from research.core.errors import ConfigError
from research.core.mesh import to_device
from research.data.records import Records
from research.data.tokenizer import Tokenizer
from research.environments.interaction import Interaction
from research.environments.turns import RowTurns
from research.sampling.engine import sample_refilled
from research.sampling.methods import SamplingMethod
from research.sampling.rows import RowCallback
from research.sampling.sampler import sample
from research.sampling.tool_turns import ToolCallback
from research.sampling.types import STOPPED, Completions, EngineSpec, Prompts, SamplerScalars, SamplerSpec


class Decoded(NamedTuple):
    """Completions on the host, and what drawing them cost.

    Attributes:
      arrays: what was sampled.
      texts: what is judged: each completion after the last message that it was given, without markup, so that a
        call's arguments and a tool's words are never taken for an answer.
      stopped: `[B]` bool, False where a completion was cut: at its limit of tokens, or at a turn that was not
        answered.
      metrics: of the sampler.
      given: `[B, N]` bool, the tokens that it was given; None without environments.
      dialogues: whole completions with their markup; None without environments.
      turns: where each sampled row stood at its end; empty without environments.
    """

    arrays: Completions
    texts: list[str]
    stopped: np.ndarray
    metrics: dict[str, float]
    given: np.ndarray | None = None
    dialogues: list[str] | None = None
    turns: tuple[RowTurns, ...] = ()

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
    """A chat model's completions: they end with the end-of-turn piece.

    Raises:
      ConfigError: environments (`interactive`) without slots.
    """
    if interactive and not sampler.slots:
        raise ConfigError("sampler.slots: got 0, expected > 0 with tools")
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
    """Draws completions of a batch of prompts and decodes them.

    Args:
      params: the policy's.
      prompts: {prompt_tokens, prompt_mask, prompt_id}; an id of -1 fills the batch.
      scalars, spec: how to draw.
      model: static model description.
      mesh: the devices.
      tokenizer: decodes.
      interaction: answers turns on the way.
      records: with `interaction`, what the episodes begin with, by prompt id.
    """
    batch = Prompts(prompts["prompt_tokens"], prompts["prompt_mask"], prompts["prompt_id"])
    metrics: dict[str, float] = {}
    if spec.engine is None:
        out = jax.device_get(sample(params, to_device(mesh, batch), scalars, config=model, spec=spec))
    elif interaction is None or records is None:
        out, metrics = _refilled(params, batch, scalars, model, spec, None)
    else:
        source, G = records, spec.samples_per_prompt
        callback = ToolCallback(
            interaction.turns(spec.max_new_tokens),
            lambda row: interaction.begin(source[int(batch.prompt_ids[row // G])])[0],
        )
        out, metrics = _refilled(params, batch, scalars, model, spec, callback)
        turns = tuple(callback.states[row] for row in range(len(out.tokens)))
        return decode_dialogues(out, turns, tokenizer, metrics)
    texts = [tokenizer.decode(tokens[:length].tolist()) for tokens, length in zip(out.tokens, out.lengths, strict=True)]
    return Decoded(out, texts, out.stop_reason == STOPPED, metrics)


def _refilled(
    params: Params,
    prompts: Prompts,
    scalars: SamplerScalars,
    model: ModelConfig,
    spec: SamplerSpec,
    callback: RowCallback | None,
) -> tuple[Completions, dict[str, float]]:
    """Completions by the engine, of no tokens for the rows at the end that only fill the batch: no prompt, no slot."""
    real = int((prompts.prompt_ids >= 0).sum())
    asked = jax.tree.map(lambda x: x[:real], prompts)
    out, stats = sample_refilled(params, asked, scalars, config=model, spec=spec, callback=callback)
    fill = (len(prompts.prompt_ids) - real) * spec.samples_per_prompt
    filled = jax.tree.map(lambda x: np.pad(x, ((0, fill),) + ((0, 0),) * (x.ndim - 1)), out)
    return filled, stats.metrics()


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
    prompt_tokens, prompt_mask = (
        np.repeat(prompts[key], group_size, axis=0) for key in ("prompt_tokens", "prompt_mask")
    )
    return completion_rows(
        prompt_tokens,
        prompt_mask,
        out.arrays.tokens,
        out.arrays.mask,
        np.ones(len(prompt_mask)),
        out.given,
        group_size=group_size,
    )
