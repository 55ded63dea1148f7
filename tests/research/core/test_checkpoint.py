"""Checkpoints: whole or absent, restored bit for bit on any mesh, and never silently wrong."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from research.core import checkpoint
from research.core.checkpoint import restore_subtree
from research.core.errors import CheckpointError

ROOT = Path(__file__).resolve().parents[3]


class Checkpointer(checkpoint.Checkpointer):
    """Closed at the end of a `with`."""

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, *exc: Any) -> None:
        self.close()


def steps_in(directory: Path) -> list[int]:
    return sorted(int(path.name) for path in directory.iterdir() if path.name.isdigit())


def abstract_like(arrays: Any) -> Any:
    """Shapes, dtypes and shardings, to restore into."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None)), arrays)


def make_state(seed: int = 0) -> dict[str, Any]:
    """Parameters in two dtypes, an optimizer state with its empty and nested tuples, a typed key, a step."""
    random = np.random.default_rng(seed)

    def draw(*shape: int, dtype: Any = jnp.float32) -> jax.Array:
        return jnp.asarray(random.normal(size=shape).astype(dtype))

    dense = {"kernel": draw(64, 32), "bias": draw(32)}
    params = {"dense": dense, "embed": draw(32, 16, dtype=jnp.bfloat16)}
    opt_state = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)).init(params)
    opt_state = jax.tree.map(lambda x: draw(*x.shape, dtype=x.dtype) if x.ndim else x, opt_state)
    return {"params": params, "opt_state": opt_state, "rng": jax.random.key(7), "step": jnp.int32(seed)}


