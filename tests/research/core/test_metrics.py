"""The files of a run: same bytes after a kill and a resume, clear refusals, strict JSON."""

import json
import math
import os

import jax.numpy as jnp
import numpy as np
import pytest

from research.core.errors import DataError, WorkdirError
from research.core.metrics import FILES, PERFORMANCE, MetricsWriter, load_jsonl, load_metrics


def _record(writer: MetricsWriter, step: int) -> None:
    rng = np.random.default_rng(step)
    writer.write(step, {"loss": rng.random(), "reward/mean": jnp.float32(0.1) * step, "tokens": step * 128})
    writer.write(step, {"tokens_per_second": 1e3 / (step + 1)}, PERFORMANCE)
    writer.write_samples(step, [{"prompt": "2+3=", "completion": f"{step} ß", "reward": np.float32(1)}])


def _bytes(directory) -> dict[str, bytes]:
    return {name: (directory / name).read_bytes() for name in FILES}


def test_interrupted_run_ends_with_the_same_bytes(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    with MetricsWriter(whole) as writer:
        for step in range(6):
            _record(writer, step)

    writer = MetricsWriter(cut)
    for step in range(3):
        _record(writer, step)
    offsets = writer.offsets()
    _record(writer, 3)  # after the checkpoint: to be done again
    writer.close()
    with open(cut / "metrics.jsonl", "ab") as handle:
        handle.write(b'{"step": 4, "lo')  # kill -9 in the middle of a write

    with MetricsWriter(cut, offsets=offsets) as writer:
        for step in range(3, 6):
            _record(writer, step)
    assert _bytes(cut) == _bytes(whole)
    assert offsets == {name: len(b"".join(data.splitlines(True)[:3])) for name, data in _bytes(whole).items()}


def test_killed_before_the_first_checkpoint(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        _record(writer, 0)
    expected = _bytes(tmp_path)
    with MetricsWriter(tmp_path, offsets=dict.fromkeys(FILES, 0)) as writer:
        _record(writer, 0)
    assert _bytes(tmp_path) == expected


def test_numbers_round_trip_and_the_file_is_strict_json(tmp_path):
    values = {"a": 0.1, "b": 1 / 3, "c": 5e-324, "d": 1e300, "e": math.nan, "f": math.inf, "g": -math.inf, "n": 7}
    with MetricsWriter(tmp_path) as writer:
        writer.write(3, values)
        writer.write(4, {"bf16": jnp.bfloat16(0.5), "f32": np.float32(0.1), "one": jnp.ones((1,)), "yes": True})

    def refuse(text: str) -> float:
        raise AssertionError(f"{text} is not JSON")

    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=refuse)
    first, second = load_metrics(tmp_path / "metrics.jsonl")
    assert list(first) == ["step", *sorted(values)]
    assert math.isnan(first.pop("e"))
    assert first == {"step": 3, **{key: value for key, value in values.items() if key != "e"}}
    assert second == {"step": 4, "bf16": 0.5, "f32": float(np.float32(0.1)), "one": 1.0, "yes": 1}


def test_a_sample_with_a_lone_surrogate_is_written_and_read_back(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write_samples(1, [{"completion": "a\ud800b"}])
    assert load_jsonl(tmp_path / "samples.jsonl") == [{"step": 1, "completion": "a\ud800b"}]


@pytest.mark.parametrize("value", [np.zeros(2), "high", None, jnp.zeros((0,))])
def test_metric_that_is_not_one_number_is_named(tmp_path, value):
    with MetricsWriter(tmp_path) as writer, pytest.raises(ValueError, match="'bad'.*one number"):
        writer.write(0, {"bad": value})
    assert _bytes(tmp_path) == dict.fromkeys(FILES, b"")


def _shorten(path):
    path.write_bytes(path.read_bytes()[:-2])


def _edit(path):
    path.write_bytes(path.read_bytes().replace(b"\n", b"!"))


@pytest.mark.parametrize(
    ("damage", "message"), [(os.unlink, "missing"), (_shorten, "expected at least"), (_edit, "no line ends")]
)
def test_resume_refuses_files_that_do_not_fit_the_checkpoint(tmp_path, damage, message):
    with MetricsWriter(tmp_path) as writer:
        _record(writer, 0)
        offsets = writer.offsets()
    damage(tmp_path / "samples.jsonl")
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(WorkdirError, match=f"samples.jsonl.*{message}"):
        MetricsWriter(tmp_path, offsets=offsets)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_resume_refuses_offsets_of_other_files(tmp_path):
    with pytest.raises(WorkdirError, match="offsets for .'log.txt'."):
        MetricsWriter(tmp_path, offsets={"log.txt": 0})


def test_full_disk_names_the_file(tmp_path):
    writer = MetricsWriter(tmp_path)
    writer.close()
    os.unlink(tmp_path / "metrics.jsonl")
    os.symlink("/dev/full", tmp_path / "metrics.jsonl")
    writer = MetricsWriter(tmp_path)
    with pytest.raises(WorkdirError, match="metrics.jsonl: no space left"):
        writer.write(0, {"loss": 1.0})


class Remembering:
    """A sink that keeps what it gets."""

    def __init__(self):
        self.got = []

    def write(self, step, values):
        self.got.append((step, dict(values)))

    def restart(self, step):
        self.got.append((step, "restart"))

    def close(self):
        self.got.append("closed")


def test_sinks_get_every_number_of_the_files_and_are_told_where_a_resumed_run_goes_on(tmp_path):
    sink = Remembering()
    with MetricsWriter(tmp_path, sinks=[sink]) as writer:
        _record(writer, 0)
        offsets = writer.offsets()
        _record(writer, 1)
    rows = load_metrics(tmp_path / "metrics.jsonl") + load_metrics(tmp_path / "performance.jsonl")
    expected = {(row.pop("step"), tuple(sorted(row.items()))) for row in rows}
    assert {(step, tuple(sorted(values.items()))) for step, values in sink.got[1:-1]} == expected
    assert sink.got[0] == (0, "restart") and sink.got[-1] == "closed"
    again = Remembering()
    MetricsWriter(tmp_path, offsets=offsets, sinks=[again]).close()
    assert again.got == [(1, "restart"), "closed"]


def test_reader_leaves_out_a_half_written_line_and_names_a_bad_one(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0, "loss": "NaN"}\n{"step": 1, "lo')
    assert load_jsonl(path) == [{"step": 0, "loss": "NaN"}]
    path.write_text('{"step": 0}\n{"step": 1, \n')
    with pytest.raises(DataError, match="metrics.jsonl, line 2: not JSON"):
        load_metrics(path)
    path.write_text("[1]\n")
    with pytest.raises(DataError, match="line 1: got a list"):
        load_metrics(path)
    with pytest.raises(DataError, match="absent.jsonl: cannot be read"):
        load_metrics(tmp_path / "absent.jsonl")
