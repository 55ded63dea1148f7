"""Continuous refill: a fixed number of slots, and the next prompt takes the slot of a row that has ended.

The host takes rows in and looks at them between chunks of decode steps; all arithmetic is in compiled programs
whose shapes come from a few buckets. A completion is the one that `sampler.sample` draws, whatever slot it had and
whoever was next to it.

Shapes: B slots, R rows taken in together, L prompt slots, C steps of a chunk, M tokens given at a time.
"""

import dataclasses
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import numpy as np

from models.cache import KVCache
from models.config import ModelConfig
from models.transformer import Params
from research.sampling.constraints import Constraint, ConstraintRows, Grammars
from research.sampling.controls import Controls, refuse_empty_rows
from research.sampling.decode import Chunk
from research.sampling.programs import (
    UNCHANGED,
    Entries,
    act_program,
    decode_program,
    empty_slots,
    layout_program,
    place_program,
    prefill_program,
    resize_program,
    shrink_program,
)
from research.sampling.types import (
    STOPPED,
    TRUNCATED,
    Completions,
    Prompts,
    SamplerScalars,
    SamplerSpec,
)


@dataclasses.dataclass(frozen=True)
class Request:
    """One completion to draw.

    Attributes:
      prompt: token ids, at least one.
      prompt_id: with `sample_id` it keys the randomness.
      sample_id: which of the prompt's completions.
      max_new_tokens: at least 1.
      constraint: what the completion must match; None is free.
    """

    prompt: np.ndarray
    prompt_id: int
    sample_id: int
    max_new_tokens: int
    constraint: Constraint | None = None

    @property
    def key(self) -> bytes:
        """Equal prompts have equal keys."""
        return self.prompt.tobytes()


class Row:
    """A request and its completion so far: the first `length` entries of each array.

    Attributes:
      number: of the request, in the order given.
      request: what is drawn.
      tokens, mask, sampler_logps, policy_logps: `[max_new_tokens]`; the mask is False on what was given.
      length: tokens so far.
      stopped: its last token was a stop token that the model drew.
      satisfied: it matches its constraint, if any; False where it was cut off on the way.
    """

    def __init__(self, number: int, request: Request) -> None:
        """A completion of no tokens."""
        N = request.max_new_tokens
        self.number, self.request, self.length = number, request, 0
        self.stopped, self.satisfied = False, True
        self.tokens, self.mask = np.zeros(N, np.int32), np.zeros(N, bool)
        self.sampler_logps, self.policy_logps = np.zeros(N, np.float32), np.zeros(N, np.float32)

    def extend(self, chunk: Chunk, slot: int) -> bool:
        """Takes over a slot's tokens of a chunk on the host; returns whether there were any."""
        count = int(chunk.active[:, slot].sum())
        new = slice(self.length, self.length + count)
        self.tokens[new], self.mask[new] = chunk.tokens[:count, slot], chunk.drawn[:count, slot]
        self.sampler_logps[new] = chunk.sampler_logps[:count, slot] * self.mask[new]
        self.policy_logps[new] = chunk.policy_logps[:count, slot] * self.mask[new]
        self.length += count
        return count > 0

    @property
    def stop_reason(self) -> int:
        """STOPPED or TRUNCATED."""
        return STOPPED if self.stopped else TRUNCATED


@dataclasses.dataclass(frozen=True)
class Give:
    """Tokens to append to a row, which goes on behind them from its cache; they are not the model's."""

    tokens: Sequence[int]


@dataclasses.dataclass(frozen=True)
class End:
    """The row ends with its first `keep` tokens, as if the last of them had been a stop token."""

    keep: int


Look = Callable[[Sequence[Row]], Mapping[int, Give | End]]
"""Sees the rows with new tokens after each chunk; says by number what to do, nothing where all is well."""


@dataclasses.dataclass
class Stats:
    """What a run of the engine cost.

    Attributes:
      steps: decode steps.
      tokens: completion tokens.
      slot_steps: steps times slots: `tokens / slot_steps` is the share of the work that was of use.
      prefilled: prompt tokens that went through the model, a common prefix once.
      resizes: how often the cache was laid out anew.
    """

    steps: int = 0
    tokens: int = 0
    slot_steps: int = 0
    prefilled: int = 0
    resizes: int = 0

    def metrics(self) -> dict[str, float]:
        """For the log of a run."""
        return {
            "sampler/decode_steps": float(self.steps),
            "sampler/slot_utilization": self.tokens / max(self.slot_steps, 1),
            "sampler/prefilled_tokens": float(self.prefilled),
        }


