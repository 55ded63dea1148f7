"""KTO: completions that are each desirable or not, without pairs."""

import dataclasses
from typing import get_args

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from objectives.kto import KTOLossType, kto_loss, kto_reference_point
from objectives.reduce import example_mean, reduce_metrics, sequence_sum
from research.algorithms.base import Algorithm, Frozen, Objective, Rollouts, Scalars, Summed, provides
from research.algorithms.pairs import BETA
from research.config.schema import choice, number
from research.core.batch import SequenceBatch, UnpairedBatch
from research.core.network import Network, batch_logps


@dataclasses.dataclass(frozen=True)
class KTO(Algorithm[UnpairedBatch]):
    """A value function around a reference point (Ethayarajh et al. 2024, Eq. 7).

    The reference point is computed once on the global batch, so micro-batches share it; apo_zero_unpaired's is 0.
    """

    loss_type: KTOLossType = "kto"

    roles = ("reference",)

    def loss(self, model: Network, batch: UnpairedBatch, scalars: Scalars, frozen: Frozen) -> Summed:
        """Mean over completions."""
        assert batch.ref_logps is not None and batch.reference_point is not None
        used = batch.rows.weights > 0
        point = jnp.where(used, batch.reference_point, 0.0)
        out = kto_loss(
            policy_logps=_sums(model, batch.rows),
            ref_logps=jnp.where(used, batch.ref_logps, 0.0),
            desirable=batch.desirable,
            reference_point=point if self.loss_type == "kto" else 0.0,
            beta=scalars["beta"],
            desirable_weight=scalars["desirable_weight"],
            undesirable_weight=scalars["undesirable_weight"],
            loss_type=self.loss_type,
        )
        weights = batch.rows.weights
        return example_mean(out.losses, weights), reduce_metrics(out.metrics, weights=weights)

    def prepare(self, model: Network, batch: UnpairedBatch, scalars: Scalars, frozen: Frozen) -> UnpairedBatch:
        """Fills in the reference's log-probs and the reference point, from the mismatched rows."""
        assert frozen.reference is not None
        ref_logps = _sums(frozen.reference, batch.rows)
        point = jnp.float32(0.0)
        if self.loss_type == "kto":
            point = kto_reference_point(
                policy_kl_logps=_sums(model, batch.mismatched),
                ref_kl_logps=_sums(frozen.reference, batch.mismatched),
                weights=batch.mismatched.weights,
            )
        return batch.replace(ref_logps=ref_logps, reference_point=jnp.full_like(ref_logps, point))

    def from_rollouts(self, rollouts: Rollouts, seed: int) -> tuple[UnpairedBatch, dict[str, float]]:
        """All B rows, desirable where correct; the mismatched rows pair each prompt with the next one's completions.

        Raises:
          ValueError: only one prompt.
        """
        B, G = len(rollouts.rewards), rollouts.group_size
        if B == G:
            raise ValueError("prompts_per_step: got 1, expected at least 2 because KTO mismatches prompts")
        others = rollouts._replace(
            tokens=np.roll(rollouts.tokens, -G, axis=0),
            mask=np.roll(rollouts.mask, -G, axis=0),
            given=None if rollouts.given is None else np.roll(rollouts.given, -G, axis=0),
        )
        ones = np.ones(B)
        batch = UnpairedBatch(rollouts.rows(None, ones), others.rows(None, ones), rollouts.correct)
        return batch, {"desirable_fraction": float(rollouts.correct.mean())}


def _sums(model: Network, rows: SequenceBatch) -> Float[Array, " B"]:
    """Sequence log-probs; 0 in rows of weight 0."""
    return sequence_sum(batch_logps(model, rows).logps, rows.used_mask)


OPTIONS = {
    "loss_type": choice("kto", "kto or apo_zero_unpaired.", *get_args(KTOLossType)),
    "beta": BETA,
    "desirable_weight": number(1.0, "Of desirable completions.", 0),
    "undesirable_weight": number(1.0, "Of undesirable completions.", 0),
}

PROVIDES = provides(
    Objective(
        "kto",
        KTO.from_setting,
        OPTIONS,
        given="unpaired",
        own=True,
        reads=lambda _options: frozenset({"correct"}),
        least_prompts=2,  # a completion is put under another prompt
    )
)
