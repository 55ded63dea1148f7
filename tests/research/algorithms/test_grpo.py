"""GRPO from rollouts to loss, against a computation in NumPy that shares nothing with it but the logits."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.softmax import compute_logits
from models.transformer import forward, unembedding
from research.algorithms.base import Frozen, Rollouts, Setting
from research.algorithms.grpo import FAMILY, GRPO
from research.config.references import provided
from research.core.batch import Batch, RolloutBatch, SequenceBatch
from research.core.mesh import to_device
from research.core.network import Network
from research.sampling.methods import SamplingMethod
from research.sampling.sampler import sample
from research.sampling.types import STOPPED, Prompts, SamplerScalars, SamplerSpec
from research.train.step import StepScalars, prepare_step, train_step
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
    hidden, _ = forward(params, MODEL, rows.tokens, rows.positions, rows.segment_ids)
    return compute_logits(hidden, unembedding(params), MODEL)


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


def numpy_loss(policy, old, ref, advantages, lengths, aggregation: str, kept=None, clip=(0.1, 0.2), beta=0.3) -> float:
    """Completions occupy slots 3 .. 3 + length of each row: nothing here looks at a mask."""
    rows = []
    for b, length in enumerate(lengths):
        tokens = []
        for t in range(3, 3 + length):
            ratio = np.exp(policy[b, t] - old[b, t])
            bounded = np.clip(ratio, 1 - clip[0], 1 + clip[1])
            d = policy[b, t] - ref[b, t]
            tokens.append(-min(ratio * advantages[b], bounded * advantages[b]) + beta * (np.exp(-d) - 1 + d))
        if kept is None or kept[b]:
            rows.append(tokens)
    if aggregation == "token_mean":
        return sum(map(sum, rows)) / sum(map(len, rows))
    if aggregation == "sequence_mean":
        return float(np.mean([np.mean(row) for row in rows]))
    return sum(map(sum, rows)) / (len(lengths) * 8)


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "constant"])
def test_loss_equals_numpy_from_logits(params, aggregation: str) -> None:
    algorithm = grpo(aggregation=aggregation, normalization="none", max_new_tokens=8)
    drawn = rollouts(REWARDS, LENGTHS, group_size=4)
    batch, metrics = algorithm.from_rollouts(drawn, seed=0)
    assert isinstance(batch, RolloutBatch) and metrics == {"frac_reward_zero_std": 0.0}
    reference = jax.tree.map(lambda x: 0.9 * x, params)
    scalars = objective_scalars(algorithm)
    frozen = Frozen(reference=Network(reference, MODEL))
    batch = jax.device_get(prepare_step(params, batch, scalars, frozen, algorithm=algorithm, config=MODEL))
    ref = numpy_logps(reference, batch, TEMPERATURE)
    np.testing.assert_allclose(
        np.where(batch.sequences.loss_mask, batch.ref_logps, 0), np.where(batch.sequences.loss_mask, ref, 0), atol=2e-5
    )
    old = np.zeros((8, 11))
    old[:, 3:] = drawn.sampler_logps
    np.testing.assert_allclose(batch.old_logps, old, atol=1e-6)

    loss, sums = jax.jit(lambda p, b: algorithm.loss(Network(p, MODEL), b, scalars, Frozen()))(params, batch)
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
    assert metrics == {"frac_reward_zero_std": 1.0}
    for advantage in ("group", "reinforce_pp", "reinforce_pp_baseline"):
        assert not prepared(grpo(kl="none", advantage=advantage), batch).advantages.any()


def prepared(algorithm: GRPO, batch: Batch, params: Any = None, **frozen: Network) -> RolloutBatch:
    """The batch as the update sees it."""
    params = jax.tree.map(jnp.asarray, host_params()) if params is None else params
    scalars = objective_scalars(algorithm)
    out = prepare_step(params, batch, scalars, Frozen(**frozen), algorithm=algorithm, config=MODEL)
    assert isinstance(out, RolloutBatch)
    return jax.device_get(out)


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
        REWARDS >= 1,
        np.repeat(prompts.prompt_ids, 4),
        4,
    )


def test_first_on_policy_step_has_no_loss_but_a_gradient() -> None:
    """Normalised per group, advantages sum to 0 and so does the loss; ratios are 1; sampler and trainer agree."""
    mesh, algorithm = one_device(), grpo(aggregation="sequence_mean", kl="none")
    state = toy_state(mesh)
    drawn = on_policy_rollouts(state.params)
    assert len(set(drawn.lengths.tolist())) > 1  # some stopped early
    batch, _ = algorithm.from_rollouts(drawn, seed=0)
    batch = prepared(algorithm, batch, state.params)
    scalars = StepScalars(optimizer_scalars(), objective_scalars(algorithm))
    _, metrics = train_step(state, to_device(mesh, batch), scalars, algorithm=algorithm, config=MODEL)
    assert abs(float(metrics["loss"])) < 1e-5
    assert float(metrics["grad_norm"]) > 0.05
    assert float(metrics["ratio"]) == pytest.approx(1.0, abs=1e-4)
    assert float(metrics["sampler_trainer_gap"]) < 1e-4
    assert float(metrics["clip_fraction"]) == 0 and abs(float(metrics["approx_kl"])) < 1e-6


def test_the_wrong_temperature_shows_as_a_gap() -> None:
    mesh, algorithm = one_device(), grpo(aggregation="sequence_mean", kl="none")
    state = toy_state(mesh)
    batch, _ = algorithm.from_rollouts(on_policy_rollouts(state.params), seed=0)
    batch = prepared(algorithm, batch, state.params)
    scalars = StepScalars(optimizer_scalars(), objective_scalars(algorithm, temperature=1.0))
    _, metrics = train_step(state, to_device(mesh, batch), scalars, algorithm=algorithm, config=MODEL)
    assert float(metrics["sampler_trainer_gap"]) > 0.02


def test_the_reference_at_equality_has_no_kl(params) -> None:
    algorithm = grpo()
    batch, _ = algorithm.from_rollouts(rollouts(REWARDS, LENGTHS, group_size=4), seed=0)
    batch = prepared(algorithm, batch, params, reference=Network(params, MODEL))
    scalars = objective_scalars(algorithm)
    _, sums = jax.jit(lambda p, b: algorithm.loss(Network(p, MODEL), b, scalars, Frozen()))(params, batch)
    assert float(sums["kl_ref"].mean()) == pytest.approx(0.0, abs=1e-6)
    assert algorithm.roles == ("reference",) and grpo(kl="none").roles == ()


def test_kl_in_the_reward_moves_the_rewards_before_the_baseline(params) -> None:
    """RLOO: `r_i - beta sum_t (l_old - l_ref)`, minus the mean of the others' (Ahmadian et al. 2024)."""
    algorithm = grpo(kl="reward", baseline="leave_one_out", normalization="none")
    drawn = rollouts(REWARDS, LENGTHS, group_size=4)
    reference = jax.tree.map(lambda x: 0.9 * x, params)
    batch = prepared(algorithm, algorithm.from_rollouts(drawn, 0)[0], params, reference=Network(reference, MODEL))
    kl = np.where(batch.sequences.loss_mask, batch.sampler_logps - batch.ref_logps, 0.0).sum(axis=1)
    rewards = (REWARDS - 0.3 * kl).reshape(2, 4)
    expected = rewards - (rewards.sum(axis=1, keepdims=True) - rewards) / 3
    np.testing.assert_allclose(batch.advantages, expected.reshape(-1), rtol=1e-4, atol=1e-5)
    loss, _ = jax.jit(lambda p, b: algorithm.loss(Network(p, MODEL), b, objective_scalars(algorithm), Frozen()))(
        params, batch
    )  # and not again in the loss
    free = dataclasses.replace(algorithm, kl="none")
    alone, _ = jax.jit(lambda p, b: free.loss(Network(p, MODEL), b, objective_scalars(free), Frozen()))(
        params, batch.replace(ref_logps=None)
    )
    assert float(loss.total) == pytest.approx(float(alone.total), rel=1e-6)


