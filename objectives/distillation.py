"""Distillation: a divergence between the teacher's and the student's next-token distributions.

On-policy, off-policy and context distillation differ only in whose tokens the two were computed on and in what the
teacher saw before them; the caller aligns positions. K is the number of the teacher's most likely tokens that were
kept. The student carries the gradient, the teacher none.
"""

from typing import Literal

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from objectives.numerics import bool_mask
from objectives.types import ObjectiveOutput, Scalar, require_choice

Divergence = Literal["forward_kl", "reverse_kl", "jsd"]
Tail = Literal["renormalize", "bucket"]

MIN_LOGP = -1e4  # of a token ruled out by a logit of -inf: its probability is still 0, but `0 * log 0` is 0, not NaN
MIN_TAIL = 1e-7  # smallest probability outside the top-k: about the spacing of float32 below 1


def distillation_loss(
    *,
    student_logits: Float[Array, "B T V"],
    teacher_logits: Float[Array, "B T V"],
    mask: Bool[Array, "B T"],
    divergence: Divergence,
    jsd_beta: Scalar = 0.5,
    temperature: Scalar = 1.0,
) -> ObjectiveOutput:
    """Divergence between teacher and student over the whole vocabulary, per token.

    `T = softmax(teacher / tau)`, `S = softmax(student / tau)`; forward_kl `KL(T || S)`, reverse_kl `KL(S || T)`, jsd
    `b KL(T || M) + (1 - b) KL(S || M)` with `M = b T + (1 - b) S`

    Source: Hinton et al. 2015, Section 2 (forward); Gu et al. 2024 (MiniLLM), Eq. 1 (reverse); Agarwal et al. 2024
    (GKD), Eq. 1 (jsd: their D_JSD(beta)(P || Q) with P = T and Q = S, so b is the teacher's weight).

    Args:
      student_logits, teacher_logits: `[B, T, V]`, any float dtype.
      divergence: forward_kl covers the teacher's modes, reverse_kl seeks one.
      jsd_beta: b in (0, 1), read by jsd only. At the ends the jsd is 0; `jsd / b -> KL(T || S)` as b -> 0 and
        `jsd / (1 - b) -> KL(S || T)` as b -> 1.
      temperature: tau > 0, divides both logits.
    Returns losses `[B, T]` and metrics `[B, T]`, nats, at the same temperature: `forward_kl`, `reverse_kl`,
    `student_entropy`, `teacher_entropy`, and `top1_agreement`. Raises ValueError on an unknown divergence.
    Differs from the paper: no factor tau^2 (Hinton et al.); multiply by it to keep the scale of gradients over a sweep
    of tau. Differs from TRL, whose `beta` of 0 *is* KL(T || S) and 1 KL(S || T), the scaled limits; between them its
    beta is our b.
    """
    mask = bool_mask(mask)
    student, teacher = _log_probs(student_logits, teacher_logits, mask, temperature)
    losses = jnp.where(mask, _divergence(student, teacher, divergence, jsd_beta), 0.0)
    metrics = {
        "forward_kl": _kl(teacher, student),
        "reverse_kl": _kl(student, teacher),
        "student_entropy": -_expectation(student, student),
        "teacher_entropy": -_expectation(teacher, teacher),
        "top1_agreement": (student.argmax(axis=-1) == teacher.argmax(axis=-1)).astype(jnp.float32),
    }
    return ObjectiveOutput(losses, jax.lax.stop_gradient(metrics))


