"""What goes into the sampler and what comes out.

Shapes: P prompts, G samples a prompt, B = P * G rows laid out [p1, p1, ..., p2, p2], L prompt slots,
N completion slots; of the engine: B slots, R rows taken in together, C steps of a chunk.
"""

import dataclasses
from typing import Any

import flax.struct
from jaxtyping import Bool, Float, Int

from research.sampling.controls import ControlSpec
from research.sampling.methods import SamplingMethod
from research.sampling.weights import Weights

STOPPED, TRUNCATED = 1, 0
"""Stop reasons: a stop token was drawn; the completion reached its limit."""


@dataclasses.dataclass(frozen=True)
class EngineSpec:
    """The sizes of the engine's programs.

    Attributes:
      slots: B, rows that are decoded together.
      chunk: C, decode steps between two looks of the host, at most.
      admit: R, prompts prefilled and rows taken in at a time; the host waits for so many free slots.
      prompt_bucket: the prompts' width is rounded up to a multiple of this.
      min_prefix: tokens that all prompts begin with are prefilled once, in multiples of this; 0 is off.
      give: M, tokens that a `Give` may have at most; 0 where nothing is given.
    """

    slots: int
    chunk: int = 32
    admit: int = 8
    prompt_bucket: int = 32
    min_prefix: int = 32
    give: int = 0


@dataclasses.dataclass(frozen=True)
class SamplerSpec:
    """The static part of a rollout.

    Attributes:
      max_new_tokens: N, completion slots.
      samples_per_prompt: G; a prompt is prefilled once for its whole group.
      stop_tokens: token ids that end a completion; they are part of it.
      pad_id: fills the slots after the end; never looked at to find a mask.
      method: greedy, temperature, top-k, top-p.
      cache_bucket: slots by which the KV cache grows while completions do; one program is compiled a size.
      int8_cache: keep keys and values in 8 bits.
      weights: what the layers' matrices are kept in; all log-probs are those of the model so rounded.
      controls: which of `Controls` change the distribution.
      engine: sizes of the engine with refilled slots; None draws all rows at once.
    """

    max_new_tokens: int
    samples_per_prompt: int
    stop_tokens: tuple[int, ...]
    pad_id: int
    method: SamplingMethod = SamplingMethod()
    cache_bucket: int = 128
    int8_cache: bool = False
    weights: Weights = "compute"
    controls: ControlSpec = ControlSpec()
    engine: EngineSpec | None = None


class SamplerScalars(flax.struct.PyTreeNode):
    """The traced part of a rollout, so that a sweep over it compiles once."""

    seed: Int[Any, ""]
    step: Int[Any, ""]
    temperature: Float[Any, ""]
    top_p: Float[Any, ""]


class Prompts(flax.struct.PyTreeNode):
    """Left-padded prompts.

    Attributes:
      tokens: `[P, L]` int32.
      mask: `[P, L]` bool, True on real tokens.
      prompt_ids: `[P]` int32, a stable id of each prompt; it keys the randomness.
    """

    tokens: Int[Any, "P L"]
    mask: Bool[Any, "P L"]
    prompt_ids: Int[Any, " P"]


class Completions(flax.struct.PyTreeNode):
    """What was sampled, B = P * G rows.

    Attributes:
      tokens: `[B, N]` int32, `pad_id` after the end.
      mask: `[B, N]` bool, True on every token that the model drew; False after the end, and on what was given to
        it in between (a tool's result).
      sampler_logps: `[B, N]` float32, under the distribution that was drawn from; 0 where the mask is False.
      policy_logps: `[B, N]` float32, under the plain model (temperature 1, nothing removed); likewise.
      stop_reason: `[B]` int32, STOPPED or TRUNCATED.
      lengths: `[B]` int32, tokens in the completion, the stop token and given tokens included.
    """

    tokens: Int[Any, "B N"]
    mask: Bool[Any, "B N"]
    sampler_logps: Float[Any, "B N"]
    policy_logps: Float[Any, "B N"]
    stop_reason: Int[Any, " B"]
    lengths: Int[Any, " B"]
