"""The commands as a user meets them: an example in the help, and one sentence for every mistake."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from experiments import quickstart
from tests.experiments.toy import shrink
from tests.launch.forks import ROOT, Forks, Outcome

TOY = """
from pathlib import Path
from experiments import quickstart
from tests.experiments.toy import shrink

def get_config(arg=""):
    config = shrink(quickstart.get_config(), Path({folder!r}))
    config.stages = ("sft", "rl")
    config.sft.checkpoint_every = 1e-9
    return config
"""


EVALUATOR = """
import numpy as np

class Length:
    def run(self, policy, seed):
        groups = policy.generate(policy.held_out(), seed=seed)
        yield "eval/characters", np.array([np.mean([len(sample.text) for sample in group]) for group in groups])
"""


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    with Forks() as server:
        yield server


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("config")
    path = folder / "toy.py"
    path.write_text(TOY.format(folder=str(folder)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def trained(forks: Forks, config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workdir with finished stages."""
    workdir = tmp_path_factory.mktemp("trained") / "run"
    outcome = forks.run("train", f"--config={config}", f"--workdir={workdir}")
    assert outcome.status == 0, outcome.stderr
    assert "sft (sft)" in outcome.stdout and "rl (grpo)" in outcome.stdout
    return workdir


def stage_folder(workdir: Path, name: str) -> Path:
    (folder,) = (workdir / "stages").glob(f"{name}-*")
    return folder


