"""A tiny model and tiny batches of every kind, for the tests of steps and algorithms."""

import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from models.config import ModelConfig
from research.algorithms.base import Algorithm, Rollouts
from research.algorithms.dpo import DPO
from research.algorithms.grpo import GRPO
from research.algorithms.sft import NextToken
from research.batch import Batch, PreferenceBatch, RolloutBatch, SequenceBatch
from research.mesh import make_mesh
from research.optim import OptimizerScalars
from research.state import TrainState, abstract_state, state_from_params
from research.step import StepScalars

MODEL = ModelConfig(
    vocab_size=24, num_layers=1, d_model=16, num_heads=2, num_kv_heads=2, head_dim=8, d_ff=24, logprob_chunk=64
)  # fmt: skip
ROWS, LENGTH = 8, 12
LENGTHS = np.array([12, 3, 2, 12, 5, 3, 9, 2])
"""Tokens in each row: very uneven, so that a mean of means is far from the mean."""


def one_device() -> Mesh:
    return make_mesh(1, 1, 1, devices=jax.devices()[:1])


def eight_devices() -> Mesh:
    return make_mesh(2, 2, 2)


@contextmanager
def quick_compilation() -> Iterator[None]:
    """XLA without its optimisations: toy programs run as well and compile in half the time."""
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", False)


@contextmanager
def compilations() -> Iterator[list[str]]:
    """Collects the names of the functions that XLA compiles inside the block."""
    names: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found = re.match(r"Compiling jit\((\w+)\)", record.getMessage())
            if found:
                names.append(found[1])

    # Not `jax.log_compiles()`: switching it is itself a reason to compile again.
    logger, listener = logging.getLogger("jax"), Listener()
    level, propagate = logger.level, logger.propagate
    logger.addHandler(listener)
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    try:
        yield names
    finally:
        logger.removeHandler(listener)
        logger.setLevel(level)
        logger.propagate = propagate


