"""Continuous batching: a fixed number of slots, and the next request takes the slot of a row that has ended.

The host admits requests and calls back between chunks of decode steps; all arithmetic is in compiled programs whose
shapes come from a few buckets. A completion is the one that `sampler.sample` draws, whatever slot it had.

Shapes: B slots, R requests admitted together, L prompt slots, C steps of a chunk.
"""

import dataclasses
from collections import deque
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from models.config import ModelConfig
from models.decode.cache import KVCache
from models.transformer import Params
from research.core.errors import DataError
from research.sampling import programs
from research.sampling.constraints import Grammars
from research.sampling.controls import NO_CONTROLS, Controls
from research.sampling.rows import ForceTokens, Request, Row, RowCallback, StopRow
from research.sampling.sampler import Chunk
from research.sampling.types import Completions, Prompts, SamplerScalars, SamplerSpec


@dataclasses.dataclass
class Stats:
    """What a run of the engine cost."""

    steps: int = 0  # decode steps
    tokens: int = 0  # completion tokens
    slot_steps: int = 0  # steps times slots: `tokens / slot_steps` is the slots' utilisation
    prefilled: int = 0  # prompt tokens that went through the model, a common prefix once

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
        controls: Controls = NO_CONTROLS,
        grammars: Grammars | None = None,
    ) -> None:
        """Lays the parameters out for decoding, once; the arguments are those of `sampler.sample`, and `grammars`.

        `spec` has an engine; its `samples_per_prompt` is not used: each request is one completion.
        """
        if spec.engine is None:
            raise ValueError("spec.engine: got None, expected the sizes of an engine")
        self.params = programs.layout_program(params, config=config, weights=spec.weights)
        self.scalars, self.config, self.spec, self.sizes = scalars, config, spec, spec.engine
        self.controls, self.grammars, self.stats = controls, grammars, Stats()

    def run(self, requests: Sequence[Request], callback: RowCallback | None = None) -> Iterator[Row]:
        """Yields each request's completion when it has ended.

        Requests of one prompt share its prefill if they are adjacent.
        """
        for _, ended in self.chunks(requests, callback):
            yield from ended

    def chunks(
        self, requests: Sequence[Request], callback: RowCallback | None = None
    ) -> Iterator[tuple[list[Row], list[Row]]]:
        """After each chunk of decode steps, the rows with new tokens and those of them that have ended."""
        if requests:
            yield from _Run(self, requests, callback).chunks()


