"""Stages: a hash that means the same everywhere, folders nobody shares by mistake, whole files."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from research.core import files
from research.core.errors import WorkdirError
from research.core.files import read_json, write_json_atomic, write_text_atomic
from research.core.stages import StageDir, hold_workdir, stage_hash
from research.core.versions import collect_versions, git_revision

ROOT = Path(__file__).resolve().parents[3]
CONFIG: dict[str, Any] = {
    "optim": {"lr": 3e-4, "betas": (0.9, 0.95), "warmup": 10},
    "objective": "dpo",
    "beta": 0.1,
    "tie": True,
    "name": "größe",
    "seed": None,
}


# --- the hash ---


def test_the_hash_is_the_same_on_every_machine_and_in_every_version() -> None:
    """A change here orphans every stage that users have on disk: say so in CHANGELOG.md if it must happen."""
    assert stage_hash(CONFIG, ["c0ffee", "corpus-1"]) == "5c27983f2c5c"
    assert stage_hash({}, []) == "878ceba4c157"


def test_the_hash_ignores_how_a_config_is_spelled() -> None:
    spelled = json.loads(json.dumps(CONFIG))
    spelled = dict(reversed(spelled.items()))
    spelled["optim"]["warmup"] = 10.0
    spelled["beta"] = 1e-1
    assert stage_hash(spelled, ("a",)) == stage_hash(CONFIG, ["a"])


@pytest.mark.parametrize(
    "change", [{"beta": 0.1000001}, {"tie": 1}, {"tie": "True"}, {"seed": 0}, {"extra": None}, {"optim": {"lr": 3e-4}}]
)
def test_the_hash_sees_every_difference(change: dict[str, Any]) -> None:
    assert stage_hash(CONFIG | change, []) != stage_hash(CONFIG, [])


def test_the_hash_sees_inputs_and_their_order() -> None:
    hashes = {stage_hash(CONFIG, inputs) for inputs in ([], ["a"], ["a", "b"], ["b", "a"], ["ab"])}
    assert len(hashes) == 5


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"optim": {"lr": float("nan")}}, r"config\.optim\.lr: got nan, expected a finite number"),
        ({"optim": {"lr": {1: 2}}}, r"config\.optim\.lr: got the key 1, expected string keys"),
        ({"path": [Path("a")]}, r"config\.path\[0\]: got a value of type \w*Path, expected what JSON"),
    ],
)
def test_a_config_without_a_canonical_form_is_refused_by_key(config: dict[str, Any], message: str) -> None:
    with pytest.raises(WorkdirError, match=message):
        stage_hash(config, [])


# --- the folder ---


def test_a_stage_is_found_again_with_its_result(tmp_path: Path) -> None:
    stage = StageDir.open(tmp_path, "sft", CONFIG, ["abc"])
    assert stage.path == tmp_path / "stages" / f"sft-{stage_hash(CONFIG, ['abc'])}"
    assert stage.checkpoints == stage.path / "checkpoints"
    with stage.running():
        assert stage.result() is None
        stage.finish({"loss": 0.5, "steps": 10})
    again = StageDir.open(tmp_path, "sft", dict(reversed(CONFIG.items())), ["abc"])
    assert again == stage
    assert again.result() == {"loss": 0.5, "steps": 10}
    assert json.loads((stage.path / "config.json").read_text()) == json.loads(json.dumps(CONFIG))
    assert json.loads((stage.path / "inputs.json").read_text()) == ["abc"]
    assert json.loads((stage.path / "versions.json").read_text()) == [collect_versions()]
    assert StageDir.open(tmp_path, "sft", CONFIG, ["abd"]).result() is None


def test_a_folder_that_disagrees_with_its_hash_is_refused(tmp_path: Path) -> None:
    stage = StageDir.open(tmp_path, "sft", CONFIG)
    (stage.path / "config.json").write_text(json.dumps(CONFIG | {"beta": 0.2}))
    with pytest.raises(WorkdirError, match="disagrees with the hash .*: beta: there 0.2, here 0.1; delete"):
        StageDir.open(tmp_path, "sft", CONFIG)
    (stage.path / "config.json").write_text('{"beta": 0.')
    with pytest.raises(WorkdirError, match="config.json: is not the JSON file that Temper wrote"):
        StageDir.open(tmp_path, "sft", CONFIG)


@pytest.mark.parametrize("text", ["{}", "[]", '"done"', "3", '{"metrics": '])
def test_a_result_that_is_none_is_one_sentence(tmp_path: Path, text: str) -> None:
    stage = StageDir.open(tmp_path, "sft", CONFIG)
    (stage.path / "done.json").write_text(text)
    with pytest.raises(WorkdirError, match=r"done\.json: (got .*, expected the result|is not the JSON file)"):
        stage.result()


def test_a_label_names_a_new_folder_and_the_hash_alone_finds_it(tmp_path: Path) -> None:
    made = StageDir.open(tmp_path, "rl", CONFIG, label="lr=3e-4, beta/2 s1")
    assert made.path.name == f"rl-lr=3e-4-beta-2-s1-{stage_hash(CONFIG, [])}"
    assert StageDir.open(tmp_path, "rl", CONFIG) == made
    assert StageDir.open(tmp_path, "rl", CONFIG, label="another") == made


@pytest.mark.parametrize("label", ["../../evil", "/etc/evil", "..", ".", "a\0b", "\n", "x" * 300, "[/b]"])
def test_no_label_leads_out_of_the_workdir(tmp_path: Path, label: str) -> None:
    made = StageDir.open(tmp_path / "run", "rl", CONFIG, label=label).path
    assert made.parent == tmp_path / "run" / "stages" and made.resolve() == made
    assert os.listdir(tmp_path) == ["run"] and len(made.name) < 100


HOLD = """
import json, sys
from research.core.stages import StageDir
with StageDir.open(sys.argv[1], "sft", json.loads(sys.argv[2])).running():
    print("held", flush=True)
    sys.stdin.read()
