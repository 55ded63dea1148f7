"""What a policy makes of held-out data without sampling: its loss on rows, its choices between pairs."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import ClassVar

import numpy as np

from research.config.schema import key
from research.core.errors import DataError
from research.evals.base import Need
from research.evals.policy import TrainedPolicy


@dataclass(frozen=True)
class ValidationLoss:
    """`eval/validation_loss`: negative log-likelihood of held-out rows, nats a target token.

    One value a row, the mean over its tokens; `eval/validation_tokens` is how many they are.
    """

    max_batches: int = key(32, "Batches read at most; 0 is all.", low=0, effect="evaluation")

    needs: ClassVar[frozenset[Need]] = frozenset({"rows"})

    def run(self, policy: TrainedPolicy, seed: int) -> Iterator[tuple[str, np.ndarray]]:
        """Teacher-forced; nothing is drawn."""
        del seed
        losses, counts = [], []
        for rows in islice(policy.rows(), self.max_batches or None):
            used = rows.weights > 0
            mask = rows.loss_mask[used]
            losses.append(-np.where(mask, policy.logps(rows)[used], 0.0).sum(axis=1) / mask.sum(axis=1))
            counts.append(mask.sum(axis=1))
        yield "eval/validation_loss", _joined(losses, "rows")
        yield "eval/validation_tokens", _joined(counts, "rows")


@dataclass(frozen=True)
class PreferenceAccuracy:
    """`eval/preference_accuracy`: share of held-out pairs whose chosen side has the higher implicit reward.

    The implicit reward is `log pi(y | x) - log pi_ref(y | x)` (Rafailov et al. 2023, eq. 5 with beta 1); equal rewards
    count half. `eval/preference_margin` is the chosen side's minus the rejected side's, nats.
    """

    max_batches: int = key(32, "Batches read at most; 0 is all.", low=0, effect="evaluation")

    needs: ClassVar[frozenset[Need]] = frozenset({"pairs"})

    def run(self, policy: TrainedPolicy, seed: int) -> Iterator[tuple[str, np.ndarray]]:
        """Teacher-forced; nothing is drawn."""
        del seed
        margins = []
        for pairs in islice(policy.pairs(), self.max_batches or None):
            chosen, rejected = (
                np.where(rows.loss_mask, policy.logps(rows) - policy.logps(rows, reference=True), 0.0).sum(axis=1)
                for rows in (pairs.chosen, pairs.rejected)
            )
            margins.append((chosen - rejected)[pairs.chosen.weights > 0])
        margin = _joined(margins, "pairs")
        yield "eval/preference_accuracy", (1.0 + np.sign(margin)) / 2
        yield "eval/preference_margin", margin


def _joined(parts: list[np.ndarray], what: str) -> np.ndarray:
    found = np.concatenate(parts) if parts else np.zeros(0)
    if not found.size:
        raise DataError(f"evaluation: there are no held-out {what}, expected at least one")
    return found.astype(np.float64)


PROVIDES = {"evaluator": {"validation_loss": ValidationLoss, "preference_accuracy": PreferenceAccuracy}}