class Engine:
    """Draws completions of any number of requests with a fixed number of slots."""

    def __init__(
        self,
        params: Params,
        scalars: SamplerScalars,
        *,
        config: ModelConfig,
        spec: SamplerSpec,
        controls: Controls | None = None,
        grammars: Grammars | None = None,
    ) -> None:
        """Lays the parameters out for decoding, once.

        Args:
          params: the policy's, as trained or as `weights.sampling_params` gives them.
          scalars: seed, step, temperature, top_p.
          config: of the model.
          spec: of the rollout, with an engine; `samples_per_prompt` is not used: each request is one completion.
          controls: numbers of `spec.controls`; None where it is empty.
          grammars: compiles the requests' constraints, where `spec.controls.constrained`.
        """
        self.params = layout_program(params, config=config, weights=spec.weights)
        if (controls is not None) != spec.controls.any or (grammars is not None) != spec.controls.constrained:
            raise ValueError(f"controls: expected those that the spec has, {spec.controls}, and no others")
        if spec.engine is None:
            raise ValueError("spec.engine: got None, expected the sizes of an engine")
        self.scalars, self.config, self.spec, self.sizes = scalars, config, spec, spec.engine
        self.controls, self.grammars, self.stats = controls, grammars, Stats()

    def run(self, requests: Sequence[Request], look: Look | None = None) -> Iterator[Row]:
        """Yields each request's completion when it has ended.

        Requests of one prompt share its prefill if they are adjacent.
        """
        for _, ended in self.chunks(requests, look):
            yield from ended

    def chunks(
        self, requests: Sequence[Request], look: Look | None = None
    ) -> Iterator[tuple[list[Row], list[Row]]]:
        """After each chunk of decode steps, the rows with new tokens and those of them that have ended."""
        if requests:
            yield from _Run(self, requests, look).chunks()


