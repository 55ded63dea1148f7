"""Rows in groups that share a prompt: position by position, the prompt is computed once a group.

A group is laid out as one long row, its prompt and then what follows it in each of its rows. Only attention needs
the rows themselves (`models.kernels.attention`).

Shapes: P groups of G adjacent rows, B = P * G rows, L prompt slots, N slots after them, T = L + N, U = L + G * N.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped

from models.axes import batch_ways


class Group(NamedTuple):
    """G rows that are equal, padding included, in their first L slots.

    Attributes:
      size: G.
      prompt: L.
    """

    size: int
    prompt: int


def fold(rows: Shaped[Array, "B T ..."], group: Group) -> Shaped[Array, "P U ..."]:
    """Each group as one row: the first one's prompt, then the rest of every row."""
    G, L = group
    first, rest = rows[::G, :L], rows[:, L:]
    return jnp.concatenate([first, rest.reshape(len(first), -1, *rows.shape[2:])], axis=1)


def unfold(folded: Shaped[Array, "P U ..."], group: Group) -> Shaped[Array, "B T ..."]:
    """The rows again; each has its group's prompt."""
    G, L = group
    P, tail = len(folded), folded.shape[2:]
    first = jnp.broadcast_to(folded[:, None, :L], (P, G, L, *tail))
    rest = folded[:, L:].reshape(P, G, -1, *tail)
    return jnp.concatenate([first, rest], axis=2).reshape(P * G, -1, *tail)


def groups_split(rows: int, size: int) -> bool:
    """Whether `rows` are whole groups on every device of the mesh in use, so that no prompt is needed on two."""
    return rows % (size * batch_ways(jax.sharding.get_abstract_mesh())) == 0
