"""Stages addressed by content: a stage's folder is named by a hash of its resolved config and of its inputs.

    <workdir>/config.json                        the experiment that was run last
    <workdir>/stages/<name>-<hash>/config.json   the stage's resolved config
                                   inputs.json   hashes and versions of what it was made from
                                   versions.json one entry per environment that ran it
                                   checkpoints/
                                   done.json     the result; written last, so a stage with it is finished
                                   evaluations/  of its result

Arms and seeds that share a stage therefore share its folder and its result. A folder is found by its hash; a label of
the run that made it may stand before that: `<name>-<label>-<hash>`.
"""

import dataclasses
import fcntl
import functools
import hashlib
import json
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from research.core import files
from research.core.errors import WorkdirError
from research.core.files import read_json, to_plain_json, write_json_atomic
from research.core.metrics import decode_numbers, encode_numbers
from research.core.versions import collect_versions


def stage_hash(resolved: Mapping[str, Any], inputs: Sequence[str]) -> str:
    """Twelve hex digits of the SHA-256 of the canonical JSON of config and inputs.

    Key order does not matter, tuples equal lists, and `1.0` equals `1`; the order of `inputs`, the hashes of the stages
    and versions of the data that it starts from, does matter. WorkdirError names a key whose value is no plain JSON.
    """
    canonical = _canonical(to_plain_json({"config": resolved, "inputs": list(inputs)}))
    text = json.dumps(canonical, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode("ascii")).hexdigest()[:12]


@dataclasses.dataclass(frozen=True)
class StageDir:
    """The folder of one stage, `<workdir>/stages/<name>-<hash>`."""

    path: Path

    @classmethod
    def open(
        cls, workdir: Path | str, name: str, resolved: Mapping[str, Any], inputs: Sequence[str] = (), *, label: str = ""
    ) -> "StageDir":
        """Finds the folder of the stage that `stage_hash` names, or makes it with its config in it.

        A `label` becomes part of a new folder's name, as far as it is fit for one. WorkdirError where the folder cannot
        be written, or holds another config than its hash says.
        """
        digest = stage_hash(resolved, inputs)
        stages = Path(workdir) / "stages"
        found = sorted(stages.glob(f"*-{digest}"))
        parts = [name, *([files.fit_for_path(label)] if label else []), digest]
        stage = cls(files.make_folder(found[0] if found else stages / "-".join(parts)))
        for file, content in (("config.json", resolved), ("inputs.json", list(inputs))):
            place, plain = stage.path / file, to_plain_json(content)
            if not place.exists():
                write_json_atomic(place, plain)
            elif difference := describe_difference(read_json(place), plain):
                raise WorkdirError(
                    f"{place}: disagrees with the hash in its folder's name, so it was edited: {difference};"
                    f" delete {stage.path} to run the stage again."
                )
        return stage

    @classmethod
    def at(cls, folder: Path) -> "StageDir":
        """A stage's folder, wherever it lies and whatever its name is; WorkdirError where it is none."""
        for name in ("config.json", "inputs.json"):
            if not (folder / name).exists():
                raise WorkdirError(f"{folder}: is not the folder of a stage that has run, expected {name} in it")
        return cls(folder)

    @functools.cached_property
    def hash(self) -> str:
        """What a stage that starts from this one passes among its `inputs`."""
        return stage_hash(self.config(), self.inputs())

    def config(self) -> dict[str, Any]:
        """What its result depends on, besides its inputs."""
        return dict(read_json(self.path / "config.json"))

    def inputs(self) -> list[str]:
        """Hashes of what it was made from."""
        return list(read_json(self.path / "inputs.json"))

    def news(self) -> str | None:
        """What differs from the stage of the same name and label that finished last; None where there is none."""
        label = self.path.name.rpartition("-")[0]
        done = [
            place
            for place in self.path.parent.glob("*/done.json")
            if place.parent != self.path and place.parent.name.rpartition("-")[0] == label
        ]
        if not done:
            return None
        last = StageDir(max(done, key=lambda place: place.stat().st_mtime).parent)
        difference = describe_difference(last.config(), self.config()) or "an earlier stage that it reads"
        return f"differs from {last.path.name} in {difference}"

    @property
    def checkpoints(self) -> Path:
        """Where the stage's `Checkpointer` writes."""
        return self.path / "checkpoints"

    def result(self) -> dict[str, Any] | None:
        """What `finish` was given, or None where the stage is unfinished; WorkdirError where it is something else."""
        done = self.path / "done.json"
        if not done.exists():
            return None
        found = read_json(done)
        if not isinstance(found, dict) or not found:
            raise WorkdirError(
                f"{done}: got {str(found)[:80]}, expected the result of a finished stage; delete it to run the stage "
                "to its end again."
            )
        return dict(decode_numbers(found))

    def finish(self, result: Mapping[str, Any]) -> None:
        """Marks the stage as finished, with its result."""
        write_json_atomic(self.path / "done.json", to_plain_json(encode_numbers(result)))

    @contextmanager
    def running(self) -> Iterator[None]:
        """Holds the stage for this process and notes what it is run with; WorkdirError where another one runs it.

        The operating system releases the stage when the process ends, however it ends.
        """
        with _locked(self.path / ".lock", f"stage {self.path}"):
            place, versions = self.path / "versions.json", collect_versions()
            noted = read_json(place) if place.exists() else []
            if versions not in noted[-1:]:
                write_json_atomic(place, [*noted, versions])
            yield


@contextmanager
def hold_workdir(workdir: Path | str, config: Mapping[str, Any]) -> Iterator[None]:
    """Holds a working directory for this process and notes the config that it runs; another one may follow in it.

    WorkdirError where another process works in it, or it cannot be written.
    """
    folder = files.make_folder(workdir)
    with _locked(folder / ".lock", f"workdir {folder}"):
        files.remove_leftovers(folder)
        write_json_atomic(folder / "config.json", to_plain_json(config))
        yield


def describe_difference(there: Any, here: Any) -> str | None:
    """`"optim.lr: there 0.1, here 0.2 (+3 more)"`, or None where the two are equal."""
    flat_there, flat_here = _flatten(_canonical(there)), _flatten(_canonical(here))
    return files.first_difference(flat_there, flat_here, "{key}: there {one}, here {other}", missing="absent")


def _flatten(obj: Any, where: str = "") -> dict[str, str]:
    """Dotted key of every leaf and its JSON text."""
    if not isinstance(obj, dict | list) or not obj:
        return {where: json.dumps(obj, ensure_ascii=False)}
    if isinstance(obj, dict):
        items = [(f"{where}.{key}" if where else key, value) for key, value in obj.items()]
    else:
        items = [(f"{where}[{i}]", value) for i, value in enumerate(obj)]
    return {key: text for name, value in items for key, text in _flatten(value, name).items()}


def _canonical(plain: Any) -> Any:
    """Plain JSON in which equal numbers are spelled alike: 1.0 as 1, -0.0 as 0."""
    return json.loads(json.dumps(plain), parse_float=lambda text: int(x) if (x := float(text)).is_integer() else x)


@contextmanager
def _locked(lock: Path, what: str) -> Iterator[None]:
    """Holds an exclusive `flock` on the file `lock`, in which the holder leaves its name."""
    with files.explained(lock):
        handle = open(lock, "a+", encoding="utf-8")  # noqa: SIM115 - closed below, where the lock is released
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            handle.seek(0)
            holder = handle.read().strip() or "another process"
            raise WorkdirError(f"{what} is being run by {holder}; wait for it or stop it.") from error
        handle.truncate(0)
        handle.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        handle.flush()
        yield
