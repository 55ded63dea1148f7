"""`python -m launch.sample` on models whose next token depends on the last one alone, so that texts are known."""

import io
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver

from launch import common, sample
from research.core.errors import ConfigError, DataError, TemperError
from research.data.tokenizer import END_TOOL_CALL, IM_END, IM_SEP, TOOL_CALL, Tokenizer
from tests.launch.forks import Forks
from tests.launch.stages import one_device, small_tokenizer, table_of, write_stage
from tests.launch.test_launch import assert_one_sentence

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 5}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False},
}
Run = Callable[..., str]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return small_tokenizer(tmp_path_factory.mktemp("t"))


@pytest.fixture(scope="module", autouse=True)
def _one_device() -> Iterator[None]:
    with one_device():
        yield


@pytest.fixture(scope="module")
def stage(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Answers "abcd"; what follows "q" is a euro sign in three bytes."""
    chat = (IM_SEP, "a", "b", "c", "d", IM_END)
    euro = ("q", "<0xE2>", "<0x82>", "<0xAC>", "x", "y", "<eos>")
    folder = tmp_path_factory.mktemp("plain") / "stages" / "sft-0"
    return write_stage(folder, tokenizer, "sft", table_of(tokenizer, chat, euro))


@pytest.fixture(scope="module")
def noisy(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Says anything."""
    folder = tmp_path_factory.mktemp("noisy") / "stages" / "sft-0"
    return write_stage(folder, tokenizer, "sft", table_of(tokenizer))


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """What the command prints; its errors are raised."""

    def call(folder: Path, *arguments: str) -> str:
        capsys.readouterr()
        with flagsaver.flagsaver():
            flags.FLAGS(["sample", f"--stage={folder}", *arguments])
            sample.main()
        return capsys.readouterr().out

    return call


def test_stops_at_the_token_that_completes_a_stop_string(run: Run, stage: Path) -> None:
    ask = (stage, "--prompt=1", "--max_new_tokens=8")
    assert run(*ask) == "abcd\n"
    assert run(*ask, "--stop=bc") == "a\n"
    assert run(*ask, "--stop=xyz", "--stop=d", "--temperature=0") == "abc\n"
    assert run(*ask, "--stop=de") == "abcd\n"
    raw = (stage, "--raw", "--prompt=q", "--max_new_tokens=8")
    assert run(*raw) == "€xy\n"
    assert run(*raw, "--stop=€x") == "\n"


def test_what_may_begin_a_stop_string_is_not_streamed(run: Run, stage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pieces: list[str] = []
    in_order = sample.in_order

    def spy(*args: Any) -> Any:
        for piece in in_order(*args):
            pieces.append(piece.text)
            yield piece

    monkeypatch.setattr(sample, "in_order", spy)
    run(stage, "--prompt=1", "--max_new_tokens=8", "--stop=bd")
    assert pieces == ["a", "", "bc", "d", ""]


def test_controls(run: Run, stage: Path, tokenizer: Tokenizer) -> None:
    ask = (stage, "--prompt=1", "--max_new_tokens=3")
    assert run(*ask, "--logit_bias=c=-inf", f"--logit_bias={tokenizer.piece_id('!')}=200") == "!!!\n"
    assert run(*ask, '--logit_bias="7"=1000') == "777\n"
    assert len(run(stage, "--prompt=1", "--max_new_tokens=8", "--temperature=0")) == 5
    assert len(run(stage, "--prompt=1", "--max_new_tokens=8", "--min_new_tokens=7")) > 6
    biased = (*ask, "--logit_bias=a=300", "--logit_bias=b=200", "--temperature=0")
    assert run(*biased)[:2] == "aa"
    assert run(*biased, "--repetition_penalty=100")[:2] == "ab"


def test_standard_input_is_one_prompt_a_line(run: Run, stage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"q\nq\n")))
    assert run(stage, "--raw", "--max_new_tokens=8") == "€xy\n€xy\n"


