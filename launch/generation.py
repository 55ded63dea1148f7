"""What the commands that answer prompts share: flags of sampling and tools, reading lines, loading the policy."""

import dataclasses
import math
import sys
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any

from absl import flags

from launch import common
from launch.common import given, refuse
from research.config.schema import expect
from research.core.errors import ConfigError, DataError
from research.data.tokenizer import Tokenizer
from research.environments.interaction import Interaction
from research.sampling.limits import DRAFT_TOKENS, check_count
from research.sampling.streaming import GenerationSettings, TextGenerator
from research.train.setup import interaction_of
from research.train.stored import Policy, load_policy

FLAGS = flags.FLAGS
flags.DEFINE_string("stage", None, "folder of a stage: <workdir>/stages/<name>-<hash>", required=True)
flags.DEFINE_integer("max_new_tokens", 128, "longest completion, tokens")
flags.DEFINE_integer("min_new_tokens", 0, "tokens before an end token may be drawn; stop strings always end")
flags.DEFINE_float("temperature", 1.0, "0 is greedy")
flags.DEFINE_integer("top_k", 0, "keep the k most likely tokens; 0 keeps all")
flags.DEFINE_float("top_p", 1.0, "keep the smallest set of tokens of this mass; 1 keeps all")
flags.DEFINE_integer("seed", 0, "of the sampler")
flags.DEFINE_multi_string(
    "logit_bias", [], 'TOKEN=NUMBER added to a logit, -inf bans; a token id, or a piece\'s text: "7"=-inf, if=2'
)
flags.DEFINE_float("repetition_penalty", 1.0, "above 1 discourages tokens already seen; 1 is off")
flags.DEFINE_multi_string("stop", [], "a text that ends a completion and is not shown; repeatable")
flags.DEFINE_list("tools", None, "calculator, python, search, references; default: the stage's; --tools= is none")
flags.DEFINE_string("corpus", None, "JSONL or text file that the tool 'search' searches")
flags.DEFINE_integer("max_turns", 4, "turns with tool calls that are answered; then the row ends", lower_bound=1)
flags.DEFINE_integer("max_result_tokens", 256, "of one tool's result; the rest is cut")
flags.DEFINE_string("draft", None, f"speculative decoding: a smaller model's folder, or {common.NGRAM}; not streamed")
flags.DEFINE_integer("draft_tokens", 4, "proposals between two forward passes of the model")
_OF_TOOLS = ("corpus", "max_turns", "max_result_tokens")


def read_settings(**others: Any) -> GenerationSettings:
    """The flags' settings but for the logit bias, which needs a vocabulary; checked before anything is loaded."""
    tools, draft, corpus, greedy = FLAGS.tools, FLAGS.draft, FLAGS.corpus, FLAGS.temperature == 0
    searches, longest, shortest = "search" in (tools or ()), FLAGS.max_new_tokens, FLAGS.min_new_tokens
    controlled, idle = given("tools", "logit_bias", "repetition_penalty", "min_new_tokens"), given(*_OF_TOOLS)
    refuse(draft and controlled, f"{controlled}: does not go with --draft")
    refuse(not draft and given("draft_tokens"), "--draft_tokens: has no effect without --draft")
    refuse(idle and tools == [], f"{idle}: has no effect without tools")
    refuse(searches and not corpus, "--tools: search needs a corpus, expected --corpus=FILE")
    refuse(corpus and tools and not searches, "--corpus: has no effect, expected search among --tools")
    refuse(greedy and FLAGS.top_k, "--top_k: has no effect at --temperature=0")
    refuse(greedy and FLAGS.top_p < 1.0, "--top_p: has no effect at --temperature=0")
    expect(not shortest >= longest > 0, "--min_new_tokens", shortest, f"less than --max_new_tokens={longest}")
    refuse("" in FLAGS.stop, "--stop: got an empty text, expected at least one character")
    refuse(sys.__stdout__ is None, "standard output: is closed, expected a place for the completions")
    if draft:
        check_count("draft_tokens", FLAGS.draft_tokens, 1, DRAFT_TOKENS)
    same = ("max_new_tokens", "min_new_tokens", "temperature", "top_k", "top_p", "seed", "repetition_penalty")
    return GenerationSettings(stops=tuple(FLAGS.stop), **{name: getattr(FLAGS, name) for name in same}, **others)


