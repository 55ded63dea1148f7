"""What goes into the sampler and what comes out.

Shapes: P prompts, G samples a prompt, B = P * G rows laid out [p1, p1, ..., p2, p2], L prompt slots,
N completion slots; of the engine: B slots, R requests admitted together, C steps of a chunk.
"""

import dataclasses
from typing import Any

import flax.struct
import numpy as np
from jaxtyping import Bool, Float, Int

from research.sampling.controls import ControlSpec
from research.sampling.limits import TOP_P, check_count, check_counts, check_number, check_temperature
from research.sampling.methods import SamplingMethod
from research.sampling.weights import Weights

STOPPED, TRUNCATED = 1, 0
"""Stop reasons: a stop token was drawn; the completion reached its limit."""


@dataclasses.dataclass(frozen=True)
class EngineSpec:
    """The sizes of the engine's programs.

    Attributes:
      slots: B, rows that are decoded together.
      chunk: C, decode steps between two visits of the host, at most.
      admit: R, prompts prefilled and requests admitted at a time; the host waits until so many slots are free.
      prompt_bucket: the prompts' width is rounded up to a multiple of this.
      min_prefix: tokens that all prompts begin with are prefilled once, in multiples of this; 0 is off.
      max_forced: M, tokens that one `ForceTokens` may have at most; 0 where nothing is forced.
    """

    slots: int
    chunk: int = 32
    admit: int = 8
    prompt_bucket: int = 32
    min_prefix: int = 32
    max_forced: int = 0

    def __post_init__(self) -> None:
        check_counts(self, slots=1, chunk=1, admit=1, prompt_bucket=1, min_prefix=0, max_forced=0)


@dataclasses.dataclass(frozen=True)
class SamplerSpec:
    """The static part of a rollout.

    Attributes:
      max_new_tokens: N, completion slots.
      samples_per_prompt: G; a prompt is prefilled once for its whole group.
      stop_tokens: token ids that end a completion; they are part of it.
      pad_id: fills the slots after the end; masks are never derived from it.
      method: greedy, temperature, top-k, top-p.
      cache_bucket: slots by which the KV cache grows while completions do; one program is compiled a size.
      int8_cache: keep keys and values in 8 bits.
      weights: dtype of the layers' matrices; all log-probs are those of the model so rounded.
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

    def __post_init__(self) -> None:
        check_counts(self, max_new_tokens=1, samples_per_prompt=1, cache_bucket=1)


class SamplerScalars(flax.struct.PyTreeNode):
    """The traced part of a rollout, so that a sweep over it compiles once; see `make_scalars`."""

    seed: Int[Any, ""]
    step: Int[Any, ""]
    temperature: Float[Any, ""]
    top_p: Float[Any, ""]


def make_scalars(*, seed: int, step: int = 0, temperature: float = 1.0, top_p: float = 1.0) -> SamplerScalars:
    """Checked scalars.

    Args:
      seed, step: int32 counters; with the prompt's and the sample's number they key the randomness.
      temperature: in `limits.TEMPERATURE`, or 0 with a greedy method, which does not read it.
      top_p: in `limits.TOP_P`; 1 keeps all tokens.

    Raises:
      ConfigError: a number is out of range or not finite.
    """
    check_count("seed", seed, 0)
    check_count("step", step, 0)
    check_temperature(temperature)
    check_number("top_p", top_p, TOP_P)
    return SamplerScalars(np.int32(seed), np.int32(step), np.float32(temperature or 1.0), np.float32(top_p))


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
      mask: `[B, N]` bool, True on every token that the model drew; False after the end, and on forced tokens in
        between (a tool's result).
      sampler_logps: `[B, N]` float32, under the distribution that was drawn from; 0 where the mask is False.
      policy_logps: `[B, N]` float32, under the plain model (temperature 1, nothing removed); likewise.
      stop_reason: `[B]` int32, STOPPED or TRUNCATED.
      lengths: `[B]` int32, tokens in the completion, the stop token and forced tokens included.
    """

    tokens: Int[Any, "B N"]
    mask: Bool[Any, "B N"]
    sampler_logps: Float[Any, "B N"]
    policy_logps: Float[Any, "B N"]
    stop_reason: Int[Any, " B"]
    lengths: Int[Any, " B"]
