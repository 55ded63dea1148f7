"""Stages of a chain: what is found again, what goes on, with more steps, on other devices, from another run."""

import dataclasses
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from research.core.errors import ConfigError, WorkdirError
from research.core.interrupts import Interrupted, Interrupts
from research.core.mesh import make_mesh
from research.train.chain import Finished, run_chain
from research.train.session import Session
from research.train.setup import Setup, set_up
from research.train.stored import load_policy, load_stage
from tests.research.algorithms.toy import quick_compilation
from tests.research.train.chain import chain_config, changed

BASE: dict[str, Any] = {
    "stages": ("sft",),
    "sft.steps": 6,
    "sft.log_every": 1,
    "sft.eval_every": 3,
    "sft.optimizer.schedule": "constant",
    "evaluation.evaluators": (),
    "evaluation.samples": 2,
    "evaluation.k": (1, 2),
    "evaluation.problems": 4,
    "sft.eval_problems": 4,
}


class Bench:
    """Prepared data, and runs of one stage on the first devices."""

    def __init__(self, folder: Path) -> None:
        self.config = chain_config(folder)
        self.setup: Setup = set_up(changed(self.config, BASE), folder)
        self.place = folder

    def run(
        self, workdir: Path, changes: Mapping[str, Any] | None = None, devices: int = 1, stop: int = 0, **how: Any
    ) -> Finished:
        """Trains; stops as for a signal after step `stop`."""
        experiment = changed(self.config, {**BASE, **(changes or {})})
        mesh = make_mesh(devices, 1, 1, devices=jax.devices()[:devices])
        setup = dataclasses.replace(self.setup, mesh=mesh, **how)
        interrupts, log = Interrupts(), Session.log

        def noticing(session: Session, step: int, metrics: Any, *, tokens: int) -> None:
            log(session, step, metrics, tokens=tokens)
            interrupts.received = 2 if step == stop else 0

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Session, "log", noticing)
            (done,) = run_chain(experiment, workdir, setup=setup, interrupts=interrupts)
        return done


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    with quick_compilation():
        yield Bench(tmp_path_factory.mktemp("bench"))


