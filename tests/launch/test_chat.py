"""`python -m launch.chat` on models whose next token depends on the last one alone, so that answers are known."""

import io
import json
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver

from launch import chat
from research.core.errors import ConfigError, DataError
from research.data.chat import Message, normalize_record
from research.data.tokenizer import END_TOOL_CALL, IM_END, IM_SEP, TOOL_CALL, Tokenizer
from research.sampling.streaming import TextGenerator
from tests.launch.forks import Forks
from tests.launch.stages import one_device, small_tokenizer, table_of, write_stage

Talk = Callable[..., tuple[str, str]]
TURN = "<|im_start|>user<|im_sep|>{}<|im_end|><|im_start|>assistant<|im_sep|>"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return small_tokenizer(tmp_path_factory.mktemp("t"))


@pytest.fixture(scope="module", autouse=True)
def _one_device() -> Iterator[None]:
    with one_device():
        yield


@pytest.fixture(scope="module")
def stage(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Answers "abcd"; its context is 1,024 tokens."""
    folder = tmp_path_factory.mktemp("plain") / "stages" / "sft-0"
    return write_stage(folder, tokenizer, "sft", table_of(tokenizer, (IM_SEP, "a", "b", "c", "d", IM_END)))


@pytest.fixture
def prompts(monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer) -> list[str]:
    """The prompts of all answers, with their markup."""
    found: list[str] = []
    stream = TextGenerator.stream

    def spy(self: TextGenerator, prompt: np.ndarray, prompt_id: int) -> Any:
        found.append(tokenizer.decode(prompt.tolist(), show_markup=True))
        return stream(self, prompt, prompt_id)

    monkeypatch.setattr(TextGenerator, "stream", spy)
    return found


@pytest.fixture
def talk(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Talk:
    """What the command prints and says, given its standard input."""

    def call(folder: Path, stdin: str | bytes | None, *arguments: str) -> tuple[str, str]:
        data = stdin.encode() if isinstance(stdin, str) else stdin
        monkeypatch.setattr("sys.stdin", None if data is None else io.TextIOWrapper(io.BytesIO(data)))
        capsys.readouterr()
        with flagsaver.flagsaver():
            flags.FLAGS(["chat", f"--stage={folder}", "--max_new_tokens=8", *arguments])
            chat.main()
        return capsys.readouterr()

    return call


def test_many_turns_are_remembered_until_a_reset(talk: Talk, stage: Path, prompts: list[str], tmp_path: Path) -> None:
    file = tmp_path / "talk.jsonl"
    out, err = talk(stage, "1\n\n2\n/reset\n3\n/quit\nnever\n", "--system=Be brief.", f"--transcript={file}")
    assert out == "abcd\n" * 3 and err == ""
    system = "<bos><|im_start|>system<|im_sep|>Be brief.<|im_end|>"
    first = system + TURN.format(1)
    assert prompts == [first, first + "abcd<|im_end|>" + TURN.format(2), system + TURN.format(3)]
    records = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    assert [len(record["messages"]) for record in records] == [5, 3]
    assert normalize_record(records[1], where="r") == (
        Message("system", "Be brief."),
        Message("user", "3"),
        Message("assistant", "abcd"),
    )
    talk(stage, "4", f"--transcript={file}")
    lines = file.read_text("utf-8").splitlines()
    assert [json.loads(line) for line in lines[:2]] == records and len(lines) == 3


def test_a_full_context_drops_the_oldest_turns_and_says_so(
    talk: Talk, stage: Path, prompts: list[str], tokenizer: Tokenizer
) -> None:
    """Room for 74 tokens of prompt: the third message has no room for the first exchange."""
    asked = [f"The quick brown fox {i}" for i in range(3)]
    out, err = talk(stage, "\n".join([*asked, "9" * 80, "/what"]), "--max_new_tokens=950")
    assert out == "abcd\n" * 3
    assert all(
        len(tokenizer.encode(prompt)) > 0 and prompt.endswith(TURN.format(text))
        for prompt, text in zip(prompts, asked, strict=True)
    )
    assert asked[0] in prompts[1] and asked[0] not in prompts[2] and asked[1] in prompts[2]
    lines = err.splitlines()
    assert lines[0] == "(context full: the 1 oldest of 2 exchanges are left out)"
    assert lines[1].startswith("(not sent: message: has ") and "expected at most 74" in lines[1]
    assert lines[2] == "(/what: is no command, expected /reset or /quit)"


def test_ctrl_c_ends_the_answer_and_not_the_program(
    talk: Talk, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = table_of(tokenizer, (IM_SEP, "a", "b", "a"))  # never ends
    folder = write_stage(tmp_path / "stages" / "sft-0", tokenizer, "sft", table)
    write, presses = sys.stdout.write, iter([2])

    def pressed(text: str) -> int:
        if text == "b" and next(presses, 0):
            signal.raise_signal(signal.SIGINT)
        return write(text)

    monkeypatch.setattr(sys.stdout, "write", pressed)
    out, err = talk(folder, "1\n2\n")
    assert out == "ab\nabababab\n"
    assert err == "(interrupted)\n(cut at --max_new_tokens=8)\n"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_tools_of_the_stages_config_are_offered(
    talk: Talk, tokenizer: Tokenizer, tmp_path: Path, prompts: list[str]
) -> None:
    pytest.importorskip("jsonschema")
    table = table_of(tokenizer, (IM_SEP, TOOL_CALL, "1", END_TOOL_CALL, IM_END))
    folder = write_stage(tmp_path / "stages" / "sft-0", tokenizer, "sft", table, tools=("calculator",))
    file = tmp_path / "talk.jsonl"
    more = ("--max_new_tokens=200", "--temperature=0")
    out, err = talk(folder, "7*6", *more, "--max_turns=1", "--system=Hi.", f"--transcript={file}")
    assert err == "tools of the stage's config: calculator (--tools= offers none)\n"
    assert prompts[0].startswith("<bos><|im_start|>system<|im_sep|>Hi.\n\nYou may call these tools:")
    assert out.count("<tool_call>1</tool_call>") == 2 and out.count("<tool_result>error: ") == 1
    (record,) = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    turns = normalize_record(record, where="r")
    assert [turn.role for turn in turns] == ["system", "user", "assistant", "tool", "assistant"]
    assert turns[2].tool_calls == ("1",) and turns[3].content.startswith("error: ")
    talk(folder, "7*6", *more, "--tools=")
    assert prompts[1] == "<bos>" + TURN.format("7*6")


@pytest.mark.parametrize(
    ("stdin", "error", "message"),
    [
        (b"1\n\xff\n", DataError, "standard input: line 2 is not UTF-8 text"),
        (None, ConfigError, "standard input: is closed"),
    ],
)
def test_standard_input_that_cannot_be_read(
    talk: Talk, stage: Path, stdin: bytes | None, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        talk(stage, stdin)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--max_new_tokens=1020",), "message: has .* tokens, expected at most 4 because the context is 1024"),
        (("--max_new_tokens=1024",), "max_new_tokens: got 1024, expected at most 1023"),
        (("--temperature=nan",), "temperature: got nan"),
        (("--transcript=none/talk.jsonl",), "--transcript: none/talk.jsonl: its folder does not exist"),
        (("--transcript=.",), r"--transcript: \.: cannot be read \(Is a directory\)"),
    ],
)
def test_mistakes(talk: Talk, stage: Path, arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        talk(stage, "1", *arguments)


def test_as_a_command(stage: Path) -> None:
    with Forks() as forks:
        outcome = forks.run("chat", f"--stage={stage}", "--max_new_tokens=8", stdin="1\n2\n")
        assert (outcome.status, outcome.stdout) == (0, "abcd\nabcd\n"), outcome.stderr
        shown = forks.run("chat", "--help").stdout
    assert "  python -m launch.chat --stage=" in shown
    for flag in ("--system", "--transcript", "--temperature", "--tools", "--draft"):
        assert flag in shown
