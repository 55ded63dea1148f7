"""The step contrast and the step values against explicit loops."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from objectives.dpo import dpo_loss
from objectives.step_dpo import step_dpo_loss, step_q_values
from tests.objectives.cases import SEEDS, SHAPES, fill, random_logps, random_mask

jit_loss = jax.jit(step_dpo_loss)
jit_values = functools.partial(jax.jit, static_argnames="num_steps")(step_q_values)


def random_case(seed):
    """Both sides: policy and reference log-probs and the mask, of different widths."""
    rng = np.random.default_rng(seed)
    batch, time = SHAPES[seed % len(SHAPES)]
    sides = []
    for width in (time, time + 2):
        mask = random_mask(rng, batch, width)
        sides.append([*(random_logps(rng, batch, width) for _ in range(2)), mask])
    return rng, sides


def arguments(sides):
    (pc, rc, mc), (pr, rr, mr) = ([fill(p, m), fill(r, m), m] for p, r, m in sides)
    return {
        "policy_chosen_token_logps": pc,
        "policy_rejected_token_logps": pr,
        "ref_chosen_token_logps": rc,
        "ref_rejected_token_logps": rr,
        "chosen_step_mask": mc,
        "rejected_step_mask": mr,
    }


def test_golden():
    for seed in SEEDS:
        rng, sides = random_case(seed)
        beta, e = float(rng.uniform(0.1, 1)), [0.0, 0.2][seed % 2]
        got = jit_loss(**arguments(sides), beta=beta, label_smoothing=e)
        for b in range(len(sides[0][2])):
            x = []
            for policy, ref, mask in sides:
                total = 0.0
                for t in range(mask.shape[1]):
                    if mask[b, t]:
                        total += float(policy[b, t]) - float(ref[b, t])
                x.append(total)
            margin = beta * (x[0] - x[1])
            loss = (1 - e) * math.log1p(math.exp(-margin)) + e * math.log1p(math.exp(margin))
            np.testing.assert_allclose(got.losses[b], loss, rtol=1e-5, atol=1e-5, err_msg=f"seed {seed}")
            np.testing.assert_allclose(got.metrics["reward_margin"][b], margin, rtol=1e-5, atol=1e-5)


def test_a_step_that_is_the_whole_completion_is_dpo():
    _, sides = random_case(0)
    sides = [[policy, ref, np.ones_like(mask)] for policy, ref, mask in sides]
    names = ("policy_chosen_logps", "ref_chosen_logps", "policy_rejected_logps", "ref_rejected_logps")
    sums = [x.sum(1) for policy, ref, _ in sides for x in (policy, ref)]
    whole = dpo_loss(**dict(zip(names, sums, strict=True)), beta=0.2)
    np.testing.assert_allclose(step_dpo_loss(**arguments(sides), beta=0.2).losses, whole.losses, rtol=1e-5)


def test_a_history_shared_by_both_cancels_so_it_may_be_left_out():
    rng, sides = random_case(4)
    history = [random_logps(rng, len(sides[0][2]), 3) for _ in range(2)]

    def with_history(counts):
        longer = []
        for policy, ref, mask in sides:
            seen = np.full(history[0].shape, counts)
            longer.append(
                [
                    np.concatenate([history[0], policy], 1),
                    np.concatenate([history[1], ref], 1),
                    np.concatenate([seen, mask], 1),
                ]
            )
        return step_dpo_loss(**arguments(longer), beta=0.3).losses

    alone = step_dpo_loss(**arguments(sides), beta=0.3).losses
    np.testing.assert_allclose(with_history(False), alone, rtol=1e-6)
    np.testing.assert_allclose(with_history(True), alone, rtol=1e-5, atol=1e-6)


def test_only_the_tokens_of_the_step_learn():
    _, sides = random_case(0)
    rows = {key: jnp.asarray(x) for key, x in arguments(sides).items()}

    def total(chosen):
        return step_dpo_loss(**rows | {"policy_chosen_token_logps": chosen}, beta=0.3).losses.sum()

    gradient = jax.grad(total)(rows["policy_chosen_token_logps"])
    np.testing.assert_array_equal(np.asarray(gradient) != 0, sides[0][2])
    assert np.all(np.asarray(gradient)[sides[0][2]] < 0)


def test_step_values_golden():
    for seed in SEEDS:
        rng = np.random.default_rng(seed)
        shape, steps, beta = SHAPES[seed % len(SHAPES)], 3, float(rng.uniform(0.05, 1))
        policy, ref = (random_logps(rng, *shape) for _ in range(2))
        ids = rng.integers(-1, steps + 2, shape)  # 0 is no step, nor is -1 or 4
        in_step = (ids >= 1) & (ids <= steps)
        got = jit_values(
            policy_logps=fill(policy, in_step), ref_logps=fill(ref, in_step), step_ids=ids, num_steps=steps, beta=beta
        )
        expected = np.zeros((shape[0], steps))
        for b, t in zip(*np.nonzero(in_step), strict=True):
            expected[b, ids[b, t] - 1] += beta * (float(policy[b, t]) - float(ref[b, t]))
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5, err_msg=f"seed {seed}")


def test_step_values_add_up_to_the_reward_of_the_completion_without_a_gradient():
    ids = jnp.array([[1, 1, 2, 3]])
    policy, ref = jnp.array([[-1.0, -2.0, -0.5, -3.0]]), jnp.full((1, 4), -1.5)

    def total(policy):
        return step_q_values(policy_logps=policy, ref_logps=ref, step_ids=ids, num_steps=3, beta=0.4).sum()

    value, gradient = jax.value_and_grad(total)(policy)
    np.testing.assert_allclose(value, 0.4 * float((policy - ref).sum()), rtol=1e-5)
    assert not np.any(gradient)