def assert_one_sentence(outcome: Outcome, message: str) -> None:
    """Exit status 1 and exactly one line on standard error, which says it all."""
    assert outcome.status == 1, outcome
    lines = [line for line in outcome.stderr.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("error: "), outcome.stderr
    assert re.search(message, lines[0]), lines[0]
    assert "Traceback" not in outcome.stdout


def test_a_real_subprocess_helps_with_an_example() -> None:
    env = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-m", "launch.train", "--help"], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert "python -m launch.train --config=experiments/quickstart.py --workdir=" in done.stdout
    assert "Traceback" not in done.stderr


def test_a_real_subprocess_fails_with_one_line(tmp_path: Path) -> None:
    env = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    arguments = ["--config=experiments/quickstart.py", f"--workdir={tmp_path / 'run'}", "--config.rl.stpes=3"]
    done = subprocess.run(
        [sys.executable, "-m", "launch.train", *arguments], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert_one_sentence(Outcome(done.returncode, done.stdout, done.stderr), r"rl\.stpes: .* rl\.steps")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", ["train", "ablate", "sample", "evaluate"])
def test_help_shows_an_example(forks: Forks, command: str) -> None:
    outcome = forks.run(command, "--help")
    assert f"  python -m launch.{command} --" in outcome.stdout, outcome
    assert "Traceback" not in outcome.stderr


CONFIG_MISTAKES = {
    "unknown key": (("--config.rl.optimizer.lr=1",), r"rl\.optimizer\.lr: unknown config key; .* rl\.optimizer\."),
    "unknown section": (("--config.ppo.steps=1",), r"ppo: unknown config key; the nearest known one is "),
    "wrong type": (("--config.rl.steps=many",), r"rl\.steps: got 'many', expected a whole number"),
    "unknown flag": (("--wrkdir=x",), r"Unknown command line flag 'wrkdir'\. Did you mean: workdir"),
    "no effect": (("--config.rl.objective.dpo.beta=0.2",), r"rl\.objective\.dpo\.beta: has no effect under rl\."),
    "group size 1": (("--config.rl.rollout.group_size=1",), r"rl\.rollout\.group_size: got 1, expected >= 2"),
    "too long": (("--config.rl.rollout.max_new_tokens=60",), r"= 92, expected at most model\.max_length=64"),
    "an argument": (("quick",), r"got the argument 'quick', expected flags only"),
}


@pytest.mark.parametrize("mistake", CONFIG_MISTAKES)
def test_mistakes_in_the_config_leave_nothing_behind(forks: Forks, config: Path, tmp_path: Path, mistake: str) -> None:
    arguments, message = CONFIG_MISTAKES[mistake]
    outcome = forks.run("train", f"--config={config}", f"--workdir={tmp_path / 'run'}", *arguments)
    assert_one_sentence(outcome, message)
    assert not (tmp_path / "run").exists()


def test_a_typo_in_the_file_itself(forks: Forks, config: Path, tmp_path: Path) -> None:
    typo = tmp_path / "typo.py"
    text = config.read_text(encoding="utf-8").replace("config.sft.checkpoint_every", "config.sft.checkpoint_evry")
    typo.write_text(text, encoding="utf-8")
    outcome = forks.run("ablate", f"--config={typo}", f"--workdir={tmp_path / 'run'}")
    assert_one_sentence(outcome, r"sft\.checkpoint_evry: unknown config key; .* sft\.checkpoint_every")
    assert not (tmp_path / "run").exists()


def test_missing_flags_and_files(forks: Forks, config: Path, tmp_path: Path) -> None:
    missing = tmp_path / "none.py"
    outcome = forks.run("train", f"--config={missing}", f"--workdir={tmp_path / 'run'}")
    assert_one_sentence(outcome, r"none\.py': no such experiment file")
    outcome = forks.run("train", f"--config={config}")
    assert_one_sentence(outcome, r"--workdir")
    broken = tmp_path / "broken.py"
    broken.write_text("from experiments import base\n\ndef get_config():\n    config = base.get_config()\n"
                      "    config.rl.stpes = 3\n    return config\n", encoding="utf-8")  # fmt: skip
    outcome = forks.run("train", f"--config={broken}", f"--workdir={tmp_path / 'run'}")
    assert_one_sentence(outcome, r"rl\.stpes: unknown config key; the nearest known one is rl\.steps")
    outcome = forks.run("sample", f"--stage={tmp_path / 'nothing'}", "--prompt=1")
    assert_one_sentence(outcome, r"nothing: is not the folder of a stage that has run, expected")


def jsonl(path: Path, *lines: str) -> str:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def test_mistakes_in_the_data(forks: Forks, config: Path, tmp_path: Path) -> None:
    """Each names the file (and line) and ends before a stage has begun."""
    good = '{"prompt": "1", "completion": "#### 1"}'
    bad = jsonl(tmp_path / "bad.jsonl", *[good] * 3, '{"prompt": "1", ')
    long = jsonl(tmp_path / "long.jsonl", *[f'{{"prompt": "{"1" * 80}{i}", "completion": "2"}}' for i in range(40)])
    (tmp_path / "empty.txt").write_text("", encoding="utf-8")
    problems = ("--config.data.problems.task=jsonl", "--config.sft.data.transform=")
    cases = [
        ((*problems, f"--config.data.problems.jsonl.path={bad}"), r"bad\.jsonl:4: is not valid JSON"),
        ((*problems, f"--config.data.problems.jsonl.path={tmp_path}/no.jsonl"), r"no\.jsonl: cannot be read"),
        ((*problems, "--config.data.problems.jsonl.path="), r"data\.problems\.jsonl\.path: got ''"),
        ((f"--config.data.text.path={tmp_path}/empty.txt",), r"empty\.txt: holds no records"),
        (
            ("--config.data.tokenizer.model_type=bpe", "--config.data.tokenizer.vocab_size=100"),
            r"vocab_size 100 is too small for the characters of this corpus, expected at least \d+",
        ),
        (
            ("--config.stages=rl", problems[0], f"--config.data.problems.jsonl.path={long}"),
            r"rl: \d+ of \d+ records do not fit 32 tokens .*prompt too long; the first is rl: long\.jsonl:\d+",
        ),
    ]
    for number, (arguments, message) in enumerate(cases):
        workdir = tmp_path / f"run{number}"
        outcome = forks.run("train", f"--config={config}", f"--workdir={workdir}", *arguments)
        assert_one_sentence(outcome, message)
        assert not list(workdir.rglob("done.json")) and not list(workdir.rglob("checkpoints/*/manifest.json"))
        assert not list(workdir.rglob("*.tmp")) and not list(workdir.rglob("incomplete.*"))


def test_a_mesh_that_does_not_divide(forks: Forks, config: Path, tmp_path: Path) -> None:
    outcome = forks.run("train", f"--config={config}", f"--workdir={tmp_path / 'run'}", "--config.mesh.data=3")
    assert_one_sentence(outcome, r"mesh: got data=3 x fsdp=1 x tensor=1, expected a product of 1 because this")


def test_another_config_reads_what_both_share(forks: Forks, config: Path, trained: Path, tmp_path: Path) -> None:
    workdir = shutil.copytree(trained, tmp_path / "run")
    outcome = forks.run("train", f"--config={config}", f"--workdir={workdir}", "--config.rl.steps=3")
    assert outcome.status == 0, outcome.stderr
    assert "sft: finished, read from" in outcome.stdout and "rl: finished" not in outcome.stdout
    assert len(list((workdir / "stages").glob("rl-*"))) == 2


def test_a_finished_run_is_read_and_not_run_again(forks: Forks, config: Path, trained: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in trained.rglob("*") if path.is_file()}
    outcome = forks.run("train", f"--config={config}", f"--workdir={trained}")
    assert outcome.status == 0 and "rl (grpo)" in outcome.stdout
    after = {path: path.stat().st_mtime_ns for path in trained.rglob("*") if path.is_file()}
    assert {p for p in after if before.get(p) != after[p]} == {trained / ".lock", trained / "config.json"}


def test_sample_and_evaluate(forks: Forks, trained: Path, tmp_path: Path) -> None:
    stage = stage_folder(trained, "rl")
    outcome = forks.run("sample", f"--stage={stage}", "--max_new_tokens=4", stdin="1+1\n2+2\n")
    assert outcome.status == 0, outcome.stderr
    outcome = forks.run("sample", f"--stage={stage}", f"--prompt={'1' * 80}", "--max_new_tokens=4")
    assert_one_sentence(outcome, r"--prompt: has \d+ tokens, expected at most 60 because the context is 64")
    output = tmp_path / "missing" / "found.json"
    arguments = ["--limit=4", "--samples=2", "--max_prompt_length=32", "--max_new_tokens=8", f"--output={output}"]
    outcome = forks.run("evaluate", f"--stage={stage}", "--k=1,2", *arguments)
    assert outcome.status == 0, outcome.stderr
    assert "4 problems, 2 samples each" in outcome.stdout and output.exists()
    found = json.loads(output.read_text())
    assert len(found["problems"]) == 4 and len(found["problems"][0]["completions"]) == 2
    own = tmp_path / "own.py"
    own.write_text(EVALUATOR, encoding="utf-8")
    evaluators = f"--evaluators=validation_loss,{own}:Length"
    outcome = forks.run("evaluate", f"--stage={stage}", "--k=1", evaluators, *arguments)
    assert outcome.status == 0, outcome.stderr
    assert "eval/validation_loss: " in outcome.stdout and "eval/characters: " in outcome.stdout
    (tmp_path / "file").write_text("", encoding="utf-8")
    for place in (tmp_path / "file" / "found.json", tmp_path):
        outcome = forks.run("evaluate", f"--stage={stage}", "--k=1", *arguments[:-1], f"--output={place}")
        assert_one_sentence(outcome, "expected a folder, found a file|expected a file, found a folder")
        assert "sampling" not in outcome.stdout, "refused before anything is sampled"
    outcome = forks.run("evaluate", f"--stage={stage}", "--k=1,4", *arguments)
    assert_one_sentence(outcome, "--k: got 1,4, expected integers from 1 to --samples=2")


def test_a_corrupt_checkpoint_offers_the_one_before(forks: Forks, trained: Path, tmp_path: Path) -> None:
    stage = tmp_path / "sft-copied"
    shutil.copytree(stage_folder(trained, "sft"), stage)
    assert sorted(p.name for p in (stage / "checkpoints").iterdir() if p.name.isdigit()) == ["1", "2"]
    largest = max((p for p in (stage / "checkpoints" / "2" / "arrays").rglob("*") if p.is_file()), key=os.path.getsize)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)
    outcome = forks.run("sample", f"--stage={stage}", "--prompt=1")
    assert_one_sentence(
        outcome, r"checkpoints/2: is damaged: .* has changed since it was written .*checkpoints/1|step 1"
    )
    assert outcome.stdout == ""


def test_a_full_disk(forks: Forks, config: Path, trained: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands in for it: the data fit, the checkpoint does not."""
    workdir = tmp_path / "run"
    shutil.copytree(trained / "data", workdir / "data")
    outcome = forks.run("train", f"--config={config}", f"--workdir={workdir}", file_limit=60_000)
    assert_one_sentence(outcome, r"checkpoints")
    assert not list(workdir.rglob("done.json")) and not list(workdir.rglob("checkpoints/[0-9]*/manifest.json"))


def test_a_folder_that_cannot_be_made(forks: Forks, config: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    outcome = forks.run("train", f"--config={config}", f"--workdir={tmp_path / 'file'}")
    assert_one_sentence(outcome, r"/file.*: (expected a folder, found a file|cannot be written \(Not a directory\))")


def test_the_toy_config_is_the_quickstarts(tmp_path: Path) -> None:
    assert set(shrink(quickstart.get_config(), tmp_path)) == set(quickstart.get_config())
