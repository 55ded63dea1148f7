"""PPO from logits to values, advantages, loss and gradients, against loops that share nothing with `objectives/`."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.heads import scorer_outputs
from models.softmax import compute_logits
from models.transformer import forward, unembedding
from research.algorithms.base import Frozen
from research.algorithms.ppo import PPO
from research.core.batch import RolloutBatch
from research.core.network import Network
from research.train.step import prepare_step
from tests.research.algorithms import hand
from tests.research.algorithms.toy import MODEL, host_params, objective_scalars, rollouts

REWARDS = np.array([1, 0, 0, 1, 0.5, 1, 0, 0])
LENGTHS = np.array([8, 1, 3, 5, 2, 8, 4, 6])
STOPPED = np.array([True, True, False, True, True, False, True, True])
SCALE = np.array([1, 2, 0.5, 1, 1, 1.5, 1, 0.7], np.float32)
PROMPT, LIMIT, TEMPERATURE = 3, 8, 0.7
KL_COEF, GAMMA, LAMBDA = 0.3, 0.95, 0.9
LOW, HIGH, CLIP_VALUE, VALUE_COEF, ENTROPY_COEF = 0.1, 0.2, 0.2, 0.5, 0.01


class Expected(NamedTuple):
    """`[B, T]` arrays, 0 outside of the tokens in the loss."""

    values: np.ndarray
    returns: np.ndarray
    advantages: np.ndarray


def slots(kept: np.ndarray) -> list[tuple[int, int]]:
    """(row, slot) of every token in the loss, row by row."""
    return [(b, PROMPT + t) for b in range(len(LENGTHS)) if kept[b] for t in range(LENGTHS[b])]


def token_logps(params: Any, rows: Any) -> np.ndarray:
    """`[B, T]` at the rollout's temperature: the logits before a token say how likely it was."""
    after = hand.log_probs(params, rows, temperature=TEMPERATURE)
    return np.take_along_axis(np.roll(after, 1, axis=1), np.asarray(rows.tokens)[:, :, None], axis=2)[:, :, 0]


def generalised_advantages(
    params: Any, ref_logps: np.ndarray, drawn: Any, rows: Any, kl_in_reward: bool, kept: np.ndarray
) -> Expected:
    """Schulman et al. 2016, eq. 16, token by token from the last one; then whitened over all tokens."""
    state_values = np.roll(hand.outputs(params["value"], rows)[:, :, 0], 1, axis=1)  # before each token
    values, returns, advantages = (np.zeros((8, PROMPT + LIMIT)) for _ in range(3))
    for b, length in enumerate(LENGTHS):
        after_value = after_advantage = 0.0
        for t in reversed(range(length if kept[b] else 0)):
            slot = PROMPT + t
            reward = drawn.step_rewards[b, t] + (REWARDS[b] if t == length - 1 else 0.0)
            if kl_in_reward:
                reward -= KL_COEF * (drawn.sampler_logps[b, t] - ref_logps[b, slot])
            value = state_values[b, slot]
            delta = reward + GAMMA * after_value - value
            after_advantage = delta + GAMMA * LAMBDA * after_advantage
            after_value = value
            values[b, slot], advantages[b, slot] = value, after_advantage
            returns[b, slot] = after_advantage + value
    where = tuple(np.array(slots(kept)).T)
    found = advantages[where]
    advantages[where] = (found - found.mean()) / np.sqrt(found.var() + 1e-8) * SCALE[where[0]]
    return Expected(values, returns, advantages)


def reference_loss(
    params: Any, rows: Any, drawn: Any, ref_logps: np.ndarray, expected: Expected, kl: str, how: str, kept: Any
) -> jax.Array:
    """Schulman et al. 2017, eq. 7, and the clipped value loss of its code, on a flat list of the tokens."""
    b, slot = np.array(slots(kept)).T
    hidden, _ = forward(params["policy"], MODEL, rows.tokens, rows.positions, rows.segment_ids)
    logits = compute_logits(hidden, unembedding(params["policy"]), MODEL)[b, slot - 1]
    before = jax.nn.log_softmax(logits / TEMPERATURE, axis=-1)
    logp = before[np.arange(len(b)), rows.tokens[b, slot]]
    ratio = jnp.exp(logp - drawn.sampler_logps[b, slot - PROMPT])
    advantage = expected.advantages[b, slot]
    policy = -jnp.minimum(ratio * advantage, jnp.clip(ratio, 1 - LOW, 1 + HIGH) * advantage)
    policy += ENTROPY_COEF * (jnp.exp(before) * before).sum(axis=1)
    if kl == "loss":
        gap = logp - ref_logps[b, slot]
        policy += KL_COEF * (jnp.exp(-gap) - 1 + gap)
    outputs, _ = scorer_outputs(params["value"], MODEL, rows.tokens, rows.positions, rows.segment_ids)
    value, old, target = outputs[b, slot - 1, 0], expected.values[b, slot], expected.returns[b, slot]
    bounded = jnp.clip(value, old - CLIP_VALUE, old + CLIP_VALUE)
    losses = policy + VALUE_COEF * 0.5 * jnp.maximum((value - target) ** 2, (bounded - target) ** 2)
    if how == "token_mean":
        return losses.sum() / len(b)
    if how == "sequence_mean":
        return (losses / LENGTHS[b]).sum() / kept.sum()
    return losses.sum() / (len(LENGTHS) * LIMIT)