def test_a_sampler_that_differs_is_corrected_for(params) -> None:
    """With importance correction l_old is the trainer's, and weights are exp(l_old - l_sampler), capped."""
    algorithm = grpo(kl="none", importance="token")
    drawn = rollouts(REWARDS, LENGTHS, group_size=4)
    batch = prepared(algorithm, algorithm.from_rollouts(drawn, 0)[0], params)
    mask = batch.sequences.loss_mask
    trainer = numpy_logps(params, batch, TEMPERATURE)
    np.testing.assert_allclose(batch.old_logps[mask], trainer[mask], atol=2e-5)
    scalars = {**objective_scalars(algorithm), "importance_cap": np.float32(1.5)}
    loss, sums = jax.jit(lambda p, b: algorithm.loss(Network(p, MODEL), b, scalars, Frozen()))(params, batch)
    weights = np.minimum(np.exp(trainer - batch.sampler_logps), 1.5)
    expected = -(weights * batch.advantages[:, None])[mask].sum()  # the ratio is 1
    assert float(loss.total) == pytest.approx(expected, rel=1e-4)
    assert float(sums["ratio"].mean()) == pytest.approx(1.0, abs=1e-4)


KEPT = np.array([False, True, False, True, True, False, False, False])


@pytest.mark.parametrize("kl", ["none", "reward"])
@pytest.mark.parametrize("advantage", ["group", "reinforce_pp_baseline"])
def test_a_truncated_completion_is_masked_out_but_stays_in_the_baseline(params, kl: Any, advantage: Any) -> None:
    drawn = rollouts(REWARDS, LENGTHS, group_size=4, stopped=KEPT)
    algorithm = grpo(kl=kl, advantage=advantage, normalization="none")
    frozen = {} if kl == "none" else {"reference": Network(jax.tree.map(lambda x: 0.9 * x, params), MODEL)}
    masked = dataclasses.replace(algorithm, mask_truncated=True)
    some = prepared(masked, masked.from_rollouts(drawn, 0)[0], params, **frozen)
    every = prepared(algorithm, algorithm.from_rollouts(drawn, 0)[0], params, **frozen)
    np.testing.assert_array_equal(some.sequences.loss_mask.any(axis=1), KEPT)
    np.testing.assert_array_equal(some.completion_mask, every.sequences.loss_mask)
    if advantage == "group":
        np.testing.assert_allclose(some.advantages, every.advantages, rtol=1e-6)
        return
    # whitened over the kept tokens: equal up to shift and scale
    tokens = some.sequences.loss_mask
    x, y = every.advantages[tokens], some.advantages[tokens]
    np.testing.assert_allclose((x - x.mean()) / x.std(), (y - y.mean()) / y.std(), atol=1e-4)


