"""Two vocabularies (BPE with bytes; bare characters), and tools that need no machine."""

import json

import pytest

from research.data.tokenizer import Tokenizer, train_tokenizer
from research.environments.base import Tool, ToolError
from research.environments.calls import Call
from tests.research.data.conftest import PROSE


def call_text(call: Call) -> str:
    """A call as `chat.py` writes those of a record."""
    return json.dumps({"name": call.name, "arguments": dict(call.arguments)}, ensure_ascii=False, sort_keys=True)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "small.model"
    return train_tokenizer([PROSE * 3], vocab_size=400, path=path)


@pytest.fixture(scope="session")
def characters(tmp_path_factory) -> Tokenizer:
    """No bytes: what is not in its corpus cannot be spelled."""
    corpus = 'abcdefghijklmnopqrstuvwxyz {}":,.+*()[]\n'
    path = tmp_path_factory.mktemp("tokenizer") / "characters.model"
    return train_tokenizer([corpus], vocab_size=None, path=path, model_type="char", byte_fallback=False)


@pytest.fixture
def echo() -> Tool:
    """Says a word as often as it is told to; refuses the word "no", breaks at the word "bug"."""

    def run(arguments) -> str:
        if arguments["word"] == "no":
            raise ToolError("not that word")
        if arguments["word"] == "bug":
            raise KeyError("oh")
        return " ".join([arguments["word"]] * arguments.get("times", 1))

    return Tool(
        name="echo",
        description="Says a word.",
        parameters={
            "type": "object",
            "properties": {"word": {"type": "string"}, "times": {"type": "integer", "minimum": 0}},
            "required": ["word"],
            "additionalProperties": False,
        },
        run=run,
    )
