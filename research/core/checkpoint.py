"""Checkpoints that are whole or absent, and that say so when something has damaged them since.

Orbax writes the arrays in the background and renames a finished checkpoint into place, so a process killed at any
moment leaves only whole checkpoints. What Orbax does not do is notice later damage: a byte changed in an array's data
is restored as another number, without a word. Each checkpoint therefore carries a manifest of its files (size and
SHA-256), written before the rename and checked before anything is restored.

    <directory>/<step>/manifest.json       the files below, their sizes and digests, and the digest of that list
    <directory>/<step>/arrays/             the pytree of arrays (OCDBT)
    <directory>/<step>/record/metadata     JSON: shapes and dtypes of the arrays, and the caller's record
    <directory>/.deleted/                  checkpoints beyond `keep`, moved aside whole, then deleted
"""

import asyncio
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp

from research.core.errors import CheckpointError, WorkdirError
from research.core.files import first_difference, sync_directory, to_plain_json, write_json_atomic

PyTree = Any

_MANIFEST = "manifest.json"
_DELETED = ".deleted"
_ARRAYS, _RECORD = "arrays", "record"
_METADATA, _COMMITTED = ("_CHECKPOINT_METADATA", "commit_timestamp_nsecs")  # Orbax adds that time after the manifest


class Restored(NamedTuple):
    """A checkpoint read back."""

    step: int
    arrays: PyTree  # like the abstract tree asked for, with its shardings
    record: dict[str, Any]  # the JSON record saved beside the arrays


class Checkpointer:
    """Writes and reads the checkpoints of one run. One process owns a directory."""

    def __init__(self, directory: str | os.PathLike[str], *, keep: int) -> None:
        """Opens `directory`, a local path, creating it; what an interrupted save left is gone before the next save.

        The `keep` newest checkpoints stay. CheckpointError where the directory cannot be created or read.
        """
        self._directory = Path(directory).absolute()
        self._saving: int | None = None
        handlers = {_ARRAYS: ocp.PyTreeCheckpointHandler(), _RECORD: ocp.JsonCheckpointHandler()}
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, cleanup_tmp_directories=True, todelete_subdir=_DELETED, temporary_path_class=_WithManifest
        )
        with _explained(self._directory, None, "be opened"):
            self._manager = ocp.CheckpointManager(self._directory, options=options, item_handlers=handlers)

    def save(self, step: int, arrays: PyTree, record: dict[str, Any]) -> None:
        """Starts to save and returns once `arrays` may be donated; the rest is done in the background.

        The record is what JSON can express; tuples come back as lists. CheckpointError where it is not, the step is not
        above all that are saved, or this or the previous save failed.
        """
        folder = self._directory / str(step)
        try:
            record = to_plain_json(record, finite=False)
        except WorkdirError as error:
            raise CheckpointError(f"{folder}: the record cannot be saved: {error}") from error
        self.wait()
        with _explained(self._directory, step, "be saved"):
            steps = _steps(self._directory)
            if steps and step <= steps[-1]:
                raise CheckpointError(
                    f"{folder}: cannot be saved because the directory already holds step {steps[-1]};"
                    f" delete {self._directory / str(steps[-1])} to go on from an earlier one."
                )
            self._delete_old()
            described = {"arrays": describe(arrays), "record": record}
            items = {_ARRAYS: ocp.args.PyTreeSave(arrays), _RECORD: ocp.args.JsonSave(described)}
            self._manager.save(step, args=ocp.args.Composite(**items), force=True)
            self._saving = step

    def restore(self, abstract_arrays: PyTree) -> Restored | None:
        """Reads the newest checkpoint; None where there is none.

        Each array gets the sharding of its `jax.ShapeDtypeStruct`, whatever mesh it was saved from, or the first device
        where that is None. CheckpointError where the checkpoint is damaged, or has other keys, shapes or dtypes.
        """
        self.wait()
        return restore_subtree(self._directory, abstract_arrays, key=None) if _steps(self._directory) else None

    def wait(self) -> None:
        """Waits until the save under way is whole on disk; CheckpointError if it failed, as where the disk is full."""
        step, self._saving = self._saving, None
        with _explained(self._directory, step, "be saved"):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits as `wait` does, deletes what is beyond `keep`, and frees the background threads."""
        try:
            self.wait()
            with _explained(self._directory, None, "be cleaned up"):
                self._delete_old()
        finally:
            self._manager.close()

    def _delete_old(self) -> None:
        """Deletes what Orbax moved aside; a move is atomic, so no half-deleted checkpoint is ever listed."""
        if (self._directory / _DELETED).exists():
            shutil.rmtree(self._directory / _DELETED)


def restore_subtree(
    directory: str | os.PathLike[str], abstract_arrays: PyTree, *, key: str | None = "params"
) -> Restored:
    """Reads one top-level entry of a finished run's checkpoint, all of them for None: what a stage starts from.

    The other entries (the optimizer's, say) are not read. Nothing in `directory` is created or cleaned up. For the
    abstract tree under `key` and errors see `Checkpointer.restore`; CheckpointError too where there is no checkpoint.
    """
    directory = Path(directory).absolute()
    if not (steps := _steps(directory)):
        raise CheckpointError(f"{directory}: holds no checkpoint, expected one to start from.")
    step = steps[-1]
    folder = directory / str(step)
    if damage := _damage(folder):
        raise CheckpointError(f"{folder}: is damaged: {damage}{_advice(directory, step)}")
    saved = json.loads((folder / _RECORD / "metadata").read_text())
    there = {name: text for name, text in saved["arrays"].items() if key is None or name.split("/")[0] == key}
    wanted = abstract_arrays if key is None else {key: abstract_arrays}
    difference = first_difference(there, describe(wanted), "{key}: found {one}, expected {other}", missing="nothing")
    if difference is not None:
        raise CheckpointError(f"{folder}: was saved from another configuration: {difference}.")

    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    item = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding or device), wanted)
    arguments = ocp.args.PyTreeRestore(
        item=item, restore_args=ocp.checkpoint_utils.construct_restore_args(item), partial_restore=key is not None
    )
    with _explained(directory, step, "be read"), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        arrays = reader.restore(folder / _ARRAYS, args=arguments)
    return Restored(step, arrays if key is None else arrays[key], saved["record"])


def describe(arrays: PyTree) -> dict[str, str]:
    """Key path of every leaf and its dtype and shape, as in `{"params/w": "float32[2,3]"}`."""
    leaves = jax.tree_util.tree_leaves_with_path(arrays)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    return {name: f"{x.dtype}[{','.join(map(str, x.shape))}]" for name, (_, x) in zip(names, leaves, strict=True)}


# --- the manifest ---


class _WithManifest(ocp.path.atomicity.AtomicRenameTemporaryPath):
    """Orbax's temporary checkpoint folder, whose last act before the commit is to list its files."""

    async def finalize(self) -> None:
        whole = self.get_final().name not in (_ARRAYS, _RECORD)  # Orbax also finalizes each item by itself
        if whole:
            await asyncio.to_thread(self._checkpoint_metadata_store.wait_until_finished)
            await asyncio.to_thread(_write_manifest, Path(self.get()))
        await super().finalize()
        if whole:
            await asyncio.to_thread(sync_directory, Path(self.get_final().parent))


def _write_manifest(folder: Path) -> None:
    listed = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != _MANIFEST)
    for path in listed:
        with open(path, "rb") as handle:
            os.fsync(handle.fileno())
    files = {str(path.relative_to(folder)): _fingerprint(path) for path in listed}
    write_json_atomic(folder / _MANIFEST, {"format": 2, "files": files, "sha256": _json_digest(files)})


