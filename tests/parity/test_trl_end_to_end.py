"""Three optimizer steps of ours and of TRL's trainers, from the same weights on the same tokens, end alike.

Needs torch and trl beside jax; skipped elsewhere. Run with: pytest -m slow tests/parity
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("trl")

from research.algorithms.base import Frozen, Rollouts
from research.algorithms.dpo import DPO
from research.algorithms.grpo import GRPO
from research.algorithms.prm import StepScorer
from research.algorithms.reward_model import RewardModel
from research.algorithms.sft import NextToken
from research.config.optimizers import ADAMW
from research.core.batch import PreferenceBatch, SequenceBatch, StepBatch
from research.core.network import Network, batch_logps
from research.core.optim import OptimizerScalars, init_optimizer
from research.core.state import TrainState
from research.train.step import StepScalars, prepare_step, train_step
from tests.models import tiny
from tests.parity import trainers
from tests.parity.weights import to_llama
from tests.research.algorithms.toy import adamw_scalars

pytestmark = pytest.mark.slow

CONFIGS = {"tied": tiny.CONFIG, "untied": tiny.UNTIED}
RTOL = 1e-4
"""Of a tensor's largest entry; the three steps move it by about 1e-2."""


class Ours(NamedTuple):
    """One objective of ours.

    Attributes:
      algorithm: in research/algorithms.
      scalars: its traced numbers.
      batches: from TRL's recording, the start's parameters and frozen models to one batch a step.
      head: outputs of a head on top of the transformer; 0 is a language model.
      rate: learning rate.
    """

    algorithm: Any
    scalars: dict[str, float]
    batches: Callable[["Ours", trainers.Recording, Any, Any, Frozen], Iterator[Any]]
    head: int = 0
    rate: float = trainers.OPTIMIZER["learning_rate"]


def rows(tokens: np.ndarray, real: np.ndarray, learned: np.ndarray) -> SequenceBatch:
    """Ours counts positions within the real tokens, wherever the padding is."""
    real = real.astype(np.int32)
    return SequenceBatch(
        tokens=tokens.astype(np.int32),
        loss_mask=learned.astype(bool),
        segment_ids=real,
        positions=np.maximum(np.cumsum(real, axis=1) - 1, 0).astype(np.int32),
        weights=np.ones(len(tokens), np.float32),
    )


def language_batches(ours: Ours, recording: trainers.Recording, *_: Any) -> Iterator[SequenceBatch]:
    del ours
    for batch in recording.batches:
        yield rows(batch["input_ids"], batch["attention_mask"], batch["labels"] != -100)


def pair_batches(
    ours: Ours, recording: trainers.Recording, params: Any, config: Any, frozen: Frozen
) -> Iterator[PreferenceBatch]:
    for batch in recording.batches:
        learned = batch.get("completion_mask", batch["attention_mask"])
        both = rows(batch["input_ids"], batch["attention_mask"], learned)
        pairs = len(both.weights) // 2
        made = PreferenceBatch(
            chosen=jax.tree.map(lambda x, n=pairs: x[:n], both),
            rejected=jax.tree.map(lambda x, n=pairs: x[n:], both),
            margins=batch.get("margin", np.zeros(pairs, np.float32)),
            soft_labels=np.ones(pairs, np.float32),
        )
        yield prepare(ours, made, params, config, frozen)


def step_batches(ours: Ours, recording: trainers.Recording, *_: Any) -> Iterator[StepBatch]:
    del ours
    for batch in recording.batches:
        labels = batch["labels"]
        scored = rows(batch["input_ids"], batch["attention_mask"], labels != -100)
        yield StepBatch(scored, np.maximum(labels, 0).astype(np.float32))


def rollout_batches(
    ours: Ours, recording: trainers.Recording, params: Any, config: Any, frozen: Frozen
) -> Iterator[Any]:
    """The samples of the one iteration, in groups again; log-probs and advantages are our own."""
    for index, batch in enumerate(recording.batches):
        order = np.lexsort(batch["prompt_ids"].T)  # TRL shuffles the rows of an iteration
        sampled = {name: x[order] for name, x in batch.items() if x.ndim}
        mask = sampled["completion_mask"].astype(bool)
        completions = [t[m].tolist() for t, m in zip(sampled["completion_ids"], mask, strict=True)]
        rollouts = Rollouts(
            prompt_tokens=sampled["prompt_ids"],
            prompt_mask=sampled["prompt_mask"].astype(bool),
            tokens=sampled["completion_ids"],
            mask=mask,
            sampler_logps=np.zeros(mask.shape, np.float32),
            stopped=np.ones(len(mask), bool),
            rewards=np.array([trainers.paid(ids) for ids in completions], np.float32),
            correct=np.ones(len(mask), bool),
            prompt_ids=np.arange(len(mask)) // trainers.GROUP,
            group_size=trainers.GROUP,
        )
        made, _ = ours.algorithm.from_rollouts(rollouts, seed=index)
        old = jax.jit(batch_logps, static_argnums=1)(params, config, made.sequences, trainers.TEMPERATURE)
        prepared = prepare(ours, made.replace(sampler_logps=old.logps), params, config, frozen)
        np.testing.assert_allclose(prepared.advantages, sampled["advantages"], rtol=1e-5, atol=1e-5)
        width = mask.shape[1]
        for ours_logps, name in ((prepared.old_logps, "old_"), (prepared.ref_logps, "ref_")):
            theirs = np.where(mask, sampled[f"{name}per_token_logps"], 0.0)
            np.testing.assert_allclose(np.where(mask, ours_logps[:, -width:], 0.0), theirs, atol=2e-5)
        yield prepared


