"""Updates that a device may still be computing: known to be done when their metrics are there, watched for skips."""

import io
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from research.core.batch import Batch
from research.core.errors import DivergedError
from research.core.files import write_bytes_atomic

BATCH = "not_finite.npz"
_MOST = 8
"""Updates in flight, whose batches are kept meanwhile; the oldest of more is waited for."""
_COUNTS = ("applied", "skipped", "skipped_in_a_row")
_WHAT = "the loss, its gradient or the update itself"


class _Update(NamedTuple):
    step: int
    batch: Batch
    skipped: Any  # on the device: 1.0 if the update was skipped


class Updates:
    """Dispatched updates, oldest first.

    The host runs ahead of the device. Whether an update was skipped, because its loss or gradient was not finite, is
    therefore read once it is known, which costs no wait.
    """

    def __init__(self, most_skipped: int, folder: Path, say: Callable[[str], None]) -> None:
        """None so far; `most_skipped` in a row may be skipped, and the batch of one more goes to `folder`."""
        self.most_skipped, self.folder, self.say = most_skipped, folder, say
        self.applied = self.skipped = self.skipped_in_a_row = 0
        self._pending: deque[_Update] = deque()
        self._last: _Update | None = None

    def record(self) -> dict[str, int]:
        """The counts, for a checkpoint; call `settle` before."""
        return {name: vars(self)[name] for name in _COUNTS}

    def restore(self, record: Mapping[str, int]) -> None:
        """The inverse of `record`."""
        vars(self).update(record)

    def add(self, step: int, batch: Batch, skipped: Any) -> None:
        """Notes an update that was dispatched; see `settle`."""
        self._pending.append(_Update(step, batch, skipped))
        self.settle(keep=_MOST)

    def oldest(self) -> int | None:
        """The step of the oldest update that is not done, None where all are; waits for nothing."""
        self.settle(keep=_MOST)
        return self._pending[0].step if self._pending else None

    def settle(self, keep: int = 0) -> None:
        """Reads the updates that are done, and waits for all but the last `keep`.

        Raises:
          DivergedError: more than `most_skipped` in a row were skipped.
        """
        while self._pending and (len(self._pending) > keep or self._pending[0].skipped.is_ready()):
            update = self._pending.popleft()
            if not float(update.skipped):
                self.applied, self.skipped_in_a_row = self.applied + 1, 0
                continue
            self.skipped, self.skipped_in_a_row = self.skipped + 1, self.skipped_in_a_row + 1
            if self.skipped_in_a_row == 1:
                self.say(f"step {update.step}: the update is skipped because {_WHAT} is not finite")
            self._last = update
            if self.skipped_in_a_row > self.most_skipped:
                self._give_up(update, f"{self.skipped_in_a_row} updates in a row were skipped")

    def finish(self) -> None:
        """Waits for all; DivergedError if none was applied."""
        self.settle()
        if self._last is not None and not self.applied:
            self._give_up(self._last, f"all {self.skipped} updates were skipped")

    def _give_up(self, update: _Update, what: str) -> None:
        place, buffer = self.folder / BATCH, io.BytesIO()
        leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(update.batch))
        arrays = {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in leaves}
        np.savez(buffer, **arrays)  # type: ignore[arg-type]
        write_bytes_atomic(place, buffer.getvalue())
        raise DivergedError(
            f"step {update.step}: {what} because {_WHAT} is not finite (optimizer.max_skipped={self.most_skipped}); "
            f"the last one's batch is in {place}. A smaller learning_rate or longer warm-up may help."
        )
