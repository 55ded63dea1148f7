"""Where metrics go besides the JSON lines: TensorBoard and Weights & Biases, chosen by name.

    <workdir>/tensorboard/<run name>-<identity>/   tensorboard --logdir <workdir>/tensorboard
    <workdir>/wandb/                               W&B's own folder; `wandb sync` uploads offline runs

A sink gets every number that the JSON lines get. Those are the record of a run; sinks are for watching it.
"""

import hashlib
import importlib.util
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from research.core.errors import ConfigError
from research.core.files import explained, fit_for_path, make_folder


class Sink:
    """Receives a run's metrics as they are written."""

    def write(self, step: int, values: Mapping[str, int | float]) -> None:
        """Appends the values of one step; several calls may share a step. WorkdirError if the disk is full."""

    def restart(self, step: int) -> None:
        """A resumed run writes the records from `step` on again, equal to those that are there."""

    def close(self) -> None:
        """Ends the record."""


def check_sinks(names: Sequence[str]) -> None:
    """Raises ConfigError for a repeated name, or where a package is not installed."""
    if len(set(names)) != len(names):
        raise ConfigError(f"sinks: got {list(names)}, expected each once")
    if "wandb" in names and importlib.util.find_spec("wandb") is None:
        raise ConfigError('sinks: got wandb, expected the package wandb to be installed: pip install "temper[wandb]"')


def make_sinks(names: Sequence[str], workdir: Path | str, run_name: str, *, identity: str) -> tuple[Sink, ...]:
    """Opens the named sinks (see `check_sinks`) for one run; they write below the `workdir`.

    A resumed run is found by its `identity`, the stage's hash, whatever its readable name ("grpo, seed 1: rl") is by
    then. ConfigError where W&B refuses to start, WorkdirError where a folder cannot be written.
    """
    name = fit_for_path(run_name)
    made: list[Sink] = []
    if "tensorboard" in names:
        root = make_folder(Path(workdir) / "tensorboard")
        earlier = sorted(path for path in root.iterdir() if path.name.endswith(f"-{identity}"))
        made.append(TensorBoardSink(earlier[0] if earlier else root / f"{name}-{identity}"))
    if "wandb" in names:
        made.append(WandbSink(make_folder(workdir), name, identity))
    return tuple(made)


class TensorBoardSink(Sink):
    """Event files in one folder, which is the run's name in TensorBoard."""

    def __init__(self, folder: Path) -> None:
        self.folder = make_folder(folder)
        with explained(folder):
            # Synchronous: SummaryWriter's thread would swallow a full disk and then hang on its queue.
            self._events = EventsWriter(str(folder / "events"), f".{time.time_ns()}")

    def write(self, step: int, values: Mapping[str, int | float]) -> None:
        summary = Summary(value=[Summary.Value(tag=key, simple_value=v) for key, v in values.items()])
        self._write(step, summary=summary)

    def restart(self, step: int) -> None:
        """TensorBoard hides earlier events from `step` on."""
        self._write(step, session_log=SessionLog(status=SessionLog.START))

    def close(self) -> None:
        self._events.close()

    def _write(self, step: int, **event: Any) -> None:
        with explained(self.folder):
            self._events.write_event(Event(wall_time=time.time(), step=step, **event))
            self._events.flush()


class WandbSink(Sink):
    """A Weights & Biases run; `WANDB_PROJECT`, `WANDB_MODE=offline` and W&B's other variables apply."""

    def __init__(self, folder: Path, name: str, identity: str) -> None:
        """Starts the run, or goes on with it; ConfigError in one sentence where W&B cannot start."""
        import wandb

        # The same stage in another working directory is another run.
        place = hashlib.sha256(str(folder.resolve()).encode("utf-8", "surrogateescape")).hexdigest()[:8]
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "temper"),
                name=name,
                id=f"{identity}-{place}",
                resume="allow",
                reinit="create_new",
                dir=str(folder),
                settings=wandb.Settings(silent=True, console="off"),
            )
        except wandb.errors.Error as error:
            reason = " ".join(str(error).split())
            raise ConfigError(
                f"sinks: wandb cannot start ({reason}); expected `wandb login`, WANDB_API_KEY or WANDB_MODE=offline"
            ) from error
        # W&B's own counter refuses to go back, as a resumed run must; "step" is the axis instead.
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, values: Mapping[str, int | float]) -> None:
        self._run.log({"step": step, **values})

    def close(self) -> None:
        """Hands everything to W&B, whose own process may still write its file for a moment."""
        self._run.finish()
