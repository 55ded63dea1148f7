"""Groups of completions of one prompt, with the prompt's positions computed once a group.

A group is folded into one long row: the prompt, then every completion. Only attention needs the separate rows
(`models.kernels.attention`).

Shapes: P groups of G adjacent rows, B = P * G rows, L prompt slots, N completion slots, T = L + N, U = L + G * N.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped

from models.axes import batch_ways


class Group(NamedTuple):
    """G rows whose first L slots are equal, padding included."""

    size: int  # G
    prompt: int  # L


def fold(rows: Shaped[Array, "B T ..."], group: Group) -> Shaped[Array, "P U ..."]:
    """Each group as one row: the prompt of its first row, then every row's completion."""
    G, L = group
    first, rest = rows[::G, :L], rows[:, L:]
    return jnp.concatenate([first, rest.reshape(len(first), -1, *rows.shape[2:])], axis=1)


def unfold(folded: Shaped[Array, "P U ..."], group: Group) -> Shaped[Array, "B T ..."]:
    """Undoes `fold`: each row with its group's prompt."""
    G, L = group
    P, tail = len(folded), folded.shape[2:]
    first = jnp.broadcast_to(folded[:, None, :L], (P, G, L, *tail))
    rest = folded[:, L:].reshape(P, G, -1, *tail)
    return jnp.concatenate([first, rest], axis=2).reshape(P * G, -1, *tail)


def groups_split(rows: int, size: int) -> bool:
    """Whether each device of the mesh in use holds whole groups of the `rows`."""
    return rows % (size * batch_ways(jax.sharding.get_abstract_mesh())) == 0
