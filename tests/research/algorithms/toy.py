"""A tiny model and tiny batches of every kind, for the tests of steps and algorithms."""

import dataclasses
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from models.config import ModelConfig
from research.algorithms.base import Algorithm, Frozen, Objective, Rollouts
from research.algorithms.distill import Distill
from research.algorithms.dpo import DPO
from research.algorithms.grpo import GRPO
from research.algorithms.kto import KTO
from research.algorithms.pairs import PairAlgorithm
from research.algorithms.ppo import PPO
from research.algorithms.prm import StepScorer
from research.algorithms.reference_free import CPO, ORPO, SimPO
from research.algorithms.reward_model import RankingRewardModel, RewardModel
from research.algorithms.sft import NextToken
from research.algorithms.step_dpo import StepDPO
from research.config.optimizers import ADAMW, COSINE
from research.config.sections import Facts
from research.core.batch import (
    Batch,
    PreferenceBatch,
    RankingBatch,
    RolloutBatch,
    SequenceBatch,
    StepBatch,
    UnpairedBatch,
    rows_of,
)
from research.core.mesh import make_mesh
from research.core.network import Network
from research.core.optim import OptimizerScalars
from research.core.state import Layout, TrainState, abstract_params, state_from_params
from research.train.step import StepScalars

MODEL = ModelConfig(
    vocab_size=24, num_layers=1, d_model=16, num_heads=2, num_kv_heads=2, head_dim=8, d_ff=24, logprob_chunk=64
)  # fmt: skip
TEACHER = dataclasses.replace(MODEL, d_model=24, head_dim=6, d_ff=20)
"""Another size, the same vocabulary."""

ROWS, LENGTH = 8, 12
CONTEXT, BOS, STEP_END = (20, 21), 6, 5
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