def topk_distillation_loss(
    *,
    student_topk_logps: Float[Array, "B T K"],
    teacher_topk_logps: Float[Array, "B T K"],
    mask: Bool[Array, "B T"],
    divergence: Divergence,
    tail: Tail,
    jsd_beta: Scalar = 0.5,
) -> ObjectiveOutput:
    """Divergence between teacher and student where only the teacher's K most likely tokens are known.

    `KL(T' || S')` or another divergence of `distillation_loss`; `T'` is made from T as `S'` is from S:
      renormalize: `T'_k = T_k / sum_j T_j`, K outcomes
      bucket: `T' = (T_1, ..., T_K, 1 - sum_k T_k)`, K + 1 outcomes, the last one being all other tokens

    Source: as `distillation_loss`; merging outcomes only lowers an f-divergence (data processing inequality), so
    `bucket` is a lower bound of the full one. `renormalize` says nothing about how much the student puts outside of the
    K tokens: it is not a bound, and a student of little mass there costs nothing.

    Args:
      student_topk_logps: `[B, T, K]`, under the full softmax, of the teacher's top-k tokens.
      teacher_topk_logps: `[B, T, K]`, likewise; -inf where the teacher gave fewer than K: there the student is not
        read.
      divergence, jsd_beta: as in `distillation_loss`.
      tail: what becomes of the other tokens.
    Returns losses `[B, T]`, nats, and the metrics `teacher_topk_mass`, `student_topk_mass`, `[B, T]`, the probability
    of the K tokens. Raises ValueError on an unknown literal.
    """
    require_choice("tail", tail, Tail)
    mask = bool_mask(mask)
    chex.assert_equal_shape([student_topk_logps, teacher_topk_logps])
    chex.assert_shape(student_topk_logps, (*mask.shape, None))
    student, teacher = (_masked_rows(x, mask) for x in (student_topk_logps, teacher_topk_logps))
    teacher = jax.lax.stop_gradient(teacher)
    student = jnp.where(teacher > -jnp.inf, student, -jnp.inf)
    metrics = {"teacher_topk_mass": jnp.exp(_mass(teacher)), "student_topk_mass": jnp.exp(_mass(student))}
    if tail == "renormalize":
        student, teacher = _log_softmax(student), _log_softmax(teacher)
    else:
        student, teacher = _with_tail(student), _with_tail(teacher)
    losses = jnp.where(mask, _divergence(student, teacher, divergence, jsd_beta), 0.0)
    return ObjectiveOutput(losses, jax.lax.stop_gradient(metrics))


def _divergence(student: Array, teacher: Array, divergence: str, jsd_beta: Scalar) -> Array:
    require_choice("divergence", divergence, Divergence)
    if divergence == "forward_kl":
        return _kl(teacher, student)
    if divergence == "reverse_kl":
        return _kl(student, teacher)
    beta = jnp.asarray(jsd_beta, jnp.float32)
    mixture = jnp.logaddexp(jnp.log(beta) + teacher, jnp.log1p(-beta) + student)
    return beta * _kl(teacher, mixture) + (1.0 - beta) * _kl(student, mixture)


def _kl(p_logps: Array, q_logps: Array) -> Array:
    return _expectation(p_logps, p_logps - q_logps)


def _expectation(logps: Array, values: Array) -> Array:
    return (jnp.exp(logps) * values).sum(axis=-1)


def _log_probs(student_logits: Array, teacher_logits: Array, mask: Array, temperature: Scalar) -> tuple[Array, Array]:
    """Log-probs of both, 0 logits where masked, no gradient to the teacher."""
    chex.assert_equal_shape([student_logits, teacher_logits])
    chex.assert_shape(student_logits, (*mask.shape, None))
    student, teacher = (_masked_rows(x, mask) / temperature for x in (student_logits, teacher_logits))
    return _log_softmax(student), jax.lax.stop_gradient(_log_softmax(teacher))


def _masked_rows(values: Array, mask: Array) -> Array:
    return jnp.where(mask[..., None], values.astype(jnp.float32), 0.0)


def _log_softmax(logits: Array) -> Array:
    return jnp.maximum(jax.nn.log_softmax(logits, axis=-1), MIN_LOGP)


def _mass(logps: Array) -> Array:
    """Log of the total probability, at most `log(1 - MIN_TAIL)`: float32 sums may exceed 1."""
    return jnp.minimum(jax.nn.logsumexp(logps, axis=-1), -MIN_TAIL)


def _with_tail(logps: Array) -> Array:
    tail = jnp.log(-jnp.expm1(_mass(logps)))
    return jnp.concatenate([jnp.maximum(logps, MIN_LOGP), tail[..., None]], axis=-1)