def load() -> Policy:
    """The policy of --stage."""
    return load_policy(Path(FLAGS.stage))


def load_tools(policy: Policy) -> Interaction | None:
    """The tools of the flags, or else those of the stage's config, which one line on standard error names."""
    section, tools = policy.experiment.tree["tools"], FLAGS.tools
    changes: dict[str, Any] = {} if tools is None else {"names": tuple(tools)}
    if FLAGS.corpus:
        changes["search"] = {**section.get("search", {}), "corpus": FLAGS.corpus}
    for name, most in (("max_turns", math.inf), ("max_result_tokens", FLAGS.max_new_tokens)):
        if tools is not None or FLAGS[name].present:
            changes[name] = min(getattr(FLAGS, name), most)
    found, idle = interaction_of({**section, **changes}, policy.tokenizer), given(*_OF_TOOLS)
    refuse(found is None and idle, f"{idle}: has no effect without --tools")
    if found is not None and tools is None:
        print(f"tools of the stage's config: {', '.join(section['names'])} (--tools= offers none)", file=sys.stderr)
    return found


def make_generator(policy: Policy, settings: GenerationSettings) -> TextGenerator:
    """The policy with the flags' logit bias, tools and draft; must run inside `jax.set_mesh(policy.mesh)`."""
    # A constraint or a draft leaves no room for calls, and raw text none for turns.
    free = not (settings.raw or settings.constraint or FLAGS.draft)
    return TextGenerator(
        policy.params,
        policy.model,
        policy.tokenizer,
        max_length=policy.max_length,
        settings=dataclasses.replace(settings, logit_bias=logit_bias(policy.tokenizer)),
        interaction=load_tools(policy) if free else None,
        draft=common.load_draft(FLAGS.draft, policy, FLAGS.draft_tokens) if FLAGS.draft else None,
    )


def input_lines(prompt: str = "", *, interrupted: str = "") -> Iterator[str]:
    """Lines of standard input without their ends, on a terminal each after the prompt.

    Args:
      interrupted: hint printed after Ctrl-C on a terminal, which then does not end the program; "" lets it.

    Raises:
      ConfigError: standard input is closed.
      DataError: a line is not UTF-8.
    """
    refuse(sys.stdin is None or sys.stdin.closed, "standard input: is closed, expected lines of text")
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
            reason = f"{error.reason} at byte {error.start + 1}"
            raise DataError(f"standard input: line {number} is not UTF-8 text ({reason})") from error
        except KeyboardInterrupt:
            if not (terminal and interrupted):
                raise
            print(f"\n{interrupted}", file=sys.stderr)
            continue
        yield text.rstrip("\r\n")


def logit_bias(tokenizer: Tokenizer) -> dict[int, float]:
    """Logit biases of --logit_bias=TOKEN=VALUE; ConfigError if one is malformed, unknown or given twice.

    TOKEN is an id, or else the text of a piece (markup by its name); in double quotes it is a text even where it is
    a number: `"7"=-inf`. All pieces that spell the text are meant: the byte <0x0A> spells a newline too.
    """
    biases: dict[int, float] = {}
    for entry in FLAGS.logit_bias:
        name, _, number = entry.rpartition("=")
        try:
            value = float(number)
        except ValueError:
            value = math.nan
        if not name or math.isnan(value):
            raise ConfigError(f"--logit_bias: got {entry!r}, expected TOKEN=NUMBER, such as 17=-2.5")
        for token in _tokens_named(name, tokenizer):
            if token in biases:
                piece = tokenizer.pieces[token]
                raise ConfigError(f"--logit_bias: token {token} ({piece!r}) is named twice, expected once")
            biases[token] = value
    return biases


def _tokens_named(name: str, tokenizer: Tokenizer) -> Sequence[int]:
    if name.isdecimal():
        return [int(name)]
    text = name[1:-1] if len(name) > 2 and name[0] == name[-1] == '"' else name
    found = [token for token, spelled in enumerate(tokenizer.markup_bytes) if spelled == text.encode()]
    if not found:
        size = tokenizer.vocab_size
        raise ConfigError(f"--logit_bias: {text!r} is no piece of this vocabulary of {size}, expected a piece or an id")
    return found
