"""Stages of models whose next token depends on the last one alone, so that their texts are known."""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from experiments import test_time_compute
from research.config.experiment import make_model
from research.config.resolve import resolve
from research.config.tree import to_json
from research.core.checkpoint import Checkpointer
from research.core.files import write_json_atomic
from research.core.mesh import make_mesh
from research.core.state import abstract_params
from research.data.tokenizer import Tokenizer, train_tokenizer
from research.train import stored
from tests.experiments.toy import shrink

TEXT = 'The quick brown fox jumps over lazy dogs, 0123456789! {"name": "Bob", "age": 3} true false null\n'
STRONG = 40.0


def small_tokenizer(folder: Path, vocab_size: int = 340) -> Tokenizer:
    """340 pieces with byte fallback."""
    return train_tokenizer([TEXT * 3], vocab_size=vocab_size, path=folder / "bpe.model")


@contextmanager
def one_device() -> Iterator[None]:
    """Policies are loaded onto one device: programs for eight take longer to compile, and users have one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stored, "make_mesh", lambda *_: make_mesh(1, 1, 1, devices=jax.devices()[:1]))
        yield


def table_of(tokenizer: Tokenizer, *chains: tuple[str, ...]) -> np.ndarray:
    """Logits `[V, V]` of the next token by the last: small noise, and each chain's next piece almost certain."""
    table = np.random.default_rng(0).normal(0, 1, (tokenizer.vocab_size,) * 2)
    for links in chains:
        for last, following in zip(links, links[1:], strict=False):
            table[tokenizer.piece_id(last), tokenizer.piece_id(following)] = STRONG
    return table.astype(np.float32)


def write_stage(folder: Path, tokenizer: Tokenizer, name: str, table: np.ndarray, tools: tuple[str, ...] = ()) -> Path:
    """A finished stage: blocks that add nothing, an embedding of one-hot rows, the table as read-out.

    A scorer's score is the sum over the last token's row of the table. `tools` are those of its config.
    """
    V = tokenizer.vocab_size
    folder.mkdir(parents=True)
    config = shrink(test_time_compute.get_config(), folder.parent)
    config.stages = ("sft", "reward", "prm")
    for section, length in (("model", 64), ("teacher_model", 1024)):
        sizes = {"num_layers": 1, "d_model": V, "num_heads": 1, "num_kv_heads": 1, "head_dim": 2, "d_ff": 2}
        config[section].update({**sizes, "tie_embeddings": False, "max_length": length})
    for stage in ("sft", "reward", "prm"):
        config[stage].model = "teacher_model"  # its context counts, not that of the section `model`
    if tools:
        config.tools.names, config.sampler.slots = tools, 4
    experiment = resolve(config)
    write_json_atomic(folder / "experiment.json", {"stage": name, **to_json(experiment.tree)})
    tokenizer.save(folder / "tokenizer.model")
    layout = stored.load_stage(folder).algorithm.layout
    model = make_model(experiment.models["teacher_model"], V)
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])

    def fill(path: Any, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        key = jax.tree_util.keystr(path)
        if "unembed" in key:
            return table / np.sqrt(V)
        if "embed" in key:
            return np.eye(V, dtype=np.float32)
        if "scale" in key:
            return np.ones(leaf.shape, np.float32)
        if leaf.ndim == 2 and leaf.shape[0] == V:  # a scorer's head
            return np.repeat(table.sum(axis=1, keepdims=True), leaf.shape[1], axis=1) * np.arange(leaf.shape[1], 0, -1)
        return np.zeros(leaf.shape, np.float32)

    params = jax.tree_util.tree_map_with_path(fill, abstract_params(model, mesh, layout))
    with closing(Checkpointer(folder / "checkpoints", keep=1)) as checkpoints:
        checkpoints.save(1, {"params": jax.tree.map(np.float32, params)}, {})
    return folder
