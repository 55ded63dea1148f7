"""Updates that were skipped: counted in their order, once they are known, and not without end."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from research.core.errors import DivergedError
from research.train.updates import BATCH, Updates


class Later:
    """A flag on a device, there when it is told so."""

    def __init__(self, value: float, ready: bool = True) -> None:
        self.value, self.ready = value, ready

    def is_ready(self) -> bool:
        return self.ready

    def __float__(self) -> float:
        return float(self.value)


def batch(step: int) -> Any:
    return {"tokens": np.full((2, 3), step)}


def fed(folder: Path, skips: list[int], most: int = 2) -> tuple[Updates, list[str]]:
    said: list[str] = []
    updates = Updates(most, folder, said.append)
    for step, skip in enumerate(skips, 1):
        updates.add(step, batch(step), Later(skip))
    return updates, said


def test_only_a_row_of_skips_stops_the_run(tmp_path: Path) -> None:
    updates, said = fed(tmp_path, [1, 1, 0, 1, 1, 0, 1])
    assert updates.record() == {"applied": 2, "skipped": 5, "skipped_in_a_row": 1}
    assert [line.split(":")[0] for line in said] == ["step 1", "step 4", "step 7"]
    updates.finish()
    with pytest.raises(DivergedError, match="step 4: 3 updates in a row were skipped"):
        fed(tmp_path, [0, 1, 1, 1])
    assert np.load(tmp_path / BATCH)["tokens"].tolist() == [[4, 4, 4]] * 2


def test_a_resumed_run_goes_on_counting(tmp_path: Path) -> None:
    updates = Updates(2, tmp_path, lambda _: None)
    updates.restore(fed(tmp_path, [0, 1, 1])[0].record())
    with pytest.raises(DivergedError, match="step 4: 3 updates in a row"):
        updates.add(4, batch(4), Later(1))


def test_zero_allows_none(tmp_path: Path) -> None:
    with pytest.raises(DivergedError, match="step 2: 1 updates in a row"):
        fed(tmp_path, [0, 1], most=0)


def test_nothing_is_waited_for_but_the_oldest_of_many(tmp_path: Path) -> None:
    updates = Updates(5, tmp_path, lambda _: None)
    flags = [Later(0, ready=False) for _ in range(12)]
    for step, flag in enumerate(flags, 1):
        updates.add(step, SimpleNamespace(), flag)
    assert updates.applied == 4 and updates.oldest() == 5
    flags[4].ready = True
    assert updates.oldest() == 6
    updates.settle()
    assert updates.applied == 12 and updates.oldest() is None
