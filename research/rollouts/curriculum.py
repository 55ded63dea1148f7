"""Curriculum: prompts that the policy always or never solves are left out, by a pass rate that follows the policy.

Such prompts give groups of equal rewards and no gradient. Those outside of a band of pass rates are passed over, except
for a retry now and then, because the policy changes.
"""

import base64
import copy
import zlib
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import numpy as np

from research.core.errors import CheckpointError, DataError

Batch = Mapping[str, np.ndarray]
"""Prompts of a pipeline: arrays with one row per prompt, `prompt_id` among them."""

_COUNTS = ("skipped", "retried", "forced")
_ARRAYS = ("seen", "solved")
_PATIENCE = 4
"""Passes over the data in search of a prompt that is not in the batch yet."""


class PromptIterator(Protocol):
    """What a pipeline's iterator can do."""

    def __next__(self) -> Batch:
        """The next batch of prompts."""

    def get_state(self) -> dict[str, Any]:
        """Its position, as plain JSON."""

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to a position."""


class Curriculum:
    """Pass rates of all prompts.

    At each visit with n completions, k of them right: `seen <- decay * seen + n`, `solved <- decay * solved + k`; the
    pass rate is `solved / seen`. A prompt never tried is in the band; the band includes its bounds.

    The band is of measured rates: of G completions at true rate p, `(1 - p)^G` visits look hopeless by chance, so a
    small G wants a larger `retry`.
    """

    def __init__(self, size: int, *, band: tuple[float, float], decay: float = 0.5, retry: float = 0.1) -> None:
        """Nothing tried yet.

        Args:
          size: number of prompts; their ids are 0 .. size - 1.
          band: lowest and highest pass rate, in [0, 1].
          decay: weight of earlier visits at each new one, in [0, 1]; 0 forgets them, 1 never does.
          retry: probability of taking a prompt outside of the band, in [0, 1].
        """
        self.size, self.band, self.decay, self.retry = size, band, decay, retry
        self._of = {name: np.zeros(size, "<f8") for name in _ARRAYS}

    def pass_rates(self, prompt_ids: np.ndarray | None = None) -> np.ndarray:
        """Float64 decayed pass rates, of all prompts unless told of which; NaN where one was never tried."""
        ids = slice(None) if prompt_ids is None else self._checked(prompt_ids)
        seen, solved = self._of["seen"][ids], self._of["solved"][ids]
        return np.where(seen > 0, solved / np.where(seen > 0, seen, 1.0), np.nan)

    def in_band(self, prompt_ids: np.ndarray | None = None) -> np.ndarray:
        """Bool, of all prompts unless told of which; prompts never tried are in the band."""
        rates = self.pass_rates(prompt_ids)
        return np.isnan(rates) | ((rates >= self.band[0]) & (rates <= self.band[1]))

    def update(self, prompt_ids: np.ndarray, correct: np.ndarray) -> None:
        """Adds a visit to each prompt named, an id per completion.

        Args:
          prompt_ids: `[B]`, in any order.
          correct: `[B]` bool.

        Raises:
          ValueError: the lengths differ, or an id is out of range.
        """
        ids, correct = self._checked(prompt_ids), np.asarray(correct, bool)
        if ids.shape != correct.shape:
            raise ValueError(f"correct: got shape {correct.shape}, expected {ids.shape} as prompt_ids")
        visited, which, count = np.unique(ids, return_inverse=True, return_counts=True)
        right = np.bincount(which, weights=correct, minlength=len(visited))
        for name, new in (("seen", count), ("solved", right)):
            self._of[name][visited] = self.decay * self._of[name][visited] + new

    def metrics(self) -> dict[str, float]:
        """Share of the prompts that was tried, and the share of these in the band."""
        tried = self._of["seen"] > 0
        inside = float(self.in_band()[tried].mean()) if tried.any() else 1.0
        return {"curriculum/tried_fraction": float(tried.mean()), "curriculum/in_band_fraction": inside}

    def get_state(self) -> dict[str, Any]:
        """Plain JSON for the checkpoint: compressed little-endian arrays in base64, under 1 MB at 1e5 prompts."""
        state: dict[str, Any] = {"size": self.size}
        for name, values in self._of.items():
            state[name] = base64.b64encode(zlib.compress(values.tobytes(), 6)).decode("ascii")
        return state

    def set_state(self, state: Mapping[str, Any]) -> None:
        """The inverse of `get_state`.

        Raises:
          CheckpointError: the state is of another number of prompts, or damaged.
        """
        if state["size"] != self.size:
            raise CheckpointError(
                f"curriculum: the checkpoint holds {state['size']} prompts, expected the data's {self.size}"
            )
        for name in _ARRAYS:
            try:
                data = zlib.decompress(base64.b64decode(state[name], validate=True))
                values = np.frombuffer(data, "<f8")
            except (ValueError, zlib.error) as error:
                raise CheckpointError(f"curriculum: {name} cannot be read ({error})") from error
            if len(values) != self.size:
                raise CheckpointError(f"curriculum: got {len(values)} {name}, expected {self.size}")
            self._of[name] = values.copy()  # a buffer of bytes is read-only

    def _checked(self, prompt_ids: np.ndarray) -> np.ndarray:
        ids = np.asarray(prompt_ids, np.int64)
        if ids.size and not (ids.min() >= 0 and ids.max() < self.size):
            raise ValueError(f"prompt_ids: got {ids.min()} .. {ids.max()}, expected within 0 .. {self.size - 1}")
        return ids


class CurriculumSampler:
    """Full batches of prompts in the band, drawn from an endless iterator of batches; itself such an iterator.

    Each row is decided by the pass rates at that moment. After `max_skipped` rows were passed over, the batch is
    filled with any prompts, so that training never stalls. No prompt is in a batch twice: its completions would be
    drawn by the same random numbers.

    A pure function of (seed, source, updates so far); its state is the position in the source and the pass rates, and
    holds no rows.
    """

    def __init__(
        self, source: PromptIterator, curriculum: Curriculum, *, batch_size: int, max_skipped: int, seed: int
    ) -> None:
        """At the source's position.

        Args:
          source: batches of prompts, of any one size.
          curriculum: the pass rates; the caller updates them after each batch.
          batch_size: prompts in a batch that comes out, >= 1.
          max_skipped: rows that filling one batch may pass over, >= 0.
          seed: of the retries, >= 0.
        """
        self.source, self.curriculum = source, curriculum
        self.batch_size, self.max_skipped, self.seed = batch_size, max_skipped, seed
        self._pulls, self._row = 0, 0  # batches pulled before the current one; rows of that decided
        self._batch: Batch | None = None
        self._before: dict[str, Any] = {}
        self._draws = np.zeros(0)
        self._counts = dict.fromkeys(_COUNTS, 0)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        """The next full batch.

        Raises:
          DataError: the source has fewer distinct prompts than a batch.
          StopIteration: the source ended.
        """
        rows: list[dict[str, np.ndarray]] = []
        taken: set[int] = set()
        repeats = 0
        counts = dict.fromkeys(_COUNTS, 0)
        while len(rows) < self.batch_size:
            batch, row = self._next_row()
            self._row += 1
            prompt_id = int(batch["prompt_id"][row])
            if prompt_id in taken:
                repeats += 1
                if repeats > _PATIENCE * self.curriculum.size:
                    raise DataError(
                        f"curriculum: got {len(taken)} distinct prompts in {_PATIENCE} passes over the data, "
                        f"expected at least batch_size = {self.batch_size}."
                    )
                continue
            if not self.curriculum.in_band(np.array([prompt_id]))[0]:
                retried = self._draws[row] < self.curriculum.retry
                full = counts["skipped"] == self.max_skipped
                what = "retried" if retried else "forced" if full else "skipped"
                counts[what] += 1
                if what == "skipped":
                    continue
            taken.add(prompt_id)
            rows.append({key: values[row] for key, values in batch.items()})
        self._counts = counts
        return {key: np.stack([row[key] for row in rows]) for key in rows[0]}

    def metrics(self) -> dict[str, float]:
        """Of the last batch: rows passed over, retried, and taken because of `max_skipped`; and of the curriculum."""
        counts = {f"curriculum/{name}": float(count) for name, count in self._counts.items()}
        return {**counts, **self.curriculum.metrics()}

    def get_state(self) -> dict[str, Any]:
        """Plain JSON: position and curriculum."""
        source = self.source.get_state() if self._batch is None else self._before
        return {"source": source, "pulls": self._pulls, "row": self._row, "curriculum": self.curriculum.get_state()}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """The inverse of `get_state`."""
        self.curriculum.set_state(state["curriculum"])
        self.source.set_state(state["source"])
        self._pulls, self._row, self._batch = int(state["pulls"]), int(state["row"]), None

    def _next_row(self) -> tuple[Batch, int]:
        """The batch that the next row is in, and which row of it."""
        while self._batch is None or self._row == len(self._batch["prompt_id"]):
            if self._batch is not None:
                self._batch, self._row, self._pulls = None, 0, self._pulls + 1
            self._before = copy.deepcopy(self.source.get_state())
            self._batch = next(self.source)
            count = len(self._batch["prompt_id"])
            self._draws = np.random.default_rng((self.seed, self._pulls)).random(count)
        return self._batch, self._row
