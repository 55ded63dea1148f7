"""From a stage's config to its algorithm (static) and scalars (traced)."""

import numpy as np

from research.algorithms.base import Algorithm
from research.algorithms.dpo import DPO
from research.algorithms.grpo import GRPO
from research.algorithms.rejection_sampling import RejectionSampling
from research.algorithms.sft import NextToken
from research.config import Stage
from research.optim import OptimizerScalars
from research.step import StepScalars


def build(stage: Stage) -> tuple[Algorithm, StepScalars]:
    """The algorithm a stage names and every number its steps take; numbers are float32 scalars."""
    options = dict(stage.options)
    algorithm: Algorithm
    if stage.objective in ("next_token", "sft"):
        algorithm = NextToken(data="text" if stage.objective == "next_token" else "chat")
    elif stage.objective == "rejection_sampling":
        algorithm = RejectionSampling(
            data="rollouts",
            keep_per_prompt=options.pop("keep_per_prompt"),
            selector=options.pop("selector"),
        )
    elif stage.objective == "dpo":
        data = "rollouts" if stage.online else "preferences"
        algorithm = DPO(data=data, pairs_per_prompt=options.pop("pairs_per_prompt"))  # type: ignore[arg-type]
    else:
        algorithm = GRPO(
            aggregation=options.pop("aggregation"),
            normalization=options.pop("normalization"),
            baseline=options.pop("baseline"),
            ddof=options.pop("ddof"),
            kl_estimator=options.pop("kl_estimator"),
            needs_reference=options["beta"] > 0,
            max_new_tokens=stage.rollout.max_new_tokens,
        )
        options["temperature"] = stage.rollout.temperature
    return algorithm, StepScalars(
        optimizer_scalars(stage), {key: np.float32(v) for key, v in options.items()}
    )


def optimizer_scalars(stage: Stage) -> OptimizerScalars:
    """The optimizer's numbers; the schedule spans all updates of the stage."""
    o = stage.optimizer
    updates = stage.steps * (stage.rollout.updates if stage.online else 1)
    values = {
        "learning_rate": o.learning_rate,
        "warmup_steps": o.warmup_steps,
        "decay_steps": updates,
        "end_fraction": o.end_fraction,
        "b1": o.b1,
        "b2": o.b2,
        "eps": o.eps,
        "weight_decay": o.weight_decay,
        "clip_norm": o.clip_norm,
    }
    return OptimizerScalars(**{key: np.float32(value) for key, value in values.items()})
