"""Whether problems are solved: pass@k, maj@k, and the accuracy of the one answer that the stage gives."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np

from research.data.records import Records
from research.evals.base import Need
from research.evals.passk import majority_at_k, pass_at_k
from research.evals.policy import Sample, TrainedPolicy


class Judged(NamedTuple):
    """Completions of P problems with their verdicts, n each."""

    right: np.ndarray  # [P, n] bool
    unknown: np.ndarray  # [P, n] bool, where the yardstick cannot tell; such a completion is not right
    # [P][n] final answers in canonical form; None does not vote. A completion that was cut has no answer: it is wrong
    # and does not vote
    votes: list[list[str | None]]


def judge(policy: TrainedPolicy, records: Records, groups: Sequence[Sequence[Sample]]) -> Judged:
    """Verdicts of the policy's yardstick, and votes as its task extracts them."""
    verdicts = [
        [policy.correct(sample, record) for sample in group] for record, group in zip(records, groups, strict=True)
    ]
    return Judged(
        right=np.array([[verdict is not None and verdict >= 1.0 for verdict in row] for row in verdicts]),
        unknown=np.array([[verdict is None for verdict in row] for row in verdicts]),
        votes=[[policy.task.extract(s.text) if s.stopped else None for s in group] for group in groups],
    )


@dataclass(frozen=True)
class Accuracy:
    """Samples held-out problems and judges the completions.

    `eval/accuracy` is of the one answer that `final_answer` gives to a problem: a sample (the mean over the samples),
    the majority's, or that of the sample which a scorer likes best. `eval/unknown` is the share of completions whose
    correctness could not be told, `eval/truncated_fraction` of those cut at their limit, `eval/mean_length` in tokens
    that the model drew; `eval/tool_calls` and `eval/tool_errors` are calls, and calls that failed, a completion.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"answers"})

    def run(self, policy: TrainedPolicy, seed: int) -> Iterator[tuple[str, np.ndarray]]:
        """One value a problem."""
        how = policy.settings
        records = policy.held_out(how.problems)
        groups = policy.generate(records, seed=seed)
        judged = judge(policy, records, groups)

        def mean(of: Callable[[Sample], float]) -> np.ndarray:
            return np.array([np.mean([of(sample) for sample in group]) for group in groups])

        for k in how.k:
            yield f"eval/pass@{k}", pass_at_k(how.samples, judged.right.sum(axis=1), k)
            if k > 1:
                yield f"eval/maj@{k}", majority_at_k(judged.votes, judged.right, k)
        yield "eval/accuracy", _final(policy, judged, groups)
        yield "eval/unknown", judged.unknown.mean(axis=1)
        yield "eval/truncated_fraction", mean(lambda sample: not sample.stopped)
        yield "eval/mean_length", mean(lambda sample: sample.length)
        if groups[0][0].turns is not None:
            yield "eval/tool_calls", mean(lambda sample: len(sample.calls))
            yield "eval/tool_errors", mean(lambda sample: sum(how != "ok" for _, how in sample.calls))


def _final(policy: TrainedPolicy, judged: Judged, groups: Sequence[Sequence[Sample]]) -> np.ndarray:
    if policy.final_answer == "majority":
        return majority_at_k(judged.votes, judged.right, judged.right.shape[1])
    if policy.final_answer == "sample":
        return judged.right.mean(axis=1)
    best = policy.scores(groups).argmax(axis=1)
    return judged.right[np.arange(len(best)), best].astype(np.float64)


PROVIDES = {"evaluator": {"accuracy": Accuracy}}
