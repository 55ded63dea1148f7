"""What goes into the sampler and what comes out.

Shapes: P prompts, G samples a prompt, B = P * G rows [p1, p1, ..., p2, p2], L prompt slots, N completion slots; of the
engine: B slots, R requests admitted together, C steps of a chunk.
"""

import dataclasses
from typing import Any

import flax.struct
import numpy as np
from jaxtyping import Bool, Float, Int

from research.sampling.limits import TOP_P, check_count, check_counts, check_number, check_temperature
from research.sampling.methods import SamplingMethod
from research.sampling.weights import Weights

STOPPED, TRUNCATED = 1, 0
"""Stop reasons: a stop token was drawn; the completion reached its limit."""


@dataclasses.dataclass(frozen=True)
class EngineSpec:
    """The sizes of the engine's programs."""

    slots: int  # B, rows that are decoded together
    chunk: int = 32  # C, decode steps between two visits of the host, at most
    admit: int = 8  # R, prompts prefilled and requests admitted at a time; the host waits until so many slots are free
    prompt_bucket: int = 32  # the prompts' width is rounded up to a multiple of this
    min_prefix: int = 32  # tokens that all prompts begin with are prefilled once, in multiples of this; 0 is off
    max_forced: int = 0  # M, tokens that one `ForceTokens` may have at most; 0 where nothing is forced

    def __post_init__(self) -> None:
        check_counts(self, slots=1, chunk=1, admit=1, prompt_bucket=1, min_prefix=0, max_forced=0)


@dataclasses.dataclass(frozen=True)
class SamplerSpec:
    """The static part of a rollout."""

    max_new_tokens: int  # N, completion slots
    samples_per_prompt: int  # G; a prompt is prefilled once for its whole group
    stop_tokens: tuple[int, ...]  # token ids that end a completion; they are part of it
    pad_id: int  # fills the slots after the end; masks are never derived from it
    method: SamplingMethod = SamplingMethod()  # greedy, temperature, top-k, top-p
    cache_bucket: int = 128  # slots by which the KV cache grows; one program is compiled a size
    int8_cache: bool = False  # keep keys and values in 8 bits
    weights: Weights = "compute"  # dtype of the layers' matrices; all log-probs are those of the model so rounded
    engine: EngineSpec | None = None  # sizes of the engine with refilled slots; None draws all rows at once

    def __post_init__(self) -> None:
        check_counts(self, max_new_tokens=1, samples_per_prompt=1, cache_bucket=1)


class SamplerScalars(flax.struct.PyTreeNode):
    """The traced part of a rollout, so that a sweep over it compiles once; see `make_scalars`."""

    seed: Int[Any, ""]
    step: Int[Any, ""]
    temperature: Float[Any, ""]
    top_p: Float[Any, ""]


def make_scalars(*, seed: int, step: int = 0, temperature: float = 1.0, top_p: float = 1.0) -> SamplerScalars:
    """Checked scalars; seed and step, with the prompt's and the sample's number, key the randomness.

    Raises:
      ConfigError: a number is out of range (`limits`); a temperature of 0 goes with a greedy method.
    """
    check_count("seed", seed, 0)
    check_count("step", step, 0)
    check_temperature(temperature)
    check_number("top_p", top_p, TOP_P)
    return SamplerScalars(np.int32(seed), np.int32(step), np.float32(temperature or 1.0), np.float32(top_p))


class Prompts(flax.struct.PyTreeNode):
    """Left-padded prompts."""

    tokens: Int[Any, "P L"]
    mask: Bool[Any, "P L"]  # True on real tokens
    prompt_ids: Int[Any, " P"]  # a stable id of each prompt; it keys the randomness

    @classmethod
    def of_one(cls, prompt: np.ndarray, prompt_id: int, width: int) -> "Prompts":
        """One prompt `[T]`, padded with 0 to a width."""
        tokens, mask = np.zeros((1, width), np.int32), np.arange(width)[None] >= width - prompt.size
        tokens[mask] = prompt
        return cls(tokens, mask, np.array([prompt_id], np.int32))


class Completions(flax.struct.PyTreeNode):
    """What was sampled."""

    tokens: Int[Any, "B N"]  # `pad_id` after the end
    mask: Bool[Any, "B N"]  # True on every token that the model drew: not after the end, nor on forced tokens
    sampler_logps: Float[Any, "B N"]  # under the distribution that was drawn from; 0 where the mask is False
    policy_logps: Float[Any, "B N"]  # under the plain model (temperature 1, nothing removed); likewise
    stop_reason: Int[Any, " B"]  # STOPPED or TRUNCATED
    lengths: Int[Any, " B"]  # tokens in the completion, the stop token and forced tokens included
