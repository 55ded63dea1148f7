"""Data that fit no stage, or not the evaluation, are found before anything is trained."""

import json
from pathlib import Path
from typing import Any

import pytest

from research.core.errors import DataError
from research.data.split import Split
from research.train.setup import set_up
from tests.research.train.chain import chain_config, changed


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"evaluation.max_prompt_length": 8},
            r"^evaluation: 8 of 8 records do not fit 8 tokens .*8 prompt too long.* max_prompt_length = 8",
        ),
        ({"rl.rollout.max_prompt_length": 8}, r"^rl: 48 of 48 records do not fit 8 tokens"),
        ({"sft.length": 12}, r"^sft: \d+ of \d+ records do not fit 12 tokens"),
        ({"sft.length": 12, "data.too_long": "error"}, r"^sft: record \d+: has \d+ tokens, expected at most length"),
    ],
)
def test_lengths_are_checked_before_the_first_step(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        set_up(changed(chain_config(tmp_path), changes), tmp_path)
    assert not (tmp_path / "stages").exists()


def test_one_long_prompt_of_a_later_stage_is_named_by_file_and_line(tmp_path: Path) -> None:
    records = [{"prompt": f"{n}+1", "completion": f"#### {n + 1}"} for n in range(60)]
    records[38]["prompt"] = next(p for k in range(1, 9) if not Split(5).holds_out(p := "1+" * 14 + str(k)))
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    changes = {
        "data.problems.task": "jsonl",
        "data.problems.jsonl.path": str(path),
        "sft.data.transform": "",
        "sft.length": 64,
    }
    assert set_up(changed(chain_config(tmp_path), changes), tmp_path).sources.task.answer(records[0]) == "#### 1"
    with pytest.raises(DataError, match=r"^rl: mine\.jsonl:39: the prompt has \d+ tokens, expected at"):
        set_up(changed(chain_config(tmp_path), {**changes, "data.too_long": "error"}), tmp_path)
