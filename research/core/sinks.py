"""Where metrics go besides the JSON lines: TensorBoard and Weights & Biases, chosen by name.

    <workdir>/tensorboard/<run name>-<identity>/   tensorboard --logdir <workdir>/tensorboard
    <workdir>/wandb/                               W&B's own folder; `wandb sync` uploads offline runs

A sink gets every number that `metrics.jsonl` and `performance.jsonl` get. The JSON lines are the record of a run;
sinks are for watching it.
"""

import hashlib
import importlib.util
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from research.core.errors import ConfigError, WorkdirError
from research.core.files import explain_os_error, fit_for_path, make_folder

SINKS = ("tensorboard", "wandb")


class Sink(Protocol):
    """Receives a run's metrics as they are written."""

    def write(self, step: int, values: Mapping[str, int | float]) -> None:
        """Appends the values of one step; several calls may share a step."""

    def restart(self, step: int) -> None:
        """A resumed run writes the records from `step` on again."""

    def close(self) -> None:
        """Ends the record."""


def check_sinks(names: Sequence[str]) -> None:
    """Refuses what `make_sinks` cannot make.

    Raises:
      ConfigError: an unknown or repeated name, or a package that is not installed.
    """
    for name in names:
        if name not in SINKS:
            raise ConfigError(f"sinks: got {name!r}, expected some of {', '.join(SINKS)}")
    if len(set(names)) != len(names):
        raise ConfigError(f"sinks: got {list(names)}, expected each once")
    if "wandb" in names and importlib.util.find_spec("wandb") is None:
        raise ConfigError('sinks: got wandb, expected the package wandb to be installed: pip install "temper[wandb]"')


def make_sinks(
    names: Sequence[str], workdir: Path | str, run_name: str, *, identity: str, config: Mapping[str, Any] | None = None
) -> tuple[Sink, ...]:
    """Opens the named sinks for one run.

    Args:
      names: of SINKS.
      workdir: they write below it.
      run_name: readable, such as "grpo, seed 1: rl"; characters unfit for a folder's name become "-".
      identity: the stage's hash; a resumed run is found by it, whatever its readable name is by then.
      config: what W&B shows as the run's config.

    Raises:
      ConfigError: as `check_sinks`, or W&B refuses to start.
      WorkdirError: a folder cannot be written.
    """
    check_sinks(names)
    name = fit_for_path(run_name)
    made: list[Sink] = []
    for kind in names:
        if kind == "tensorboard":
            root = make_folder(Path(workdir) / "tensorboard")
            earlier = sorted(path for path in root.iterdir() if path.name.endswith(f"-{identity}"))
            made.append(TensorBoardSink(earlier[0] if earlier else root / f"{name}-{identity}"))
        else:
            made.append(WandbSink(make_folder(workdir), name, identity, config or {}))
    return tuple(made)


class TensorBoardSink:
    """Event files in one folder, which is the run's name in TensorBoard."""

    def __init__(self, folder: Path) -> None:
        """Opens a new event file in `folder`; WorkdirError if it cannot be written."""
        self.folder = make_folder(folder)
        try:
            # Synchronous: SummaryWriter's thread would swallow a full disk and then hang on its queue.
            self._events = EventsWriter(str(folder / "events"), f".{time.time_ns()}")
        except OSError as error:
            raise WorkdirError(explain_os_error(error, folder)) from error

    def write(self, step: int, values: Mapping[str, int | float]) -> None:
        """One event with all values; WorkdirError if the disk is full."""
        summary = Summary(value=[Summary.Value(tag=key, simple_value=v) for key, v in values.items()])
        self._write(Event(wall_time=time.time(), step=step, summary=summary))

    def restart(self, step: int) -> None:
        """TensorBoard hides earlier events from `step` on."""
        start = SessionLog(status=SessionLog.START)
        self._write(Event(wall_time=time.time(), step=step, session_log=start))

    def close(self) -> None:
        """Closes the file."""
        self._events.close()

    def _write(self, event: Event) -> None:
        try:
            self._events.write_event(event)
            self._events.flush()
        except OSError as error:
            raise WorkdirError(explain_os_error(error, self.folder)) from error


class WandbSink:
    """A Weights & Biases run; `WANDB_PROJECT`, `WANDB_MODE=offline` and W&B's other variables apply."""

    def __init__(self, folder: Path, name: str, identity: str, config: Mapping[str, Any]) -> None:
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
                config=dict(config),
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
        """One row of W&B's history."""
        self._run.log({"step": step, **values})

    def restart(self, step: int) -> None:
        """Nothing: the rows that are written again are equal to those that are there."""

    def close(self) -> None:
        """Hands everything to W&B, whose own process may still write its file for a moment."""
        self._run.finish()
