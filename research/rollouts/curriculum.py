"""Curriculum: prompts that the policy always or never solves are left out, by a pass rate that follows the policy.

Such prompts give groups of equal rewards and no gradient. Those outside of a band of pass rates are passed over, except
for a retry now and then, because the policy changes.
"""

import base64
import copy
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import numpy as np

from research.core.errors import CheckpointError, DataError

Batch = Mapping[str, np.ndarray]
"""Prompts of a pipeline: arrays with one row per prompt, `prompt_id` among them."""

_PATIENCE = 4
"""Passes over the data in search of a prompt that is not in the batch yet."""


class PromptIterator(Protocol):
    """What a pipeline's iterator can do: the next batch of prompts; its position, as plain JSON."""

    def __next__(self) -> Batch: ...
    def get_state(self) -> dict[str, Any]: ...
    def set_state(self, state: dict[str, Any]) -> None: ...


class Curriculum:
    """Pass rates of all prompts.

    At each visit with n completions, k of them right: `seen <- decay * seen + n`, `solved <- decay * solved + k`; the
    pass rate is `solved / seen`. A prompt never tried is in the band; the band includes its bounds.

    The band is of measured rates: of G completions at true rate p, `(1 - p)^G` visits look hopeless by chance, so a
    small G wants a larger `retry`.
    """

    def __init__(self, size: int, *, band: tuple[float, float], decay: float = 0.5, retry: float = 0.1) -> None:
        """Nothing tried yet of `size` prompts with ids 0 .. size - 1.

        Args, in [0, 1]:
          band: lowest and highest pass rate.
          decay: weight of earlier visits at each new one; 0 forgets them, 1 never does.
          retry: probability of taking a prompt outside of the band.
        """
        self.size, self.band, self.decay, self.retry = size, band, decay, retry
        self._of = {name: np.zeros(size, "<f8") for name in ("seen", "solved")}

    def pass_rates(self) -> np.ndarray:
        """Float64 decayed pass rates of all prompts; NaN where one was never tried."""
        seen = self._of["seen"]
        return np.where(seen > 0, self._of["solved"] / np.where(seen > 0, seen, 1.0), np.nan)

    def in_band(self) -> np.ndarray:
        """Bool of all prompts; those never tried are in the band."""
        rates = self.pass_rates()
        return np.isnan(rates) | ((rates >= self.band[0]) & (rates <= self.band[1]))

    def update(self, prompt_ids: np.ndarray, correct: np.ndarray) -> None:
        """Adds a visit to each prompt named: `[B]` ids in any order, one per completion, and whether it is right."""
        visited, which, count = np.unique(prompt_ids, return_inverse=True, return_counts=True)
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
        packed = {name: zlib.compress(values.tobytes(), 6) for name, values in self._of.items()}
        return {"size": self.size, **{name: base64.b64encode(data).decode("ascii") for name, data in packed.items()}}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """The inverse of `get_state`; CheckpointError for a state of another number of prompts."""
        if state["size"] != self.size:
            raise CheckpointError(
                f"curriculum: the checkpoint holds {state['size']} prompts, expected the data's {self.size}"
            )
        for name in self._of:  # a buffer of bytes is read-only, hence the copy
            self._of[name] = np.frombuffer(zlib.decompress(base64.b64decode(state[name])), "<f8").copy()


class CurriculumSampler:
    """Full batches of prompts in the band, drawn from an endless iterator of batches; itself such an iterator.

    After `max_skipped` rows were passed over, the batch is filled with any prompts, so that training never stalls. No
    prompt is in a batch twice: its completions would be drawn by the same random numbers. A pure function of (seed,
    source, updates so far); its state is the position in the source and the pass rates, and holds no rows.
    """

    def __init__(
        self, source: PromptIterator, curriculum: Curriculum, *, batch_size: int, max_skipped: int, seed: int
    ) -> None:
        """At the source's position; the caller updates the curriculum after each batch. `seed` is of the retries."""
        self.source, self.curriculum = source, curriculum
        self.batch_size, self.max_skipped, self.seed = batch_size, max_skipped, seed
        self._pulls, self._row = 0, 0  # batches pulled before the current one; rows of that decided
        self._batch: Batch | None = None
        self._before: dict[str, Any] = {}
        self._draws = np.zeros(0)
        self._counts: Counter[str] = Counter()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        """The next full batch; DataError where the source has fewer distinct prompts than that."""
        rows: dict[int, dict[str, np.ndarray]] = {}
        inside = self.curriculum.in_band()
        counts: Counter[str] = Counter()
        while len(rows) < self.batch_size:
            batch, row = self._next_row()
            self._row += 1
            prompt_id = int(batch["prompt_id"][row])
            what = "taken"
            if prompt_id in rows:
                what = "repeated"
                if counts[what] == _PATIENCE * self.curriculum.size:
                    raise DataError(
                        f"curriculum: got {len(rows)} distinct prompts in {_PATIENCE} passes over the data, "
                        f"expected at least batch_size = {self.batch_size}."
                    )
            elif not inside[prompt_id]:
                full = counts["skipped"] == self.max_skipped
                what = "retried" if self._draws[row] < self.curriculum.retry else "forced" if full else "skipped"
            counts[what] += 1
            if what not in ("repeated", "skipped"):
                rows[prompt_id] = {key: values[row] for key, values in batch.items()}
        self._counts = counts
        return {key: np.stack([row[key] for row in rows.values()]) for key in batch}

    def metrics(self) -> dict[str, float]:
        """Of the last batch: rows passed over, retried, and taken because of `max_skipped`; and of the curriculum."""
        counts = {f"curriculum/{what}": float(self._counts[what]) for what in ("skipped", "retried", "forced")}
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
