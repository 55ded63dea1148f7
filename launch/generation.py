"""What the commands that answer prompts share: flags of sampling and tools, reading lines, loading the policy."""

import dataclasses
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any

from absl import flags

from launch import common
from research.core.errors import ConfigError, DataError
from research.data.tokenizer import Tokenizer
from research.environments.interaction import Interaction
from research.sampling.limits import DRAFT_TOKENS, check_count
from research.sampling.streaming import GenerationSettings, TextGenerator
from research.train.setup import interaction_of
from research.train.stored import Policy, load_policy

_STAGE = flags.DEFINE_string("stage", None, "folder of a stage: <workdir>/stages/<name>-<hash>", required=True)
_TOKENS = flags.DEFINE_integer("max_new_tokens", 128, "longest completion, tokens")
_MIN_TOKENS = flags.DEFINE_integer(
    "min_new_tokens", 0, "tokens before an end token may be drawn; stop strings always end"
)
_TEMPERATURE = flags.DEFINE_float("temperature", 1.0, "0 is greedy")
_TOP_K = flags.DEFINE_integer("top_k", 0, "keep the k most likely tokens; 0 keeps all")
_TOP_P = flags.DEFINE_float("top_p", 1.0, "keep the smallest set of tokens of this mass; 1 keeps all")
_SEED = flags.DEFINE_integer("seed", 0, "of the sampler")
_BIAS = flags.DEFINE_multi_string(
    "logit_bias", [], 'TOKEN=NUMBER added to a logit, -inf bans; a token id, or a piece\'s text: "7"=-inf, if=2'
)
_PENALTY = flags.DEFINE_float("repetition_penalty", 1.0, "above 1 discourages tokens already seen; 1 is off")
_STOP = flags.DEFINE_multi_string("stop", [], "a text that ends a completion and is not shown; repeatable")
_TOOLS = flags.DEFINE_list(
    "tools",
    None,
    "tools that the model may call: calculator, python, search, or references; default: those of the stage's config; "
    "--tools= is none",
)
_CORPUS = flags.DEFINE_string("corpus", None, "JSONL or text file that the tool 'search' searches")
_TURNS = flags.DEFINE_integer("max_turns", 4, "turns with tool calls that are answered; then the row ends")
_RESULT = flags.DEFINE_integer("max_result_tokens", 256, "of one tool's result; the rest is cut")
_DRAFT = flags.DEFINE_string(
    "draft",
    None,
    f"speculative decoding: folder of a smaller model's stage, or {common.NGRAM} for n-grams of the text; the "
    "completions' distribution stays the model's, and they come whole",
)
_DRAFT_TOKENS = flags.DEFINE_integer("draft_tokens", 4, "proposals between two forward passes of the model")


def given(*names: str) -> list[str]:
    """Those of these flags that the command line sets, as --name."""
    return [f"--{name}" for name in names if flags.FLAGS[name].present]


def refuse(rules: Iterable[tuple[Any, str]]) -> None:
    """ConfigError with the sentence of the first rule that is true."""
    for wrong, sentence in rules:
        if wrong:
            raise ConfigError(sentence)


def read_settings(**others: Any) -> GenerationSettings:
    """The flags' settings but for the logit bias, which needs a vocabulary; checked before anything is loaded."""
    greedy, tools = _TEMPERATURE.value == 0, _TOOLS.value or ()
    controlled = given("tools", "logit_bias", "repetition_penalty", "min_new_tokens")
    idle = given("corpus", "max_turns", "max_result_tokens")
    refuse(
        (
            (_DRAFT.value and controlled, f"{''.join(controlled[:1])}: does not go with --draft"),
            (not _DRAFT.value and given("draft_tokens"), "--draft_tokens: has no effect without --draft"),
            (idle and _TOOLS.value == [], f"{''.join(idle[:1])}: has no effect without tools"),
            ("search" in tools and not _CORPUS.value, "--tools: search needs a corpus, expected --corpus=FILE"),
            (
                _CORPUS.value and tools and "search" not in tools,
                "--corpus: has no effect, expected search among --tools",
            ),
            (greedy and _TOP_K.value, "--top_k: has no effect at --temperature=0"),
            (greedy and _TOP_P.value < 1.0, "--top_p: has no effect at --temperature=0"),
            (
                _MIN_TOKENS.value >= _TOKENS.value > 0,
                f"--min_new_tokens: got {_MIN_TOKENS.value}, expected less than --max_new_tokens={_TOKENS.value}",
            ),
            ("" in _STOP.value, "--stop: got an empty text, expected at least one character"),
            (sys.__stdout__ is None, "standard output: is closed, expected a place for the completions"),
        )
    )
    if _DRAFT.value:
        check_count("draft_tokens", _DRAFT_TOKENS.value, 1, DRAFT_TOKENS)
    return GenerationSettings(
        max_new_tokens=_TOKENS.value,
        temperature=_TEMPERATURE.value,
        top_k=_TOP_K.value,
        top_p=_TOP_P.value,
        seed=_SEED.value,
        stops=tuple(_STOP.value),
        repetition_penalty=_PENALTY.value,
        min_new_tokens=_MIN_TOKENS.value,
        **others,
    )


