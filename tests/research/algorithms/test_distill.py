"""Distillation from tokens to loss, against NumPy from both models' logits; contexts and their alignment."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

from research.algorithms.base import Frozen, Setting
from research.algorithms.context import teacher_rows
from research.algorithms.distill import PROVIDES, Distill
from research.core.batch import DistillBatch, SequenceBatch
from research.core.network import Network
from research.train.step import eval_step
from tests.research.algorithms import hand
from tests.research.algorithms.toy import (
    BOS,
    CONTEXT,
    LENGTH,
    MODEL,
    TEACHER,
    frozen_models,
    host_batch,
    host_params,
    no_effect,
    objective_scalars,
    rollouts,
    rows,
    with_garbage,
)

OTHER_VOCABULARY = dataclasses.replace(MODEL, vocab_size=30)


def kl(p: np.ndarray, q: np.ndarray) -> float:
    return float((np.exp(p) * (p - q)).sum())


def divergence(student: np.ndarray, teacher: np.ndarray, algorithm: Distill) -> float:
    if algorithm.top_k:
        kept = np.argsort(-teacher)[: algorithm.top_k]
        student, teacher = student[kept], teacher[kept]
        if algorithm.tail == "bucket":
            student, teacher = (np.append(x, np.log(1 - np.exp(x).sum())) for x in (student, teacher))
        else:
            student, teacher = (x - np.log(np.exp(x).sum()) for x in (student, teacher))
    if algorithm.divergence == "forward_kl":
        return kl(teacher, student)
    if algorithm.divergence == "reverse_kl":
        return kl(student, teacher)
    middle = np.log(0.3 * np.exp(teacher) + 0.7 * np.exp(student))
    return 0.3 * kl(teacher, middle) + 0.7 * kl(student, middle)


def by_hand(policy: Any, teacher: Any, batch: DistillBatch, algorithm: Distill, offset: int) -> float:
    """Student token t is the teacher's t + offset: every row starts at slot 0."""
    student_after = hand.log_probs(policy, batch.student, temperature=1.5)
    teacher_after = hand.log_probs(teacher, batch.teacher, TEACHER, temperature=1.5)
    total = count = 0.0
    for b in range(8):
        for t in np.flatnonzero(batch.student.loss_mask[b]):
            total += batch.student.weights[b] * divergence(
                student_after[b, t - 1], teacher_after[b, t + offset - 1], algorithm
            )
            count += batch.student.weights[b]
    return total / count


@pytest.mark.parametrize(
    "algorithm",
    [
        Distill("forward_kl"),
        Distill("reverse_kl", top_k=3, tail="bucket"),
        Distill("forward_kl", top_k=3, tail="renormalize"),
        Distill("jsd", context_ids=CONTEXT, bos_id=BOS),
    ],
    ids=lambda a: f"{a.divergence}-{a.top_k}-{len(a.context_ids)}",
)
def test_equals_numpy_from_logits(policy: Any, algorithm: Distill) -> None:
    frozen = frozen_models(algorithm)
    given = rows()
    given.loss_mask[:, 1:3] &= (np.arange(8) % 2 == 0)[:, None]  # prompts of two lengths
    batch = algorithm.from_rows(given)
    expected = by_hand(policy, frozen.teacher.params, batch, algorithm, len(algorithm.context_ids))
    after = hand.log_probs(policy, batch.student, temperature=1.5)
    places = [(b, t) for b in range(8) for t in np.flatnonzero(batch.student.loss_mask[b])]
    weights = [batch.student.weights[b] for b, _ in places]
    entropy = np.average([-(np.exp(after[b, t - 1]) * after[b, t - 1]).sum() for b, t in places], weights=weights)
    scalars = objective_scalars(algorithm)
    for part in (batch, with_garbage(batch)):
        found = eval_step(policy, part, scalars, frozen, algorithm=algorithm, config=MODEL)
        assert float(found["loss"].mean()) == pytest.approx(expected, rel=2e-5)
        assert float(found["entropy"].mean()) == pytest.approx(entropy, rel=2e-5)


def test_only_the_student_is_trained(policy: Any) -> None:
    algorithm = Distill("jsd", context_ids=CONTEXT, bos_id=BOS)
    batch, scalars = host_batch(algorithm), objective_scalars(algorithm)

    def total(student: Any, teacher: Any) -> jax.Array:
        frozen = Frozen(teacher=Network(teacher, TEACHER))
        return algorithm.loss(Network(student, MODEL), batch, scalars, frozen)[0].total

    teacher = frozen_models(algorithm).teacher.params
    to_student, to_teacher = jax.jit(jax.grad(total, argnums=(0, 1)))(policy, teacher)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(to_student))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(to_teacher))
    assert len(jax.tree.leaves(to_teacher)) == len(jax.tree.leaves(to_student))


def test_a_student_that_is_its_teacher_has_nothing_to_learn(policy: Any) -> None:
    algorithm = Distill("forward_kl")
    frozen = Frozen(teacher=Network(policy, MODEL))
    found = eval_step(
        policy, algorithm.from_rows(rows()), objective_scalars(algorithm), frozen, algorithm=algorithm, config=MODEL
    )
    assert float(found["loss"].mean()) == pytest.approx(0, abs=1e-6)
    assert float(found["agreement"].mean()) == 1