class _Run:
    """One pass over the requests: which row is in which slot, and how far the cache is written."""

    def __init__(self, engine: Engine, requests: Sequence[Request], look: Look | None) -> None:
        self.own, self.look = engine, look
        self.sizes, self.spec, self.config = engine.sizes, engine.spec, engine.config
        self.waiting = deque(Row(number, request) for number, request in enumerate(requests))
        B = self.sizes.slots
        self.placed: list[Row | None] = [None] * B
        self.begins = np.zeros(B, np.int64)  # the first cache slot of each placed row
        shared = _common_prefix([request.prompt for request in requests], self.sizes.min_prefix)
        self.prefix: KVCache | None = None
        if shared.size:
            self.prefix = prefill_program(
                engine.params, shared[None], np.ones((1, shared.size), bool), None, config=self.config
            )
            engine.stats.prefilled += shared.size
        self.before = shared.size
        longest = max(request.prompt.size for request in requests) - self.before - 1
        self.width = _round_up(longest, self.sizes.prompt_bucket)
        self.length = self.width  # the next cache slot
        self.slots = empty_slots(
            self.prefix, batch=B, length=self.width, give=self.sizes.give, config=self.config, spec=self.spec
        )
        self.sources: dict[bytes, int] = {}  # a prompt's key -> its row in `filled`
        self.filled: KVCache | None = None
        self.constrained = None if engine.grammars is None else ConstraintRows(engine.grammars)

    def chunks(self) -> Iterator[tuple[list[Row], list[Row]]]:
        while self.waiting or any(self.placed):
            self._admit()
            self._shrink()
            self._make_room()
            chunk = self._decode()
            seen = [
                (slot, row)
                for slot, row in enumerate(self.placed)
                if row is not None and row.extend(chunk, slot)
            ]
            self._check(seen)
            live, ended = self._act(seen), []
            for slot, row in enumerate(self.placed):
                if row is not None and not live[slot]:
                    self.placed[slot] = None
                    ended.append(row)
            yield [row for _, row in seen], ended

    def _check(self, seen: Sequence[tuple[int, Row]]) -> None:
        """Tells the constraints what was drawn, and refuses a row that had nothing left to draw."""
        if self.spec.controls.any:
            for _, row in seen:
                refuse_empty_rows(row.sampler_logps[None, : row.length], [_name(row.request)])
        if self.constrained is not None:
            for _, row in seen:
                self.constrained.advance(row.number, int(row.tokens[row.length - 1]))
                row.satisfied = self.constrained.satisfied(row.number)

    def _admit(self) -> None:
        """Fills free slots from the queue, R at a time."""
        free = [slot for slot, row in enumerate(self.placed) if row is None]
        while self.waiting and len(free) >= self._worth():
            if self.waiting[0].request.key not in self.sources:
                self._prefill()
            assert self.filled is not None
            R = self.sizes.admit
            rows, sources = np.full(R, self.sizes.slots, np.int32), np.zeros(R, np.int32)
            last, positions, limits, prompt_ids, sample_ids = np.zeros((5, R), np.int32)
            penalised = self.spec.controls.repetition_penalty
            seen = np.zeros((R, self.config.vocab_size), bool) if penalised else None
            for i in range(min(R, len(free), len(self.waiting))):
                request = self.waiting[0].request
                if request.key not in self.sources:
                    break
                slot = free.pop(0)
                row = self.placed[slot] = self.waiting.popleft()
                self.begins[slot] = self.length - (request.prompt.size - self.before - 1)
                rows[i], sources[i] = slot, self.sources[request.key]
                last[i], positions[i] = request.prompt[-1], request.prompt.size - 1
                limits[i], prompt_ids[i] = request.max_new_tokens, request.prompt_id
                sample_ids[i] = request.sample_id
                if seen is not None:
                    seen[i, request.prompt] = True
                if self.constrained is not None:
                    self.constrained.start(
                        row.number,
                        request.constraint,
                        name=_name(request),
                        max_new_tokens=request.max_new_tokens,
                    )
            self.slots = place_program(
                self.slots,
                self.filled,
                Entries(rows, sources, last, positions, limits, prompt_ids, sample_ids, seen),
                self.own.scalars,
            )

    def _worth(self) -> int:
        """Free slots that are worth a stop."""
        return min(self.sizes.admit, len(self.waiting), self.sizes.slots)

    def _prefill(self) -> None:
        """The next R prompts of the queue."""
        prompts: dict[bytes, np.ndarray] = {}
        for row in self.waiting:
            if row.request.key not in prompts and len(prompts) == self.sizes.admit:
                break
            prompts[row.request.key] = row.request.prompt
        R, L = self.sizes.admit, self.width
        tokens, mask = np.full((R, L), self.spec.pad_id, np.int32), np.zeros((R, L), bool)
        for i, prompt in enumerate(prompts.values()):
            own = prompt[self.before : -1]
            tokens[i, L - own.size :], mask[i, L - own.size :] = own, True
        self.sources = {key: i for i, key in enumerate(prompts)}
        self.filled = prefill_program(self.own.params, tokens, mask, self.prefix, config=self.config)
        self.own.stats.prefilled += int(mask.sum())

    def _shrink(self) -> None:
        """Halves the slots while nobody waits and half are free: the last, longest rows do not pay for them."""
        while not self.waiting and sum(row is not None for row in self.placed) <= len(self.placed) // 2:
            order = sorted(range(len(self.placed)), key=lambda slot: self.placed[slot] is None)
            kept = order[: len(self.placed) // 2]
            self.slots = shrink_program(self.slots, np.array(kept, np.int32))
            self.placed = [self.placed[slot] for slot in kept]
            self.begins = self.begins[kept]

    def _make_room(self) -> None:
        """Leaves out what no row needs any more, and grows or shrinks the cache to what they do."""
        if self.length < self.slots.cache.slots:
            return
        begins = [self.begins[slot] for slot, row in enumerate(self.placed) if row is not None]
        drop = int(min(*begins, self.length - self.width)) if begins else self.length - self.width
        bucket = self.spec.cache_bucket
        size = _round_up(self.length - drop + (bucket + 1) // 2, bucket)
        self.slots = resize_program(self.slots, np.int32(drop), slots=size)
        self.length, self.begins = self.length - drop, self.begins - drop
        self.own.stats.resizes += 1

    def _decode(self) -> Chunk:
        never = len(self.placed) + 1
        most = min(self.slots.cache.slots - self.length, self.sizes.chunk)
        if self.constrained is not None:
            masks = self.constrained.masks([_FREE if row is None else row.number for row in self.placed])
            self.slots, most = self.slots.replace(allowed=masks), 1
        self.slots, chunk = decode_program(
            self.own.params,
            self.slots,
            self.own.scalars,
            np.int32(self._worth() if self.waiting else never),
            np.int32(most),
            self.own.controls,
            steps=self.sizes.chunk,
            config=self.config,
            spec=self.spec,
        )
        chunk = jax.device_get(chunk)
        steps, stats = int(chunk.active.any(axis=1).sum()), self.own.stats
        self.length += steps
        stats.steps, stats.slot_steps = stats.steps + steps, stats.slot_steps + steps * len(self.placed)
        stats.tokens += int(chunk.active.sum())
        return chunk

    def _act(self, seen: Sequence[tuple[int, Row]]) -> np.ndarray:
        """Which slots go on, after the host has had its say; `[B]` bool."""
        live = np.zeros(len(self.placed), bool)
        for slot, row in enumerate(self.placed):
            if row is not None:
                ended = row.length > 0 and row.mask[row.length - 1]
                row.stopped = bool(ended and row.tokens[row.length - 1] in self.spec.stop_tokens)
                live[slot] = not row.stopped and row.length < row.request.max_new_tokens
        said = self.look([row for _, row in seen]) if self.look is not None and seen else {}
        if not said:
            return live
        given = np.zeros((len(self.placed), self.sizes.give), np.int32)
        left = np.full(len(self.placed), UNCHANGED, np.int32)
        for slot, row in seen:
            action = said.get(row.number)
            if isinstance(action, End):
                live[slot], left[slot], row.length, row.stopped = False, 0, action.keep, True
            elif isinstance(action, Give) and row.length < row.request.max_new_tokens:
                if not 0 < len(action.tokens) <= self.sizes.give:
                    raise ValueError(
                        f"give: got {len(action.tokens)} tokens, expected 1 to {self.sizes.give}"
                    )
                live[slot], row.stopped, left[slot] = True, False, len(action.tokens)
                given[slot, -len(action.tokens) :] = action.tokens
        self.slots = act_program(self.slots, live, given, left)
        return live


def _common_prefix(prompts: Sequence[np.ndarray], multiple: int) -> np.ndarray:
    """The tokens that all prompts begin with, at most all but the last of one, cut to a multiple."""
    first, shortest = prompts[0], min(prompt.size for prompt in prompts) - 1
    if not multiple or len(prompts) == 1:
        return first[:0]
    same = np.all([prompt[:shortest] == first[:shortest] for prompt in prompts], axis=0)
    length = shortest if same.all() else int(same.argmin())
    return first[: length - length % multiple]


_FREE = -1


def _name(request: Request) -> str:
    return f"prompt {request.prompt_id}, sample {request.sample_id}"


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def sample_refilled(
    params: Params,
    prompts: Prompts,
    scalars: SamplerScalars,
    *,
    config: ModelConfig,
    spec: SamplerSpec,
    look: Look | None = None,
) -> tuple[Completions, Stats]:
    """`sampler.sample` with `spec.engine.slots` slots: the same completions, on the host, and what they cost.

    Args:
      params: the model's parameters.
      prompts: left-padded prompts on the host.
      scalars: seed, step, temperature, top_p.
      config: static model description.
      spec: static rollout description, with an engine.
      look: the host's say between chunks.
    """
    G, N = spec.samples_per_prompt, spec.max_new_tokens
    requests = [
        Request(tokens[mask].astype(np.int32), int(prompt_id), sample, N)
        for tokens, mask, prompt_id in zip(prompts.tokens, prompts.mask, prompts.prompt_ids, strict=True)
        for sample in range(G)
    ]
    B = len(requests)
    out = Completions(
        tokens=np.full((B, N), spec.pad_id, np.int32),
        mask=np.zeros((B, N), bool),
        sampler_logps=np.zeros((B, N), np.float32),
        policy_logps=np.zeros((B, N), np.float32),
        stop_reason=np.zeros(B, np.int32),
        lengths=np.zeros(B, np.int32),
    )
    running = Engine(params, scalars, config=config, spec=spec)
    for row in running.run(requests, look):
        here = row.number, slice(0, row.length)
        for name in ("tokens", "mask", "sampler_logps", "policy_logps"):
            getattr(out, name)[here] = getattr(row, name)[: row.length]
        out.stop_reason[row.number], out.lengths[row.number] = row.stop_reason, row.length
    return out, running.stats
