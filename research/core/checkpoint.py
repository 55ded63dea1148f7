"""Checkpoints that are whole or absent, and that say so when something has damaged them since.

Orbax writes the arrays in the background and renames a finished checkpoint into place, so a process killed
at any moment leaves only whole checkpoints. What Orbax does not do is notice later damage: a byte changed in
an array's data is restored as another number, without a word. Each checkpoint therefore carries a manifest
of its files (size and SHA-256), written before the rename and checked before anything is restored.

    <directory>/<step>/manifest.json       the files below, their sizes and digests
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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from research.core.errors import CheckpointError, WorkdirError
from research.core.files import sync_directory, to_plain_json, write_json_atomic

PyTree = Any

_MANIFEST = "manifest.json"
_DELETED = ".deleted"
_ARRAYS, _RECORD = "arrays", "record"
_METADATA, _COMMITTED = ("_CHECKPOINT_METADATA", "commit_timestamp_nsecs")  # Orbax adds that time after the manifest
_UNLISTED = frozenset({_MANIFEST, "commit_success.txt"})  # the latter comes after the manifest too, and is never read


class Restored(NamedTuple):
    """A checkpoint read back.

    Attributes:
      step: the step it was saved at.
      arrays: a tree like the abstract one asked for, with its shardings.
      record: the JSON record saved beside the arrays.
    """

    step: int
    arrays: PyTree
    record: dict[str, Any]


class Checkpointer:
    """Writes and reads the checkpoints of one run. One process (or one group of hosts) owns a directory.

    With several hosts every method is collective: all processes call it, with the same step and record.
    """

    def __init__(self, directory: str | os.PathLike[str], *, keep: int) -> None:
        """Opens `directory`, creating it; what an interrupted save left there is gone before the next save.

        Args:
          directory: a local path.
          keep: how many of the newest checkpoints stay, >= 1.

        Raises:
          CheckpointError: the directory cannot be created or read, or `keep` is below 1.
        """
        if keep < 1:
            raise CheckpointError(f"keep: got {keep}, expected >= 1 because a run resumes from the newest.")
        self._directory = _absolute(directory)
        self._saving: int | None = None
        with self._explained("be opened"):
            self._manager = _open_manager(self._directory, keep=keep)

    def save(self, step: int, arrays: PyTree, record: dict[str, Any]) -> None:
        """Starts to save and returns once `arrays` may be donated; the rest is done in the background.

        Args:
          step: larger than every step already saved.
          arrays: a pytree whose leaves are `jax.Array` or `numpy.ndarray`.
          record: what JSON can express: data-iterator position, counters. Tuples come back as lists.

        Raises:
          CheckpointError: the record is not JSON, the step is not new, or this or the previous save failed.
        """
        try:
            record = to_plain_json(record, finite=False)
        except WorkdirError as error:
            raise CheckpointError(f"{self._directory / str(step)}: the record cannot be saved: {error}") from error
        self.wait()
        with self._explained("be saved"):
            steps = _steps(self._directory)
            if steps and step <= steps[-1]:
                newest = self._directory / str(steps[-1])
                raise CheckpointError(
                    f"{self._directory / str(step)}: cannot be saved because the directory already holds"
                    f" step {steps[-1]}; delete {newest} to go on from an earlier one."
                )
            self._delete_old()
            self._saving = step
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    **{
                        _ARRAYS: ocp.args.PyTreeSave(arrays),
                        _RECORD: ocp.args.JsonSave({"arrays": describe(arrays), "record": record}),
                    }
                ),
                force=True,
            )

    def restore(self, abstract_arrays: PyTree) -> Restored | None:
        """Reads the newest checkpoint; None where there is none.

        Args:
          abstract_arrays: `jax.ShapeDtypeStruct` leaves; each array is restored with its leaf's sharding,
            whatever mesh it was saved from, and onto the first device where the sharding is None.

        Raises:
          CheckpointError: it is damaged, or has other keys, shapes or dtypes.
        """
        self.wait()
        return _restore(self._manager, self._directory, abstract_arrays, key=None)

    def wait(self) -> None:
        """Waits until the save under way is whole on disk.

        Raises:
          CheckpointError: that save failed, for example because the disk is full.
        """
        with self._explained("be saved"):
            self._manager.wait_until_finished()
        self._saving = None

    def close(self) -> None:
        """Waits as `wait` does, deletes what is beyond `keep`, and frees the background threads."""
        try:
            self.wait()
            with self._explained("be cleaned up"):
                self._delete_old()
        finally:
            self._manager.close()

    def _delete_old(self) -> None:
        """Deletes what Orbax moved aside; a move is atomic, so no half-deleted checkpoint is ever listed."""
        deleted = self._directory / _DELETED
        if jax.process_index() == 0 and deleted.exists():
            shutil.rmtree(deleted)

    @contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        """Turns the errors of a full or broken disk into a sentence that names the directory and the step."""
        try:
            yield
        except (OSError, ValueError, WorkdirError) as error:
            reason = _disk_error(error)
            if reason is None:
                raise
            step, self._saving = self._saving, None
            where = self._directory if step is None else self._directory / str(step)
            raise CheckpointError(f"{where}: cannot {what}: {reason}{_advice(self._directory, step)}") from error


def restore_subtree(
    directory: str | os.PathLike[str], abstract_arrays: PyTree, *, key: str | None = "params"
) -> Restored:
    """Reads one top-level entry of a finished run's checkpoint, for a stage that starts from its parameters.

    The other entries (the optimizer's, say) are not read. Nothing in `directory` is created or cleaned up.

    Args:
      directory: the checkpoint directory of the earlier stage.
      abstract_arrays: the tree under `key`, as in `Checkpointer.restore`.
      key: the top-level entry; None is all of them.

    Raises:
      CheckpointError: there is none, it is damaged, or what is under `key` has other keys, shapes or dtypes.
    """
    path = _absolute(directory)
    with _open_manager(path, keep=None) as manager:
        restored = _restore(manager, path, abstract_arrays, key=key)
    if restored is None:
        raise CheckpointError(f"{path}: holds no checkpoint, expected one to start from.")
    return restored


def describe(arrays: PyTree) -> dict[str, str]:
    """Key path of every leaf and its dtype and shape, as in `{"params/w": "float32[2,3]"}`.

    Raises:
      CheckpointError: a leaf is not an array.
    """
    described = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(arrays):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if not isinstance(leaf, jax.Array | np.ndarray | jax.ShapeDtypeStruct):
            raise CheckpointError(f"{name}: got a {type(leaf).__name__}, expected an array.")
        described[name] = f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"
    return described


# --- the manifest ---


class _WithManifest:
    """Mixed into Orbax's temporary checkpoint folder: its last act before the commit is to list its files."""

    get: Callable[[], epath.Path]
    get_final: Callable[[], epath.Path]
    _checkpoint_metadata_store: Any

    async def finalize(self) -> None:
        whole = self.get_final().name not in (_ARRAYS, _RECORD)  # Orbax also finalizes each item by itself
        if whole:
            await asyncio.to_thread(self._checkpoint_metadata_store.wait_until_finished)
            await asyncio.to_thread(_write_manifest, Path(self.get()))
        await super().finalize()  # type: ignore[misc]
        if whole:
            await asyncio.to_thread(sync_directory, Path(self.get_final().parent))


def _write_manifest(folder: Path) -> None:
    files = {name: _fingerprint(folder / name, sync=True) for name in _files_under(folder)}
    write_json_atomic(folder / _MANIFEST, {"format": 2, "files": files, "sha256": _json_digest(files)})


def _json_digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _fingerprint(path: Path, *, sync: bool) -> dict[str, int | str]:
    """Size and digest; of Orbax's metadata, which are completed later, the digest of what is there at first."""
    if path.name == _METADATA:
        try:
            found = json.loads(path.read_bytes())
            return {"sha256": _json_digest({**found, _COMMITTED: None})}
        except (ValueError, TypeError):
            return {"sha256": "no JSON object"}
    with open(path, "rb") as handle:
        if sync:
            os.fsync(handle.fileno())
        digest = hashlib.file_digest(handle, "sha256").hexdigest()
        return {"bytes": os.fstat(handle.fileno()).st_size, "sha256": digest}


def _files_under(folder: Path) -> list[str]:
    found = (path for path in folder.rglob("*") if path.is_file())
    return sorted(str(path.relative_to(folder)) for path in found if path.name not in _UNLISTED)


def _damage(folder: Path) -> str | None:
    """The first way in which the checkpoint differs from its manifest; the hosts share the reading."""
    found = _damage_in_share(folder, jax.process_index(), jax.process_count()) or ""
    if jax.process_count() > 1:
        padded = np.frombuffer(found.encode()[:512].ljust(512), np.uint8)
        rows = np.asarray(multihost_utils.process_allgather(padded))
        found = next(filter(None, (bytes(row).decode(errors="replace").strip() for row in rows)), "")
    return found or None


def _damage_in_share(folder: Path, index: int, count: int) -> str | None:
    if not (folder / _MANIFEST).exists():
        return f"{_MANIFEST} is missing"
    try:
        manifest = json.loads((folder / _MANIFEST).read_bytes())
        expected = manifest["files"]
        whole = manifest["sha256"] == _json_digest(expected)
    except (ValueError, KeyError, TypeError) as error:
        return f"{_MANIFEST} is not what was written there ({error})"
    if not whole:
        return f"{_MANIFEST} has changed since it was written (its SHA-256 differs)"
    for name in sorted(expected)[index::count]:
        path, size = folder / name, expected[name].get("bytes")
        if not path.exists():
            return f"{name} is missing"
        if size is not None and path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, expected {size}"
        if _fingerprint(path, sync=False).get("sha256") != expected[name].get("sha256"):
            return f"{name} has changed since it was written (its SHA-256 differs)"
    return None


# --- restoring ---


def _restore(manager: ocp.CheckpointManager, directory: Path, abstract: PyTree, *, key: str | None) -> Restored | None:
    steps = _steps(directory)
    if not steps:
        return None
    step = steps[-1]
    folder = directory / str(step)
    damage = _damage(folder)
    if damage is not None:
        raise CheckpointError(f"{folder}: is damaged: {damage}{_advice(directory, step)}")
    saved = json.loads((folder / _RECORD / "metadata").read_text())
    _check_match(folder, saved["arrays"], describe(abstract if key is None else {key: abstract}), key)

    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding or device), abstract)
    item = placed if key is None else {key: placed}
    arguments = ocp.args.PyTreeRestore(
        item=item, restore_args=ocp.checkpoint_utils.construct_restore_args(item), partial_restore=key is not None
    )
    try:
        arrays = manager.restore(step, args=ocp.args.Composite(**{_ARRAYS: arguments}))[_ARRAYS]
    except (OSError, ValueError) as error:
        reason = _disk_error(error)
        if reason is None:
            raise
        raise CheckpointError(f"{folder}: cannot be read: {reason}{_advice(directory, step)}") from error
    return Restored(step, arrays if key is None else arrays[key], saved["record"])