@pytest.mark.parametrize(
    ("kl", "aggregation", "mask_truncated"),
    [("reward", "token_mean", False), ("reward", "constant", True), ("loss", "sequence_mean", True)],
)
def test_ppo_from_logits_to_gradients(kl: Any, aggregation: Any, mask_truncated: bool) -> None:
    kept = STOPPED if mask_truncated else np.ones(8, bool)
    drawn = rollouts(REWARDS, LENGTHS, group_size=4, stopped=STOPPED)
    steps = np.where(np.arange(LIMIT) % 3 == 0, 0.25, 0.0) * drawn.mask
    drawn = drawn._replace(step_rewards=steps, step_mask=steps > 0, advantage_scale=SCALE)
    algorithm = PPO(LIMIT, aggregation=aggregation, kl=kl, mask_truncated=mask_truncated)
    scalars = objective_scalars(
        algorithm, clip_eps_low=LOW, clip_eps_high=HIGH, clip_eps_value=CLIP_VALUE, value_coef=VALUE_COEF,
        entropy_coef=ENTROPY_COEF, gamma=GAMMA, gae_lambda=LAMBDA, kl_coef=KL_COEF, temperature=TEMPERATURE,
    )  # fmt: skip
    before, reference = host_params(layout="actor_critic"), host_params(seed=7)
    after = jax.tree.map(lambda p, q: 0.6 * p + 0.4 * q, before, host_params(layout="actor_critic", seed=4))
    # What the sampler drew from: near the policy after the first update, so that some ratios are clipped.
    rows = algorithm.from_rollouts(drawn, 0)[0].sequences
    noise = np.random.default_rng(2).normal(0, 0.2, (8, LIMIT))
    near = (token_logps(after["policy"], rows)[:, PROMPT:] + noise).astype(np.float32)
    drawn = drawn._replace(sampler_logps=np.where(drawn.mask, near, 0))

    batch = algorithm.from_rollouts(drawn, 0)[0]
    frozen = Frozen(reference=Network(reference, MODEL))
    batch = jax.device_get(prepare_step(before, batch, scalars, frozen, algorithm=algorithm, config=MODEL))
    assert isinstance(batch, RolloutBatch)
    ref_logps = token_logps(reference, rows)
    expected = generalised_advantages(before, ref_logps, drawn, rows, kl == "reward", kept)
    tokens = tuple(np.array(slots(kept)).T)
    np.testing.assert_allclose(batch.ref_logps[tokens], ref_logps[tokens], atol=2e-5)
    for name, values in expected._asdict().items():
        np.testing.assert_allclose(getattr(batch, name)[tokens], values[tokens], atol=2e-4, err_msg=name)

    @jax.jit
    def ours(params: Any) -> Any:
        loss, sums = algorithm.loss(Network(params, MODEL), batch, scalars, Frozen())
        return loss.total / loss.count, sums

    theirs = jax.jit(
        jax.value_and_grad(lambda p: reference_loss(p, rows, drawn, ref_logps, expected, kl, aggregation, kept))
    )
    (loss, sums), gradient = jax.value_and_grad(ours, has_aux=True)(after)
    wanted, wanted_gradient = theirs(after)
    assert float(loss) == pytest.approx(float(wanted), rel=1e-3)
    for (path, got), want in zip(
        jax.tree_util.tree_leaves_with_path(gradient), jax.tree.leaves(wanted_gradient), strict=True
    ):
        np.testing.assert_allclose(got, want, rtol=2e-3, atol=1e-4, err_msg=jax.tree_util.keystr(path))
    for name in ("clip_fraction_low", "clip_fraction_high", "value_clip_fraction"):
        assert 0.0 < float(sums[name].mean()) < 1.0, name
