"""From a stage's config to its algorithm (static) and scalars (traced)."""

import numpy as np

from research.algorithms.base import Algorithm
from research.config.experiment import Stage
from research.core.optim import OptimizerScalars
from research.data.chat import Message, render_turns
from research.data.steps import step_end_ids
from research.data.tokenizer import Tokenizer
from research.train.step import StepScalars


def build(stage: Stage, tokenizer: Tokenizer) -> tuple[Algorithm, StepScalars]:
    """The algorithm a stage names and every number its steps take; numbers are float32 scalars."""
    algorithm = stage.objective.make(
        stage.setting._replace(
            context_ids=context_ids(stage.data.context, tokenizer),
            bos_id=tokenizer.bos_id,
            step_end_ids=step_end_ids(tokenizer),
        )
    )
    traced = {
        key: np.float32(stage.options[key])
        for key, option in stage.objective.options.items()
        if option.traced
    }
    if stage.online:
        traced.setdefault("temperature", np.float32(stage.rollout.temperature))
    return algorithm, StepScalars(optimizer_scalars(stage), traced)


def context_ids(context: str, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The tokens of a system turn that only a teacher sees; none for an empty context."""
    return render_turns([Message("system", context)], tokenizer) if context else ()


def optimizer_scalars(stage: Stage) -> OptimizerScalars:
    """The optimizer's numbers; the schedule spans all updates of the stage."""
    o = stage.optimizer
    an_iteration = stage.rollout.epochs * stage.rollout.minibatches if stage.online else 1
    values = {
        "learning_rate": o.learning_rate,
        "warmup_steps": o.warmup_steps,
        "decay_steps": stage.steps * an_iteration,
        "end_fraction": o.end_fraction,
        "b1": o.b1,
        "b2": o.b2,
        "eps": o.eps,
        "weight_decay": o.weight_decay,
        "clip_norm": o.clip_norm,
    }
    return OptimizerScalars(**{key: np.float32(value) for key, value in values.items()})
