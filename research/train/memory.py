"""A rough estimate of a stage's memory, to warn of one that will not fit before it has compiled."""

import jax
import numpy as np
from jax.sharding import Mesh

from models.config import ModelConfig
from research.config.experiment import Stage
from research.core.progress import say
from research.core.state import abstract_state


def check_memory(stage: Stage, model: ModelConfig, mesh: Mesh) -> None:
    """Warns of a stage that will hardly fit, where the device says how much it has (CPUs do not)."""
    there = (mesh.devices.flat[0].memory_stats() or {}).get("bytes_limit")
    needed = memory_needed(stage, model, mesh)
    if there is not None and needed > there:
        say(
            f"{stage.name}: about {needed / 2**30:.1f} GiB a device are needed (parameters, optimizer, activations), "
            f"and {there / 2**30:.1f} GiB are there: more micro_batches, model.remat or mesh.fsdp need less"
        )


def memory_needed(stage: Stage, model: ModelConfig, mesh: Mesh) -> int:
    """Bytes a device of a stage's training: state, gradients in float32, activations of one micro-batch.

    Activations are counted as the tensors of a layer that the backward pass keeps: without `remat` about 10 of width D,
    6 of width F and 2 of the heads' width a token; with it, D a layer. Frozen models and the sampler's cache come
    on top.
    """
    state = abstract_state(model, mesh, stage.rule, stage.facts.trains)
    held = sum(_shard_bytes(leaf) for leaf in jax.tree.leaves(state))
    gradients = sum(_shard_bytes(leaf) for leaf in jax.tree.leaves(state.params))
    how = stage.rollout
    length = how.max_prompt_length + how.max_new_tokens if stage.online else stage.length
    updates = how.minibatches if stage.online else 1
    tokens = stage.rows * length // (updates * stage.micro_batches)
    split = mesh.shape["data"] * mesh.shape["fsdp"]
    heads = 2 * (model.num_heads + model.num_kv_heads) * model.head_dim
    kept = 10 * model.d_model + 6 * model.d_ff + heads if model.remat == "none" else model.d_model
    width = np.dtype(model.compute_dtype).itemsize
    return held + gradients + tokens * model.num_layers * kept * width // split


def _shard_bytes(leaf: jax.ShapeDtypeStruct) -> int:
    shape = leaf.sharding.shard_shape(leaf.shape) if leaf.sharding is not None else leaf.shape
    return int(np.prod(shape)) * leaf.dtype.itemsize
