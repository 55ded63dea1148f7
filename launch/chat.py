"""A conversation with a policy in the terminal, streamed.

Examples:
  python -m launch.chat --stage=runs/quickstart/stages/rl-0123456789ab
  python -m launch.chat --stage=... --system='Answer in one line.' --temperature=0.7 --transcript=talk.jsonl
  python -m launch.chat --stage=... --tools=calculator --max_new_tokens=400
  printf 'Hello\\nAnd then?\\n/quit\\n' | python -m launch.chat --stage=...

Each line of standard input is a message; /reset begins anew, /quit (or the end of the input) ends. Ctrl-C ends an
answer. Where the context is full, the oldest turns are left out and counted. `--transcript` gets a line for each
conversation, a record of messages such as training data have.
"""

import json
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import jax
from absl import flags

from launch import common, generation
from research.core.errors import ConfigError, DataError
from research.core.files import write_text_atomic
from research.sampling.conversation import Conversation
from research.sampling.streaming import TextDelta

_SYSTEM = flags.DEFINE_string("system", "", "text of the system turn")
_TRANSCRIPT = flags.DEFINE_string("transcript", None, "JSONL file to which conversations are appended, one a line")
flags.adopt_module_key_flags(generation)

_HINT = "Ctrl-C ends an answer; /quit or Ctrl-D ends the conversation"


def main() -> None:
    """Answers each line until /quit."""
    settings = generation.read_settings()
    transcript = _TRANSCRIPT.value
    earlier = _earlier(transcript) if transcript else ""
    policy = generation.load()
    with jax.set_mesh(policy.mesh):
        conversation = Conversation(generation.make_generator(policy, settings), _SYSTEM.value)
        conversation.ask("")  # refuses a system turn that leaves no room
        asked = 0
        for line in generation.input_lines("> ", interrupted=_HINT):
            command = line.strip()
            if command == "/quit":
                break
            if command == "/reset":
                earlier += _line(conversation)
                conversation.reset()
            elif command.startswith("/"):
                _say(f"{command.split()[0]}: is no command, expected /reset or /quit")
            elif command:
                _answer(conversation, line, asked)
                asked += 1
                if transcript and conversation.exchanges:  # the last line is written anew after each answer
                    write_text_atomic(transcript, earlier + _line(conversation))


def _answer(conversation: Conversation, text: str, number: int) -> None:
    """Streams the answer to one message; a message that cannot be read is refused, and the conversation goes on."""
    before = conversation.dropped
    try:
        prompt = conversation.ask(text)
    except (ConfigError, DataError) as error:
        _say(f"not sent: {error}")
        return
    if conversation.dropped > before:
        _say(f"context full: the {conversation.dropped} oldest of {len(conversation.exchanges)} exchanges are left out")
    last: TextDelta | None = None
    with _interrupts() as interrupts:
        for last in conversation.generator.stream(prompt, number):
            print(last.text, end="", flush=True)
            if interrupts:
                break
    print(flush=True)
    if last is None:
        return
    conversation.answered(text, last.row)
    if interrupts:
        _say("interrupted")
    elif not last.row.stopped:
        _say(f"cut at --max_new_tokens={last.row.length}")


@contextmanager
def _interrupts() -> Iterator[list[int]]:
    """Notes the first Ctrl-C, so that an answer ends between two tokens; the second ends the program."""
    noted: list[int] = []

    def note(number: int, _frame: FrameType | None) -> None:
        if noted:
            raise KeyboardInterrupt
        noted.append(number)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, before)


def _earlier(path: str) -> str:
    """The lines of the transcript so far; ConfigError if it cannot be read, or its folder does not exist."""
    text = common.read_text(path, "--transcript") if Path(path).exists() else ""
    common.refuse(not Path(path).absolute().parent.is_dir(), f"--transcript: {path}: its folder does not exist")
    return f"{text}\n" if text and not text.endswith("\n") else text


def _line(conversation: Conversation) -> str:
    return json.dumps(conversation.record(), ensure_ascii=False) + "\n" if conversation.exchanges else ""


def _say(text: str) -> None:
    print(f"({text})", file=sys.stderr, flush=True)


if __name__ == "__main__":
    common.run(main)
