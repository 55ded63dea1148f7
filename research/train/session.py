"""What both loops share: one stage's run, from its folder to its result, resumable at every checkpoint."""

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from models.config import ModelConfig
from models.transformer import Params
from research.algorithms.base import Algorithm, Frozen, Scalars
from research.config.experiment import Stage
from research.config.sections import Evaluation, Sampler
from research.core.batch import Batch
from research.core.checkpoint import Checkpointer
from research.core.compilations import CompilationCounter
from research.core.errors import CheckpointError
from research.core.mesh import to_device
from research.core.metrics import FILES, MetricsWriter
from research.core.network import Network
from research.core.progress import Progress
from research.core.sinks import make_sinks
from research.core.stages import StageDir
from research.core.state import (
    Layout,
    TrainState,
    abstract_state,
    grow,
    init_state,
    policy_of,
    state_from_params,
)
from research.data.report import DataReport
from research.environments.interaction import Interaction
from research.rewards.base import RewardFunction
from research.tasks.sources import Sources
from research.train.budget import Spending
from research.train.build import build
from research.train.monitors import ALARMS
from research.train.step import StepScalars, eval_step, prepare_step, train_step


@dataclasses.dataclass(frozen=True)
class StageRun:
    """Everything a loop is given.

    Attributes:
      stage: the resolved stage.
      folder: where it writes.
      model: static model description.
      mesh: the devices.
      sources: the data.
      evaluation: the final evaluation.
      sampler: how completions are computed.
      result_of: loads what another stage has trained, by name: fresh buffers at every call.
      label: what the progress bar says.
      yardstick: what says whether a completion is right, whatever is optimised.
      interaction: what answers the policy while it is sampled, if anything.
    """

    stage: Stage
    folder: StageDir
    model: ModelConfig
    mesh: Mesh
    sources: Sources
    evaluation: Evaluation
    sampler: Sampler
    result_of: Callable[[str], "StageResult"]
    label: str
    yardstick: RewardFunction
    interaction: Interaction | None = None

    def initial_params(self, layout: Layout) -> Params:
        """What training starts from: the result of another stage, with fresh heads where it has none."""
        stage = self.stage
        if not stage.start:
            policy = init_state(self.model, self.mesh, stage.seed, stage.rule).params
        else:
            start = self.result_of(stage.start)
            if start.layout == layout:
                return start.network.params
            policy = policy_of(start.network.params, start.layout)
        value = None
        if layout == "actor_critic" and stage.roles.value:
            value = self.result_of(stage.roles.value).network.params
        return grow(policy, self.model, self.mesh, layout, stage.seed, value)

    def policy(self, name: str) -> Network:
        """A finished stage's policy."""
        found = self.result_of(name)
        return Network(policy_of(found.network.params, found.layout), found.network.config)


class StageResult(NamedTuple):
    """What a finished stage has trained."""

    network: Network
    layout: Layout


class Extra(Protocol):
    """What a loop keeps besides: everything that the next iteration depends on."""

    def get_state(self) -> dict[str, Any]:
        """Plain JSON."""

    def set_state(self, state: dict[str, Any]) -> None:
        """The inverse of `get_state`."""