def test_another_vocabulary_is_refused_by_both_sizes(policy: Any) -> None:
    algorithm = Distill("forward_kl")
    frozen = Frozen(teacher=Network(host_params(OTHER_VOCABULARY), OTHER_VOCABULARY))
    batch, scalars = algorithm.from_rows(rows()), objective_scalars(algorithm)
    with pytest.raises(ValueError, match="vocabulary of 30 tokens, expected the student's 24"):
        jax.eval_shape(lambda: algorithm.loss(Network(policy, MODEL), batch, scalars, frozen))


def text(rows: SequenceBatch, b: int) -> list[int]:
    real = rows.segment_ids[b] > 0
    np.testing.assert_array_equal(rows.positions[b][real], np.arange(real.sum()))
    return rows.tokens[b][real].tolist()


@pytest.mark.parametrize("bos_id", [BOS, None])
def test_the_context_comes_after_bos_or_before_the_first_token(bos_id: int | None) -> None:
    """Left- and right-padded rows, with BOS and without, full and empty."""
    tokens = np.array([[BOS, 7, 8, 9], [0, BOS, 7, 8], [7, BOS, 8, 0], [0, 0, 7, BOS], [0, 0, 0, 0], [7, 8, 9, 7]])
    real = np.array([[1, 1, 1, 1], [0, 1, 1, 1], [1, 1, 1, 0], [0, 0, 1, 1], [0, 0, 0, 0], [1, 1, 1, 1]], bool)
    loss_mask = real & (np.arange(4) >= 3)
    given = SequenceBatch(
        tokens=tokens.astype(np.int32),
        loss_mask=loss_mask,
        segment_ids=real.astype(np.int32),
        positions=np.maximum(np.cumsum(real, axis=1) - 1, 0).astype(np.int32),
        weights=np.ones(6, np.float32),
    )
    teacher, slots = teacher_rows(given, (20, 21), bos_id)
    assert teacher.tokens.shape == (6, 6) and teacher.tokens.dtype == slots.dtype == np.int32
    for b in range(6):
        mine = tokens[b][real[b]].tolist()
        at = 1 if bos_id is not None and mine[:1] == [BOS] else 0
        assert text(teacher, b) == (mine[:at] + [20, 21] + mine[at:] if mine else [])
        for t in np.flatnonzero(real[b]):
            assert teacher.tokens[b, slots[b, t]] == tokens[b, t]
            assert teacher.loss_mask[b, slots[b, t]] == loss_mask[b, t]
        assert teacher.loss_mask[b].sum() == loss_mask[b].sum()


def test_without_a_context_the_teacher_sees_the_student_s_rows() -> None:
    given = rows()
    teacher, slots = teacher_rows(given, (), None)
    jax.tree.map(np.testing.assert_array_equal, teacher, given.replace(positions=teacher.positions))
    np.testing.assert_array_equal(teacher.positions[given.loss_mask], given.positions[given.loss_mask])
    np.testing.assert_array_equal(slots, np.tile(np.arange(LENGTH), (8, 1)))


def test_packed_rows_are_refused() -> None:
    given = rows()
    with pytest.raises(ValueError, match="rows: got several sequences in a row"):
        teacher_rows(given.replace(segment_ids=given.segment_ids * 2), (), None)


def test_own_samples_all_count_whatever_their_reward() -> None:
    drawn = rollouts(np.array([1.0, 0, 0, 1]), np.array([3, 1, 8, 2]), group_size=2)
    batch, metrics = Distill("forward_kl", context_ids=CONTEXT).from_rollouts(drawn, seed=0)
    assert metrics == {} and batch.student.weights.tolist() == [1, 1, 1, 1]
    np.testing.assert_array_equal(batch.student.loss_mask[:, 3:], drawn.mask)
    for b in range(4):
        mine = [*drawn.prompt_tokens[b][drawn.prompt_mask[b]], *drawn.tokens[b][drawn.mask[b]]]
        assert text(batch.student, b) == mine and text(batch.teacher, b) == [*CONTEXT, *mine]


def test_the_config_finds_it_and_names_what_has_no_effect() -> None:
    objective = next(iter(PROVIDES["objective"].values()))
    options = {"divergence": "jsd", "jsd_beta": 0.5, "temperature": 1.0, "top_k": 0, "tail": "bucket"}
    assert options.keys() == objective.options.keys()
    made = objective.make(Setting(options, True, 8, 8, context_ids=(1, 2), bos_id=3))
    assert made == Distill("jsd") and (made.context_ids, made.bos_id) == ((1, 2), 3)
    assert made.roles == ("teacher",) and objective.given == "chat" and objective.own
    assert no_effect(objective, options, True) == {"tail"}
    assert no_effect(objective, {**options, "divergence": "forward_kl", "top_k": 4}, True) == {"jsd_beta"}
    traced = {key for key, option in objective.options.items() if option.traced}
    assert traced == objective_scalars(made).keys()
