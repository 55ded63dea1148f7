"""Exact-match evaluation: sample each problem, verify the completions, report pass@k and maj@k."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from research.core.errors import DataError
from research.evals.passk import Estimate, Values, majority_at_k, mean_with_error, pass_at_k


@dataclass(frozen=True)
class Problem:
    """A question with an answer that can be checked."""

    name: str
    prompt_ids: Sequence[int]
    answer: str


@dataclass(frozen=True)
class Completion:
    """One sample: its text, its length in tokens, and whether the length limit cut it off."""

    text: str
    num_tokens: int
    truncated: bool


Generate = Callable[[Sequence[Sequence[int]], int], Sequence[Sequence[Completion]]]
"""(prompt_ids [P][T], samples n) -> completions [P][n]."""

Verify = Callable[[str, str], bool]
"""(completion, answer) -> whether the completion is right."""

Extract = Callable[[str], str | None]
"""completion -> its final answer in one spelling per value, or None if it gives none."""


@dataclass(frozen=True)
class ProblemResult:
    """What happened at one problem, sample by sample."""

    name: str
    answer: str
    completions: tuple[Completion, ...]
    extracted: tuple[str | None, ...]
    correct: tuple[bool, ...]


@dataclass(frozen=True)
class Evaluation:
    """The outcome.

    Attributes:
      metrics: `eval/pass@k`, `eval/maj@k`, `eval/truncated_fraction`, `eval/mean_length` (tokens).
      estimates: the same names, with error bars over the problems.
      per_problem: the same names, [P] values in the order of `problems`, for paired comparison of two models.
      problems: the evidence.
    """

    metrics: dict[str, float]
    estimates: dict[str, Estimate]
    per_problem: dict[str, Values]
    problems: tuple[ProblemResult, ...]


def evaluate(
    problems: Sequence[Problem],
    *,
    generate: Generate,
    samples: int,
    verify: Verify,
    extract: Extract,
    ks: Sequence[int] = (1,),
    seed: int = 0,
) -> Evaluation:
    """Samples every problem and scores the completions; see `score_completions`."""
    completions = generate([problem.prompt_ids for problem in problems], samples)
    return score_completions(problems, completions, verify=verify, extract=extract, ks=ks, seed=seed)


def score_completions(
    problems: Sequence[Problem],
    completions: Sequence[Sequence[Completion]],
    *,
    verify: Verify,
    extract: Extract,
    ks: Sequence[int] = (1,),
    seed: int = 0,
) -> Evaluation:
    """Scores completions that exist already.

    Args:
      problems: [P].
      completions: [P][n].
      verify: decides whether a completion is right; one that was cut at its limit never is.
      extract: finds the answer that a completion votes for.
      ks: the k of pass@k and maj@k; maj@1 equals pass@1 and is left out.
      seed: of the random subsets and of the bootstrap.

    Raises:
      DataError: no problems, completions for another number of problems, or fewer samples than the largest k.
    """
    if not problems or len(problems) != len(completions):
        raise DataError(
            f"evaluation: got completions of {len(completions)} problems, expected {len(problems)} (> 0)."
        )
    results = []
    for problem, row in zip(problems, completions, strict=True):
        if len(row) < max(1, *ks):
            raise DataError(
                f"evaluation: {problem.name!r} has {len(row)} samples, expected >= {max(1, *ks)}."
            )
        results.append(
            ProblemResult(
                name=problem.name,
                answer=problem.answer,
                completions=tuple(row),
                extracted=tuple(extract(completion.text) for completion in row),
                correct=tuple(
                    not completion.truncated and bool(verify(completion.text, problem.answer))
                    for completion in row
                ),
            )
        )

    num_samples = [len(result.correct) for result in results]
    num_correct = [sum(result.correct) for result in results]
    per_problem: dict[str, Values] = {}
    for k in ks:
        per_problem[f"eval/pass@{k}"] = pass_at_k(num_samples, num_correct, k)
        if k > 1:
            votes, right = [result.extracted for result in results], [result.correct for result in results]
            per_problem[f"eval/maj@{k}"] = majority_at_k(votes, right, k, seed=seed)
    rows = [result.completions for result in results]
    per_problem["eval/truncated_fraction"] = np.array([np.mean([c.truncated for c in row]) for row in rows])
    per_problem["eval/mean_length"] = np.array([np.mean([c.num_tokens for c in row]) for row in rows])

    estimates = {name: mean_with_error(values, seed=seed) for name, values in per_problem.items()}
    return Evaluation(
        metrics={name: estimate.mean for name, estimate in estimates.items()},
        estimates=estimates,
        per_problem=per_problem,
        problems=tuple(results),
    )
