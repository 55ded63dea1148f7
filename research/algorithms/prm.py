"""Process reward models and, with the same head, outcome reward models."""

import dataclasses
from functools import partial
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from objectives.gae import last_token
from objectives.prm import prm_loss
from objectives.reduce import reduce_metrics, token_mean
from research.algorithms.base import Algorithm, Frozen, Objective, Scalars, Summed, provides
from research.core.batch import StepBatch
from research.core.network import Network, row_outputs

Supervision = Literal["process", "outcome"]


@dataclasses.dataclass(frozen=True)
class StepScorer(Algorithm[StepBatch]):
    """Two-class cross-entropy at the last token of each labelled step.

    Sources: process, Lightman et al. 2023, Wang et al. 2023 (soft labels); outcome, Cobbe et al. 2021.
    """

    supervision: Supervision = "process"  # every step is labelled, or only the last one: right where every step is

    layout = "step_scorer"

    def loss(self, model: Network, batch: StepBatch, scalars: Scalars, frozen: Frozen) -> Summed:
        """Mean over the labelled steps of the global batch, rows weighted."""
        mask, labels = batch.rows.used_mask, batch.step_labels
        if self.supervision == "outcome":
            mask, labels = outcome(labels, mask)
        out = prm_loss(step_logits=row_outputs(model, batch.rows), labels=labels, label_mask=mask)
        weights = batch.rows.weights
        return token_mean(out.losses, mask, weights=weights), reduce_metrics(out.metrics, mask=mask, weights=weights)


def outcome(
    step_labels: Float[Array, "B T"], mask: Bool[Array, "B T"]
) -> tuple[Bool[Array, "B T"], Float[Array, "B T"]]:
    """The mask of each row's last labelled step, and the outcome as its label.

    `min_s p_s`: 1 where all steps are right, 0 where one is wrong; of soft labels, the least sure step's.
    """
    worst = jnp.where(mask, step_labels, 1.0).min(axis=1, keepdims=True)
    return last_token(mask), jnp.broadcast_to(worst, mask.shape)


PROVIDES = provides(
    Objective("prm", StepScorer.from_setting, {}, given="steps"),
    Objective("orm", partial(StepScorer.from_setting, supervision="outcome"), {}, given="steps"),
)
