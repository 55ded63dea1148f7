"""Tools and environments as a config names them: short names, references, versions, prompts."""

import json
import sys

import pytest

from research.core.errors import ConfigError
from research.data.tokenizer import train_tokenizer
from research.environments.base import Completion
from research.environments.calls import Call
from research.environments.interaction import make_interaction
from research.environments.toolbox import Toolbox
from tests.research.environments.conftest import call_text

SIZES = {"max_turns": 2, "max_result_tokens": 60}

OWN = '''
from dataclasses import dataclass
from research.config.schema import key
from research.data.chat import Message
from research.environments.base import Tool, Turn

def shout() -> Tool:
    return Tool("shout", "Says it loudly.", {"type": "object"}, lambda arguments: arguments["word"].upper())

def nothing():
    return 3

@dataclass
class Count:
    """Asks for the numbers one after the other."""
    up_to: int = key(2, "Last number.")

    def reset(self, record, seed):
        self.next = record["first"]
        return [Message("user", f"from {self.next}")]

    def step(self, completion):
        self.next += 1
        return Turn(done=True) if self.next > self.up_to else Turn([Message("user", "next")])
'''


@pytest.fixture
def own(tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    return f"{tmp_path}/own.py"


def answer(interaction, tokenizer, name, **arguments):
    """What the tool answers."""
    call = call_text(Call(name, arguments))
    tokens = [tokenizer.piece_id("<tool_call>"), *tokenizer.encode(call), tokenizer.piece_id("</tool_call>")]
    turn = interaction.make().step(Completion("", tuple(tokens), 500))
    return [message.content for message in turn.messages]


def test_tools_by_name_and_by_reference_take_their_options(tmp_path, own, tokenizer):
    pytest.importorskip("bm25s")
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("The sea is deep.\n\nThe fox is quick.")
    options = {"search": {"corpus": str(corpus), "results": 1}, "python": {"isolation": "best_effort"}}
    names = ("calculator", "python", "search", f"{own}:shout")
    found = make_interaction(names, options, tokenizer, **SIZES)
    assert answer(found, tokenizer, "calculator", expression="6*7") == ["42"]
    assert answer(found, tokenizer, "python", code="print(6*7)") == ["42\n"]
    assert answer(found, tokenizer, "search", query="fox") == ["[2]\nThe fox is quick."]
    assert answer(found, tokenizer, "shout", word="fox") == ["FOX"]


def test_the_version_is_of_sources_options_and_the_corpus_content_not_of_its_place(tmp_path, own, tokenizer):
    pytest.importorskip("bm25s")

    def version(name, text, **options):
        path = tmp_path / name
        path.write_text(text)
        options = {"search": {"corpus": str(path), **options}}
        found = make_interaction(("search",), options, tokenizer, **SIZES)
        return json.loads(json.dumps(found.version))

    first = version("a.txt", "one two")
    assert first == version("b.txt", "one two") != version("a.txt", "one three")
    assert first != version("a.txt", "one two", results=2)

    def source():
        return make_interaction((f"{own}:shout",), {}, tokenizer, **SIZES).version

    before = source()
    with open(own, "a") as file:
        file.write("\n# a remark\n")
    assert source() == before
    with open(own, "a") as file:
        file.write("\nMORE = 1\n")
    assert source() != before


def test_an_environment_by_reference_has_an_instance_for_each_episode(own, tokenizer):
    found = make_interaction((), {"Count": {"up_to": 3}}, tokenizer, environment=f"{own}:Count", **SIZES)
    records = found.prompts([{"first": 2, "prompt": "?", "answer": "x"}])
    assert [(m["role"], m["content"]) for m in records[0]["prompt"]] == [("user", "from 2")]
    assert records[0]["first"] == 2 and records[0]["answer"] == "x"
    one, other = (found.begin({"first": first})[0] for first in (2, 3))
    assert not one.step(Completion("2", (), 9)).done and other.step(Completion("3", (), 9)).done
    assert one.step(Completion("3", (), 9)).done
    assert found.turns(50).max_turns == 2


def test_refusals(own, tokenizer, tmp_path):
    assert make_interaction((), {}, tokenizer, **SIZES) is None
    with pytest.raises(ConfigError, match=r"tools\.names: got 'eval', expected one of calculator, python, search"):
        make_interaction(("eval",), {}, tokenizer, **SIZES)
    with pytest.raises(ConfigError, match=r"tools\.search\.corpus: got ''"):
        make_interaction(("search",), {}, tokenizer, **SIZES)
    with pytest.raises(ConfigError, match=r"own\.py:nothing gives int, expected a Tool"):
        make_interaction((f"{own}:nothing",), {}, tokenizer, **SIZES)
    with pytest.raises(ConfigError, match=r"and the tools calculator, expected one of them"):
        make_interaction(("calculator",), {}, tokenizer, environment=f"{own}:Count", **SIZES)
    letters = train_tokenizer(
        ['{"name": "calculator", "arguments": {}} :[]._"'], vocab_size=None, path=tmp_path / "few.model",
        model_type="char", byte_fallback=False,
    )  # fmt: skip
    with pytest.raises(ConfigError, match="the vocabulary cannot spell their descriptions"):
        make_interaction(("calculator",), {}, letters, **SIZES)


def test_a_missing_package_names_the_extra(monkeypatch, echo, tokenizer):
    monkeypatch.setitem(sys.modules, "jsonschema", None)
    with pytest.raises(ConfigError, match=r"jsonschema is missing; pip install 'temper\[tools\]'"):
        Toolbox([echo], tokenizer, max_result_tokens=60)
