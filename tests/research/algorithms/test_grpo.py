"""GRPO from rollouts to loss, against a computation in NumPy that shares nothing with it but the logits."""

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.logprobs import compute_logits
from models.transformer import forward, unembedding
from research.algorithms.base import Rollouts
from research.batch import RolloutBatch, SequenceBatch
from research.mesh import to_device
from research.sampling.methods import SamplingMethod
from research.sampling.sampler import STOPPED, Prompts, SamplerScalars, SamplerSpec, sample
from research.step import StepScalars, reference_step, train_step
from tests.research.algorithms.toy import (
    MODEL,
    grpo,
    host_params,
    objective_scalars,
    one_device,
    optimizer_scalars,
    quick_compilation,
    rollouts,
    toy_state,
)

TEMPERATURE = 0.7
REWARDS = np.array([1, 0, 0, 1, 1, 1, 0, 0.0])
LENGTHS = np.array([8, 1, 3, 5, 2, 8, 4, 6])


@pytest.fixture(autouse=True)
def _quick() -> Iterator[None]:
    with quick_compilation(), jax.set_mesh(one_device()):
        yield


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(jnp.asarray, host_params())


@jax.jit
def _logits(params, rows: SequenceBatch) -> jax.Array:
    hidden = forward(params, MODEL, rows.tokens, rows.positions, rows.segment_ids)
    return compute_logits(hidden, unembedding(params, MODEL), MODEL)


def numpy_logps(params, batch: RolloutBatch, temperature: float) -> np.ndarray:
    """[B, T] log-softmax of logits / temperature, each token predicted from the position before it."""
    rows = batch.sequences
    logits = np.asarray(_logits(params, rows), np.float64) / temperature
    logps = np.zeros(rows.tokens.shape)
    for b in range(logits.shape[0]):
        for t in range(1, logits.shape[1]):
            row = logits[b, t - 1]
            logps[b, t] = row[rows.tokens[b, t]] - row.max() - np.log(np.exp(row - row.max()).sum())
    return logps


def numpy_loss(policy, old, ref, advantages, lengths, aggregation: str, clip=(0.1, 0.2), beta=0.3) -> float:
    """Completions occupy slots 3 .. 3 + length of each row: nothing here looks at a mask."""
    rows = []
    for b, length in enumerate(lengths):
        tokens = []
        for t in range(3, 3 + length):
            ratio = np.exp(policy[b, t] - old[b, t])
            bounded = np.clip(ratio, 1 - clip[0], 1 + clip[1])
            d = policy[b, t] - ref[b, t]
            tokens.append(-min(ratio * advantages[b], bounded * advantages[b]) + beta * (np.exp(-d) - 1 + d))
        rows.append(tokens)
    if aggregation == "token_mean":
        return sum(map(sum, rows)) / sum(lengths)
    if aggregation == "sequence_mean":
        return float(np.mean([np.mean(row) for row in rows]))
    return sum(map(sum, rows)) / (len(rows) * 8)


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "constant"])
def test_loss_equals_numpy_from_logits(params, aggregation: str) -> None:
    algorithm = grpo(aggregation=aggregation, normalization="none", max_new_tokens=8)
    drawn = rollouts(REWARDS, LENGTHS, group_size=4)
    batch, metrics = algorithm.from_rollouts(drawn, seed=0)
    assert isinstance(batch, RolloutBatch) and metrics == {"frac_reward_zero_std": 0.0}
    reference = jax.tree.map(lambda x: 0.9 * x, params)
    scalars = objective_scalars(algorithm)
    batch = jax.device_get(reference_step(reference, batch, scalars, algorithm=algorithm, config=MODEL))
    ref = numpy_logps(reference, batch, TEMPERATURE)
    np.testing.assert_allclose(
        np.where(batch.sequences.loss_mask, batch.ref_logps, 0),
        np.where(batch.sequences.loss_mask, ref, 0),
        atol=2e-5,
    )
    old = np.zeros((8, 11))
    old[:, 3:] = drawn.sampler_logps
    np.testing.assert_allclose(batch.old_logps, old, atol=1e-6)

    loss, sums = jax.jit(lambda p, b: algorithm.loss(p, MODEL, b, scalars))(params, batch)
    policy = numpy_logps(params, batch, TEMPERATURE)
    advantages = REWARDS - np.repeat(REWARDS.reshape(2, 4).mean(axis=1), 4)
    expected = numpy_loss(policy, old, ref, advantages, LENGTHS, aggregation)
    assert float(loss.mean()) == pytest.approx(expected, rel=1e-4)
    assert abs(expected) > 0.01

    colder = numpy_logps(params, batch, 1.0)
    assert numpy_loss(colder, old, ref, advantages, LENGTHS, aggregation) != pytest.approx(expected, rel=1e-2)
    inside = np.concatenate([np.exp(policy - old)[b, 3 : 3 + n] for b, n in enumerate(LENGTHS)])
    assert float(sums["ratio"].mean()) == pytest.approx(float(inside.mean()), rel=1e-4)