@pytest.mark.parametrize(
    ("aggregation", "count"), [("token_mean", 1 + 5 + 2), ("sequence_mean", 3), ("constant", 8 * 8)]
)
def test_masked_out_completions_leave_the_loss_but_not_the_constant(params, aggregation: Any, count: int) -> None:
    """As TRL's dr_grpo, `constant` divides by all rows, the masked-out ones too: `B * max_new_tokens`."""
    drawn = rollouts(REWARDS, LENGTHS, group_size=4, stopped=KEPT)
    algorithm = grpo(aggregation=aggregation, normalization="none", max_new_tokens=8, mask_truncated=True, kl="loss")
    reference = jax.tree.map(lambda x: 0.9 * x, params)
    batch, _ = algorithm.from_rollouts(drawn, 0)
    batch = prepared(algorithm, batch, params, reference=Network(reference, MODEL))
    scalars = objective_scalars(algorithm)
    loss, sums = jax.jit(lambda p, b: algorithm.loss(Network(p, MODEL), b, scalars, Frozen()))(params, batch)
    old = np.zeros((8, 11))
    old[:, 3:] = drawn.sampler_logps
    policy, ref = (numpy_logps(each, batch, TEMPERATURE) for each in (params, reference))
    advantages = REWARDS - np.repeat(REWARDS.reshape(2, 4).mean(axis=1), 4)
    expected = numpy_loss(policy, old, ref, advantages, LENGTHS, aggregation, KEPT)
    assert float(loss.count) == count and abs(expected) > 1e-3
    assert float(loss.mean()) == pytest.approx(expected, rel=1e-4)
    assert float(sums["ratio"].count) == 8  # metrics are of the tokens in the loss