"""


def test_two_processes_do_not_run_the_same_stage_and_a_killed_one_lets_go(tmp_path: Path) -> None:
    stage = StageDir.open(tmp_path, "sft", CONFIG)
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path), json.dumps(CONFIG)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(WorkdirError, match=f"sft-.* is being run by process {holder.pid} on "), stage.running():
        pytest.fail("the stage was run twice")
    with StageDir.open(tmp_path, "sft", CONFIG | {"beta": 0.2}).running():
        pass
    holder.kill()
    holder.communicate()
    with stage.running():
        pass


# --- the working directory ---


def test_a_workdir_is_held_by_one_process_and_notes_its_config(tmp_path: Path) -> None:
    with hold_workdir(tmp_path / "run", CONFIG):
        with pytest.raises(WorkdirError, match=r"workdir .*run is being run by process \d+ on"):
            hold(tmp_path / "run")
        assert read_json(tmp_path / "run" / "config.json") == json.loads(json.dumps(CONFIG))
    with hold_workdir(tmp_path / "run", {"other": 1}):
        assert read_json(tmp_path / "run" / "config.json") == {"other": 1}


def hold(path: Path) -> None:
    with hold_workdir(path, CONFIG):
        pass


def test_a_path_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(WorkdirError, match="file: expected a folder, found a file"):
        hold(tmp_path / "file")
    with pytest.raises(WorkdirError, match="file/run: cannot be written"):
        hold(tmp_path / "file" / "run")
    with pytest.raises(WorkdirError, match="cannot be written"):
        StageDir.open(tmp_path / "file", "sft", CONFIG)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_workdir_without_permission_is_one_sentence(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(WorkdirError, match="cannot be written .*choose a directory that you may write to"):
        hold(tmp_path / "run")


# --- atomic files ---


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    def no_space(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    place = tmp_path / "done.json"
    write_json_atomic(place, {"loss": 1})
    monkeypatch.setattr(files.os, failing, no_space)
    with pytest.raises(WorkdirError, match="done.json: no space left on the device"):
        write_json_atomic(place, {"loss": 2})
    assert json.loads(place.read_text()) == {"loss": 1}
    assert os.listdir(tmp_path) == ["done.json"]


def test_what_json_cannot_express_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(WorkdirError, match="done.json: cannot be written as JSON"):
        write_json_atomic(tmp_path / "done.json", {"loss": float("nan")})
    assert os.listdir(tmp_path) == []


def test_text_is_utf8_whatever_the_locale(tmp_path: Path) -> None:
    write_text_atomic(tmp_path / "a.txt", "größe\n")
    assert (tmp_path / "a.txt").read_bytes() == b"gr\xc3\xb6\xc3\x9fe\n"


def test_what_a_killed_writer_left_is_removed_and_a_living_ones_stays(tmp_path: Path) -> None:
    command = (
        "import os, sys; from research.core import files; files.os.replace = lambda *_: (print('stuck', flush=True), "
        "sys.stdin.read()); files.write_text_atomic(sys.argv[1], 'half')"
    )
    (tmp_path / "stages" / "sft-1").mkdir(parents=True)
    place = tmp_path / "stages" / "sft-1" / "done.json"
    writer = subprocess.Popen(
        [sys.executable, "-c", command, str(place)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert writer.stdout is not None and writer.stdout.readline() == b"stuck\n"
    (half,) = place.parent.glob(".done.json.*.tmp")
    os.utime(half, (0, 0))
    files.remove_leftovers(tmp_path)
    assert half.exists()
    writer.kill()
    writer.communicate()
    with hold_workdir(tmp_path, CONFIG):
        assert not half.exists()


# --- versions ---


def test_versions_name_the_packages_and_the_revision(tmp_path: Path) -> None:
    versions = collect_versions()
    assert {"jax", "jaxlib", "numpy", "orbax-checkpoint"} <= versions["packages"].keys()
    assert (versions["git_revision"], versions["git_dirty"]) == git_revision(ROOT)  # a checkout, or none
    assert json.loads(json.dumps(versions)) == versions
    assert git_revision(tmp_path) == ("unknown", None)


def test_the_revision_is_that_of_the_checkout_and_says_when_it_is_dirty(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.com"]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    assert git_revision(tmp_path) == ("unknown", None)
    (tmp_path / "a.py").write_text("")
    git("add", "a.py")
    git("commit", "-q", "-m", "first")
    head = git("rev-parse", "HEAD")
    assert git_revision(tmp_path) == (head, False)
    (tmp_path / "a.py").write_text("1")
    assert git_revision(tmp_path) == (head, True)
    inside = tmp_path / "site-packages"
    inside.mkdir()
    assert git_revision(inside) == ("unknown", None)
