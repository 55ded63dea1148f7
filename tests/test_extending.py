"""The guide to bringing one's own, executed: its files in a folder of a user's, named in a config, trained."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from experiments import quickstart
from research.config.references import find
from research.config.resolve import resolve
from research.environments.base import Completion
from research.train.chain import run_chain
from research.train.setup import set_up
from tests.experiments.toy import shrink
from tests.research.algorithms.toy import quick_compilation

GUIDE = (Path(__file__).resolve().parents[1] / "research" / "README.md").read_text("utf-8")
FILES = dict(re.findall(r"`(my_\w+\.py)`:\n```python\n(.*?)^```", GUIDE, re.M | re.S))
NAMES = ("data.problems.task=my_task.py:Letters", "data.problems.Letters.longest=4", "sft.data.transform=")
OPTIMIZER = (
    *("sft.optimizer.name=my_optimizer.py:sign", "sft.optimizer.sign.scale=0.5"),
    "sft.optimizer.schedule=my_optimizer.py:half",
)


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    for name, text in FILES.items():
        Path(name).write_text(text, encoding="utf-8")
    with quick_compilation():
        yield


def test_a_task_and_an_optimizer_train(tmp_path: Path) -> None:
    config = shrink(quickstart.get_config(), tmp_path)
    config.stages = ("sft",)
    experiment = resolve(config, (*NAMES, *OPTIMIZER))
    setup = set_up(experiment, tmp_path / "run")
    assert setup.sources.task.answer(setup.sources.held_out[0]) == str(len(setup.sources.held_out[0]["prompt"]))
    (done,) = run_chain(experiment, tmp_path / "run", setup=setup)
    assert 0 <= done.metrics["eval/pass@1"] <= 1


def test_an_environment_and_a_tool_answer() -> None:
    game = find("environment", "my_game.py:Guess", "tools.environment").make({"highest": 4})
    assert game.reset({}, 7)[0].content == "Guess: 0 to 4"
    assert game.step(Completion("1", (), 9)).messages[0].content == "higher"
    won = game.step(Completion("2", (), 9))
    assert won.done and won.reward == 1.0
    tool = find("tool", "my_game.py:reverse", "tools.names").target()
    assert tool.run({"text": "abc"}) == "cba"


def test_the_guide_has_every_kind() -> None:
    assert sorted(FILES) == ["my_game.py", "my_optimizer.py", "my_task.py"]
    for kind in (
        "reward",
        "evaluator",
        "objective",
        "task",
        "transform",
        "environment",
        "tool",
        "optimizer",
        "schedule",
    ):
        assert re.search(rf"^\| .*\b{kind}\b.*\|", GUIDE, re.M), kind
