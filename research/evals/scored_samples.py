"""Samples of a policy on problems, drawn once, verified, and read by scorers while they are at hand."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from research.config.bridge import old_verifier
from research.config.sections import Sampler
from research.core.progress import Progress
from research.data.examples import Records
from research.environments.tool_use import tools_of
from research.evals.exact_match import Evaluation
from research.evals.problems import Decoded, decoded_rows, sampler_spec, score_problems
from research.evals.scorers import Scorer
from research.sampling.methods import SamplingMethod
from research.sampling.types import make_scalars
from research.train.chain import Policy


class ScoredSamples(NamedTuple):
    """M samples of each of P problems.

    Attributes:
      found: what was sampled, extracted and verified.
      prompt_lengths: [P] tokens.
      scores, weights: [P, M] by the score's name; weights are its votes.
    """

    found: Evaluation
    prompt_lengths: np.ndarray
    scores: dict[str, np.ndarray]
    weights: dict[str, np.ndarray]

    @property
    def lengths(self) -> np.ndarray:
        """[P, M] tokens of the completions."""
        return np.array([[one.num_tokens for one in row.completions] for row in self.found.problems])

    def records(self) -> list[dict[str, Any]]:
        """One a problem: enough to make every curve again without a device."""
        return [
            {
                "prompt": problem.name,
                "prompt_length": int(self.prompt_lengths[place]),
                "answer": problem.answer,
                "completions": [one.text for one in problem.completions],
                "lengths": [one.num_tokens for one in problem.completions],
                "answers": list(problem.extracted),
                "correct": list(problem.correct),
                "scores": {name: table[place] for name, table in self.scores.items()},
            }
            for place, problem in enumerate(self.found.problems)
        ]


def sample_and_score(
    policy: Policy,
    problems: Records,
    scorers: Sequence[Scorer],
    *,
    samples: int,
    max_prompt_length: int,
    max_new_tokens: int,
    temperature: float,
    batch_problems: int,
    seed: int,
) -> ScoredSamples:
    """Draws `samples` completions of each problem; must run inside `jax.set_mesh(policy.mesh)`.

    Args:
      policy: what is sampled.
      problems: P records with answers.
      scorers: each reads every sample once, `batch_problems` rows at a time.
      samples: M.
      max_prompt_length, max_new_tokens: tokens.
      temperature: > 0.
      batch_problems: problems sampled at a time.
      seed: of the sampler.
    """
    lengths: list[np.ndarray] = []
    scores: dict[str, list[np.ndarray]] = {name: [] for scorer in scorers for name in scorer.scores}

    def look(prompts: Mapping[str, np.ndarray], out: Decoded) -> None:
        real = prompts["prompt_id"] >= 0  # the last batch is filled up
        lengths.append(prompts["prompt_mask"].sum(axis=1)[real])
        rows = decoded_rows(prompts, out, samples)
        for scorer in scorers:
            for name, column in zip(scorer.scores, scorer(rows, at_once=batch_problems), strict=True):
                scores[name].append(column.reshape(-1, samples)[real])
        progress.advance(int(real.sum()), tokens=int(out.arrays.lengths.sum()))

    tools = tools_of(policy.experiment, policy.tokenizer)
    with Progress(f"sampling {samples} each", len(problems), "problems") as progress:
        found = score_problems(
            policy.params,
            problems,
            sampler_spec(
                policy.tokenizer,
                Sampler(**policy.experiment["sampler"]),
                samples=samples,
                max_new_tokens=max_new_tokens,
                method=SamplingMethod(greedy=False),
                tools=tools,
            ),
            make_scalars(seed=seed, step=0, temperature=temperature),
            model=policy.model,
            mesh=policy.mesh,
            tokenizer=policy.tokenizer,
            batch_problems=batch_problems,
            max_prompt_length=max_prompt_length,
            verifier=old_verifier(policy.experiment["evaluation"]["correct"]),
            ks=(1,),
            look=look,
            tools=tools,
        )
    whole = {name: np.concatenate(parts) for name, parts in scores.items()}
    weights = {name: scorer.weights(whole[name]) for scorer in scorers for name in scorer.scores}
    return ScoredSamples(found, np.concatenate(lengths), whole, weights)
