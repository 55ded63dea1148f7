"""Next-token cross-entropy against an explicit loop over the vocabulary."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from objectives.next_token import next_token_loss
from tests.objectives.cases import SEEDS, SHAPES, fill, random_mask

VOCAB = 5


def loop_losses(logits, targets, mask, label_smoothing, z_loss_coef):
    losses, nlls = np.zeros(mask.shape), np.zeros(mask.shape)
    for b, t in zip(*np.nonzero(mask), strict=True):
        z = logits[b, t].astype(float)
        lse = np.log(np.sum(np.exp(z)))
        nlls[b, t] = lse - z[targets[b, t]]
        target = np.full(VOCAB, label_smoothing / VOCAB)
        target[targets[b, t]] += 1 - label_smoothing
        losses[b, t] = sum(p * (lse - z_v) for p, z_v in zip(target, z, strict=True)) + z_loss_coef * lse**2
    return losses, nlls


@jax.jit
def jit_loss(logits, targets, mask, label_smoothing, z_loss_coef):
    logps = jax.nn.log_softmax(logits)
    return next_token_loss(
        token_logps=jnp.take_along_axis(logps, targets[..., None], axis=-1)[..., 0],
        mask=mask,
        mean_logps=logps.mean(axis=-1),
        label_smoothing=label_smoothing,
        logsumexp=jax.nn.logsumexp(logits, axis=-1),
        z_loss_coef=z_loss_coef,
    )


@pytest.mark.parametrize(("label_smoothing", "z_loss_coef"), [(0.0, 0.0), (0.1, 0.0), (0.0, 1e-2), (0.3, 0.5)])
def test_golden(label_smoothing, z_loss_coef):
    for seed in SEEDS:
        rng = np.random.default_rng(seed)
        shape = SHAPES[seed % len(SHAPES)]
        mask = random_mask(rng, *shape)
        logits = rng.normal(size=(*shape, VOCAB)).astype(np.float32)
        logits = fill(logits, mask[..., None] & np.ones(VOCAB, bool))
        targets = rng.integers(VOCAB, size=shape)
        got = jit_loss(logits, targets, mask, label_smoothing, z_loss_coef)
        losses, nlls = loop_losses(logits, targets, mask, label_smoothing, z_loss_coef)
        np.testing.assert_allclose(got.losses, losses, rtol=1e-5, atol=1e-5, err_msg=f"seed {seed}")
        np.testing.assert_allclose(got.metrics["nll"], nlls, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(got.metrics["frac_empty_rows"], ~mask.any(axis=1))


def test_defaults_are_plain_negative_log_likelihood():
    logps = jnp.array([[-0.5, -2.0]])
    output = next_token_loss(token_logps=logps)
    np.testing.assert_array_equal(output.losses, -logps)
    assert set(output.metrics) == {"nll", "frac_empty_rows"}


@pytest.mark.parametrize(
    ("option", "missing"), [({"label_smoothing": 0.1}, "mean_logps"), ({"z_loss_coef": jnp.array(0.0)}, "logsumexp")]
)
def test_refuses_a_coefficient_that_would_do_nothing(option, missing):
    with pytest.raises(ValueError, match=f"no effect because {missing} is None"):
        next_token_loss(token_logps=jnp.zeros((1, 2)), **option)