class _Run:
    """One pass over the requests: which row is in which slot, and how far the cache is written."""

    def __init__(self, engine: Engine, requests: Sequence[Request], callback: RowCallback | None) -> None:
        self.engine, self.callback = engine, callback
        self.sizes, self.spec, self.config = engine.sizes, engine.spec, engine.config
        self.penalised = engine.controls.repetition_penalty is not None
        self.waiting = deque(Row(number, request) for number, request in enumerate(requests))
        self.rows: list[Row | None] = [None] * self.sizes.slots
        self.starts = np.zeros(self.sizes.slots, np.int64)  # the first cache slot of each row
        shared = _common_prefix([request.prompt for request in requests], self.sizes.min_prefix)
        self.before = shared.size
        self.prefix = self._prefilled(shared[None], np.ones((1, shared.size), bool), None) if shared.size else None
        longest = max(request.prompt.size for request in requests) - self.before - 1
        self.width = self.length = _round_up(longest, self.sizes.prompt_bucket)  # `length` is the next cache slot
        self.slots = programs.empty_slots(
            self.prefix,
            length=self.width,
            config=self.config,
            sizes=self.sizes,
            int8=self.spec.int8_cache,
            penalised=self.penalised,
        )
        self.sources: dict[bytes, int] = {}  # a prompt's key -> its row in `filled`
        self.filled: KVCache | None = None

    def chunks(self) -> Iterator[tuple[list[Row], list[Row]]]:
        while self.waiting or any(self.rows):
            self._admit()
            self._shrink()
            self._make_room()
            chunk = self._decode()
            grown = [(slot, row) for slot, row in self._busy() if row.extend(chunk, slot)]
            for _, row in grown:
                self._check(row)
            live = self._act(grown)
            ended = [row for slot, row in self._busy() if not live[slot]]
            self.rows = [row if goes_on else None for row, goes_on in zip(self.rows, live, strict=True)]
            yield [row for _, row in grown], ended

    def _busy(self) -> list[tuple[int, Row]]:
        return [(slot, row) for slot, row in enumerate(self.rows) if row is not None]

    def _check(self, row: Row) -> None:
        """Tells the constraint what was drawn, and refuses a row that had nothing left to draw."""
        empty = np.flatnonzero(np.isneginf(row.sampler_logps[: row.length]))
        if empty.size:
            raise DataError(
                f"{row.request}: no token was left to draw at completion token {empty[0]}: logit_bias, min_new_tokens "
                "and the constraint together removed all of them."
            )
        if self.engine.grammars is not None:
            self.engine.grammars.advance(row)

    def _admit(self) -> None:
        """Fills free slots from the queue, R at a time."""
        free = [slot for slot, row in enumerate(self.rows) if row is None]
        R = self.sizes.admit
        while self.waiting and len(free) >= self._enough():
            if self.waiting[0].request.key not in self.sources:
                self._prefill()
            assert self.filled is not None
            new = np.zeros((7, R), np.int32)
            new[0] = self.sizes.slots
            seen = np.zeros((R, self.config.vocab_size), bool) if self.penalised else None
            for i in range(min(R, len(free), len(self.waiting))):
                request = self.waiting[0].request
                if request.key not in self.sources:
                    break
                slot, row, source = free.pop(0), self.waiting.popleft(), self.sources[request.key]
                self.rows[slot] = row
                position, limit = request.prompt.size - 1, request.max_new_tokens
                self.starts[slot] = self.length - (position - self.before)
                new[:, i] = slot, source, request.prompt[-1], position, limit, request.prompt_id, request.sample_id
                if seen is not None:
                    seen[i, request.prompt] = True
                if self.engine.grammars is not None and request.constraint is not None:
                    row.matcher = self.engine.grammars.matcher(request.constraint, limit)
            self.slots = programs.admit_program(self.slots, self.filled, new, seen, self.engine.scalars)

    def _enough(self) -> int:
        """Free slots for which decoding is interrupted to admit requests."""
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
        self.filled = self._prefilled(tokens, mask, self.prefix)

    def _prefilled(self, tokens: np.ndarray, mask: np.ndarray, prefix: KVCache | None) -> KVCache:
        self.engine.stats.prefilled += int(mask.sum())
        return programs.prefill_program(self.engine.params, tokens, mask, prefix=prefix, config=self.config)

    def _shrink(self) -> None:
        """Halve the slots once at most half are busy and the queue is empty, so stragglers run in a smaller batch."""
        while not self.waiting and len(self._busy()) <= (half := len(self.rows) // 2):
            kept = sorted(range(len(self.rows)), key=lambda slot: self.rows[slot] is None)[:half]
            self.slots = programs.shrink_program(self.slots, np.array(kept, np.int32))
            self.rows = [self.rows[slot] for slot in kept]
            self.starts = self.starts[kept]

    def _make_room(self) -> None:
        """Drops the cache's first slots that no row needs any more, and grows or shrinks it to what they do need."""
        if self.length < self.slots.cache.slots:
            return
        drop = min([self.length - self.width, *(int(self.starts[slot]) for slot, _ in self._busy())])
        bucket = self.spec.cache_bucket
        size = _round_up(self.length - drop + (bucket + 1) // 2, bucket)
        self.slots = programs.resize_program(self.slots, np.int32(drop), slots=size)
        self.length, self.starts = self.length - drop, self.starts - drop

    def _decode(self) -> Chunk:
        disabled = len(self.rows) + 1
        most = min(self.slots.cache.slots - self.length, self.sizes.chunk)
        if self.engine.grammars is not None:
            self.slots, most = self.slots.replace(allowed=self.engine.grammars.masks(self.rows)), 1
        self.slots, chunk = programs.decode_program(
            self.engine.params,
            self.slots,
            self.engine.scalars,
            np.int32(self._enough() if self.waiting else disabled),
            np.int32(most),
            self.engine.controls,
            steps=self.sizes.chunk,
            config=self.config,
            spec=self.spec,
        )
        chunk = jax.device_get(chunk)
        steps, stats = int(chunk.active.any(axis=1).sum()), self.engine.stats
        self.length += steps
        stats.steps += steps
        stats.slot_steps += steps * len(self.rows)
        stats.tokens += int(chunk.active.sum())
        return chunk

    def _act(self, grown: Sequence[tuple[int, Row]]) -> np.ndarray:
        """Which slots go on, `[B]` bool, after the callback's actions."""
        live = np.zeros(len(self.rows), bool)
        for slot, row in self._busy():
            drawn = row.length > 0 and row.mask[row.length - 1]
            row.stopped = bool(drawn and row.tokens[row.length - 1] in self.spec.stop_tokens)
            live[slot] = not row.stopped and row.length < row.request.max_new_tokens
        actions = self.callback([row for _, row in grown]) if self.callback is not None and grown else {}
        if not actions:
            return live
        M = self.sizes.max_forced
        forced, left = np.zeros((len(self.rows), M), np.int32), np.full(len(self.rows), programs.UNCHANGED, np.int32)
        for slot, row in grown:
            match actions.get(row.number):
                case StopRow(keep):
                    live[slot], left[slot], row.length, row.stopped = False, 0, keep, True
                case ForceTokens(tokens) if row.length < row.request.max_new_tokens:
                    if not 0 < len(tokens) <= M:
                        raise ValueError(f"forced tokens: got {len(tokens)} tokens, expected 1 to {M}")
                    live[slot], row.stopped, left[slot] = True, False, len(tokens)
                    forced[slot, -len(tokens) :] = tokens
        self.slots = programs.act_program(self.slots, live, forced, left)
        return live


def _common_prefix(prompts: Sequence[np.ndarray], multiple: int) -> np.ndarray:
    """The tokens that all prompts begin with, at most all but the last of one, cut to a multiple."""
    first, shortest = prompts[0], min(prompt.size for prompt in prompts) - 1
    if not multiple or len(prompts) == 1:
        return first[:0]
    same = np.all([prompt[:shortest] == first[:shortest] for prompt in prompts], axis=0)
    length = shortest if same.all() else int(same.argmin())
    return first[: length - length % multiple]


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def sample_refilled(
    params: Params,
    prompts: Prompts,
    scalars: SamplerScalars,
    *,
    config: ModelConfig,
    spec: SamplerSpec,
    callback: RowCallback | None = None,
) -> tuple[Completions, Stats]:
    """`sampler.sample` by an engine (`spec.engine`): the same completions, on the host, and what they cost.

    Prompts at the end whose id is -1 only fill the batch: their completions have no tokens.
    """
    G, N = spec.samples_per_prompt, spec.max_new_tokens
    requests = [
        Request(tokens[mask].astype(np.int32), int(prompt_id), sample, N)
        for tokens, mask, prompt_id in zip(prompts.tokens, prompts.mask, prompts.prompt_ids, strict=True)
        for sample in range(G)
        if prompt_id >= 0
    ]
    B = len(prompts.tokens) * G
    out = Completions(
        tokens=np.full((B, N), spec.pad_id, np.int32),
        mask=np.zeros((B, N), bool),
        sampler_logps=np.zeros((B, N), np.float32),
        policy_logps=np.zeros((B, N), np.float32),
        stop_reason=np.zeros(B, np.int32),
        lengths=np.zeros(B, np.int32),
    )
    running = Engine(params, scalars, config=config, spec=spec)
    for row in running.run(requests, callback):
        here = row.number, slice(0, row.length)
        for name in ("tokens", "mask", "sampler_logps", "policy_logps"):
            getattr(out, name)[here] = getattr(row, name)[: row.length]
        out.stop_reason[row.number], out.lengths[row.number] = row.stop_reason, row.length
    return out, running.stats
