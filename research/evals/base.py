"""What evaluators are."""

from collections.abc import Iterator
from typing import Literal, Protocol

import numpy as np

from research.evals.policy import TrainedPolicy

Need = Literal["answers", "rows", "pairs"]
"""What an evaluator reads: problems with answers that can be checked, rows of text or chat, pairs of preferences."""


class Evaluator(Protocol):
    """Measures a policy.

    A component of kind "evaluator" is a class of these, made without arguments or with its `key` fields. What it cannot
    do without, it says in the class attribute `needs: ClassVar[frozenset[Need]]`.
    """

    def run(self, policy: TrainedPolicy, seed: int) -> Iterator[tuple[str, np.ndarray]]:
        """Metric name and [N] values, one per example; the metric is their mean."""
