"""The loop over given data: pretraining, SFT, reward models, DPO and its family, process reward models."""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any

import jax
import numpy as np

from objectives.types import WeightedSum
from research.train.batches import as_batch, count_tokens, training_batches, validation_batches
from research.train.measure import held_out_metrics
from research.train.run import StageRun
from research.train.session import Session


def run_offline(run: StageRun) -> dict[str, Any]:
    """Runs a stage to its end, from wherever it was; returns its result."""
    stage = run.stage
    pipeline = training_batches(stage, run.sources)
    with Session(run, iter(pipeline)) as session:
        session.tell(pipeline.report)
        for step in session.steps(partial(_measure, session), at_start=stage.eval_every > 0):
            batch = as_batch(stage, session.learner.algorithm, next(session.data))
            counts = count_tokens(batch)
            metrics = session.update(step, session.learner.prepare(batch, counts), counts)
            session.log(step, metrics, tokens=counts["real_tokens"])
        return session.finish()


def _measure(session: Session) -> dict[str, float]:
    """Validation loss and metrics and, before the end, the accuracy of a policy on held-out problems."""
    run = session.run
    metrics = validation_metrics(session, validation_batches(run.stage, run.sources))
    metrics["alarm/overfitting"] = overfitting([*session.curve, metrics])
    return metrics | held_out_metrics(session)


def overfitting(curve: Sequence[Mapping[str, float]]) -> float:
    """1.0 where the validation loss has risen at each of the last two evaluations, else 0.0."""
    losses = [point["eval/loss"] for point in curve if "eval/loss" in point]
    return float(len(losses) >= 3 and losses[-1] > losses[-2] > losses[-3])


def validation_metrics(session: Session, batches: Iterable[Mapping[str, np.ndarray]]) -> dict[str, float]:
    """Means over the first `eval_batches` batches of held-out data, divided once."""
    stage, learner = session.run.stage, session.learner
    sums: dict[str, WeightedSum] = {}
    for arrays in islice(batches, stage.eval_batches):
        session.stop_if_asked()
        part = learner.measure(learner.prepare(as_batch(stage, learner.algorithm, arrays), counts=None))
        sums = {key: sums[key] + value for key, value in part.items()} if sums else part
    fetched = jax.device_get(sums)
    return {f"eval/{key}": float(value.total / max(float(value.count), 1e-8)) for key, value in fetched.items()}
