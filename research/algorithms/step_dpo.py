"""DPO on the first step in which the two sides of a pair differ."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Bool

from objectives.reduce import reduce_metrics
from objectives.step_dpo import step_dpo_loss
from research.algorithms.base import Frozen, Objective, Scalars, Summed, provides
from research.algorithms.pairs import BETA, ReferencePairs, label_smoothing, mean_over_pairs, pair_logps, pair_masks
from research.core.batch import PreferenceBatch
from research.core.network import Network


@dataclasses.dataclass(frozen=True)
class StepDPO(ReferencePairs):
    """The contrast of one step given a shared history (Lai et al. 2024, eq. 2; Zhai et al. 2024).

    Both sides of a pair must hold the prompt in the same slots.
    """

    step_end_ids: tuple[int, ...] = ()  # the tokens that end a step (a line break)

    def loss(self, model: Network, batch: PreferenceBatch, scalars: Scalars, frozen: Frozen) -> Summed:
        """Mean over pairs; a pair of which one side has no differing step weighs nothing (`no_step`)."""
        assert batch.ref_chosen_logps is not None and batch.ref_rejected_logps is not None
        chosen, rejected = pair_logps(model, batch)
        chosen_step, rejected_step = first_differing_step(batch, self.step_end_ids)
        out = step_dpo_loss(
            policy_chosen_token_logps=chosen.logps,
            policy_rejected_token_logps=rejected.logps,
            ref_chosen_token_logps=batch.ref_chosen_logps,
            ref_rejected_token_logps=batch.ref_rejected_logps,
            chosen_step_mask=chosen_step,
            rejected_step_mask=rejected_step,
            beta=scalars["beta"],
            label_smoothing=scalars["label_smoothing"],
        )
        has_step = chosen_step.any(axis=1) & rejected_step.any(axis=1)
        loss, metrics = mean_over_pairs(out, jnp.where(has_step, batch.chosen.weights, 0.0))
        counted = reduce_metrics({"no_step": 1.0 - has_step}, weights=batch.chosen.weights)
        return loss, {**metrics, **counted}


def first_differing_step(
    batch: PreferenceBatch, step_end_ids: tuple[int, ...]
) -> tuple[Bool[Array, "B T"], Bool[Array, "B T"]]:
    """Each side's targets from the first token that differs to the end of that step, its line break included.

    Raises:
      ValueError: no token ends a step, so that a step would be all that follows.
    """
    if not step_end_ids:
        raise ValueError("step_end_ids: got none, expected the ids of the tokens that end a step (line breaks)")
    masks = pair_masks(batch)
    tokens = batch.chosen.tokens, batch.rejected.tokens
    differs = ((tokens[0] != tokens[1]) & (masks[0] | masks[1])) | (masks[0] != masks[1])
    after = jnp.cumsum(differs, axis=1) > 0

    def step(tokens: Array, mask: Array) -> Array:
        ends = jnp.isin(tokens, jnp.array(step_end_ids)) & mask & after
        over = jnp.cumsum(ends, axis=1) - ends > 0
        return mask & after & ~over

    return step(tokens[0], masks[0]), step(tokens[1], masks[1])


OPTIONS = {"beta": BETA, "label_smoothing": label_smoothing()}

PROVIDES = provides(Objective("step_dpo", StepDPO.from_setting, OPTIONS, given="preferences"))