def host_params(model: ModelConfig = MODEL, seed: int = 3) -> Any:
    """Random parameters drawn by NumPy: compiling the real initialisation takes longer than any test here."""
    rng = np.random.default_rng(seed)

    def draw(path: Any, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        if getattr(path[-1], "key", "") == "scale":
            return np.ones(leaf.shape, np.float32)
        return rng.normal(0, 0.2, leaf.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, abstract_state(model, one_device()).params)


def toy_state(mesh: Mesh) -> TrainState:
    return state_from_params(host_params(), MODEL, mesh)


def grpo(**changes: Any) -> GRPO:
    defaults: dict[str, Any] = {
        "aggregation": "token_mean",
        "normalization": "group",
        "baseline": "mean",
        "ddof": 1,
        "kl_estimator": "k3",
        "needs_reference": True,
        "max_new_tokens": LENGTH - 1,
    }
    return GRPO(**{**defaults, **changes})


ALGORITHMS: Mapping[str, Algorithm] = {
    "next_token": NextToken("text"),
    "dpo": DPO("preferences"),
    "grpo_token_mean": grpo(aggregation="token_mean"),
    "grpo_sequence_mean": grpo(aggregation="sequence_mean"),
    "grpo_constant": grpo(aggregation="constant"),
}


def objective_scalars(algorithm: Algorithm, **changes: float) -> dict[str, Any]:
    if isinstance(algorithm, NextToken):
        values = {"label_smoothing": 0.1, "z_loss_coef": 1e-3}
    elif isinstance(algorithm, DPO):
        values = {"beta": 0.5, "label_smoothing": 0.1}
    else:
        values = {"clip_eps_low": 0.1, "clip_eps_high": 0.2, "beta": 0.3, "temperature": 0.7}
    return {key: np.float32(value) for key, value in {**values, **changes}.items()}


def optimizer_scalars(**changes: float) -> OptimizerScalars:
    """With a large epsilon: Adam's first steps are the sign of the gradient, which rounding may flip."""
    values = {
        "learning_rate": 1e-2, "warmup_steps": 2, "decay_steps": 10, "end_fraction": 0.1, "b1": 0.9, "b2": 0.95,
        "eps": 1e-3, "weight_decay": 0.1, "clip_norm": 0.5,
    }  # fmt: skip
    return OptimizerScalars(**{k: np.float32(v) for k, v in {**values, **changes}.items()})  # type: ignore[arg-type]


def step_scalars(algorithm: Algorithm) -> StepScalars:
    return StepScalars(optimizer_scalars(), objective_scalars(algorithm))


def rows(seed: int = 0, lengths: np.ndarray = LENGTHS, weights: np.ndarray | None = None) -> SequenceBatch:
    """Right-padded rows; all tokens but the first are targets. Weights are uneven too, and two are 0."""
    rng = np.random.default_rng(seed)
    real = np.arange(LENGTH)[None, :] < lengths[:, None]
    if weights is None:
        weights = np.array([1, 1, 0, 2, 1, 0.5, 0, 1])
    return SequenceBatch(
        tokens=np.where(real, rng.integers(4, MODEL.vocab_size, real.shape), 0).astype(np.int32),
        loss_mask=real & (np.arange(LENGTH)[None, :] > 0),
        segment_ids=real.astype(np.int32),
        positions=np.where(real, np.arange(LENGTH), 0).astype(np.int32),
        weights=weights.astype(np.float32),
    )


def host_batch(algorithm: Algorithm, seed: int = 0) -> Batch:
    """A batch of the kind that the algorithm eats, with plausible log-probs (about log 1/V a token)."""
    rng = np.random.default_rng((seed, 1))
    near = lambda *shape: (-np.log(MODEL.vocab_size) + rng.normal(0, 0.3, shape)).astype(np.float32)  # noqa: E731
    if isinstance(algorithm, DPO):
        chosen, rejected = rows(seed), rows(seed + 1, LENGTHS[::-1])
        sums = [near(ROWS) * side.loss_mask.sum(axis=1) for side in (chosen, rejected)]
        return PreferenceBatch(chosen, rejected, *(s.astype(np.float32) for s in sums))
    if isinstance(algorithm, GRPO):
        advantages = rng.normal(0, 1, ROWS).astype(np.float32)
        return RolloutBatch(rows(seed), advantages, near(ROWS, LENGTH), near(ROWS, LENGTH))
    return rows(seed)


def row_weights(batch: Batch) -> np.ndarray:
    if isinstance(batch, PreferenceBatch):
        return np.asarray(batch.chosen.weights)
    return np.asarray((batch.sequences if isinstance(batch, RolloutBatch) else batch).weights)


def with_garbage(batch: Batch) -> Batch:
    """Other tokens and NaN numbers in the rows of weight 0."""
    unused = row_weights(batch) == 0

    def spoil(leaf: np.ndarray) -> np.ndarray:
        leaf = np.array(leaf)
        if leaf.dtype == np.float32 and not np.array_equal(leaf, row_weights(batch)):
            leaf[unused] = np.nan
        elif leaf.dtype == np.int32 and leaf.ndim == 2 and leaf.max() > 1 + LENGTH:
            leaf[unused] = MODEL.vocab_size - 1
        return leaf

    return jax.tree.map(spoil, batch)


def rollouts(
    rewards: np.ndarray, lengths: np.ndarray, *, group_size: int, stopped: np.ndarray | None = None
) -> Rollouts:
    """Samples with these rewards and completion lengths; prompts of 2 or 3 tokens in 3 slots."""
    B, L, N = len(rewards), 3, 8
    rng = np.random.default_rng(5)
    prompts = np.arange(B) // group_size
    prompt_mask = np.ones((B, L), bool)
    prompt_mask[:, 0] = prompts % 2 == 0
    mask = np.arange(N)[None, :] < lengths[:, None]
    tokens = rng.integers(4, MODEL.vocab_size, (B, N))
    tokens[:, 0] = 4 + np.arange(B)  # names the row
    prompt_tokens = np.where(prompt_mask, (4 + prompts)[:, None], 0)
    return Rollouts(
        prompt_tokens=prompt_tokens.astype(np.int32),
        prompt_mask=prompt_mask,
        tokens=np.where(mask, tokens, 0).astype(np.int32),
        mask=mask,
        sampler_logps=np.where(mask, rng.normal(-3, 0.3, (B, N)), 0).astype(np.float32),
        stopped=np.ones(B, bool) if stopped is None else stopped,
        rewards=rewards.astype(np.float32),
        prompt_ids=prompts.astype(np.int32),
        group_size=group_size,
    )
