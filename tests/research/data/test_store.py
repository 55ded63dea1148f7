"""Prepared data: round trips, folders named by content, one writer, and what killed or broken disks leave."""

import json
import multiprocessing
import os
import signal
import time

import pytest

from research.core.errors import DataError
from research.data import store
from research.data.records import Selected, first_records, place_of
from research.data.store import Row, prepare, writing

ROWS = {
    "train": [Row({"n": n, "é": [None, 1.5, {"a": "\u2081"}], "text": "x" * n}, f"in.jsonl:{n}") for n in range(50)],
    "validation": [Row({"n": 99})],
}


def made(tmp_path, seed=0, load=lambda: ROWS):
    return prepare("toy", tmp_path, inputs={"seed": seed}, load=load)


def folders(data_dir):
    return sorted(path.name for path in data_dir.glob("rows/*"))


def test_every_column_comes_back_with_its_type_in_order(tmp_path, capsys):
    data = made(tmp_path)
    assert list(data.train) == [row.record for row in ROWS["train"]]
    assert data.train[3] == ROWS["train"][3].record and len(data.train) == 50
    assert data.train.place(3) == "in.jsonl:3" and data.validation.place(0) == "record 0"
    assert data.details["records"] == {"train": 50, "validation": 1} and data.details["version"] == data.version
    assert capsys.readouterr() == ("", "")
    for index in (-1, 50):
        with pytest.raises(IndexError, match=f"record {index} of 50"):
            data.train[index]


def test_a_folder_is_written_once_and_named_by_its_inputs(tmp_path):
    first = made(tmp_path)
    again = made(tmp_path, load=lambda: pytest.fail("written twice"))
    assert (again.version, again.details) == (first.version, first.details)
    assert made(tmp_path, seed=1).version != first.version
    assert len(folders(tmp_path)) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "rows"]


def test_what_cannot_be_loaded_or_written_leaves_no_folder(tmp_path):
    def fail():
        raise DataError("line 3 is bad")

    with pytest.raises(DataError, match="line 3 is bad"):
        made(tmp_path, load=fail)
    with pytest.raises(DataError, match="the validation split of .* is empty"):
        made(tmp_path, load=lambda: {**ROWS, "validation": []})
    assert folders(tmp_path) == [] and len(made(tmp_path).train) == 50


@pytest.mark.parametrize("harm", ["flip", "cut", "missing", "no hashes"])
def test_damaged_files_are_refused_in_one_sentence(tmp_path, harm):
    data = made(tmp_path)
    (folder,) = tmp_path.glob("rows/*/*")
    (file,) = folder.glob("*train*array_record*")
    content = bytearray(file.read_bytes())
    if harm == "flip":
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif harm == "cut":
        file.write_bytes(content[:-100])
    else:
        (file if harm == "missing" else folder / "sha256.json").unlink()
    with pytest.raises(DataError, match=rf"{data.version}.* [Dd]elete .*{data.version}"):
        made(tmp_path)


def hold(data_dir, kill):
    """Begins to write; then dies as by `kill -9`, or stays."""
    with writing(data_dir) as incomplete:
        (incomplete / "half").write_text("half")
        tokenizers = data_dir / "tokenizers"
        tokenizers.mkdir()
        (tokenizers / ".x.model.1.ab.tmp").write_text("half")
        (data_dir / "ready").touch()
        if kill:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)


@pytest.mark.parametrize("killed", [True, False])
def test_what_a_writer_has_left_is_removed_once_it_is_dead(tmp_path, killed):
    made(tmp_path)
    process = multiprocessing.get_context("fork").Process(target=hold, args=(tmp_path, killed))
    process.start()
    while not (tmp_path / "ready").exists():
        time.sleep(0.01)
    if killed:
        process.join()
    made(tmp_path)  # reads what is there, and so waits for nobody
    assert (tmp_path / "incomplete" / "half").exists()
    process.kill()
    process.join()
    made(tmp_path, seed=1)
    assert not (tmp_path / "incomplete").exists() and not list((tmp_path / "tokenizers").iterdir())


def test_two_processes_that_want_the_same_write_it_once(tmp_path, monkeypatch):
    original = store.writing

    def overtaken(data_dir):
        monkeypatch.setattr(store, "writing", original)
        made(tmp_path)  # another process, while this one waited for the lock
        return original(data_dir)

    monkeypatch.setattr(store, "writing", overtaken)
    data = made(tmp_path, load=lambda: pytest.fail("written twice") if folders(tmp_path) else ROWS)
    assert len(data.train) == 50


def test_views_and_selections_keep_the_places_of_their_records(tmp_path):
    train = made(tmp_path).train
    view = first_records(train, 3, lambda record: {"doubled": 2 * record["n"]})
    assert len(view) == 3 and [record["doubled"] for record in view] == [0, 2, 4]
    assert len(first_records(train, 0)) == len(first_records(train, 999)) == 50
    chosen = first_records(Selected(train, [7, 30, 4]), 2)
    assert [record["n"] for record in chosen] == [7, 30]
    assert place_of(chosen, 1) == "in.jsonl:30" and place_of([{}], 0) == "record 0"
    for index in (3, -1):
        with pytest.raises(IndexError):
            view[index]


def test_rows_are_json(tmp_path):
    assert json.loads(json.dumps(made(tmp_path).train[1])) == ROWS["train"][1].record
