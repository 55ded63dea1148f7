"""From a stage's config to its algorithm (static) and scalars (traced)."""

from collections.abc import Mapping

import numpy as np

from research.algorithms.base import Algorithm, Setting
from research.config.experiment import Stage
from research.core.optim import OptimizerScalars
from research.data.chat import Message, render_turns
from research.data.steps import step_end_ids
from research.data.tokenizer import Tokenizer
from research.train.step import StepScalars


def build(stage: Stage, tokenizer: Tokenizer) -> tuple[Algorithm, StepScalars]:
    """The algorithm a stage names and every number its steps take; numbers are float32 scalars."""
    how, context = stage.rollout, context_ids(stage.data.context, tokenizer)
    setting = Setting(stage.options, stage.online, how.group_size, how.max_new_tokens, context)
    setting = setting._replace(bos_id=tokenizer.bos_id, step_end_ids=step_end_ids(tokenizer))
    traced = {key: stage.options[key] for key, option in stage.objective.options.items() if option.traced}
    if stage.online:
        traced.setdefault("temperature", how.temperature)
    return stage.objective.make(setting), StepScalars(optimizer_scalars(stage), float32(traced))


def context_ids(context: str, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The tokens of a system turn that only a teacher sees; none for an empty context."""
    return render_turns([Message("system", context)], tokenizer) if context else ()


def optimizer_scalars(stage: Stage) -> OptimizerScalars:
    """The optimizer's numbers; the schedule spans all updates of the stage."""
    o = stage.optimizer
    (rule,), (schedule,) = stage.chosen("optimizer", "name"), stage.chosen("optimizer", "schedule")
    return OptimizerScalars(
        learning_rate=np.float32(o.learning_rate),
        warmup_steps=np.float32(o.warmup_steps),
        decay_steps=np.float32(stage.steps * stage.updates),
        clip_norm=np.float32(o.clip_norm),
        rule_options=float32(rule.options),
        schedule_options=float32(schedule.options),
        rule=rule.component.target,
        schedule=schedule.component.target,
    )


def float32(numbers: Mapping[str, float]) -> dict[str, np.float32]:
    """Numbers as they are traced."""
    return {name: np.float32(value) for name, value in numbers.items()}