@pytest.fixture(scope="module")
def whole(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """Six steps at once, on one device."""
    return bench.run(tmp_path_factory.mktemp("whole"))


def params(done: Finished) -> list[np.ndarray]:
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    return [np.asarray(leaf) for leaf in jax.tree.leaves(load_policy(done.folder.path, mesh).params)]


def assert_same(one: Finished, other: Finished) -> None:
    """Bit for bit."""
    assert all(a.tobytes() == b.tobytes() for a, b in zip(params(one), params(other), strict=True))
    name = "metrics.jsonl"
    assert (one.folder.path / name).read_bytes() == (other.folder.path / name).read_bytes()
    assert one.result["metrics"] == other.result["metrics"] and one.curve == other.curve


def test_a_stage_goes_on_on_another_number_of_devices(bench: Bench, whole: Finished, tmp_path: Path) -> None:
    """The number of devices is no part of its name; on an equal mesh every bit is the same."""
    for devices in (1, 2):
        workdir = tmp_path / str(devices)
        with pytest.raises(Interrupted, match=r"sft \(sft\): saved at step 2 of 6; the same command goes on"):
            bench.run(workdir, stop=2)
        done = bench.run(workdir, devices=devices)
        assert done.folder.hash == whole.folder.hash
        if devices == 1:
            assert_same(done, whole)
        for a, b in zip(params(done), params(whole), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-4)
        assert bench.run(workdir, devices=3 - devices).reused


def test_keys_that_change_no_result_may_change_on_resume(bench: Bench, whole: Finished, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        bench.run(tmp_path, stop=3)
    changes = {"sft.log_every": 2, "sft.checkpoint_every": 1e-9, "sft.keep_checkpoints": 1, "sft.eval_batches": 2}
    done = bench.run(tmp_path, changes)
    assert done.folder.hash == whole.folder.hash
    assert all(a.tobytes() == b.tobytes() for a, b in zip(params(done), params(whole), strict=True))
    steps = [json.loads(line)["step"] for line in (done.folder.path / "performance.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 6]


def test_a_finished_stage_is_continued_for_more_steps(
    bench: Bench, whole: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = bench.run(tmp_path, {"sft.steps": 3})
    longer = bench.run(tmp_path, {"sft.extend": str(short.folder.path)})
    assert longer.folder.path != short.folder.path and longer.folder.hash != whole.folder.hash
    assert "resuming from step 3 of 6" in capsys.readouterr().out
    assert_same(longer, whole)
    assert longer.result["budget"]["tokens_trained"] == whole.result["budget"]["tokens_trained"]
    with pytest.raises(ConfigError, match=r"sft\.extend: .* has 6 steps, expected sft\.steps=6 to be more"):
        bench.run(tmp_path, {"sft.extend": str(longer.folder.path)})
    other = {"sft.extend": str(short.folder.path), "sft.optimizer.learning_rate": 0.5}
    with pytest.raises(ConfigError, match=r"differs in more than its steps: stage\.optimizer\.learning_rate: there"):
        bench.run(tmp_path, other)


def test_a_stage_starts_from_that_of_another_run(bench: Bench, whole: Finished, tmp_path: Path) -> None:
    """By its folder; another tokenizer or model is refused before anything is trained."""
    start = {"sft.start_from": str(whole.folder.path), "sft.steps": 1}
    experiment = changed(bench.config, {**BASE, **start})
    setup = set_up(experiment, bench.place)
    done = bench.run(tmp_path, start, folders=setup.folders)
    assert json.loads((done.folder.path / "inputs.json").read_text()) == [whole.folder.hash]
    moved = shutil.copytree(whole.folder.path, tmp_path / "elsewhere" / "mine")
    there = bench.run(tmp_path, {**start, "sft.start_from": str(moved)}, folders=_folders(bench, start, moved))
    assert there.reused and there.folder == done.folder
    refusals = {
        r"sft\.start_from: .* another model: model\.d_ff: there 32, here 64": {"model.d_ff": 64},
        r"sft\.start_from: .* another tokenizer, .*data\.tokenizer\.path=.*/tokenizer\.model": {
            "data.tokenizer.model_type": "bpe",
            "data.tokenizer.vocab_size": 400,
        },
        r"sft\.start_from: .*nowhere/sft-1: is not the folder of a stage": {"sft.start_from": "/nowhere/sft-1"},
    }
    for message, changes in refusals.items():
        with pytest.raises(ConfigError, match=message):
            set_up(changed(bench.config, {**BASE, **start, **changes}), bench.place)


def _folders(bench: Bench, start: Mapping[str, Any], place: Path) -> Any:
    return set_up(changed(bench.config, {**BASE, **start, "sft.start_from": str(place)}), bench.place).folders


def test_evaluations_are_apart_from_training(bench: Bench, whole: Finished, tmp_path: Path) -> None:
    """Another one leaves training as it is; a second look reads it; none can be asked for."""
    assert whole.evaluation is None and not (whole.folder.path / "evaluations").exists()
    workdir = tmp_path / "run"
    shutil.copytree(whole.folder.path, workdir / "stages" / whole.folder.path.name)
    seen: dict[str, Finished] = {}
    for samples in (2, 3):
        how = {"evaluation.evaluators": ("accuracy",), "evaluation.samples": samples}
        done = bench.run(workdir, how)
        assert done.reused and done.folder.hash == whole.folder.hash and done.evaluation is not None
        assert {"eval/pass@1", "eval/loss"} <= done.metrics.keys()
        again = bench.run(workdir, how)
        assert again.metrics == done.metrics and again.evaluated_by == done.evaluated_by
        seen[done.evaluated_by] = done
    assert sorted(p.stem for p in (workdir / "stages" / whole.folder.path.name / "evaluations").iterdir()) == sorted(
        seen
    )
    assert all(done.result["curve_evaluation"] not in seen for done in seen.values())
    assert all("eval/pass@1" not in point for done in seen.values() for point in done.curve)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"stage": "sft"}', '{"stage": 3}', "newer", "other stage"])
def test_a_stage_of_another_version_is_one_sentence(whole: Finished, tmp_path: Path, text: str) -> None:
    folder = tmp_path / "sft-1"
    folder.mkdir()
    for name in ("experiment.json", "tokenizer.model"):
        shutil.copy(whole.folder.path / name, folder)
    assert load_stage(folder).name == "sft"
    tree = json.loads((folder / "experiment.json").read_text())
    if text == "newer":
        text = json.dumps({**tree, "data": {**tree["data"], "from_the_future": 1}})
    elif text == "other stage":
        text = json.dumps({**tree, "stage": "rl"})
    (folder / "experiment.json").write_text(text)
    with pytest.raises(WorkdirError, match=r"experiment\.json: ") as caught:
        load_stage(folder)
    assert "\n" not in str(caught.value)