def load() -> Policy:
    """The policy of --stage."""
    return load_policy(Path(_STAGE.value))


def load_tools(policy: Policy) -> Interaction | None:
    """The tools of the flags, or else those of the stage's config, which one line on standard error names."""
    section, changes = policy.experiment.tree["tools"], dict[str, Any]()
    if _TOOLS.value is not None:
        changes["names"] = tuple(_TOOLS.value)
    if _CORPUS.value:
        changes["search"] = {**section.get("search", {}), "corpus": _CORPUS.value}
    changes |= {name: flags.FLAGS[name].value for name in ("max_turns", "max_result_tokens")
                if _TOOLS.value is not None or flags.FLAGS[name].present}  # fmt: skip
    if "max_result_tokens" in changes:
        changes["max_result_tokens"] = min(changes["max_result_tokens"], _TOKENS.value)
    tools = interaction_of({**section, **changes}, policy.tokenizer)
    if tools is None:
        idle = given("corpus", "max_turns", "max_result_tokens")
        refuse([(idle, f"{''.join(idle[:1])}: has no effect without --tools")])
    elif _TOOLS.value is None:
        names = ", ".join(section["names"])
        print(f"tools of the stage's config: {names} (--tools= offers none)", file=sys.stderr)
    return tools


def make_generator(policy: Policy, settings: GenerationSettings) -> TextGenerator:
    """The policy with the flags' logit bias, tools and draft; must run inside `jax.set_mesh(policy.mesh)`."""
    # A constraint or a draft leaves no room for calls, and raw text none for turns.
    free = not (settings.raw or settings.constraint or _DRAFT.value)
    return TextGenerator(
        policy.params,
        policy.model,
        policy.tokenizer,
        max_length=policy.max_length,
        settings=dataclasses.replace(settings, logit_bias=logit_bias(policy.tokenizer)),
        interaction=load_tools(policy) if free else None,
        draft=common.load_draft(_DRAFT.value, policy, _DRAFT_TOKENS.value) if _DRAFT.value else None,
    )


def input_lines(prompt: str = "", *, interrupted: str = "") -> Iterator[str]:
    """Lines of standard input without their ends.

    Args:
      prompt: shown before each line on a terminal.
      interrupted: hint printed after Ctrl-C on a terminal, which then does not end the program; "" lets it.

    Raises:
      ConfigError: standard input is closed.
      DataError: a line is not UTF-8.
    """
    if sys.stdin is None or sys.stdin.closed:
        raise ConfigError("standard input: is closed, expected lines of text")
    terminal = sys.stdin.isatty()
    for number in count(1):
        try:
            if terminal:
                yield input(prompt)
                continue
            line = sys.stdin.buffer.readline()
            if not line:
                return
            text = line.decode()
        except EOFError:
            return
        except UnicodeDecodeError as error:
            raise DataError(
                f"standard input: line {number} is not UTF-8 text ({error.reason} at byte {error.start + 1})"
            ) from error
        except KeyboardInterrupt:
            if not (terminal and interrupted):
                raise
            print(f"\n{interrupted}", file=sys.stderr)
            continue
        yield text.rstrip("\r\n")


def logit_bias(tokenizer: Tokenizer) -> dict[int, float]:
    """Logit biases of --logit_bias=TOKEN=VALUE.

    TOKEN is an id, or else the text of a piece (markup by its name); in double quotes it is a text even where it is
    a number: `"7"=-inf`. All pieces that spell the text are meant: the byte <0x0A> spells a newline too.

    Raises:
      ConfigError: an entry of another form, an unknown piece, or a token named twice.
    """
    biases: dict[int, float] = {}
    for entry in _BIAS.value:
        name, _, number = entry.rpartition("=")
        try:
            value = float(number)
        except ValueError:
            value = math.nan
        if not name or math.isnan(value):
            raise ConfigError(f"--logit_bias: got {entry!r}, expected TOKEN=NUMBER, such as 17=-2.5")
        for token in _tokens_named(name, tokenizer):
            if token in biases:
                raise ConfigError(
                    f"--logit_bias: token {token} ({tokenizer.pieces[token]!r}) is named twice, expected once"
                )
            biases[token] = value
    return biases


def _tokens_named(name: str, tokenizer: Tokenizer) -> Sequence[int]:
    if name.isdecimal():
        return [int(name)]
    text = name[1:-1] if len(name) > 2 and name[0] == name[-1] == '"' else name
    found = [token for token, spelled in enumerate(tokenizer.markup_bytes) if spelled == text.encode()]
    if not found:
        raise ConfigError(
            f"--logit_bias: {text!r} is no piece of this vocabulary of {tokenizer.vocab_size}, expected one piece "
            "or a token id"
        )
    return found
