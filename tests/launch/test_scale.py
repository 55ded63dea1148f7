"""`python -m launch.scale` from trained stages to tables, picture and JSON; and its mistakes in one sentence."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from research.core.metrics import decode_numbers
from research.data.tokenizer import train_tokenizer
from research.evals.scaling import scaling_curves
from tests.launch.forks import Forks, Outcome
from tests.launch.test_launch import assert_one_sentence, stage_folder

TOY = """
from pathlib import Path
from experiments import test_time_compute
from tests.experiments.toy import shrink

def get_config(arg=""):
    config = shrink(test_time_compute.get_config(), Path({folder!r}))
    config.stages = ("sft", "reward", "prm")
    sums = {{"operations": "+", "min_steps": 1, "max_steps": 1, "max_operand": 9, "train": 48, "test": 8}}
    config.data.problems.arithmetic.update(sums)
    # Bare answers to sums of two digits, learned for a moment: the policy stops, and is sometimes right.
    config.sft.update({{"steps": 80, "batch_size": 16, "log_every": 80}})
    config.sft.data.update({{"transform": "terse", "terse": {{"fraction": 1.0}}, "limit": 0}})
    config.sft.optimizer.learning_rate = 1e-2
    return config
"""
SIZES = ("--max_prompt_length=32", "--max_new_tokens=8", "--batch_problems=4")


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    with Forks() as server:
        yield server


@pytest.fixture(scope="module")
def trained(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workdir with a policy, a reward model and a process reward model."""
    folder = tmp_path_factory.mktemp("scale")
    (folder / "toy.py").write_text(TOY.format(folder=str(folder)), encoding="utf-8")
    outcome = forks.run("train", f"--config={folder / 'toy.py'}", f"--workdir={folder / 'run'}")
    assert outcome.status == 0, outcome.stderr
    return folder / "run"


def scale(forks: Forks, trained: Path, output: Path, *arguments: str, stage: str = "sft") -> Outcome:
    flags = (f"--stage={stage_folder(trained, stage)}", f"--output={output}", *SIZES, *arguments)
    return forks.run("scale", *flags)


def test_help_shows_an_example(forks: Forks) -> None:
    outcome = forks.run("scale", "--help")
    assert "  python -m launch.scale --stage=" in outcome.stdout, outcome
    assert "Traceback" not in outcome.stderr


FLAGS = {
    "n": (("--samples=4", "--n=2,8"), "--n: got 2,8, expected integers from 1 to --samples=4"),
    "no number": (("--n=two",), r"--n: got two, expected numbers such as 1,4,16"),
    "greedy": (("--temperature=0",), r"--temperature: got 0, expected > 0: greedy samples are equal"),
    "not a number": (("--temperature=nan",), r"temperature: got nan, expected 0 \(greedy\) or a number from"),
    "samples": (("--samples=1000000000",), r"--samples=1000000000.*--help"),
    "reduction": (("--prm_score=max",), r"--prm_score: got max, expected some of min,prod"),
    "no stage": ((), r"nothing: is not the folder of a stage that has run, expected"),
}


@pytest.mark.parametrize("mistake", FLAGS)
def test_mistakes_in_the_flags(forks: Forks, tmp_path: Path, mistake: str) -> None:
    arguments, message = FLAGS[mistake]
    stage, output = f"--stage={tmp_path / 'nothing'}", f"--output={tmp_path / 'none'}"
    assert_one_sentence(forks.run("scale", stage, output, *arguments), message)
    assert not (tmp_path / "none").exists()