def _check_match(folder: Path, saved: dict[str, str], asked: dict[str, str], key: str | None) -> None:
    """Names the first key on which the checkpoint and the model that is to be filled differ."""
    if key is not None:
        saved = {k: v for k, v in saved.items() if k == key or k.startswith(f"{key}/")}
    differing = sorted(k for k in saved.keys() | asked.keys() if saved.get(k) != asked.get(k))
    if differing:
        first, more = differing[0], len(differing) - 1
        raise CheckpointError(
            f"{folder}: was saved from another configuration: {first}: found {saved.get(first, 'nothing')},"
            f" expected {asked.get(first, 'nothing')}{f' (+{more} more)' if more else ''}."
        )


def _advice(directory: Path, step: int | None) -> str:
    """Ends a message about `step` with the newest other checkpoint that is whole."""
    steps = _steps(directory)
    others = [s for s in reversed(steps) if s != step]
    # Each host reads for itself here: after a failed write the others may not be in this function.
    good = next((s for s in others if _damage_in_share(directory / str(s), 0, 1) is None), None)
    if good is None:
        return "; there is no other good one in the directory."
    if step is None or step not in steps:
        return f"; the last good one is step {good}."
    if good > step:
        return f"; step {good} is good."
    return f"; the previous good one is step {good}: delete {directory / str(step)} to go on from it."


