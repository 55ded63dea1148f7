"""Next-token cross-entropy: pretraining on text, fine-tuning on responses."""

import dataclasses

from models.config import ModelConfig
from models.transformer import Params
from objectives.next_token import next_token_loss
from objectives.reduce import reduce_metrics, token_mean
from research.algorithms.base import Algorithm, Batch, DataKind, Frozen, Objective, Scalars, Summed
from research.config.schema import number
from research.core.batch import SequenceBatch
from research.core.network import batch_logps


@dataclasses.dataclass(frozen=True)
class NextToken(Algorithm):
    """`next_token` (every token of packed text) and `sft` (response tokens of chat examples).

    Attributes:
      every_token: whether all tokens of the rows are targets.

    Scalars: `label_smoothing`, `z_loss_coef`.
    """

    every_token: bool = False

    def loss(self, params: Params, config: ModelConfig, batch: Batch, scalars: Scalars, frozen: Frozen) -> Summed:
        """Mean over all target tokens of the global batch, rows weighted."""
        del frozen
        assert isinstance(batch, SequenceBatch)
        scored = batch_logps(params, config, batch, all_targets=self.every_token)
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
        return (
            token_mean(out.losses, batch.loss_mask, weights=batch.weights),
            reduce_metrics(metrics, mask=batch.loss_mask, weights=batch.weights),
        )


NEXT_TOKEN_OPTIONS = {
    "label_smoothing": number(0.0, "Probability mass spread over the vocabulary.", 0, 1),
    "z_loss_coef": number(0.0, "Weight of the squared log-partition.", 0),
}


def _objective(name: str, given: DataKind, algorithm: NextToken) -> Objective:
    return Objective(name, lambda _setting: algorithm, NEXT_TOKEN_OPTIONS, given=given)


PROVIDES = {
    "objective": {
        "next_token": _objective("next_token", "text", NextToken(every_token=True)),
        "sft": _objective("sft", "chat", NextToken()),
    }
}
