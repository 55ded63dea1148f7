"""The data section of a config as its sections spell it today, as `Sources`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from research.config.sections import Data, Judged, Rankings, Text, TokenizerSection
from research.tasks.arithmetic.task import Arithmetic
from research.tasks.base import Task
from research.tasks.jsonl import Jsonl
from research.tasks.sources import Sources

_GENERATOR = ("train", "test", "seed", "operations", "min_steps", "max_steps", "max_operand", "max_value")


def sources_of_tree(tree: Mapping[str, Any], data_dir: Path) -> Sources:
    """Opens the data that a config names."""
    problems, text, rankings = tree["problems"], tree["text"], tree["rankings"]
    task: Task = Jsonl(path=problems["path"], answer_format="mark")
    if problems["kind"] == "arithmetic":
        task = Arithmetic(**{key: problems[key] for key in _GENERATOR})
    section = Data(
        validation_one_in=text["validation_one_in"],
        too_long="drop",
        max_dropped=1.0,
        text=Text(text["path"], text["max_bytes"]),
        preferences=_judged(tree["preferences"]),
        rankings=Rankings(**vars(_judged(rankings)), candidates=rankings["candidates"]),
        steps=_judged(tree["steps"]),
        tokenizer=TokenizerSection(**tree["tokenizer"]),
    )
    return Sources(task, section, data_dir, problems["verifier"])


def _judged(section: Mapping[str, Any]) -> Judged:
    path = section["path"] if section["kind"] == "jsonl" else ""
    return Judged(path, section["train"], section["validation"])