def assert_same(got: Any, expected: Any) -> None:
    """Same structure, dtypes and bits."""
    chex.assert_trees_all_equal_structs(got, expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with checkpoints of `make_state(300)` and `make_state(400)`."""
    directory = tmp_path_factory.mktemp("pristine")
    with Checkpointer(directory, keep=2) as checkpoints:
        for step in (300, 400):
            checkpoints.save(step, make_state(step), {"offset": 10 * step})
    return directory


@pytest.fixture
def run(pristine: Path, tmp_path: Path) -> Path:
    """A copy of `pristine` to damage."""
    return Path(shutil.copytree(pristine, tmp_path / "checkpoints"))


def largest_file(folder: Path) -> Path:
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


# --- round trips ---


def test_round_trip_is_bit_for_bit_and_structure_is_kept(tmp_path: Path) -> None:
    state = make_state(3)
    record = {"offset": 2**40 + 1, "files": ["a", "b"], "best": float("inf"), "lr": 0.1, "done": None}
    with Checkpointer(tmp_path, keep=1) as checkpoints:
        assert checkpoints.restore(abstract_like(state)) is None
        checkpoints.save(3, state, record)
        restored = checkpoints.restore(abstract_like(state))
    assert restored is not None
    assert restored.step == 3
    assert restored.record == record
    assert_same(restored.arrays, state)


def test_restores_from_a_2x2x2_mesh_to_one_device_and_back(tmp_path: Path) -> None:
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"))
    spread = NamedSharding(mesh, PartitionSpec(("data", "fsdp"), "tensor"))
    one = SingleDeviceSharding(jax.devices()[5])
    plain = {"w": jnp.arange(64.0).reshape(8, 8), "h": jnp.ones((8, 2), jnp.bfloat16) * 1.7}
    with Checkpointer(tmp_path, keep=2) as checkpoints:
        for step, source, target in ((1, spread, one), (2, one, spread)):
            checkpoints.save(step, jax.device_put(plain, source), {})
            asked = jax.tree.map(lambda x, s=target: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), plain)
            restored = checkpoints.restore(asked)
            assert restored is not None
            assert_same(restored.arrays, plain)
            assert all(x.sharding == target for x in jax.tree.leaves(restored.arrays))


def test_arrays_may_be_donated_and_the_record_changed_as_soon_as_save_returns(tmp_path: Path) -> None:
    @jax.jit
    def fresh() -> list[jax.Array]:
        return [jnp.full((256, 256), 1.0) for _ in range(8)]

    add = jax.jit(lambda xs: [x + 1000 for x in xs], donate_argnums=0)
    arrays, record = fresh(), {"seen": [1]}
    with Checkpointer(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, arrays, record)
        abstract = abstract_like(arrays)
        record["seen"].append(2)
        for _ in range(5):
            arrays = add(arrays)
        jax.block_until_ready(arrays)
        restored = checkpoints.restore(abstract)
    assert restored is not None
    assert restored.record == {"seen": [1]}
    assert all((np.asarray(x) == 1.0).all() for x in restored.arrays)


def test_only_the_newest_are_kept_and_nothing_of_the_others_is_left(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, keep=2) as checkpoints:
        for step in (1, 5, 9, 12):
            checkpoints.save(step, {"w": jnp.full(4, step)}, {})
        checkpoints.wait()
        assert steps_in(tmp_path) == [9, 12]
    assert sorted(os.listdir(tmp_path)) == ["12", "9"]


def test_restore_subtree_reads_the_parameters_only(run: Path) -> None:
    expected = make_state(400)["params"]
    before = sorted(p for p in run.rglob("*"))
    restored = restore_subtree(run, abstract_like(expected))
    assert restored.step == 400
    assert restored.record == {"offset": 4000}
    assert_same(restored.arrays, expected)
    assert sorted(p for p in run.rglob("*")) == before
    with pytest.raises(CheckpointError, match="empty: holds no checkpoint"):
        restore_subtree(run / "empty", abstract_like(expected))
    assert not (run / "empty").exists()


# --- what a user can get wrong ---


def test_a_step_that_is_not_new_is_refused(run: Path) -> None:
    with Checkpointer(run, keep=2) as checkpoints:
        for step in (400, 350):
            with pytest.raises(CheckpointError, match=f"{step}: cannot be saved because .* holds step 400"):
                checkpoints.save(step, make_state(), {})


@pytest.mark.parametrize("record", [{"x": {1: "a"}}, {"x": np.int64(3)}, {"x": {"y": object()}}])
def test_a_record_that_would_not_survive_is_refused(tmp_path: Path, record: dict[str, Any]) -> None:
    with Checkpointer(tmp_path, keep=1) as checkpoints:
        with pytest.raises(CheckpointError, match="the record cannot be saved: x"):
            checkpoints.save(1, {"w": jnp.ones(2)}, record)
        assert steps_in(tmp_path) == []


@pytest.mark.parametrize(
    ("path", "replacement", "message"),
    [
        (("params", "embed"), (32, 8), r"params/embed: found bfloat16\[32,16\], expected bfloat16\[32,8\]"),
        (("params", "extra"), (3,), r"params/extra: found nothing, expected bfloat16\[3\]"),
        (("params", "embed"), None, r"params/embed: found bfloat16\[32,16\], expected nothing"),
        (("step",), (), r"step: found int32\[\], expected bfloat16\[\]"),
    ],
)
def test_another_configs_checkpoint_is_named_by_its_first_differing_key(
    run: Path, path: tuple[str, ...], replacement: tuple[int, ...] | None, message: str
) -> None:
    abstract = abstract_like(make_state())
    node = abstract
    for key in path[:-1]:
        node = node[key]
    if replacement is None:
        del node[path[-1]]
    else:
        node[path[-1]] = jax.ShapeDtypeStruct(replacement, jnp.bfloat16)
    with Checkpointer(run, keep=2) as checkpoints, pytest.raises(CheckpointError, match=message):
        checkpoints.restore(abstract)
    if path[0] == "params":
        with pytest.raises(CheckpointError, match=message):
            restore_subtree(run, abstract["params"])


def test_a_directory_that_cannot_be_made_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file/checkpoints: cannot be opened: "):
        Checkpointer(tmp_path / "file" / "checkpoints", keep=1)


# --- damage ---


def every_restored_file(folder: Path) -> list[Path]:
    """All files of a checkpoint but the one that Orbax adds at the commit."""
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "commit_success.txt")


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x11
    path.write_bytes(data)


DAMAGES = {
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "emptied": lambda path: os.truncate(path, 0),
    "flipped": flip,
    "deleted": os.remove,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_to_any_file_is_named_and_the_previous_good_one_offered(run: Path, damage: str) -> None:
    abstract = abstract_like(make_state())
    files = every_restored_file(run / "400")
    assert len(files) > 8
    with Checkpointer(run, keep=2) as checkpoints:
        for path in files:
            data = path.read_bytes()
            DAMAGES[damage](path)
            with pytest.raises(CheckpointError) as caught:
                checkpoints.restore(abstract)
            message = str(caught.value)
            assert message.startswith(f"{run}/400: is damaged: ")
            if path.name != "manifest.json":
                assert str(path.relative_to(run / "400")) in message
            assert message.endswith(f"the previous good one is step 300: delete {run}/400 to go on from it.")
            path.write_bytes(data)
        shutil.rmtree(run / "400")
        restored = checkpoints.restore(abstract)
        assert restored is not None
        assert_same(restored.arrays, make_state(300))
        checkpoints.save(310, make_state(310), {})
        assert checkpoints.restore(abstract).step == 310  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "text",
    ["{}", "[]", '{"files": {}}', '{"files": {"record/metadata": {}}}', '{"files": [1]}', "{", "no sizes", "other key"],
)
def test_a_manifest_that_is_not_whole_is_damage(run: Path, text: str) -> None:
    place = run / "400" / "manifest.json"
    if text == "no sizes":
        manifest = json.loads(place.read_text())
        manifest["files"] = {name: {"sha256": mark["sha256"]} for name, mark in manifest["files"].items()}
        text = json.dumps(manifest)
    elif text == "other key":  # one flipped bit
        text = place.read_text().replace('"bytes"', '"bxtes"', 1)
    place.write_text(text)
    with Checkpointer(run, keep=2) as checkpoints, pytest.raises(CheckpointError, match="400: is damaged: "):
        checkpoints.restore(abstract_like(make_state()))


def test_when_all_are_damaged_no_good_one_is_promised(run: Path) -> None:
    for step in ("300", "400"):
        flip(largest_file(run / step))
    with Checkpointer(run, keep=2) as checkpoints, pytest.raises(CheckpointError, match="no other good one"):
        checkpoints.restore(abstract_like(make_state()))
    shutil.rmtree(run / "400")
    with pytest.raises(CheckpointError, match="300: is damaged"):
        restore_subtree(run, abstract_like(make_state()["params"]))


# --- the full disk ---


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of three megabytes."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_is_said_once_and_the_last_good_checkpoint_stays(small_disk: Path) -> None:
    directory = small_disk / "checkpoints"
    small, big = ({"w": jnp.asarray(np.random.default_rng(0).normal(size=n), jnp.float32)} for n in (1000, 2_000_000))
    with Checkpointer(directory, keep=1) as checkpoints:
        checkpoints.save(1, small, {})
        checkpoints.save(2, big, {})
        with pytest.raises(CheckpointError) as caught:
            checkpoints.wait()
        expected = f"{directory}/2: cannot be saved: no space left on the device; the last good one is step 1."
        assert str(caught.value) == expected
        assert steps_in(directory) == [1]
    with Checkpointer(directory, keep=1) as checkpoints:
        assert_same(checkpoints.restore(abstract_like(small)).arrays, small)  # type: ignore[union-attr]
        checkpoints.save(3, small, {})
    assert os.listdir(directory) == ["3"]  # what the failed save left is gone too


@pytest.mark.parametrize("surfaces_in", ["wait", "save", "close", "restore"])
def test_an_error_in_the_background_surfaces_at_the_next_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, surfaces_in: str
) -> None:
    def no_space(_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint, "_write_manifest", no_space)
    state = {"w": jnp.ones(3)}
    checkpoints = Checkpointer(tmp_path, keep=1)
    checkpoints.save(1, state, {})
    calls = {
        "wait": checkpoints.wait,
        "close": checkpoints.close,
        "save": lambda: checkpoints.save(2, state, {}),
        "restore": lambda: checkpoints.restore(abstract_like(state)),
    }
    with pytest.raises(CheckpointError, match="1: cannot be saved: no space left on the device; there is no other"):
        calls[surfaces_in]()
    checkpoints.close()
    assert steps_in(tmp_path) == []


# --- kill -9 ---

CHILD = """
import os, pathlib, shutil, signal, sys
import jax.numpy as jnp
from research.core import checkpoint
from research.core.checkpoint import Checkpointer
directory, moment = sys.argv[1:]

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

def half_delete(path):
    shutil.rmtree(next(p for p in pathlib.Path(path).rglob("arrays")))
    die()

if moment == "before_manifest":
    write, count = checkpoint._write_manifest, iter(range(99))
    checkpoint._write_manifest = lambda folder: die() if next(count) == 3 else write(folder)
elif moment == "before_commit":
    write_json, count = checkpoint.write_json_atomic, iter(range(99))
    checkpoint.write_json_atomic = lambda *a: (write_json(*a), die() if next(count) == 3 else None)
elif moment == "while_deleting":
    checkpoint.shutil = type("", (), {"rmtree": staticmethod(half_delete)})

state = lambda step: {"w": jnp.full((300, 100), step, jnp.float32), "h": jnp.full(64, step, jnp.bfloat16)}
checkpoints = Checkpointer(directory, keep=2)
restored = checkpoints.restore(state(0))
start = restored.step + 1 if restored else 1
for step in range(start, start + 100_000):
    checkpoints.save(step, state(step), {"step": step})
    print(step, flush=True)
"""


@pytest.mark.parametrize("moment", ["anywhere", "before_manifest", "before_commit", "while_deleting"])
def test_kill_9_leaves_only_whole_checkpoints(tmp_path: Path, moment: str) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    command = [sys.executable, "-c", CHILD, str(tmp_path), moment]
    for attempt in range(2 if moment == "anywhere" else 1):
        child = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert child.stdout is not None
        for _ in range(4):  # the child is well under way, or has killed itself
            child.stdout.readline()
        if moment == "anywhere":
            time.sleep(0.13 + 0.09 * attempt)
            child.send_signal(signal.SIGKILL)
        _, stderr = child.communicate(timeout=60)
        assert child.returncode == -signal.SIGKILL, stderr
        with Checkpointer(tmp_path, keep=2) as checkpoints:
            steps = steps_in(tmp_path)
            assert steps
            for step in reversed(steps):
                expected = {"w": np.full((300, 100), step, np.float32), "h": jnp.full(64, step, jnp.bfloat16)}
                restored = checkpoints.restore(abstract_like(expected))
                assert restored is not None and restored.step == step
                assert restored.record == {"step": step}
                assert_same(restored.arrays, expected)
                shutil.move(tmp_path / str(step), tmp_path.parent / f"{tmp_path.name}-{step}")
            for step in steps:
                shutil.move(tmp_path.parent / f"{tmp_path.name}-{step}", tmp_path / str(step))
            checkpoints.save(steps[-1] + 1, expected, {"step": steps[-1]})
        assert sorted(os.listdir(tmp_path)) == sorted(map(str, [steps[-1], steps[-1] + 1]))
        shutil.rmtree(tmp_path / str(steps[-1] + 1))