STDIN = {
    "not UTF-8": (b"1\n\xff\n", DataError, "standard input: line 2 is not UTF-8 text .* at byte 1"),
    "half a character": (b"\xe2\x82", DataError, "standard input: line 1 is not UTF-8"),
    "empty": (b"", ConfigError, "standard input: holds no prompt, expected one a line, or --prompt"),
    "blank": (b"\n \n", ConfigError, "standard input: holds no prompt"),
    "closed": (None, ConfigError, "standard input: is closed, expected lines of text"),
}


@pytest.mark.parametrize("case", STDIN)
def test_standard_input_that_cannot_be_read(run: Run, stage: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    data, error, message = STDIN[case]
    stdin = None if data is None else io.TextIOWrapper(io.BytesIO(data))
    monkeypatch.setattr("sys.stdin", stdin)
    with pytest.raises(error, match=message):
        run(stage, "--max_new_tokens=8")


def test_blank_lines_are_counted(
    stage: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\n1\n\n")))
    with flagsaver.flagsaver():
        flags.FLAGS(["sample", f"--stage={stage}", "--max_new_tokens=8"])
        sample.main()
    assert capsys.readouterr() == ("abcd\n", "standard input: 2 blank lines were left out\n")


def test_output_is_escaped_where_its_encoding_lacks_it(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(raw, encoding="ascii"))
    monkeypatch.setattr("sys.stderr", None)
    common._open_streams()
    print("3 €", flush=True)
    print("unheard", file=sys.stderr, flush=True)
    assert raw.getvalue() == b"3 \\u20ac\n"


def test_closed_standard_output_is_one_sentence(run: Run, stage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.__stdout__", None)
    with pytest.raises(ConfigError, match="standard output: is closed"):
        run(stage, "--prompt=1")


def blocks(text: str) -> list[str]:
    return re.split(r"^--- .* ---\n", text, flags=re.MULTILINE)[1:]


def test_samples_do_not_depend_on_how_many_are_drawn_together(run: Run, noisy: Path) -> None:
    ask = (noisy, "--prompt=1", "--max_new_tokens=6", "--seed=3")
    text = run(*ask, "--n=4")
    assert re.findall("^--- .*$", text, re.MULTILINE) == [f"--- sample {i} of 4 ---" for i in range(1, 5)]
    assert len(set(blocks(text))) == 4
    assert run(*ask, "--n=4", "--slots=2") == text
    assert run(*ask) == blocks(text)[0]


@pytest.mark.parametrize("kind", ["reward", "prm"])
def test_best_of(run: Run, noisy: Path, tokenizer: Tokenizer, tmp_path: Path, kind: str) -> None:
    """One token each: the score is that of the token, and the draws are those of --n."""
    table = np.zeros((tokenizer.vocab_size,) * 2, np.float32)
    table[:, 0] = np.linspace(-1, 1, tokenizer.vocab_size)
    scorer = write_stage(tmp_path / "stages" / f"{kind}-0", tokenizer, kind, table)
    ask = (noisy, "--prompt=1", "--max_new_tokens=1", "--seed=1", "--logit_bias=\n=-inf")
    drawn = run(*ask, "--n=6", "--echo")
    tokens = [int(re.findall(r"^ +(\d+) ", block, re.MULTILINE)[0]) for block in blocks(drawn)]
    text = run(*ask, "--best_of=6", "--n=2", f"--scorer={scorer}", "--echo")
    shown = re.findall(r"^--- (\d) of 6: (\S+) (\S+) \(sample (\d)\) ---$", text, re.MULTILINE)
    assert [place for place, *_ in shown] == ["1", "2"]
    assert {name for _, name, *_ in shown} == {"reward" if kind == "reward" else "prm-min"}
    if kind == "reward":
        order = sorted(range(6), key=lambda i: -tokens[i])
        assert [int(number) - 1 for *_, number in shown] == order[:2]
        assert float(shown[0][2]) > float(shown[1][2])


def test_echo_shows_the_log_probs_of_the_table(run: Run, noisy: Path, tokenizer: Tokenizer) -> None:
    prompt = "fox 3"
    text = run(noisy, "--raw", f"--prompt={prompt}", "--max_new_tokens=3", "--top_k=5", "--echo")
    lines = re.findall(r"^ *(\d+) (.+?) +(-|-?\d+\.\d+)$", text, re.MULTILINE)
    tokens = [tokenizer.bos_id, *tokenizer.encode(prompt)]
    assert [int(token) for token, *_ in lines[: len(tokens)]] == tokens
    assert lines[0] == (str(tokenizer.bos_id), "'<bos>'", "-")
    tokens += [int(token) for token, *_ in lines[len(tokens) :]]
    assert len(tokens) == len(lines) == len(tokenizer.encode(prompt)) + 4
    V = tokenizer.vocab_size
    logits = table_of(tokenizer) / np.sqrt(V) / np.sqrt(1 / V + 1e-5)  # a one-hot row behind the norm
    logps = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    found = [float(logp) for *_, logp in lines[1:]]
    np.testing.assert_allclose(found, [logps[a, b] for a, b in zip(tokens, tokens[1:], strict=False)], atol=2e-4)


def test_constraints(run: Run, noisy: Path, tmp_path: Path) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    pytest.importorskip("llguidance")
    (tmp_path / "person.json").write_text(json.dumps(PERSON), encoding="utf-8")
    ask = (noisy, "--prompt=1", "--max_new_tokens=60")
    found = blocks(run(*ask, f"--json_schema={tmp_path / 'person.json'}", "--n=3"))
    for text in found:
        jsonschema.validate(json.loads(text), PERSON)
    assert len(found) == 3 and len(set(found)) > 1
    assert re.fullmatch("[0-9]{3}-x\n", run(*ask, "--regex=[0-9]{3}-x"))
    assert run(*ask, "--choice=yes", "--choice=no, never") in ("yes\n", "no, never\n")
    with pytest.raises(ConfigError, match="constraint: regex .* is not valid"):
        run(*ask, "--regex=(")


def test_a_model_calls_a_tool_reads_the_result_and_goes_on(run: Run, tokenizer: Tokenizer, tmp_path: Path) -> None:
    pytest.importorskip("jsonschema")
    table = table_of(tokenizer, (IM_SEP, TOOL_CALL, "1", END_TOOL_CALL, IM_END))
    folder = write_stage(tmp_path / "stages" / "sft-0", tokenizer, "sft", table)
    arguments = ("--prompt=7*6", "--tools=calculator", "--max_new_tokens=200", "--temperature=0")
    text = run(folder, *arguments, "--max_turns=2")
    turn = "<tool_call>1</tool_call><|im_end|>\n"
    result = "<|im_start|>tool<|im_sep|><tool_result>error: the call is 1"
    lines = text.splitlines(keepends=True)
    assert lines[0] == turn and lines[1].startswith(result.replace("1", "")), text
    assert text.count(turn) == 3 and text.count("<tool_result>") == 2, "the third call is one too many"
    echoed = run(folder, *arguments, "--max_turns=1", "--echo")
    given = [line for line in echoed.splitlines() if re.search(r"'<tool_result>' +-$", line)]
    assert len(given) == 1, "a given token has no log-prob"
    with pytest.raises(ConfigError, match=r"--prompt: has \d+ tokens with the description of the tools"):
        run(folder, "--prompt=1", "--tools=calculator", "--max_new_tokens=1000")


def test_a_draft_changes_nothing_but_the_way(
    run: Run, stage: Path, noisy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One that is never right, one that always is, and a look-up; stop strings cut what came too far."""
    ask = ("--prompt=1", "--max_new_tokens=8")
    assert run(stage, *ask, f"--draft={noisy}") == "abcd\n"
    assert run(stage, *ask, "--draft=ngram", "--stop=bc") == "a\n"
    folder = (stage, *ask, f"--draft={stage}", "--draft_tokens=2")
    with flagsaver.flagsaver():
        flags.FLAGS(["sample", f"--stage={stage}", *folder[1:], "--n=2"])
        sample.main()
    out, error = capsys.readouterr()
    assert blocks(out) == ["abcd\n", "abcd\n"]
    # Five tokens: three from the first forward pass, two from the second.
    assert error == "100% of the proposals accepted, 2.50 tokens a forward pass of the model\n"
    echoed = run(stage, *ask, "--echo", "--draft=ngram")
    assert echoed[echoed.index("abcd") :] == (plain := run(stage, *ask, "--echo"))[plain.index("abcd") :]


def test_a_draft_with_another_tokenizer_is_refused(run: Run, stage: Path, tmp_path: Path) -> None:
    other = small_tokenizer(tmp_path, 330)
    folder = write_stage(tmp_path / "stages" / "sft-0", other, "sft", table_of(other))
    with pytest.raises(ConfigError, match="--draft: .*: has another tokenizer, expected the policy's"):
        run(stage, "--prompt=1", f"--draft={folder}")


NUMBERS = {
    "--temperature": ("nan", "inf", "1e-40", "1e38", "-1"),
    "--top_p": ("nan", "0", "1.1", "-inf"),
    "--repetition_penalty": ("nan", "inf", "1e39", "0", "-2"),
    "--logit_bias=7": ("1e39", "inf", "nan"),
    "--top_k": ("-1", "9" * 30),
    "--seed": ("-1", str(2**31)),
    "--max_new_tokens": ("0", "-5", str(2**40)),
    "--min_new_tokens": ("-1",),
    "--n": ("0", "9" * 9),
    "--slots": ("-1",),
    "--best_of": ("-1", "9" * 9),
    "--max_turns": ("0", "-1"),
    "--max_result_tokens": ("0",),
    "--draft_tokens": ("0", "10000", "-1"),
}


@pytest.mark.parametrize(("flag", "number"), [(flag, number) for flag, values in NUMBERS.items() for number in values])
def test_numbers_out_of_range_are_one_sentence(
    run: Run, stage: Path, monkeypatch: pytest.MonkeyPatch, flag: str, number: str
) -> None:
    """Each names its key, what it got and what it expected, and nothing was drawn."""
    monkeypatch.setattr("research.sampling.engine.Engine.chunks", lambda *_: pytest.fail("drawn"))
    more = {"--draft_tokens": ["--draft=ngram"], "--max_turns": ["--tools=calculator"]}
    more |= {"--max_result_tokens": ["--tools=calculator"], "--best_of": ["--scorer=x"]}
    with pytest.raises((TemperError, flags.IllegalFlagValueError)) as caught:
        run(stage, "--prompt=1", f"{flag}={number}", *more.get(flag, []))
    assert flag.strip("-=7") in str(caught.value) and "\n" not in str(caught.value).replace("\n(", "")


MISTAKES = {
    "controlled draft": (("--draft=ngram", "--logit_bias=1=2"), "--logit_bias: does not go with --draft"),
    "no draft": (("--draft_tokens=2",), "--draft_tokens: has no effect without --draft"),
    "two constraints": (("--regex=a", "--choice=b"), "--choice: got --regex too"),
    "stop in a constraint": (("--regex=a", "--stop=b"), "--stop: would end a completion before .* --regex"),
    "tools in a constraint": (("--regex=a", "--tools=calculator"), "--tools: --regex leaves no room"),
    "raw tools": (("--raw", "--tools=calculator"), "--tools: calls need chat turns"),
    "no tools": (("--tools=", "--max_turns=2"), "--max_turns: has no effect without tools"),
    "no corpus": (("--tools=search",), "--tools: search needs a corpus"),
    "corpus": (("--tools=calculator", "--corpus=x"), "--corpus: has no effect, expected search"),
    "no scorer": (("--best_of=2",), "--best_of: needs a scorer"),
    "no best_of": (("--scorer=x",), "--scorer: has no effect without --best_of"),
    "raw scorer": (("--raw", "--best_of=2", "--scorer=x"), "--scorer: was trained on chat turns"),
    "prm_score": (("--prm_score=prod",), "--prm_score: has no effect without --scorer"),
    "n of best_of": (("--best_of=2", "--scorer=x", "--n=3"), "--n: got 3, expected at most --best_of=2"),
    "greedy n": (("--temperature=0", "--n=2"), "--n: got 2, expected 1 at --temperature=0"),
    "greedy best_of": (("--temperature=0", "--best_of=2", "--scorer=x"), "--best_of: got 2, expected 1 at"),
    "greedy top_k": (("--temperature=0", "--top_k=2"), "--top_k: has no effect at --temperature=0"),
    "greedy top_p": (("--temperature=0", "--top_p=0.5"), "--top_p: has no effect at --temperature=0"),
    "slots": (("--slots=2",), "--slots: got 2, expected at most the 1 samples"),
    "min_new_tokens": (("--min_new_tokens=8", "--max_new_tokens=8"), "--min_new_tokens: got 8, expected less"),
    "empty stop": (("--stop=",), "--stop: got an empty text"),
    "penalty": (("--repetition_penalty=0",), "repetition_penalty: got 0, expected a number from 0.01 to 100"),
    "no prompt": (("--prompt=",), "--prompt: got an empty text"),
    "schema file": (("--json_schema=none.json",), r"--json_schema: none\.json: cannot be read"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_does_not_fit_together_is_one_sentence(run: Run, mistake: str) -> None:
    arguments, message = MISTAKES[mistake]
    with pytest.raises(ConfigError, match=f"^{message}"):
        run(Path("nothing"), "--prompt=1", *arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--logit_bias=a",), "--logit_bias: got 'a', expected TOKEN=NUMBER"),
        (("--logit_bias=a=b",), "--logit_bias: got 'a=b', expected TOKEN=NUMBER"),
        (("--logit_bias=abcab=1",), "--logit_bias: 'abcab' is no piece of this vocabulary of 340"),
        (("--logit_bias=a=1", "--logit_bias=a=2"), r"--logit_bias: token .* is named twice"),
        (("--logit_bias=999=1",), "logit_bias: got token 999, expected 0 to 339"),
        (("--max_turns=2",), "--max_turns: has no effect without --tools"),
        (("--max_new_tokens=5000",), "max_new_tokens: got 5000, expected at most 1023 because the context is 1024"),
        (("--max_new_tokens=1022",), "--prompt: has .* expected at most 2 because the context is 1024"),
        (("--tools=hammer",), r"tools\.names: got 'hammer', expected one of"),
    ],
)
def test_mistakes_that_only_the_stage_shows(run: Run, stage: Path, arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(TemperError, match=message):
        run(stage, "--prompt=1", *arguments)


def test_a_missing_extra_is_named(run: Run, stage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance.numpy", None)
    with pytest.raises(ConfigError, match=r"llguidance: pip install 'temper\[constrained\]'"):
        run(stage, "--prompt=1", "--choice=a")


def test_as_a_command(stage: Path) -> None:
    with Forks() as forks:
        outcome = forks.run("sample", f"--stage={stage}", "--prompt=1", "--max_new_tokens=8", "--stop=c")
        assert (outcome.status, outcome.stdout) == (0, "ab\n"), outcome.stderr
        assert_one_sentence(forks.run("sample", f"--stage={stage}", "--n=0"), r"--n=0.*--help")
        assert_one_sentence(forks.run("sample", "--stage=x", "--prompt=\udcff"), "is not valid UTF-8")
        outcome = forks.run("evaluate", "--stage=x", "--temperature=1e39")
        assert_one_sentence(outcome, "temperature: got 1e.39, expected 0 .greedy. or a number")
        lengths = ("--max_prompt_length=1000", "--max_new_tokens=100", "--k=1")
        outcome = forks.run("evaluate", f"--stage={stage}", *lengths)
        assert_one_sentence(outcome, "expected a sum of at most 1024, the model.s context")
        shown = forks.run("sample", "--help").stdout
    for flag in ("--stop=", "--best_of=", "--json_schema=", "--tools=", "--echo"):
        assert re.search(rf"^  python -m launch\.sample .*{flag}", shown, re.MULTILINE)
