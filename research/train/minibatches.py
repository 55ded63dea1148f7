"""Mini-batches of an iteration's samples: several optimizer steps a pass over them."""

from collections.abc import Iterator
from functools import partial

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Int

from models.axes import batch_sharding
from research.core.batch import Batch, rows_of


def mini_batches(
    host: Batch, prepared: Batch, mesh: Mesh, *, parts: int, seed: tuple[int, int, int]
) -> Iterator[tuple[Batch, Batch]]:
    """One pass over a batch in random order, in `parts` parts of equal size.

    Yields each part's rows of `host`, from which what an update spends is counted, and of `prepared`, split over the
    mesh again: what `prepare` has computed on the whole batch goes along with its row. The parts depend on the seed,
    (run seed, iteration, pass), and not on the mesh; 1 part is the batch as it is.
    """
    if parts == 1:
        yield host, prepared
        return
    rows = rows_of(host)[0]
    for chosen in permuted_rows(len(rows.weights), rows.group_size, parts, seed):
        yield jax.tree.map(lambda x, chosen=chosen: x[chosen], host), _take(prepared, chosen, batch_sharding(mesh))


def permuted_rows(rows: int, group_size: int, parts: int, seed: tuple[int, int, int]) -> Int[np.ndarray, "parts rows"]:
    """Row numbers `[parts, rows / parts]` of each mini-batch: groups of adjacent rows are permuted and stay whole.

    Raises:
      ValueError: the groups do not divide into so many parts.
    """
    groups = rows // group_size
    if groups % parts:
        raise ValueError(f"minibatches: got {parts}, expected a divisor of the batch's {groups} groups")
    run_seed, step, epoch = seed
    # `+ 1` because a seed sequence of (a, b, 0) equals that of (a, b), from which the loop draws too.
    order = np.random.default_rng(np.random.SeedSequence((run_seed, step, epoch + 1))).permutation(groups)
    return (order[:, None] * group_size + np.arange(group_size)).reshape(parts, -1)


@partial(jax.jit, static_argnames="sharding")
def _take(batch: Batch, rows: Int[np.ndarray, " rows"], sharding: NamedSharding) -> Batch:
    """Those rows of every leaf, split over the devices as the batch is."""
    taken: Batch = jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x[rows], sharding), batch)
    return taken
