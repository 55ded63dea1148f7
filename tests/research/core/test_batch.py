"""Parts of a batch, and the step of rows that share prompts."""

import jax
import numpy as np
import pytest

from models.axes import MESH_AXES
from models.groups import Group
from research.algorithms.base import completion_rows
from research.algorithms.grpo import GRPO
from research.core.batch import RolloutBatch, SequenceBatch, split_batch
from research.core.mesh import make_mesh, to_device
from research.train.step import train_step
from tests.research.algorithms.toy import MODEL, host_batch, one_device, rows, step_scalars, toy_state

ROWS = 8
PROMPT = 2


def numbered(group_size: int) -> SequenceBatch:
    """Rows whose weights are their numbers."""
    batch = rows().replace(first_target=PROMPT, group_size=group_size)
    return batch.replace(weights=np.arange(ROWS, dtype=np.float32))


@pytest.mark.parametrize(
    ("group_size", "parts", "expected"),
    [(1, 2, [[0, 2, 4, 6], [1, 3, 5, 7]]), (2, 2, [[0, 1, 4, 5], [2, 3, 6, 7]]), (4, 2, [[0, 1, 2, 3], [4, 5, 6, 7]])],
)
def test_parts_hold_whole_groups(group_size: int, parts: int, expected: list[list[int]]) -> None:
    found = split_batch(numbered(group_size), parts)
    np.testing.assert_array_equal(found.weights, expected)
    np.testing.assert_array_equal(found.tokens[0], numbered(group_size).tokens[expected[0]])
    assert found.group == (Group(group_size, PROMPT) if group_size > 1 else None)


def test_a_group_has_one_prompt() -> None:
    prompts, mask = np.array([[4, 5], [4, 5], [6, 7], [6, 8]], np.int32), np.ones((4, 2), bool)
    completions, real = np.full((4, 3), 9, np.int32), np.ones((4, 3), bool)
    completion_rows(prompts, mask, completions, real, np.ones(4))
    with pytest.raises(ValueError, match="prompt_tokens: row 3 differs from the first of its group of 2"):
        completion_rows(prompts, mask, completions, real, np.ones(4), group_size=2)


def test_groups_that_a_part_cannot_hold_stop_sharing() -> None:
    found = split_batch(numbered(4), 4)
    np.testing.assert_array_equal(found.weights, [[0, 4], [1, 5], [2, 6], [3, 7]])
    assert found.group is None
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((2, 1, 1), MESH_AXES)):
        assert split_batch(numbered(2), 2).group is not None
        assert split_batch(numbered(4), 2).group is None


@pytest.mark.parametrize(
    ("devices", "micro_batches"),
    [pytest.param(1, 1, marks=pytest.mark.slow), (1, 2), pytest.param(2, 1, marks=pytest.mark.slow), (2, 2)],
)
def test_a_step_on_groups_is_that_on_rows_apart(devices: int, micro_batches: int) -> None:
    algorithm = GRPO(group_size=2, max_new_tokens=8)
    batch = host_batch(algorithm)
    assert isinstance(batch, RolloutBatch)
    apart = batch.sequences
    tokens, mask = apart.tokens.copy(), apart.loss_mask.copy()
    tokens[:, :PROMPT], mask[:, :PROMPT] = np.repeat(tokens[::2, :PROMPT], 2, axis=0), False
    apart = apart.replace(tokens=tokens, loss_mask=mask, first_target=PROMPT)

    def stepped(sequences: SequenceBatch, devices: int, micro_batches: int) -> list[np.ndarray]:
        mesh = make_mesh(devices, 1, 1, devices=jax.devices()[:devices]) if devices > 1 else one_device()
        with jax.set_mesh(mesh):
            state, metrics = train_step(
                toy_state(mesh, algorithm.layout),
                to_device(mesh, batch.replace(sequences=sequences)),
                step_scalars(algorithm),
                algorithm=algorithm,
                config=MODEL,
                micro_batches=micro_batches,
            )
        return [np.asarray(leaf) for leaf in jax.tree.leaves(jax.device_get((state, metrics)))]

    found = stepped(apart.replace(group_size=2), devices, micro_batches)
    for got, want in zip(found, stepped(apart, 1, 1), strict=True):
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-6)