def host_params(model: ModelConfig = MODEL, seed: int = 3, layout: Layout = "policy") -> Any:
    """Random parameters drawn by NumPy: compiling the real initialisation takes longer than any test here."""
    rng = np.random.default_rng(seed)

    def draw(path: Any, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        if getattr(path[-1], "key", "") == "scale":
            return np.ones(leaf.shape, np.float32)
        return rng.normal(0, 0.2, leaf.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, abstract_params(model, one_device(), layout))


def toy_state(mesh: Mesh, layout: Layout = "policy") -> TrainState:
    return state_from_params(host_params(layout=layout), MODEL, mesh, ADAMW, layout)


def frozen_models(algorithm: Algorithm) -> Frozen:
    """The roles that the algorithm asks for: a reference unlike the policy, a teacher of another size."""
    makers = {
        "reference": lambda: Network(host_params(seed=7), MODEL),
        "teacher": lambda: Network(host_params(TEACHER, seed=8), TEACHER),
    }
    return Frozen(**{role: makers[role]() for role in algorithm.roles})


def grpo(**changes: Any) -> GRPO:
    defaults: dict[str, Any] = {
        "group_size": 4,
        "max_new_tokens": LENGTH - 1,
        "aggregation": "token_mean",
        "kl": "loss",
    }
    return GRPO(**{**defaults, **changes})


ALGORITHMS: Mapping[str, Algorithm] = {
    "next_token": NextToken(),
    "dpo": DPO(),
    "dpo_weighted": DPO("sigmoid_norm", "alpha", "wpo"),
    "orpo": ORPO(),
    "simpo": SimPO(),
    "cpo": CPO(),
    "step_dpo": StepDPO((STEP_END,)),
    "kto": KTO(),
    "reward_model": RewardModel(),
    "reward_model_ranking": RankingRewardModel(),
    "prm": StepScorer("process"),
    "orm": StepScorer("outcome"),
    "distill": Distill("jsd", context_ids=CONTEXT, bos_id=BOS),
    "distill_top_k": Distill("reverse_kl", top_k=3),
    "grpo_token_mean": grpo(aggregation="token_mean"),
    "grpo_sequence_mean": grpo(aggregation="sequence_mean"),
    "grpo_constant": grpo(aggregation="constant"),
    "ppo": PPO(max_new_tokens=LENGTH - 1, kl="loss"),
}

SCALARS: Mapping[type[Algorithm], Mapping[str, float]] = {
    NextToken: {"label_smoothing": 0.1, "z_loss_coef": 1e-3},
    DPO: {
        "beta": 0.5, "label_smoothing": 0.1, "alpha_divergence_coef": 0.6, "discopop_tau": 0.05,
        "rpo_alpha": 0.3, "ld_alpha": 0.7,
    },
    ORPO: {"lambda_coef": 0.4},
    SimPO: {"beta": 2.0, "gamma": 0.3, "label_smoothing": 0.1},
    CPO: {"beta": 0.5, "nll_coef": 0.7, "label_smoothing": 0.1},
    StepDPO: {"beta": 0.5, "label_smoothing": 0.1},
    KTO: {"beta": 0.3, "desirable_weight": 1.0, "undesirable_weight": 1.5},
    RewardModel: {"center_coef": 0.1},
    RankingRewardModel: {"center_coef": 0.1},
    StepScorer: {},
    Distill: {"jsd_beta": 0.3, "temperature": 1.5},
    GRPO: {"clip_eps_low": 0.1, "clip_eps_high": 0.2, "beta": 0.3, "temperature": 0.7},
    PPO: {
        "clip_eps_low": 0.1, "clip_eps_high": 0.2, "clip_eps_value": 0.2, "value_coef": 0.5,
        "entropy_coef": 0.01, "gamma": 1.0, "gae_lambda": 0.9, "kl_coef": 0.3, "temperature": 0.7,
    },
}  # fmt: skip


def objective_scalars(algorithm: Algorithm, **changes: float) -> dict[str, Any]:
    found = next(values for kind, values in SCALARS.items() if isinstance(algorithm, kind))
    return {key: np.float32(value) for key, value in {**found, **changes}.items()}


def optimizer_scalars(**changes: float) -> OptimizerScalars:
    """With a large epsilon: Adam's first steps are the sign of the gradient, which rounding may flip."""
    values = {
        "learning_rate": 1e-2, "warmup_steps": 2, "decay_steps": 10, "end_fraction": 0.1, "b1": 0.9, "b2": 0.95,
        "eps": 1e-3, "weight_decay": 0.1, "clip_norm": 0.5,
    }  # fmt: skip
    return adamw_scalars({**values, **changes})


def adamw_scalars(values: Mapping[str, float]) -> OptimizerScalars:
    """AdamW with a cosine schedule from flat values."""
    numbers: dict[str, Any] = {k: np.float32(v) for k, v in values.items()}
    rule = {name: numbers.pop(name) for name in ADAMW.options}
    schedule = {name: numbers.pop(name) for name in COSINE.options}
    return OptimizerScalars(**numbers, rule_options=rule, schedule_options=schedule, rule=ADAMW, schedule=COSINE)


def no_effect(objective: Objective, options: Mapping[str, Any], online: bool) -> set[str]:
    """Names of the options given that have no effect together."""
    facts = Facts(online, objective.given or "", objective.own, True, "policy", frozenset(), frozenset())
    return {
        name for name, key in objective.options.items() if name in options and key.used and not key.used(options, facts)
    }


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
    """A prepared batch of the kind that the algorithm eats; log-probs are about log 1/V a token."""
    rng = np.random.default_rng((seed, 1))
    near = lambda *shape: (-np.log(MODEL.vocab_size) + rng.normal(0, 0.3, shape)).astype(np.float32)  # noqa: E731
    draw = lambda *shape: rng.random(shape).astype(np.float32)  # noqa: E731
    first, second = rows(seed), rows(seed + 1, LENGTHS[::-1])
    if isinstance(algorithm, StepDPO):
        second = second.replace(tokens=np.where(np.arange(LENGTH) < 2, first.tokens, second.tokens))
    if isinstance(algorithm, PairAlgorithm | StepDPO | RewardModel):
        batch = PreferenceBatch(first, second, margins=draw(ROWS), soft_labels=0.5 + 0.5 * draw(ROWS))
        if "reference" not in algorithm.roles:
            return batch
        return batch.replace(ref_chosen_logps=near(ROWS, LENGTH), ref_rejected_logps=near(ROWS, LENGTH))
    if isinstance(algorithm, RankingRewardModel):
        sides = [first, second, rows(seed + 2, np.roll(LENGTHS, 3), first.weights * [1, 0, 1, 1, 0, 1, 1, 0])]
        stacked = jax.tree.map(lambda *leaves: np.stack(leaves, axis=1), *sides)
        return RankingBatch(stacked, rng.integers(0, 3, (ROWS, 3)).astype(np.int32))
    if isinstance(algorithm, KTO):
        return UnpairedBatch(
            first,
            second,
            desirable=rng.random(ROWS) < 0.5,
            ref_logps=(near(ROWS, LENGTH) * first.loss_mask).sum(axis=1),
            reference_point=draw(ROWS)[:1].repeat(ROWS),
        )
    if isinstance(algorithm, StepScorer):
        ends = first.loss_mask & (np.arange(LENGTH) % 3 == 1)
        return StepBatch(first.replace(loss_mask=ends), np.round(draw(ROWS, LENGTH), 1))
    if isinstance(algorithm, Distill):
        return algorithm.from_rows(first)
    if isinstance(algorithm, GRPO | PPO):
        kept = np.arange(ROWS)[:, None] != 4  # a truncated completion of weight 1 is masked out
        batch = RolloutBatch(
            first.replace(loss_mask=first.loss_mask & kept),
            completion_mask=first.loss_mask,
            sampler_logps=near(ROWS, LENGTH),
            scores=draw(ROWS),
            advantage_scale=draw(ROWS),
            advantages=rng.normal(0, 1, ROWS).astype(np.float32),
            old_logps=near(ROWS, LENGTH),
            ref_logps=near(ROWS, LENGTH) if "reference" in algorithm.roles else None,
        )
        if isinstance(algorithm, GRPO):
            return batch
        per_token = {name: rng.normal(0, 1, (ROWS, LENGTH)).astype(np.float32) for name in _PER_TOKEN}
        return batch.replace(**per_token)
    return first


_PER_TOKEN = ("advantages", "values", "returns")


def row_weights(batch: Batch) -> np.ndarray:
    return np.asarray(rows_of(batch)[0].weights)


def with_garbage(batch: Batch) -> Batch:
    """Other tokens and NaN numbers in the rows of weight 0."""
    unused = row_weights(batch) == 0

    def spoil(leaf: np.ndarray) -> np.ndarray:
        leaf = np.array(leaf)
        if leaf.dtype == np.float32 and not np.array_equal(leaf, row_weights(batch)):
            leaf[unused] = np.nan
        elif leaf.dtype == np.int32 and leaf.ndim == unused.ndim + 1 and leaf.max() > 1 + LENGTH:
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
        correct=rewards > 0.5,
        prompt_ids=prompts.astype(np.int32),
        group_size=group_size,
    )
