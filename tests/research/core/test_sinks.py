"""Sinks: readable folders that a resumed run finds again, one sentence where one cannot be made."""

import json
import math
import sys
import time

import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from research.core.errors import ConfigError, WorkdirError
from research.core.metrics import FILES, PERFORMANCE, MetricsWriter
from research.core.sinks import check_sinks, make_sinks


def _events(folder) -> list[Event]:
    """All TensorBoard events in order of writing: length (8 bytes), checksum (4), data, checksum (4)."""
    events = []
    for path in sorted(folder.iterdir(), key=lambda path: path.name.rsplit(".", 1)[1]):
        data = path.read_bytes()
        while data:
            length = int.from_bytes(data[:8], "little")
            events.append(Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
    return events


def test_tensorboard_holds_the_scalars_and_hides_what_is_done_again(tmp_path):
    def sinks():
        return make_sinks(("tensorboard",), tmp_path, "grpo, seed 1: rl", identity="0123abcd")

    with MetricsWriter(tmp_path / "run", sinks=sinks()) as writer:
        writer.write(0, {"loss": 2.0})
        offsets = writer.offsets()
        writer.write(1, {"loss": 1.0})
        writer.write(1, {"tokens_per_second": 5}, PERFORMANCE)
    with MetricsWriter(tmp_path / "run", offsets=offsets, sinks=sinks()) as writer:
        writer.write(1, {"loss": 1.0})
    assert set(offsets) == set(FILES)
    (folder,) = (tmp_path / "tensorboard").iterdir()
    events = _events(folder)
    scalars = [(e.step, v.tag, v.simple_value) for e in events for v in e.summary.value]
    assert scalars == [(0, "loss", 2.0), (1, "loss", 1.0), (1, "tokens_per_second", 5.0), (1, "loss", 1.0)]
    assert [event.step for event in events if event.session_log.status == SessionLog.START] == [0, 1]


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("grpo, seed 1: rl (grpo)", "grpo-seed-1-rl-grpo-0123abcd"),
        ("beta=0.1, lr=3e-4", "beta=0.1-lr=3e-4-0123abcd"),
        ("../../evil\0$x^$[/b]", "evil-x-b-0123abcd"),
        ("größe 你好", "größe-你好-0123abcd"),
        ("..", "run-0123abcd"),
        ("a" * 500, "a" * 60 + "-0123abcd"),
    ],
)
def test_a_runs_folder_has_its_readable_name_and_its_hash(tmp_path, name, folder):
    workdir = tmp_path / "workdir"
    for sink in make_sinks(["tensorboard"], workdir, name, identity="0123abcd"):
        sink.close()
    assert [path.name for path in (workdir / "tensorboard").iterdir()] == [folder]
    assert [path.name for path in tmp_path.iterdir()] == ["workdir"]


def test_a_stage_goes_on_in_its_folder_under_another_arms_name(tmp_path):
    for name in ("sft: sft", "grpo: sft"):
        for sink in make_sinks(["tensorboard"], tmp_path, name, identity="0123abcd"):
            sink.close()
    assert [path.name for path in (tmp_path / "tensorboard").iterdir()] == ["sft-sft-0123abcd"]


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(WorkdirError, match="file/tensorboard: cannot be written"):
        make_sinks(["tensorboard"], tmp_path / "file", "run", identity="0")


def test_a_repeated_name_is_refused():
    with pytest.raises(ConfigError, match="expected each once"):
        check_sinks(("tensorboard", "tensorboard"))


def test_a_missing_wandb_is_one_sentence(monkeypatch):
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr(sys, "meta_path", [])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(ConfigError, match=r'^sinks: got wandb, .* pip install "temper\[wandb\]"$'):
        check_sinks(("wandb",))


def _wandb_records(file):
    """LevelDB's log after a header of 7 bytes: checksum (4), length (2), type (1), data."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, records, start = file.read_bytes(), [], 7
    assert len(data) < 32768  # one block, so every record is whole
    while start < len(data):
        end = start + 7 + int.from_bytes(data[start + 4 : start + 6], "little")
        records.append(Record.FromString(data[start + 7 : end]))
        start = end
    return records


def test_wandb_offline_holds_every_number_under_the_runs_name(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    sinks = make_sinks(("wandb",), tmp_path, "grpo, seed 1: rl", identity="0123abcd")
    with MetricsWriter(tmp_path / "run", sinks=sinks) as writer:
        writer.write(1, {"loss": 2.0, "kl/reference": math.nan})
        writer.write(1, {"tokens_per_second": 5}, PERFORMANCE)
        writer.write(2, {"loss": 1.0})
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    records = _wandb_records(file)
    for _ in range(600):  # W&B's own process writes the file, and may end a moment after `finish`
        if any(record.HasField("exit") for record in records):
            break
        time.sleep(0.05)
        records = _wandb_records(file)
    rows = [
        {(item.key or item.nested_key[0]): json.loads(item.value_json) for item in record.history.item}
        for record in records
        if record.HasField("history")
    ]
    rows = [{key: value for key, value in row.items() if not key.startswith("_")} for row in rows]
    assert math.isnan(rows[0].pop("kl/reference"))
    assert rows == [{"step": 1, "loss": 2.0}, {"step": 1, "tokens_per_second": 5}, {"step": 2, "loss": 1.0}]
    (run,) = [record.run for record in records if record.HasField("run")]
    assert run.display_name == "grpo-seed-1-rl" and run.run_id.startswith("0123abcd-")