class Session:
    """A stage in progress: state, data position, records and what was spent. A context manager.

    A loop calls `update`, `log`, `evaluate` and `save` at the steps it is told to; all that a resumed run needs
    is in one checkpoint: state, data-iterator position, controllers, the records' file offsets, what was spent,
    the curve.
    """

    def __init__(self, run: StageRun, data: Any, extra: Extra | None = None) -> None:
        """Opens the stage's folder and restores its newest checkpoint, if any.

        Args:
          run: the stage.
          data: a Grain iterator (or one that wraps it); its position is restored too.
          extra: what else the loop keeps.
        """
        self.run, self.data, self.extra = run, data, extra
        self.algorithm: Algorithm
        self.scalars: StepScalars
        self.algorithm, self.scalars = build(run.stage, run.sources.tokenizer)
        layout = self.algorithm.layout
        self.checkpointer = Checkpointer(run.folder.checkpoints, keep=run.stage.keep_checkpoints)
        restored = self.checkpointer.restore(abstract_state(run.model, run.mesh, run.stage.rule, layout))
        self.done = 0
        self.spent = Spending(run.model)
        self.curve: list[dict[str, float]] = []
        self.note: dict[str, Any] = {}
        self._data: dict[str, float] = {}
        self._frozen: Frozen | None = None
        offsets = dict.fromkeys(FILES, 0)
        if restored is None:
            params = run.initial_params(layout)
            self.state: TrainState = state_from_params(params, run.model, run.mesh, run.stage.rule, layout)
        else:
            record = restored.record
            self.state, self.done = restored.arrays, restored.step
            self.curve, self.note, offsets = record["curve"], record["note"], record["offsets"]
            self.spent.restore(record["spent"])
            self.data.set_state(record["data"])
            if extra is not None:
                extra.set_state(record["extra"])
            self._adapt({key: np.float32(value) for key, value in record["objective_scalars"].items()})
            if self.done > run.stage.steps:
                raise CheckpointError(
                    f"{run.folder.checkpoints}: holds step {self.done}, expected at most {run.stage.steps}"
                )
        self.moved = self.done > 0  # whether the policy has left the parameters that the stage started from
        workdir = run.folder.path.parent.parent
        sinks = make_sinks(("tensorboard",), workdir, run.label, identity=run.folder.hash)
        self.writer = MetricsWriter(run.folder.path, offsets=offsets, sinks=sinks)
        self.progress = Progress(run.label, run.stage.steps, initial=self.done)
        self._compiled = CompilationCounter()
        self._tick = self._saved = time.monotonic()
        self._alarms: set[str] = set()  # each is said once
        self._tokens, self._logged = 0, (self.spent.seconds, 0)

    @property
    def policy(self) -> Params:
        """The policy as it is now."""
        return policy_of(self.state.params, self.algorithm.layout)

    def frozen(self) -> Frozen:
        """The frozen models that the algorithm asks for.

        A reference that equals the policy is the policy itself until the first update: no second copy before.
        """
        if self._frozen is not None:
            return self._frozen
        roles, found = self.run.stage.roles, Frozen()
        if "teacher" in self.algorithm.roles:
            found = found.replace(teacher=self.run.policy(roles.teacher))
        if "reference" in self.algorithm.roles:
            own = roles.reference in ("", self.run.stage.start)
            if own and not self.moved:
                return found.replace(reference=Network(self.policy, self.run.model))
            found = found.replace(reference=self.run.policy(roles.reference or self.run.stage.start))
        self._frozen = found
        return found

    def prepare(self, batch: Batch, counts: Mapping[str, Any] | None) -> Batch:
        """The global batch on the device, with what is computed once on it.

        `counts` is what it spends; None where it is evaluated only.
        """
        batch = to_device(self.run.mesh, batch)
        if not self.algorithm.prepares:
            return batch
        frozen = self.frozen()
        if counts is not None:
            if frozen.reference is not None:
                self._forward(frozen.reference.config, counts)
            if self.algorithm.layout == "actor_critic":
                self._forward(self.run.model, counts)
        return prepare_step(
            self.state.params,
            batch,
            self.scalars.objective,
            frozen,
            algorithm=self.algorithm,
            config=self.run.model,
        )

    def update(self, batch: Batch, counts: Mapping[str, Any]) -> dict[str, Any]:
        """One optimizer step on a prepared batch; returns its metrics."""
        frozen = self._loss_models()
        if frozen.teacher is not None:
            self._forward(frozen.teacher.config, counts)
        self.state, metrics = train_step(
            self.state,
            batch,
            self.scalars,
            frozen,
            algorithm=self.algorithm.for_update,
            config=self.run.model,
            micro_batches=self.run.stage.micro_batches,
        )
        self.moved = True
        self.spent.trained(**counts, networks=2 if self.algorithm.layout == "actor_critic" else 1)
        return metrics

    def _forward(self, model: ModelConfig, counts: Mapping[str, Any]) -> None:
        self.spent.forward(model=model, real_tokens=counts["real_tokens"], context=counts["context"])

    def measure(self, batch: Batch) -> dict[str, Any]:
        """Loss and metrics of a prepared batch as sums, without learning from it."""
        return eval_step(
            self.state.params,
            batch,
            self.scalars.objective,
            self._loss_models(),
            algorithm=self.algorithm.for_update,
            config=self.run.model,
        )

    def adapt(self, metrics: Mapping[str, float], completions: int) -> None:
        """Lets the algorithm's controllers set the next iteration's scalars."""
        self._adapt(self.algorithm.adapt(self.scalars.objective, metrics, completions))

    def _adapt(self, objective: Scalars) -> None:
        self.scalars = self.scalars._replace(objective={**self.scalars.objective, **objective})

    def _loss_models(self) -> Frozen:
        """The frozen models that the loss itself reads: a teacher. The reference has spoken in `prepare`."""
        if "teacher" not in self.algorithm.roles:
            return Frozen()
        return self.frozen().replace(reference=None)

    def __enter__(self) -> "Session":
        self.progress.__enter__()
        self._compiled.__enter__()
        self._tick = time.monotonic()
        return self

    def __exit__(self, *exc: Any) -> None:
        self._compiled.__exit__(*exc)
        self.progress.__exit__(*exc)
        self.writer.close()
        self.checkpointer.close()

    def tell(self, report: DataReport) -> None:
        """Says what became of the training records; notes it in the result and in the first row of metrics."""
        self.note.setdefault("data", report.record())
        self._data = report.metrics()
        self.progress.say(report.line())

    def log(self, step: int, metrics: Mapping[str, Any], *, tokens: int) -> None:
        """Writes metrics (fetching them from the device) every `log_every` steps, and moves the bar."""
        stage = self.run.stage
        shown: dict[str, float] | None = None
        if step % stage.log_every == 0 or step == stage.steps or step == 1:
            values = {key: float(value) for key, value in jax.device_get(dict(metrics)).items()}
            values |= self._data if step == 1 else {}
            self.writer.write(step, values)
            self._alarm(step, values)
            keys = ("loss", "reward/mean", "reward_accuracy", "eval/loss")
            shown = {key: values[key] for key in keys if key in values}
            before, tokens_before = self._logged
            self._clock()
            seconds, seen = self.spent.seconds - before, self._tokens + tokens - tokens_before
            self._logged = (self.spent.seconds, self._tokens + tokens)
            self.writer.write_performance(
                step,
                {
                    "seconds": self.spent.seconds,
                    "tokens_per_second": seen / max(seconds, 1e-9),
                    "compilations": self._compiled.count,  # of this process, since it entered the stage
                },
            )
        self._tokens += tokens
        self.progress.advance(1, tokens=tokens, metrics=shown)

    def evaluate(self, step: int, measure: Callable[[], Mapping[str, float]]) -> None:
        """Records an evaluation in the metrics and as a point of the learning curve; its time is not spent."""
        self._clock()
        metrics = measure()
        self._tick = time.monotonic()
        self.writer.write(step, metrics)
        self._alarm(step, metrics)
        self.curve.append({"step": step, "tokens_spent": self.spent.tokens, **metrics})

    def save(self, step: int) -> None:
        """Writes a checkpoint every `checkpoint_every` minutes and after the last, before the final evaluation."""
        minutes = self.run.stage.checkpoint_every
        self.done = step
        now = time.monotonic()
        if step != self.run.stage.steps and (minutes == 0 or now - self._saved < 60 * minutes):
            return
        self._saved = now
        self._clock()
        record = {
            "data": self.data.get_state(),
            "extra": self.extra.get_state() if self.extra is not None else {},
            "objective_scalars": {key: float(v) for key, v in self.scalars.objective.items()},
            "offsets": self.writer.offsets(),
            "spent": self.spent.record(),
            "curve": self.curve,
            "note": self.note,
        }
        self.checkpointer.save(step, self.state, record)

    def finish(self, metrics: Mapping[str, float]) -> dict[str, Any]:
        """Waits until the last checkpoint is whole on disk, and writes the result that marks the stage done."""
        self.checkpointer.wait()
        self._clock()
        result = {
            "metrics": dict(metrics),
            "budget": self.spent.budget(),
            "curve": self.curve,
            "note": self.note,
        }
        self.run.folder.finish(result)
        return result

    def _alarm(self, step: int, metrics: Mapping[str, float]) -> None:
        """Says what a person should look at."""
        found = {name for name in _ALARMS if metrics.get(name)}
        if not all(np.isfinite(value) for value in metrics.values()):
            found.add("non_finite")
        for name in sorted(found - self._alarms):
            self.progress.say(f"alarm at step {step}: {_ALARMS[name]}")
        self._alarms |= found

    def _clock(self) -> None:
        now = time.monotonic()
        self.spent.seconds += now - self._tick
        self._tick = now


_ALARMS = {
    "non_finite": "a metric is not a finite number",
    "alarm/overfitting": "the validation loss rises (overfitting)",
    **ALARMS,
}


def due(step: int, every: int, last: int) -> bool:
    """Whether something done every `every` steps is due at `step`; the last step has its own."""
    return every > 0 and step % every == 0 and step != last


def iteration_seed(seed: int, step: int) -> int:
    """A seed for the host's choices at one iteration, unique to (seed, step)."""
    return int(np.random.SeedSequence((seed, step)).generate_state(1)[0])