@pytest.mark.slow
def test_from_stages_to_curves(forks: Forks, trained: Path, tmp_path: Path) -> None:
    scorers = ",".join(str(stage_folder(trained, name)) for name in ("reward", "prm"))
    arguments = ("--samples=6", "--limit=6", f"--scorers={scorers}", "--prm_score=last,min")
    outcome = scale(forks, trained, tmp_path / "one", *arguments)
    assert outcome.status == 0, outcome.stderr
    assert "majority" in outcome.stdout and "scaling.png" in outcome.stdout
    found = json.loads((tmp_path / "one" / "scaling.json").read_text("utf-8"))
    names = ["reward", "prm-min", "prm-last"]
    assert set(found["curves"]) == {"pass", "random", "majority"} | {
        f"{way}:{name}" for way in ("best_of_n", "weighted") for name in names
    }
    assert (found["problems"], found["samples"], found["trials"]) == (6, 6, 400)
    assert set(found["run"]["forward_flops_per_token"]) == {"policy", "reward", "prm"}

    # All of it follows from the samples, which the file has whole.
    samples = decode_numbers(json.loads((tmp_path / "one" / "samples.json").read_text("utf-8")))
    correct = np.array([record["correct"] for record in samples])
    assert correct.shape == (6, 6) and 0 < correct.mean() < 1, "the toy model should be sometimes right"
    assert all(len(set(map(len, record["scores"].values()))) == 1 for record in samples)
    scores = {name: np.array([record["scores"][name] for record in samples]) for name in names}
    probabilities = {name: np.where(np.isfinite(scores[name]), scores[name], 0.0) for name in names[1:]}
    again = scaling_curves(
        correct=correct,
        answers=[record["answers"] for record in samples],
        lengths=[record["lengths"] for record in samples],
        prompt_lengths=[record["prompt_length"] for record in samples],
        scores=scores,
        weights={"reward": np.exp(scores["reward"] - scores["reward"].max(axis=1, keepdims=True)), **probabilities},
    )
    for name, curve in again.curves.items():
        points = found["curves"][name]["points"]
        assert [point["n"] for point in points] == [1, 2, 4, 6]
        assert [point["accuracy"] for point in points] == [point.accuracy for point in curve.points]
        assert [point["draws"]["std"] for point in points] == [point.draws.std for point in curve.points]
    assert min(imread(tmp_path / "one" / "scaling.png").shape[:2]) > 400
    text = (tmp_path / "one" / "scaling.md").read_text("utf-8")
    assert "| best of n, prm-last |" in text and "N = 6" in text

    # The same draws whatever else is asked of them.
    outcome = scale(forks, trained, tmp_path / "two", "--samples=6", "--limit=3", "--n=2,6")
    assert outcome.status == 0, outcome.stderr
    fewer = json.loads((tmp_path / "two" / "samples.json").read_text("utf-8"))
    assert [r["completions"] for r in fewer] == [r["completions"] for r in samples[:3]]
    assert set(json.loads((tmp_path / "two" / "scaling.json").read_text("utf-8"))["curves"]) == {
        "pass",
        "random",
        "majority",
    }


@pytest.mark.slow
def test_stages_that_do_not_fit(forks: Forks, trained: Path, tmp_path: Path) -> None:
    sft, prm, other = stage_folder(trained, "sft"), stage_folder(trained, "prm"), tmp_path / "prm-other"
    shutil.copytree(prm, other)
    train_tokenizer(
        ["abc 123"], vocab_size=None, path=other / "tokenizer.model", model_type="char", byte_fallback=False
    )
    cases = [
        ("prm", (), r"prm-\w+: holds a step_scorer, expected a policy, which can be sampled"),
        ("sft", (f"--scorers={sft}",), r"sft-\w+: holds a policy, expected a reward model, an outcome scorer"),
        ("sft", (f"--scorers={tmp_path}",), r"is not the folder of a stage that has run, expected"),
        ("sft", (f"--scorers={other}",), r"prm-other: has another tokenizer than the policy"),
        ("sft", ("--max_new_tokens=60",), r"--max_new_tokens: got 60 after prompts of up to 32 tokens"),
    ]
    for stage, arguments, message in cases:
        outcome = scale(forks, trained, tmp_path / "none", *arguments, stage=stage)
        assert_one_sentence(outcome, message)
        assert not (tmp_path / "none").exists(), message