def _json_digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _fingerprint(path: Path) -> dict[str, int | str]:
    """Size and digest; of Orbax's metadata, which are completed later, the digest of what is there at first."""
    if path.name == _METADATA:
        try:
            return {"sha256": _json_digest({**json.loads(path.read_bytes()), _COMMITTED: None})}
        except (ValueError, TypeError):
            return {"sha256": "no JSON object"}
    with open(path, "rb") as handle:
        digest = hashlib.file_digest(handle, "sha256").hexdigest()
        return {"bytes": os.fstat(handle.fileno()).st_size, "sha256": digest}


def _damage(folder: Path) -> str | None:
    """The first way in which the checkpoint differs from its manifest."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_bytes())
        expected, digest = manifest["files"], manifest["sha256"]
    except FileNotFoundError:
        return f"{_MANIFEST} is missing"
    except (ValueError, KeyError, TypeError) as error:
        return f"{_MANIFEST} is not what was written there ({error})"
    if digest != _json_digest(expected):
        return f"{_MANIFEST} has changed since it was written (its SHA-256 differs)"
    for name, mark in expected.items():
        if not (folder / name).exists():
            return f"{name} is missing"
        found = _fingerprint(folder / name)
        if found.get("bytes") != mark.get("bytes"):
            return f"{name} has {found['bytes']} bytes, expected {mark['bytes']}"
        if found != mark:
            return f"{name} has changed since it was written (its SHA-256 differs)"
    return None


# --- Orbax and the disk ---


def _steps(directory: Path) -> list[int]:
    return sorted(ocp.utils.checkpoint_steps(directory))


@contextmanager
def _explained(directory: Path, step: int | None, what: str) -> Iterator[None]:
    """Turns the errors of a full or broken disk into a sentence that names the directory and the step."""
    try:
        yield
    except (OSError, ValueError, WorkdirError) as error:
        reason = _disk_error(error)
        if reason is None:
            raise
        where = directory if step is None else directory / str(step)
        raise CheckpointError(f"{where}: cannot {what}: {reason}{_advice(directory, step)}") from error


def _disk_error(error: BaseException) -> str | None:
    """Why the storage refused, or None where `error` is about something else."""
    cause: BaseException | None = error
    while cause is not None:
        text = str(cause)
        if "No space left on device" in text or "Disk quota exceeded" in text:
            return "no space left on the device"
        if isinstance(cause, OSError):
            return "a file is in its place" if cause.errno == errno.EEXIST else (cause.strerror or text)
        if re.match(r"[A-Z_]{5,}: ", text):  # TensorStore's errors are ValueErrors that start with their status
            return text.splitlines()[0][:300]
        cause = cause.__cause__
    return None


def _advice(directory: Path, step: int | None) -> str:
    """Ends a message about `step` with the newest other checkpoint that is whole."""
    steps = _steps(directory)
    good = next((s for s in reversed(steps) if s != step and _damage(directory / str(s)) is None), None)
    if good is None:
        return "; there is no other good one in the directory."
    if step is None or step not in steps:
        return f"; the last good one is step {good}."
    if good > step:
        return f"; step {good} is good."
    return f"; the previous good one is step {good}: delete {directory / str(step)} to go on from it."