def test_rows_are_laid_out_prompt_then_completion() -> None:
    drawn = rollouts(REWARDS, LENGTHS, group_size=4)
    batch, _ = grpo().from_rollouts(drawn, seed=0)
    rows = batch.sequences
    np.testing.assert_array_equal(rows.tokens[:, :3], drawn.prompt_tokens)
    np.testing.assert_array_equal(rows.tokens[:, 3:], drawn.tokens)
    np.testing.assert_array_equal(rows.loss_mask[:, 3:].sum(axis=1), LENGTHS)
    assert not rows.loss_mask[:, :3].any()
    for b in range(8):  # positions count real tokens, whatever stands left of the prompt
        real = rows.segment_ids[b] > 0
        np.testing.assert_array_equal(rows.positions[b][real], np.arange(real.sum()))
    # pad may equal a real id: masks come from lengths
    assert rows.segment_ids.sum() == drawn.prompt_mask.sum() + LENGTHS.sum()


def test_equal_rewards_teach_nothing() -> None:
    batch, metrics = grpo().from_rollouts(rollouts(np.ones(8), LENGTHS, group_size=4), seed=0)
    assert not batch.advantages.any() and metrics == {"frac_reward_zero_std": 1.0}


def on_policy_rollouts(params) -> Rollouts:
    """Really sampled, at another temperature than 1."""
    prompts = Prompts(
        np.array([[0, 5, 6], [7, 8, 9]], np.int32),
        np.array([[False, True, True], [True, True, True]]),
        np.arange(2, dtype=np.int32),
    )
    spec = SamplerSpec(8, 4, (3,), 0, SamplingMethod())
    scalars = SamplerScalars(np.int32(0), np.int32(1), np.float32(TEMPERATURE), np.float32(1))
    out = jax.device_get(sample(params, prompts, scalars, config=MODEL, spec=spec))
    return Rollouts(
        np.repeat(prompts.tokens, 4, axis=0),
        np.repeat(prompts.mask, 4, axis=0),
        out.tokens,
        out.mask,
        out.sampler_logps,
        out.stop_reason == STOPPED,
        REWARDS.astype(np.float32),
        np.repeat(prompts.prompt_ids, 4),
        4,
    )


def test_first_on_policy_step_has_no_loss_but_a_gradient() -> None:
    """Normalised per group, advantages sum to 0 and so does the loss; ratios are 1; sampler and trainer agree."""
    mesh, algorithm = one_device(), grpo(aggregation="sequence_mean", needs_reference=False)
    state = toy_state(mesh)
    drawn = on_policy_rollouts(state.params)
    assert len(set(drawn.lengths.tolist())) > 1  # some stopped early
    batch, _ = algorithm.from_rollouts(drawn, seed=0)
    scalars = StepScalars(optimizer_scalars(), objective_scalars(algorithm))
    _, metrics = train_step(state, to_device(mesh, batch), scalars, algorithm=algorithm, config=MODEL)
    assert abs(float(metrics["loss"])) < 1e-5
    assert float(metrics["grad_norm"]) > 0.05
    assert float(metrics["ratio"]) == pytest.approx(1.0, abs=1e-4)
    assert float(metrics["sampler_trainer_gap"]) < 1e-4
    assert float(metrics["clip_fraction"]) == 0 and abs(float(metrics["approx_kl"])) < 1e-6


def test_the_wrong_temperature_shows_as_a_gap() -> None:
    mesh, algorithm = one_device(), grpo(aggregation="sequence_mean", needs_reference=False)
    state = toy_state(mesh)
    batch, _ = algorithm.from_rollouts(on_policy_rollouts(state.params), seed=0)
    scalars = StepScalars(optimizer_scalars(), objective_scalars(algorithm, temperature=1.0))
    _, metrics = train_step(state, to_device(mesh, batch), scalars, algorithm=algorithm, config=MODEL)
    assert float(metrics["sampler_trainer_gap"]) > 0.02


def test_the_reference_at_equality_has_no_kl(params) -> None:
    algorithm = grpo()
    scalars = objective_scalars(algorithm)
    batch, _ = algorithm.from_rollouts(rollouts(REWARDS, LENGTHS, group_size=4), seed=0)
    batch = reference_step(params, batch, scalars, algorithm=algorithm, config=MODEL)
    _, sums = jax.jit(lambda p, b: algorithm.loss(p, MODEL, b, scalars))(params, batch)
    assert float(sums["kl_ref"].mean()) == pytest.approx(0.0, abs=1e-6)
    assert dataclasses.replace(algorithm, needs_reference=False) != algorithm
