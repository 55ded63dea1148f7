"""Whether problems are solved: pass@k, maj@k, and the accuracy of the one answer that the stage gives."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np

from research.core.errors import ConfigError
from research.data.records import Records
from research.evals.base import Need, Policy, Sample
from research.evals.passk import majority_at_k, pass_at_k


class Judged(NamedTuple):
    """Completions of P problems with their verdicts, n each.

    Attributes:
      right: [P, n] bool.
      unknown: [P, n] bool, where the yardstick cannot tell; such a completion is not right.
      votes: [P][n] final answers in canonical form; None does not vote. A completion that was cut has no answer:
        it is wrong and does not vote.
    """

    right: np.ndarray
    unknown: np.ndarray
    votes: list[list[str | None]]


def judge(policy: Policy, records: Records, groups: Sequence[Sequence[Sample]]) -> Judged:
    """Verdicts of the policy's yardstick, and votes as its task extracts them."""
    verdicts = [
        [policy.correct(sample, record) if sample.stopped else 0.0 for sample in group]
        for record, group in zip(records, groups, strict=True)
    ]
    votes = [[policy.task.extract(s.text) if s.stopped else None for s in group] for group in groups]
    return Judged(
        right=np.array([[verdict is not None and verdict >= 1.0 for verdict in row] for row in verdicts]),
        unknown=np.array([[verdict is None for verdict in row] for row in verdicts]),
        votes=votes,
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

    def run(self, policy: Policy, seed: int) -> Iterator[tuple[str, np.ndarray]]:
        """One value a problem; needs `k` samples at least."""
        how = policy.settings
        if max(how.k, default=1) > how.samples:
            raise ConfigError(f"evaluation.k: got {max(how.k)}, expected at most evaluation.samples={how.samples}")
        records = policy.held_out(how.problems)
        groups = policy.generate(records, seed=seed)
        judged = judge(policy, records, groups)
        for k in how.k:
            yield f"eval/pass@{k}", pass_at_k(how.samples, judged.right.sum(axis=1), k)
            if k > 1:
                yield f"eval/maj@{k}", majority_at_k(judged.votes, judged.right, k)
        yield "eval/accuracy", _final(policy, judged, groups)
        yield "eval/unknown", judged.unknown.mean(axis=1)
        yield "eval/truncated_fraction", _mean(groups, lambda sample: not sample.stopped)
        yield "eval/mean_length", _mean(groups, lambda sample: sample.length)
        if groups[0][0].turns is not None:
            yield "eval/tool_calls", _mean(groups, lambda sample: len(_calls(sample)))
            yield "eval/tool_errors", _mean(groups, lambda s: sum(how != "ok" for how in _calls(s)))


def _final(policy: Policy, judged: Judged, groups: Sequence[Sequence[Sample]]) -> np.ndarray:
    if policy.final_answer == "majority":
        return majority_at_k(judged.votes, judged.right, judged.right.shape[1])
    if policy.final_answer == "sample":
        return judged.right.mean(axis=1)
    best = policy.scores(groups).argmax(axis=1)
    return judged.right[np.arange(len(best)), best].astype(np.float64)


def _mean(groups: Sequence[Sequence[Sample]], of: Callable[[Sample], float]) -> np.ndarray:
    return np.array([np.mean([of(sample) for sample in group]) for group in groups])


def _calls(sample: Sample) -> list[str]:
    return [] if sample.turns is None else [how for _, how in sample.turns.calls]


PROVIDES = {"evaluator": {"accuracy": Accuracy}}