def test_difficulty_scales_advantages_and_steps_add_to_them() -> None:
    drawn = rollouts(REWARDS, LENGTHS, group_size=4)
    algorithm = grpo(kl="none")
    plain = prepared(algorithm, algorithm.from_rollouts(drawn, 0)[0]).advantages
    scale = np.arange(8, dtype=np.float32)
    scaled = algorithm.from_rollouts(drawn._replace(advantage_scale=scale), 0)[0]
    np.testing.assert_allclose(prepared(algorithm, scaled).advantages, scale * plain, rtol=1e-6)

    ends = np.zeros_like(drawn.mask)
    ends[:, 0] = True  # one step of a single token, then the rest
    paid = np.where(ends, np.array([0.9, 0.1, 0.2, 0.8, 0.5, 0.5, 0.5, 0.5])[:, None], 0).astype(np.float32)
    both = algorithm.from_rollouts(drawn._replace(step_rewards=paid, step_mask=ends), 0)[0]
    advantages = prepared(algorithm, both).advantages
    first, later = advantages[:, 3] - plain, advantages[:, 4] - plain
    group = paid[:4, 0]
    np.testing.assert_allclose(first[:4], (group - group.mean()) / (group.std(ddof=1) + 1e-4), rtol=1e-3)
    np.testing.assert_allclose(first[4:], 0, atol=1e-6)
    np.testing.assert_allclose(later[LENGTHS > 1], 0, atol=1e-6)  # after the last step nothing is to come


@pytest.mark.parametrize("name", FAMILY)
def test_each_member_of_the_family_is_what_its_paper_says(name: str) -> None:
    objective = provided("objective")[name][1]
    options = {key: option.default for key, option in objective.options.items()}
    objective.check(options)
    algorithm = objective.make(Setting(options, True, 8, 64))
    assert isinstance(algorithm, GRPO)
    expected = {
        "grpo": {"aggregation": "sequence_mean", "normalization": "group", "baseline": "mean"},
        "dr_grpo": {"aggregation": "constant", "normalization": "none", "max_new_tokens": 64},
        "dapo": {"aggregation": "token_mean", "normalization": "group", "kl": "none"},
        "rloo": {"baseline": "leave_one_out", "normalization": "none"},
        "reinforce_pp": {"advantage": "reinforce_pp", "aggregation": "token_mean"},
        "gspo": {"ratio_level": "sequence", "aggregation": "sequence_mean"},
        "cispo": {"surrogate": "cispo", "aggregation": "token_mean"},
        "sapo": {"surrogate": "sapo", "aggregation": "sequence_mean"},
    }[name]
    assert {key: getattr(algorithm, key) for key in expected} == expected
    if name == "dapo":
        assert (options["clip_eps_low"], options["clip_eps_high"]) == (0.2, 0.28)
    if name == "gspo":
        assert (options["clip_eps_low"], options["clip_eps_high"]) == (3e-4, 4e-4)


def test_advantages_alone_do_not_recompile_the_update() -> None:
    a, b = grpo(normalization="none", baseline="leave_one_out"), grpo(advantage="reinforce_pp")
    assert a != b and a.for_update == b.for_update
    assert grpo(aggregation="constant").for_update != a.for_update
