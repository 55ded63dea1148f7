"""A stage in progress: its steps, its records, its checkpoints. Both loops run inside of one."""

import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
import numpy as np

from research.core.batch import Batch
from research.core.checkpoint import Checkpointer, Restored, restore_subtree
from research.core.compilations import CompilationCounter
from research.core.errors import CheckpointError
from research.core.interrupts import Interrupted
from research.core.metrics import FILES, PERFORMANCE, MetricsWriter
from research.core.progress import Progress
from research.core.sinks import make_sinks
from research.data.report import DataReport
from research.train.learner import Learner
from research.train.monitors import ALARMS
from research.train.run import StageRun
from research.train.updates import Updates

_SHOWN = ("loss", "reward/mean", "reward_accuracy", "eval/loss", "eval/pass@1", "eval/accuracy")
"""Metrics that the console shows."""
_ALARMS = {
    "non_finite": "a metric is not a finite number",
    "alarm/overfitting": "the validation loss rises (overfitting)",
    **ALARMS,
}


class Session:
    """A context manager. All that a resumed run needs is in one checkpoint: the learner's state, data position,
    controllers, sizes of the records, what was spent, the curve.
    """

    def __init__(self, run: StageRun, data: Any, **extra: Any) -> None:
        """Opens the stage's folder and restores its newest checkpoint, if any.

        Args:
          run: the stage.
          data: a Grain iterator (or one that wraps it); its position is restored too.
          extra: what else the next iteration depends on, by name: `get_state` gives plain JSON, `set_state` takes it.
        """
        self.run, self.data, self.extra = run, data, extra
        self.learner = Learner(run)
        self.checkpointer = Checkpointer(run.folder.checkpoints, keep=run.stage.keep_checkpoints)
        self.done = 0
        self.curve: list[dict[str, float]] = []
        self.note: dict[str, Any] = {}
        self.updates = Updates(run.stage.optimizer.max_skipped, run.folder.path, self.say)
        self.progress = Progress(run.label, run.stage.steps)
        restored = self._newest()
        offsets = restored.record["offsets"] if restored else dict.fromkeys(FILES, 0)
        if restored:
            self._restore(restored)
        else:
            self.learner.start()
        sinks = make_sinks(
            run.experiment.records.sinks, run.folder.path.parent.parent, run.label, identity=run.folder.hash
        )
        self.writer = MetricsWriter(run.folder.path, offsets=offsets, sinks=sinks)
        self._compiled, self._stack = CompilationCounter(), ExitStack()
        self._tick = self._saved = time.monotonic()
        self._saved_step, self._updated = self.done, False
        self._alarms: set[str] = set()  # each is said once
        self._first_metrics: dict[str, float] = {}
        self._tokens, self._logged = 0, (self.learner.spent.seconds, 0)
        self._dispatched: deque[tuple[int, int]] = deque()  # steps not yet known to be done, and their tokens

    def _newest(self) -> Restored | None:
        """The checkpoint to go on from: the stage's own, or that of the stage that it extends."""
        own, extended = self.checkpointer.restore(self.learner.abstract), self.run.stage.extend
        if own is not None or not extended:
            return own
        found = restore_subtree(Path(extended) / "checkpoints", self.learner.abstract, key=None)
        for name in FILES:
            shutil.copyfile(Path(extended) / name, self.run.folder.path / name)
        return found

    def _restore(self, restored: Restored) -> None:
        record, steps = restored.record, self.run.stage.steps
        self.done = restored.step
        if self.done > steps:
            raise CheckpointError(f"{self.run.folder.checkpoints}: holds step {self.done}, expected at most {steps}")
        self.learner.restore(restored.arrays, record, moved=self.done > 0)
        self.curve, self.note = record["curve"], record["note"]
        self.updates.restore(record["updates"])
        self.data.set_state(record["data"])
        for name, part in self.extra.items():
            part.set_state(record["extra"][name])
        self.progress = Progress(self.run.label, steps, initial=self.done)
        self.say(f"resuming from step {self.done} of {steps}")

    def __enter__(self) -> "Session":
        deferred = self.run.interrupts.deferred("saving after this step, then stopping; once more stops at once")
        for context in (deferred, self.progress, self._compiled):
            self._stack.enter_context(context)
        self._tick = time.monotonic()
        return self

    def __exit__(self, *exc: Any) -> None:
        self.writer.close()
        self.checkpointer.close()
        self._stack.__exit__(*exc)

    def say(self, line: str) -> None:
        """Prints a line of its own."""
        self.progress.say(line)

    def tell(self, report: DataReport) -> None:
        """Says what became of the training records; notes it in the result and in the first row of metrics."""
        self.note.setdefault("data", report.record())
        self._first_metrics = report.metrics()
        self.say(report.line())

    def steps(self, measure: Callable[[], Mapping[str, float]], *, at_start: bool) -> Iterator[int]:
        """The numbers of the steps that are left; between two of them it evaluates, saves and stops.

        Args:
          measure: metrics of the policy as it is, on held-out data: every `eval_every` steps and at the end.
          at_start: whether they are measured before the first step too.

        Raises:
          Interrupted: a signal asked to stop; a checkpoint is written.
        """
        stage = self.run.stage
        while True:
            self.stop_if_asked()
            last = self.done == stage.steps
            due = at_start if self.done == 0 else last or (stage.eval_every and self.done % stage.eval_every == 0)
            if due and not any(point["step"] == self.done for point in self.curve):
                self._evaluate(measure)
            if last:
                return
            yield self.done + 1
            self.done += 1
            minutes = stage.checkpoint_every
            if self.done == stage.steps or (minutes and time.monotonic() - self._saved >= 60 * minutes):
                self.save()

    def update(self, step: int, batch: Batch, counts: Mapping[str, Any]) -> dict[str, Any]:
        """One optimizer step on a prepared batch; returns its metrics. The first one says how long it compiled."""
        before, start = self._compiled.count, time.monotonic()
        metrics = self.learner.update(batch, counts)
        seconds = time.monotonic() - start
        if not self._updated and self._compiled.count > before and seconds >= 1:
            self.say(f"compiling the training step took {seconds:.0f} s")
            self.progress.exclude(seconds)  # so that the time left is not a guess from it
        self._updated = True
        self.updates.add(step, batch, metrics["skipped_updates"])
        return metrics

    def log(self, step: int, metrics: Mapping[str, Any], *, tokens: int) -> None:
        """Writes metrics (fetching them from the device) every `log_every` steps, and moves the bar."""
        stage = self.run.stage
        self._tokens += tokens
        self._dispatched.append((step, tokens))
        shown: dict[str, float] | None = None
        if step % stage.log_every == 0 or step == stage.steps or step == 1:
            values = {key: float(value) for key, value in jax.device_get(dict(metrics)).items()}
            shown = self._write(step, {**values, **(self._first_metrics if step == 1 else {})})
            self._write_performance(step)
        self._advance(shown)

    def _write(self, step: int, metrics: Mapping[str, float]) -> dict[str, float]:
        """Writes metrics, says once what a person should look at, and returns those that the console shows."""
        self.writer.write(step, metrics)
        found = {name for name in _ALARMS if metrics.get(name)}
        if not all(np.isfinite(value) for value in metrics.values()):
            found.add("non_finite")
        for name in sorted(found - self._alarms):
            self.say(f"alarm at step {step}: {_ALARMS[name]}")
        self._alarms |= found
        return {key: metrics[key] for key in _SHOWN if key in metrics}

    def _write_performance(self, step: int) -> None:
        self._clock()
        seconds, (before, tokens_before) = self.learner.spent.seconds, self._logged
        self._logged = (seconds, self._tokens)
        rate = (self._tokens - tokens_before) / max(seconds - before, 1e-9)
        compilations = self._compiled.count  # of this process, since it entered the stage
        figures = {"seconds": seconds, "tokens_per_second": rate, "compilations": compilations}
        self.writer.write(step, figures, PERFORMANCE)

    def _advance(self, shown: Mapping[str, float] | None) -> None:
        """Moves the bar by the steps that the device is known to have done: only their times say a rate."""
        pending = self.updates.oldest()
        while self._dispatched and (pending is None or self._dispatched[0][0] < pending):
            self.progress.advance(1, tokens=self._dispatched.popleft()[1], metrics=shown)

    def _evaluate(self, measure: Callable[[], Mapping[str, float]]) -> None:
        """Records an evaluation in the metrics and as a point of the learning curve; its time is not spent."""
        self.updates.settle()
        self._advance(None)
        self._clock()
        metrics = measure()
        now = time.monotonic()
        self.progress.exclude(now - self._tick)
        self._tick = now
        point = {"step": self.done, "tokens_spent": self.learner.spent.tokens, **metrics}
        self.curve.append(point)
        if metrics:
            shown = self._write(self.done, metrics)
            self.say(f"step {self.done}: {', '.join(f'{key} {value:.4g}' for key, value in shown.items())}")

    def stop_if_asked(self) -> None:
        """Raises Interrupted where a signal came, after the steps that are done were saved."""
        number = self.run.interrupts.received
        if number:
            self.save()
            self.checkpointer.wait()
            told = f"saved at step {self.done} of {self.run.stage.steps}; the same command goes on from there"
            none = "no step is done yet; the same command begins it again"
            raise Interrupted(number, f"{self.run.label}: {told if self.done else none}")

    def save(self) -> None:
        """Writes a checkpoint of the steps that are done, unless there is one."""
        if self.done == self._saved_step:
            return
        self.updates.settle()
        self._saved, self._saved_step = time.monotonic(), self.done
        self._clock()
        record = {
            **self.learner.record(),
            "data": self.data.get_state(),
            "extra": {name: part.get_state() for name, part in self.extra.items()},
            "updates": self.updates.record(),
            "offsets": self.writer.offsets(),
            "curve": self.curve,
            "note": self.note,
        }
        self.checkpointer.save(self.done, self.learner.state, record)

    def finish(self) -> dict[str, Any]:
        """Waits until the last checkpoint is whole on disk, and writes the result that marks the stage done."""
        self.updates.finish()
        self.checkpointer.wait()
        self._clock()
        if self.updates.skipped:
            self.note["skipped_updates"] = self.updates.skipped
        last = self.curve[-1] if self.curve else {}
        result = {
            "metrics": {key: value for key, value in last.items() if key not in ("step", "tokens_spent")},
            "budget": self.learner.spent.record(),
            "curve": self.curve,
            "curve_evaluation": self.run.curve_evaluation,
            "note": self.note,
        }
        self.run.folder.finish(result)
        return result

    def _clock(self) -> None:
        now = time.monotonic()
        self.learner.spent.seconds += now - self._tick
        self._tick = now
