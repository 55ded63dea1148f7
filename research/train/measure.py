"""A stage's policy as evaluators see it: points of its learning curve, and its final evaluation."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import cache, partial

import numpy as np

from models.transformer import Params
from research.core.batch import SequenceBatch
from research.data.pipelines import sft_batches
from research.data.records import first_records
from research.evals.base import Evaluator
from research.evals.policy import TrainedPolicy
from research.evals.results import Results, checkable, evaluate, fitting, lacking
from research.rewards.learned import ProcessScorer, RewardScorer
from research.train.batches import validation_batches
from research.train.run import StageRun
from research.train.session import Session


def held_out_metrics(session: Session) -> dict[str, float]:
    """A point of the learning curve: means over the first `eval_problems` held-out problems.

    Empty after the last step, which the final evaluation measures.
    """
    run, how = session.run, session.run.experiment.evaluation
    if session.done == run.stage.steps or not run.evaluators:
        return {}
    policy = stage_policy(run, session.learner.policy, session.stop_if_asked)
    policy = dataclasses.replace(policy, settings=dataclasses.replace(how, problems=run.stage.eval_problems))
    return evaluate(policy, run.evaluators, how.seed).metrics


def final_evaluation(run: StageRun, params: Params) -> Results:
    """What the evaluators find of a policy that is trained."""
    return evaluate(stage_policy(run, params), run.evaluators, run.experiment.evaluation.seed)


def choose_evaluators(run: StageRun, chosen: Mapping[str, Evaluator]) -> tuple[dict[str, Evaluator], list[str]]:
    """Those evaluators that can measure the stage's result, and what is to be said of the others."""
    facts = run.stage.facts
    if not chosen or facts.trains not in ("policy", "actor_critic"):
        return {}, []
    missing = lacking(facts, answers=facts.policy and checkable(run.sources.task, run.sources.held_out))
    if not run.stage.start:
        missing = {"pairs": "the stage starts from no policy that it could be compared with", **missing}
    runs, said = fitting(chosen, missing)
    if facts.policy:
        return runs, said
    return {name: each for name, each in runs.items() if name in chosen}, []


def stage_policy(run: StageRun, params: Params, between: Callable[[], None] = lambda: None) -> TrainedPolicy:
    """The policy of a stage, with the scorer that its final answer needs; `between` is called between batches."""
    stage, sources, how = run.stage, run.sources, run.experiment.evaluation
    limits = dataclasses.replace(sources.limits, max_dropped=1.0)  # they were counted before the first step
    held_out = partial(validation_batches, stage, sources)
    chat = partial(
        sft_batches,
        sources.held_out,
        sources.tokenizer,
        batch_size=how.batch_problems,
        length=how.max_prompt_length + how.max_new_tokens,
        seed=None,
        limits=limits,
        name="evaluation",
    )
    return TrainedPolicy(
        params=params,
        model=run.model,
        mesh=run.mesh,
        tokenizer=sources.tokenizer,
        sampler=run.experiment.sampler,
        settings=how,
        task=sources.task,
        records=first_records(sources.held_out, max(stage.eval_problems, how.problems)),
        interaction=run.setup.interaction,
        limits=limits,
        yardstick=run.setup.yardstick,
        final_answer=stage.final_answer,
        scorer=_scorer(run),
        reference=cache(lambda: run.result_of(stage.roles.reference or stage.start).policy),
        row_arrays=held_out if stage.facts.given in ("text", "chat") and not stage.online else chat,
        pair_arrays=held_out if stage.facts.given == "preferences" and not stage.online else None,
        between=between,
    )


def _scorer(run: StageRun) -> Callable[[SequenceBatch], np.ndarray] | None:
    """What picks the best of a problem's samples; None where nothing does."""
    if run.stage.final_answer == "reward":
        return reward_scorer(run)
    if run.stage.final_answer == "prm":
        process = process_scorer(run)
        return lambda rows: process.solutions(rows, (run.stage.prm_score,))[0]
    return None


def reward_scorer(run: StageRun) -> RewardScorer:
    """The reward models that play the stage's role."""
    networks, how = tuple(run.result_of(name).network for name in run.stage.roles.reward), run.stage.reward
    return RewardScorer(networks, run.mesh, how.ensemble, how.variance_coef)


def process_scorer(run: StageRun) -> ProcessScorer:
    """The process reward model that plays the stage's role."""
    return ProcessScorer(run.result_of(run.stage.roles.prm).network, run.mesh, run.sources.tokenizer)
