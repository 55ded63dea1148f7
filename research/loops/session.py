"""What both loops share: one stage's run, from its folder to its result, resumable at every checkpoint."""

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from models.config import ModelConfig
from models.transformer import Params
from research.algorithms.base import Algorithm
from research.algorithms.registry import build
from research.checkpoint import Checkpointer
from research.config import Evaluation, Stage
from research.errors import CheckpointError
from research.loops.budget import Spending
from research.metrics import FILES, MetricsWriter
from research.progress import Progress
from research.sources import Sources
from research.stages import StageDir
from research.state import TrainState, abstract_state, init_state, state_from_params
from research.step import StepScalars


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
      start_from: loads the parameters that the stage starts from; None where it is the first.
      label: what the progress bar says.
    """

    stage: Stage
    folder: StageDir
    model: ModelConfig
    mesh: Mesh
    sources: Sources
    evaluation: Evaluation
    start_from: Callable[[], Params] | None
    label: str

    def initial_params(self) -> Params:
        """The parameters that the stage starts from: fresh buffers at every call."""
        if self.start_from is None:
            return init_state(self.model, self.mesh, self.stage.seed).params
        return self.start_from()


class Session:
    """A stage in progress: state, data position, records and what was spent. A context manager.

    A loop calls `log`, `evaluated` and `save` at the steps it is told to; all that a resumed run needs is in
    one checkpoint: state, data-iterator position, the records' file offsets, what was spent, the curve.
    """

    def __init__(self, run: StageRun, data: Any) -> None:
        """Opens the stage's folder and restores its newest checkpoint, if any.

        Args:
          run: the stage.
          data: a Grain iterator; its position is restored too.
        """
        self.run, self.data = run, data
        self.algorithm: Algorithm
        self.scalars: StepScalars
        self.algorithm, self.scalars = build(run.stage)
        self.checkpointer = Checkpointer(run.folder.checkpoints, keep=run.stage.keep_checkpoints)
        restored = self.checkpointer.restore(abstract_state(run.model, run.mesh))
        self.done = 0
        self.spent = Spending(run.model)
        self.curve: list[dict[str, float]] = []
        self.note: dict[str, Any] = {}
        offsets = dict.fromkeys(FILES, 0)
        if restored is None:
            params = run.initial_params()
            self.state: TrainState = state_from_params(params, run.model, run.mesh)
        else:
            record = restored.record
            self.state, self.done = restored.arrays, restored.step
            self.curve, self.note, offsets = record["curve"], record["note"], record["offsets"]
            self.spent.restore(record["spent"])
            self.data.set_state(record["data"])
            if self.done > run.stage.steps:
                raise CheckpointError(
                    f"{run.folder.checkpoints}: holds step {self.done}, expected at most {run.stage.steps}"
                )
        self.writer = MetricsWriter(run.folder.path, offsets=offsets)
        self.progress = Progress(run.label, run.stage.steps, initial=self.done)
        self._tick = time.monotonic()
        self._alarms: set[str] = set()  # each is said once
        self._tokens, self._logged = 0, (self.spent.seconds, 0)

    def __enter__(self) -> "Session":
        self.progress.__enter__()
        self._tick = time.monotonic()
        return self

    def __exit__(self, *exc: Any) -> None:
        self.progress.__exit__(*exc)
        self.writer.close()
        self.checkpointer.close()

    def log(self, step: int, metrics: Mapping[str, Any], *, tokens: int) -> None:
        """Writes metrics (fetching them from the device) every `log_every` steps, and moves the bar."""
        stage = self.run.stage
        shown: dict[str, float] | None = None
        if step % stage.log_every == 0 or step == stage.steps or step == 1:
            values = {key: float(value) for key, value in jax.device_get(dict(metrics)).items()}
            self.writer.write(step, values)
            self._alarm(step, values)
            keys = ("loss", "reward/mean", "reward_accuracy", "eval/loss")
            shown = {key: values[key] for key in keys if key in values}
            before, tokens_before = self._logged
            self._clock()
            seconds, seen = self.spent.seconds - before, self._tokens + tokens - tokens_before
            self._logged = (self.spent.seconds, self._tokens + tokens)
            self.writer.write_performance(
                step, {"seconds": self.spent.seconds, "tokens_per_second": seen / max(seconds, 1e-9)}
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
        """Writes a checkpoint every `checkpoint_every` steps and after the last, before the final evaluation."""
        every = self.run.stage.checkpoint_every
        self.done = step
        if step != self.run.stage.steps and (every == 0 or step % every):
            return
        self._clock()
        record = {
            "data": self.data.get_state(),
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
    "alarm/truncated": "many completions are cut at max_new_tokens, which silently ends learning",
}


def due(step: int, every: int, last: int) -> bool:
    """Whether something done every `every` steps is due at `step`; the last step has its own."""
    return every > 0 and step % every == 0 and step != last


def iteration_seed(seed: int, step: int) -> int:
    """A seed for the host's choices at one iteration, unique to (seed, step)."""
    return int(np.random.SeedSequence((seed, step)).generate_state(1)[0])
