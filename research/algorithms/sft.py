"""Next-token cross-entropy: pretraining on text, fine-tuning on responses."""

import dataclasses

from models.config import ModelConfig
from models.transformer import Params
from objectives.next_token import next_token_loss
from objectives.reduce import reduce_metrics, token_mean
from objectives.types import WeightedSum
from research.algorithms.base import Batch, DataKind, Rollouts, Scalars, batch_logps
from research.batch import SequenceBatch


@dataclasses.dataclass(frozen=True)
class NextToken:
    """`next_token` (every token of packed text) and `sft` (response tokens of chat examples).

    Attributes:
      data: "text" or "chat"; the mask that comes with the data is the only difference.

    Scalars: `label_smoothing`, `z_loss_coef`.
    """

    data: DataKind = dataclasses.field(compare=False)  # text and chat share one compiled step
    needs_reference: bool = False

    def loss(
        self, params: Params, config: ModelConfig, batch: Batch, scalars: Scalars
    ) -> tuple[WeightedSum, dict[str, WeightedSum]]:
        """Mean over all target tokens of the global batch, rows weighted."""
        assert isinstance(batch, SequenceBatch)
        scored = batch_logps(params, config, batch)
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

    def with_reference(self, params: Params, config: ModelConfig, batch: Batch, scalars: Scalars) -> Batch:
        """Not used: there is no reference."""
        del params, config, scalars
        return batch

    def from_rollouts(self, rollouts: Rollouts, seed: int) -> tuple[Batch, dict[str, float]]:
        """Not used: the data are given."""
        raise NotImplementedError(
            f"{self.data} batches do not come from rollouts ({rollouts.group_size}, {seed})"
        )