# --- Orbax and the disk ---


def _open_manager(directory: Path, *, keep: int | None) -> ocp.CheckpointManager:
    """The owner's manager, or, where `keep` is None, one that reads without creating or cleaning anything."""
    handlers = {_ARRAYS: ocp.PyTreeCheckpointHandler(), _RECORD: ocp.JsonCheckpointHandler()}
    if keep is None:
        options = ocp.CheckpointManagerOptions(read_only=True)
    else:
        committing = ocp.path.atomicity_defaults.get_default_temporary_path_class(directory)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            cleanup_tmp_directories=True,
            todelete_subdir=_DELETED,
            temporary_path_class=type(f"{committing.__name__}WithManifest", (_WithManifest, committing), {}),
        )
    return ocp.CheckpointManager(directory, options=options, item_handlers=handlers)


def _steps(directory: Path) -> list[int]:
    return sorted(ocp.utils.checkpoint_steps(directory)) if directory.exists() else []


def _disk_error(error: BaseException) -> str | None:
    """Why the storage refused, or None where `error` is about something else."""
    cause: BaseException | None = error
    while cause is not None:
        text = str(cause)
        if "No space left on device" in text or "Disk quota exceeded" in text:
            return "no space left on the device"
        if isinstance(cause, OSError):
            return "a file is in its place" if cause.errno == errno.EEXIST else (cause.strerror or text)
        status = re.match(r"[A-Z_]{5,}: ", text)  # TensorStore's errors are ValueErrors that start with their status
        if status:
            return text.splitlines()[0][:300]
        cause = cause.__cause__
    return None


def _absolute(directory: str | os.PathLike[str]) -> Path:
    return Path(os.path.abspath(directory))