def prepare(ours: Ours, batch: Any, params: Any, config: Any, frozen: Frozen) -> Any:
    """What an algorithm computes once, with the parameters before the first update."""
    return prepare_step(params, batch, traced(ours.scalars), frozen, algorithm=ours.algorithm, config=config)


def traced(scalars: dict[str, float]) -> dict[str, np.float32]:
    return {name: np.float32(value) for name, value in scalars.items()}


FAMILY: dict[str, Any] = {"group_size": trainers.GROUP, "max_new_tokens": 6, "kl": "loss"}
CLIPPED = {
    "clip_eps_low": trainers.EPSILON,
    "clip_eps_high": trainers.EPSILON,
    "beta": trainers.BETA,
    "temperature": trainers.TEMPERATURE,
}
OBJECTIVES = {
    "sft": Ours(NextToken(), {"label_smoothing": 0.0, "z_loss_coef": 0.0}, language_batches),
    "dpo": Ours(
        DPO(), {"beta": trainers.BETA, "label_smoothing": 0.0, "rpo_alpha": 0.0, "ld_alpha": 1.0}, pair_batches
    ),
    "grpo": Ours(GRPO(**FAMILY), CLIPPED, rollout_batches, rate=trainers.GRPO_RATE),
    "grpo_corrected": Ours(GRPO(**FAMILY, kl_correction="ratio"), CLIPPED, rollout_batches, rate=trainers.GRPO_RATE),
    "reward_model": Ours(RewardModel(), {"center_coef": 0.05}, pair_batches, head=1),
    "step_scorer": Ours(StepScorer(), {}, step_batches, head=2),
}


def start_params(ours: Ours, config: Any) -> Any:
    """Parameters away from their initial values, with a head where there is one."""
    params = tiny.make_params(config)
    if not ours.head:
        return params
    weight = np.random.default_rng(1).normal(scale=0.2, size=(config.d_model, ours.head))
    return {"trunk": params, "head": {"w": jnp.asarray(weight, jnp.float32)}}


def optimizer(rate: float) -> OptimizerScalars:
    """The trainer's, at a constant rate."""
    o = trainers.OPTIMIZER
    values = {
        "learning_rate": rate,
        "warmup_steps": 0.0,
        "decay_steps": float(trainers.STEPS),
        "end_fraction": 1.0,
        "b1": o["adam_beta1"],
        "b2": o["adam_beta2"],
        "eps": o["adam_epsilon"],
        "weight_decay": o["weight_decay"],
        "clip_norm": o["max_grad_norm"],
    }
    return adamw_scalars(values)


def run_ours(
    ours: Ours, recording: trainers.Recording, params: Any, config: Any
) -> Iterator[tuple[float, dict[str, np.ndarray]]]:
    """Each step's loss, and the parameters after it under transformers' names."""
    frozen = Frozen(reference=Network(params, config)) if ours.algorithm.roles else Frozen()
    scalars = StepScalars(optimizer(ours.rate), traced(ours.scalars))
    state = TrainState(jnp.int32(0), jax.tree.map(jnp.copy, params), init_optimizer(params, ADAMW))
    for batch in ours.batches(ours, recording, params, config, frozen):
        state, metrics = train_step(state, batch, scalars, frozen, algorithm=ours.algorithm, config=config)
        yield float(metrics["loss"]), to_llama(jax.device_get(state.params), config)


def gaps(got: dict[str, np.ndarray], theirs: dict[str, np.ndarray], start: dict[str, np.ndarray]):
    """The largest difference relative to its tensor's largest entry, and of all updates relative to them."""
    relative = max(np.abs(got[name] - x).max() / np.abs(x).max() for name, x in theirs.items() if name in got)
    moved = {name: theirs[name] - start[name] for name in got}
    error = np.sqrt(sum(np.square(got[name] - theirs[name]).sum() for name in got))
    return float(relative), float(error / np.sqrt(sum(np.square(x).sum() for x in moved.values())))


@pytest.mark.parametrize("tying", CONFIGS)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_three_steps_end_where_trls_do(name, tying, tmp_path):
    ours, config = OBJECTIVES[name], CONFIGS[tying]
    if ours.head and tying == "untied":
        pytest.skip("a scorer has no read-out")
    params = start_params(ours, config)
    start = to_llama(params, config)
    recording = getattr(trainers, name)(config, start, tmp_path)
    assert len(recording.states) == len(recording.losses) == trainers.STEPS
    found = list(run_ours(ours, recording, params, config))
    for step, (loss, state) in enumerate(found):
        assert set(state) == set(recording.states[step]) - {"lm_head.weight"} | (set(start) & {"lm_head.weight"})
        relative, update = gaps(state, recording.states[step], start)
        print(f"{name}, {tying}, step {step + 1}: loss {loss:.6f}, TRL {recording.losses[step]:.6f}, "
              f"parameters {relative:.1e}, updates {update:.1e}")  # fmt: skip
        assert abs(loss - recording.losses[step]) < 1e-5 + 1e-4 * abs(loss)
        assert relative < RTOL
        assert update < 1e-3
