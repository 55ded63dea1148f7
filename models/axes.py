"""Logical axis names and the one table that maps them to mesh axes.

Every parameter and activation names its axes logically; the mesh (`data`, `fsdp`, `tensor`) appears here only.
"""

import math

import flax.linen as nn
import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from models.config import ModelConfig

MESH_AXES = ("data", "fsdp", "tensor")

RULES: tuple[tuple[str, str | tuple[str, ...] | None], ...] = (
    ("batch", ("data", "fsdp")),
    ("length", None),
    ("activation_embed", None),
    ("activation_heads", "tensor"),
    ("activation_kv_heads", "tensor"),
    ("activation_mlp", "tensor"),
    ("activation_vocab", "tensor"),
    ("layers", None),
    ("norm", None),
    ("head_dim", None),
    ("vocab", "tensor"),
    ("embed", "fsdp"),
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    ("mlp", "tensor"),
)


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Constrains an array's sharding by logical axes, None for an unsharded one; does nothing outside a mesh."""
    return nn.with_logical_constraint(x, names, rules=RULES)


def param_shardings(boxed: object, mesh: Mesh) -> object:
    """NamedShardings for a tree of parameters boxed with logical names (`Transformer.init`'s output)."""
    return nn.logical_to_mesh_sharding(nn.get_partition_spec(boxed), mesh, RULES)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of an array whose first axis is the batch."""
    return NamedSharding(mesh, nn.logical_to_mesh_axes(("batch",), RULES) or PartitionSpec())


def batch_ways(mesh: Mesh | AbstractMesh) -> int:
    """Number of shards of the batch; 1 where a mesh has no axes."""
    (names,) = (names for name, names in RULES if name == "batch")
    return math.prod(mesh.shape.get(axis, 1) for axis in names or ())


def check_divisible(config: ModelConfig, mesh: Mesh) -> None:
    """Raises ValueError where a sharded axis of the model does not divide over the mesh."""
    sizes = {
        "num_heads": (config.num_heads, "tensor"),
        "num_kv_heads": (config.num_kv_heads, "tensor"),
        "d_ff": (config.d_ff, "tensor"),
        "vocab_size": (config.vocab_size, "tensor"),
        "d_model": (config.d_model, "fsdp"),
    }
    for key, (size, axis) in sizes.items():
        if size % mesh.shape[axis]:
            raise ValueError(
                f"model.{key}: got {size}, expected a multiple of mesh.{axis}={mesh.shape[axis]} "
                f"because this axis is split over it"
            )
