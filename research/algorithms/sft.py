"""Next-token cross-entropy: pretraining on text, fine-tuning on responses."""

import dataclasses
from functools import partial

from objectives.next_token import next_token_loss
from objectives.reduce import reduce_metrics, token_mean
from research.algorithms.base import Algorithm, Frozen, Objective, Scalars, Summed, provides
from research.config.schema import number
from research.core.batch import SequenceBatch
from research.core.network import Network, batch_logps


@dataclasses.dataclass(frozen=True)
class NextToken(Algorithm[SequenceBatch]):
    """`next_token` (every token of packed text) and `sft` (response tokens of chat examples)."""

    every_token: bool = False  # whether all tokens of the rows are targets

    def loss(self, model: Network, batch: SequenceBatch, scalars: Scalars, frozen: Frozen) -> Summed:
        """Mean over all target tokens of the global batch, rows weighted."""
        scored = batch_logps(model, batch, all_targets=self.every_token)
        out = next_token_loss(
            token_logps=scored.logps,
            mask=batch.loss_mask,
            mean_logps=scored.mean_logps,
            label_smoothing=scalars["label_smoothing"],
            logsumexp=scored.logsumexp,
            z_loss_coef=scalars["z_loss_coef"],
        )
        # Rows without a target have weight 0; the pipelines count them where they leave them out.
        metrics = {"nll": out.metrics["nll"], "z_loss": out.metrics["z_loss"], "entropy": scored.entropy}
        loss = token_mean(out.losses, batch.loss_mask, weights=batch.weights)
        return loss, reduce_metrics(metrics, mask=batch.loss_mask, weights=batch.weights)


NEXT_TOKEN_OPTIONS = {
    "label_smoothing": number(0.0, "Probability mass spread over the vocabulary.", 0, 1),
    "z_loss_coef": number(0.0, "Weight of the squared log-partition.", 0),
}

PROVIDES = provides(
    Objective("next_token", partial(NextToken.from_setting, every_token=True), NEXT_TOKEN_OPTIONS, given="text"),
    Objective("sft", NextToken.from_setting, NEXT_TOKEN_OPTIONS, given="chat"),
)
