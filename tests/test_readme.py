"""What the README tells a user to bring, brought: its files and its command, at toy size."""

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from experiments import quickstart
from research.config.resolve import resolve
from research.train.chain import Finished, run_chain
from tests.experiments.toy import shrink
from tests.research.algorithms.toy import quick_compilation

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text("utf-8")
FILES = dict(re.findall(r"^`(my_\w+\.py)`\n```python\n(.*?)^```", README, re.M | re.S))


@pytest.fixture(autouse=True)
def _quick() -> Iterator[None]:
    with quick_compilation():
        yield


def overrides() -> list[str]:
    """Of the command that names the user's files."""
    (command,) = (block for block in re.findall(r"^```bash\n(.*?)^```", README, re.M | re.S) if "my_reward.py" in block)
    words = shlex.split(command.replace("\\\n", " "))
    return [word.removeprefix("--config.") for word in words if word.startswith("--config.")]


def train(folder: Path) -> list[Finished]:
    (folder / "toy").mkdir(exist_ok=True)
    config = shrink(quickstart.get_config(), folder / "toy")
    config.stages = ("sft", "rl")
    experiment = resolve(config, overrides())
    return run_chain(experiment, folder / "run")


def test_a_reward_and_an_evaluator_in_files_of_a_users_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Run as the README says; then the reward function is edited, and what learned from it runs again."""
    assert sorted(FILES) == ["my_evaluator.py", "my_reward.py"] and sum(t.count("\n") for t in FILES.values()) <= 20
    monkeypatch.chdir(tmp_path)
    for name, text in FILES.items():
        Path(name).write_text(text, encoding="utf-8")
    rows: list[dict[str, Any]] = [
        {"prompt": f"{i}+1", "completion": f"#### {i + 1}", "level": ("easy", "hard", "unknown")[i % 3]}
        for i in range(80)
    ]
    Path("problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    sft, rl = train(tmp_path)
    assert 0 <= rl.metrics["eval/short"] <= 1 and "eval/pass@1" in rl.metrics
    logged = [json.loads(line) for line in (rl.folder.path / "metrics.jsonl").read_text("utf-8").splitlines()]
    row = next(row for row in logged if "reward/mean" in row)
    assert 0 < row["reward/right_and_short/unknown"] < 1
    assert {"reward/right_and_short/mean", "reward/right_and_short/right"} <= row.keys()

    capsys.readouterr()
    Path("my_reward.py").write_text("# A comment changes nothing.\n" + FILES["my_reward.py"], encoding="utf-8")
    again = train(tmp_path)
    assert [done.reused for done in again] == [True, True]
    Path("my_reward.py").write_text(FILES["my_reward.py"].replace("0.5", "0.25"), encoding="utf-8")
    capsys.readouterr()
    edited = train(tmp_path)
    printed = capsys.readouterr().out
    assert f"sft: finished, read from {sft.folder.path}" in printed
    assert re.search(
        rf"rl: runs again: differs from {rl.folder.path.name} in stage\.reward\.functions\S*source", printed
    )
    assert [done.reused for done in edited] == [True, False]
    assert edited[1].folder.path != rl.folder.path and edited[0].folder.path == sft.folder.path
