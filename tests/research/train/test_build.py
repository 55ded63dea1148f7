"""From a stage's config to the numbers of its steps."""

from pathlib import Path

import pytest

from research.train.build import optimizer_scalars
from tests.research.train.chain import chain_config, changed


@pytest.mark.parametrize(("epochs", "minibatches", "updates"), [(1, 1, 5), (3, 1, 15), (1, 2, 10), (3, 2, 30)])
def test_the_schedule_spans_every_update(tmp_path: Path, epochs: int, minibatches: int, updates: int) -> None:
    """Of own samples steps * epochs * minibatches; of given data the steps."""
    sizes = {"rl.steps": 5, "rl.rollout.epochs": epochs, "rl.rollout.minibatches": minibatches}
    sft, rl = changed(chain_config(tmp_path), sizes).stages
    assert float(optimizer_scalars(rl).decay_steps) == updates
    assert float(optimizer_scalars(sft).decay_steps) == sft.steps
