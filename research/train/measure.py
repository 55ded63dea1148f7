"""A stage's policy as evaluators see it, and points of its learning curve."""

import dataclasses
from collections.abc import Callable

import numpy as np

from models.transformer import Params
from research.core.batch import SequenceBatch
from research.data.records import View
from research.evals.accuracy import Accuracy
from research.evals.policy import TrainedPolicy
from research.evals.results import evaluate
from research.rewards.learned import ProcessScorer, RewardScorer
from research.train.session import StageRun


def stage_policy(run: StageRun, params: Params) -> TrainedPolicy:
    """The policy of a stage in progress, with the scorer that its final answer needs."""
    return TrainedPolicy(
        params=params,
        model=run.model,
        mesh=run.mesh,
        tokenizer=run.sources.tokenizer,
        sampler=run.sampler,
        settings=run.evaluation,
        task=run.sources.task,
        records=View(run.sources.held_out, max(run.stage.eval_problems, run.evaluation.problems)),
        interaction=run.interaction,
        limits=dataclasses.replace(run.sources.limits, max_dropped=1.0),  # counted before the first step
        yardstick=run.yardstick,
        final_answer=run.stage.final_answer,
        scorer=_scorer(run),
    )


def _scorer(run: StageRun) -> Callable[[SequenceBatch], np.ndarray] | None:
    """What picks the best of a problem's samples; None where nothing does."""
    stage = run.stage
    if stage.final_answer == "reward":
        networks = tuple(run.result_of(name).network for name in stage.roles.reward)
        return RewardScorer(networks, run.mesh, stage.reward.ensemble, stage.reward.variance_coef)
    if stage.final_answer == "prm":
        process = ProcessScorer(run.result_of(stage.roles.prm).network, run.mesh, run.sources.tokenizer)
        return lambda rows: process.solutions(rows, (stage.prm_score,))[0]
    return None


def problem_metrics(run: StageRun, params: Params, final: dict[str, float] | None = None) -> dict[str, float]:
    """A point of the learning curve: means over the first `eval_problems` held-out problems.

    Where `final` is given, all of the final evaluation's problems are sampled and their means put into it; the
    point is then of the first ones among them, so that a curve is of the same problems throughout.
    """
    count, n = run.stage.eval_problems, run.evaluation.problems
    policy = stage_policy(run, params)
    settings = dataclasses.replace(policy.settings, problems=count if final is None else max(count, n))
    found = evaluate(
        dataclasses.replace(policy, settings=settings), {"accuracy": Accuracy()}, run.evaluation.seed
    )
    if final is not None:
        final.update(found.first(n))
    return found.first(count)
