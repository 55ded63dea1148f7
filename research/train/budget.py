"""What a run has spent: tokens, completions, FLOPs, seconds."""

import dataclasses
from typing import Any

from models.config import ModelConfig


@dataclasses.dataclass
class Spending:
    """Counters of one run; evaluation is not counted, it is the same for every arm.

    FLOPs are the model's own (`ModelConfig.flops_per_token`), of real tokens only: padding costs time, not budget, and
    a prompt counts in each of its rows, though they share it. A trained token costs three forward passes, a reference's
    or a sampled token one. `context` is the mean context length of the tokens.
    """

    model: ModelConfig
    tokens_sampled: int = 0
    completions_sampled: int = 0
    tokens_trained: int = 0
    flops: float = 0.0
    seconds: float = 0.0

    @property
    def tokens(self) -> int:
        """Tokens spent: sampled and trained."""
        return self.tokens_sampled + self.tokens_trained

    def sampled(self, *, completions: int, tokens: int, prompt_tokens: int, context: float) -> None:
        """Adds a rollout."""
        self.completions_sampled += completions
        self.tokens_sampled += tokens
        self.flops += self.model.flops_per_token(context) * (tokens + prompt_tokens)

    def trained(self, *, target_tokens: int, real_tokens: int, context: float, networks: int = 1) -> None:
        """Adds an update: `target_tokens` entered the loss, `real_tokens` went through each network trained."""
        self.tokens_trained += target_tokens
        self.flops += 3.0 * networks * self.model.flops_per_token(context) * real_tokens

    def forward(self, *, model: ModelConfig, real_tokens: int, context: float) -> None:
        """Adds a forward pass of another model: a reference, a teacher, a scorer."""
        self.flops += model.flops_per_token(context) * real_tokens

    def record(self) -> dict[str, Any]:
        """The counters by name."""
        return {name: value for name, value in vars(self).items() if name != "model"}

    def restore(self, record: dict[str, Any]) -> None:
        """Sets the counters to those of a checkpoint."""
        vars(self).update(record)
