"""The rough estimate of a stage's memory: what is held exactly, and what makes it smaller."""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from research.core.mesh import make_mesh
from research.core.state import abstract_state
from research.train.memory import check_memory, memory_needed
from tests.research.train.chain import chain_config, changed


def needed(tmp_path: Path, changes: dict[str, Any], fsdp: int = 1) -> int:
    experiment = changed(chain_config(tmp_path), {"stages": ("sft",), **changes})
    mesh = make_mesh(1, fsdp, 1, devices=jax.devices()[:fsdp])
    return memory_needed(experiment.stages[0], experiment.model_config(128), mesh)


def test_parts_of_a_batch_remat_and_more_devices_need_less(tmp_path: Path) -> None:
    whole = needed(tmp_path, {})
    experiment = changed(chain_config(tmp_path), {"stages": ("sft",)})
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    stage, model = experiment.stages[0], experiment.model_config(128)
    state = abstract_state(model, mesh, stage.rule, "policy")
    bytes_of = lambda tree: sum(int(np.prod(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))  # noqa: E731
    activations = whole - bytes_of(state) - bytes_of(state.params)
    assert activations > 0
    assert whole - needed(tmp_path, {"sft.micro_batches": 4}) == activations * 3 // 4
    assert needed(tmp_path, {"model.remat": "full"}) < whole
    assert needed(tmp_path, {}, fsdp=2) < 0.7 * whole
    check_memory(stage, model, mesh)  # a CPU does not say
