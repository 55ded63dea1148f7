"""Distillation against explicit loops, its limits, and the top-k approximations against the full sum."""

import functools
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from objectives.distillation import Divergence, distillation_loss, topk_distillation_loss
from tests.objectives.cases import SEEDS, SHAPES, fill, random_mask

V = 7  # vocabulary
DIVERGENCES = ["forward_kl", "reverse_kl", "jsd"]
jit_loss = functools.partial(jax.jit, static_argnames="divergence")(distillation_loss)
jit_topk = functools.partial(jax.jit, static_argnames=("divergence", "tail"))(topk_distillation_loss)


def jit_divergence(student, teacher, mask, divergence, jsd_beta=0.5, temperature=1.0):
    options = {"divergence": divergence, "jsd_beta": jsd_beta, "temperature": temperature}
    return jit_loss(student_logits=student, teacher_logits=teacher, mask=mask, **options).losses


def jit_value_and_grad(function):
    return jax.jit(jax.value_and_grad(function))


def softmax(logits, temperature=1.0):
    weights = np.exp(logits.astype(float) / temperature)
    return weights / weights.sum(-1, keepdims=True)


def loop_kl(p, q):
    return sum(a * np.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def loop_divergence(teacher, student, divergence, beta):
    if divergence == "forward_kl":
        return loop_kl(teacher, student)
    if divergence == "reverse_kl":
        return loop_kl(student, teacher)
    mixture = [beta * t + (1 - beta) * s for t, s in zip(teacher, student, strict=True)]
    return beta * loop_kl(teacher, mixture) + (1 - beta) * loop_kl(student, mixture)


def entropy(p):
    return -sum(a * np.log(a) for a in p if a > 0)


def random_case(seed):
    rng = np.random.default_rng(seed)
    shape = SHAPES[seed % len(SHAPES)]
    mask = random_mask(rng, *shape)
    student, teacher = (2 * rng.normal(size=(2, *shape, V))).astype(np.float32)
    if seed % 6 == 0:
        student = teacher
    return student, teacher, mask


def fill_rows(values, mask):
    return np.stack([fill(values[..., k], mask) for k in range(values.shape[-1])], axis=-1)


@pytest.mark.parametrize(("divergence", "beta"), [("forward_kl", 0.5), ("reverse_kl", 0.5), ("jsd", 0.5), ("jsd", 0.1)])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_golden(divergence, beta, temperature):
    for seed in SEEDS:
        student, teacher, mask = random_case(seed)
        got = jit_loss(
            student_logits=fill_rows(student, mask),
            teacher_logits=fill_rows(teacher, mask),
            mask=mask,
            divergence=divergence,
            jsd_beta=beta,
            temperature=temperature,
        )
        expected = {name: np.zeros(mask.shape) for name in ["losses", *got.metrics]}
        for b, t in zip(*np.nonzero(mask), strict=True):
            s, q = softmax(student[b, t], temperature), softmax(teacher[b, t], temperature)
            expected["losses"][b, t] = loop_divergence(q, s, divergence, beta)
            expected["forward_kl"][b, t], expected["reverse_kl"][b, t] = loop_kl(q, s), loop_kl(s, q)
            expected["student_entropy"][b, t], expected["teacher_entropy"][b, t] = entropy(s), entropy(q)
            expected["top1_agreement"][b, t] = s.argmax() == q.argmax()
        for name, array in {"losses": got.losses, **got.metrics}.items():
            kept = np.where(mask, array, 0.0)
            np.testing.assert_allclose(kept, expected[name], rtol=1e-5, atol=1e-5, err_msg=f"{name}, {seed}")
        np.testing.assert_array_equal(np.asarray(got.losses)[~mask], 0.0)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_student_equal_to_its_teacher_loses_nothing_and_learns_nothing(divergence):
    logits = jnp.array(random_case(1)[0])
    mask = jnp.ones(logits.shape[:2], bool)
    value, gradient = jit_value_and_grad(lambda student: jit_divergence(student, logits + 3.0, mask, divergence).sum())(
        logits
    )
    np.testing.assert_allclose(value, 0.0, atol=1e-5)
    np.testing.assert_allclose(gradient, jnp.zeros_like(logits), atol=1e-6)


def test_forward_kl_gradient_is_cross_entropys_and_reverse_kl_is_not():
    student, teacher = jnp.array(random_case(3)[:2])
    mask = jnp.ones(student.shape[:2], bool)

    def cross_entropy(student):
        return -jnp.sum(jax.nn.softmax(teacher) * jax.nn.log_softmax(student))

    expected = jax.jit(jax.grad(cross_entropy))(student)
    gradients = {
        name: jit_value_and_grad(lambda s, name=name: jit_divergence(s, teacher, mask, name).sum())(student)[1]
        for name in ("forward_kl", "reverse_kl")
    }
    np.testing.assert_allclose(gradients["forward_kl"], expected, rtol=1e-4, atol=1e-6)
    assert np.abs(gradients["reverse_kl"] - expected).max() > 1e-2


def test_jsd_limits_symmetry_and_bound():
    student, teacher = jnp.array(random_case(3)[:2])
    mask = jnp.ones(student.shape[:2], bool)

    def divergence(student, teacher, name, beta=0.5):
        return np.asarray(jit_divergence(student, teacher, mask, name, beta))

    half = divergence(student, teacher, "jsd")
    np.testing.assert_allclose(half, divergence(teacher, student, "jsd"), rtol=1e-5)
    assert np.all(half > 0) and np.all(half < np.log(2))
    forward, reverse = (divergence(student, teacher, name) for name in ("forward_kl", "reverse_kl"))
    np.testing.assert_allclose(divergence(student, teacher, "jsd", 1e-3) / 1e-3, forward, rtol=0.1)
    np.testing.assert_allclose(divergence(student, teacher, "jsd", 1 - 1e-3) / 1e-3, reverse, rtol=0.1)
    for beta in (0.0, 1.0):
        np.testing.assert_allclose(divergence(student, teacher, "jsd", beta), 0.0, atol=1e-5)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_tokens_ruled_out_for_both_do_not_poison(divergence):
    """A logit of -inf in both, as for a padded vocabulary: as if the token did not exist."""
    student, teacher = jnp.array(random_case(3)[:2])
    mask = jnp.ones(student.shape[:2], bool)
    wider = [jnp.pad(x, [(0, 0), (0, 0), (0, 2)], constant_values=-jnp.inf) for x in (student, teacher)]

    def total(student, teacher):
        return jit_divergence(student, teacher, mask, divergence).sum()

    value, gradient = jit_value_and_grad(total)(*wider)
    expected, expected_gradient = jit_value_and_grad(total)(student, teacher)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(gradient[..., :V], expected_gradient, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(gradient[..., V:], 0.0)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_chunks_of_time_are_the_whole(divergence):
    student, teacher, mask = random_case(4)
    whole = jit_loss(
        student_logits=student, teacher_logits=teacher, mask=mask, divergence=divergence, temperature=1.5
    ).losses
    chunks = [
        jit_divergence(student[:, c], teacher[:, c], mask[:, c], divergence, temperature=1.5)
        for c in (slice(0, 3), slice(3, 5), slice(5, 7))
    ]
    np.testing.assert_allclose(jnp.concatenate(chunks, axis=1), whole, rtol=1e-6, atol=1e-7)


def topk(student, teacher, k):
    """The log-probs of both at the teacher's k most likely tokens."""
    top = np.argsort(-teacher, axis=-1)[..., :k]
    return [np.take_along_axis(np.log(softmax(x)), top, axis=-1) for x in (student, teacher)]


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("tail", ["renormalize", "bucket"])
def test_topk_golden(tail, divergence):
    for seed in SEEDS:
        student, teacher, mask = random_case(seed)
        # flat enough that the tail, a difference of float32 from 1, has the digits compared here
        student_logps, teacher_logps = (x.astype(np.float32) for x in topk(student / 4, teacher / 4, 3))
        got = jit_topk(
            student_topk_logps=fill_rows(student_logps, mask),
            teacher_topk_logps=fill_rows(teacher_logps, mask),
            mask=mask,
            divergence=divergence,
            tail=tail,
            jsd_beta=0.3,
        )
        got = jax.device_get(got)
        for b, t in np.ndindex(mask.shape):
            if not mask[b, t]:
                assert float(got.losses[b, t]) == 0.0
                continue
            s, q = (list(np.exp(x[b, t].astype(float))) for x in (student_logps, teacher_logps))
            np.testing.assert_allclose(got.metrics["student_topk_mass"][b, t], sum(s), rtol=1e-5)
            np.testing.assert_allclose(got.metrics["teacher_topk_mass"][b, t], sum(q), rtol=1e-5)
            if tail == "bucket":
                s, q = [*s, 1 - sum(s)], [*q, 1 - sum(q)]
            else:
                s, q = [x / sum(s) for x in s], [x / sum(q) for x in q]
            expected = loop_divergence(q, s, divergence, 0.3)
            np.testing.assert_allclose(got.losses[b, t], expected, rtol=1e-5, atol=1e-5, err_msg=f"seed {seed}")


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("tail", ["renormalize", "bucket"])
def test_topk_of_the_whole_vocabulary_is_the_full_divergence(tail, divergence):
    student, teacher, _ = random_case(4)
    mask = np.ones(student.shape[:2], bool)
    student_logps, teacher_logps = topk(student, teacher, V)
    got = jit_topk(
        student_topk_logps=jnp.asarray(student_logps, jnp.float32),
        teacher_topk_logps=jnp.asarray(teacher_logps, jnp.float32),
        mask=mask,
        divergence=divergence,
        tail=tail,
    ).losses
    full = jit_divergence(student, teacher, mask, divergence)
    np.testing.assert_allclose(got, full, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_bucket_is_a_lower_bound_and_the_renormalised_sum_is_blind_to_lost_mass(divergence):
    """A student that moves nearly all probability off the top-k, keeping its proportions there."""
    student, teacher, _ = random_case(4)
    mask = np.ones(student.shape[:2], bool)
    student = teacher.copy()
    np.put_along_axis(student, np.argsort(-teacher, axis=-1)[..., 3:4], 20.0, axis=-1)
    logps = [jnp.asarray(x, jnp.float32) for x in topk(student, teacher, 3)]
    arrays = {"student_topk_logps": logps[0], "teacher_topk_logps": logps[1], "mask": mask}
    full = np.asarray(jit_divergence(student, teacher, mask, divergence))
    bucket = jit_topk(**arrays, divergence=divergence, tail="bucket").losses
    blind = jit_topk(**arrays, divergence=divergence, tail="renormalize").losses
    assert np.all(bucket <= full * (1 + 1e-5)) and np.all(np.asarray(bucket) > 0.1)
    np.testing.assert_allclose(blind, np.zeros(mask.shape), atol=1e-5)


@pytest.mark.parametrize("padding", [-np.inf, -1.0])
@pytest.mark.parametrize("divergence", get_args(Divergence))
@pytest.mark.parametrize("tail", ["renormalize", "bucket"])
def test_fewer_than_k_teacher_tokens_are_padded_by_minus_infinity(tail, divergence, padding):
    """Whatever the student says of the token in that place."""
    student, teacher, _ = random_case(4)
    mask = np.ones(student.shape[:2], bool)
    student_logps, teacher_logps = (jnp.asarray(x, jnp.float32) for x in topk(student, teacher, 3))
    padded = [
        jnp.pad(x, [(0, 0), (0, 0), (0, 1)], constant_values=value)
        for x, value in ((student_logps, padding), (teacher_logps, -np.inf))
    ]

    def total(student, teacher):
        out = jit_topk(
            student_topk_logps=student, teacher_topk_logps=teacher, mask=mask, divergence=divergence, tail=tail
        )
        return out.losses.sum()

    value, gradient = jit_value_and_grad(total)(*padded)
    np.testing.assert_allclose(value, total(student_logps, teacher_logps), rtol=1e-5)
    assert np.all(np.isfinite(gradient))


def test_refusals():
    ones, mask = jnp.ones((1, 1, 2)), jnp.ones((1, 1), bool)
    with pytest.raises(ValueError, match="divergence: got 'kl', expected one of forward_kl, reverse_kl, jsd"):
        distillation_loss(student_logits=ones, teacher_logits=ones, mask=mask, divergence="kl")
    arrays = {"student_topk_logps": -ones, "teacher_topk_logps": -ones, "mask": mask}
    with pytest.raises(ValueError, match="tail: got 'drop', expected one of renormalize, bucket"):
        topk_distillation_loss(**arrays, divergence="jsd", tail="drop")
    with pytest.raises(ValueError, match="divergence: got 'kl'"):
        topk_distillation_loss(**arrays, divergence="kl", tail="bucket")


def test_masked_slots_are_exactly_zero_although_a_mixture_of_equals_rounds():
    logits, mask = jnp.zeros((1, 1, 7)), jnp.zeros((1, 1), bool)
    for beta in np.linspace(0.05, 0.95, 13):
        options = {"divergence": "jsd", "jsd_beta": float(beta), "temperature": 1.0}
        assert distillation_loss(student_logits=logits, teacher_logits=logits, mask=mask, **options).losses == 0.0
