"""Completions with thoughts, calls and results are read back as the messages that they were rendered from."""

from pathlib import Path

import pytest

from research.data.chat import Message, render_messages, render_prompt
from research.data.tokenizer import Tokenizer, train_tokenizer
from research.sampling.conversation import completion_messages


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path: Path = tmp_path_factory.mktemp("t") / "small.model"
    return train_tokenizer(["six by seven is 42\n" * 20], vocab_size=300, path=path)


USER = (Message("user", "six by seven"),)
CALLS = ('{"name": "calculator"}', '{"name": "search"}')


@pytest.mark.parametrize(
    "turns",
    [
        (Message("assistant", "42"),),
        (Message("assistant", ""),),
        (Message("assistant", "is 42\n", "six, <think>", CALLS),),
        (
            Message("assistant", "", "", CALLS[:1]),
            Message("tool", "42 <|im_end|>"),
            Message("tool", ""),
            Message("assistant", "It is 42."),
        ),
    ],
)
def test_messages_survive_the_way_through_tokens(tokenizer: Tokenizer, turns: tuple[Message, ...]) -> None:
    whole = render_messages((*USER, *turns), tokenizer, where="r").tokens
    completion = whole[len(render_prompt(USER, tokenizer)) :].tolist()
    assert completion_messages(completion, tokenizer) == list(turns)


def test_broken_markup_is_text_without_it(tokenizer: Tokenizer) -> None:
    think, call = tokenizer.piece_id("<think>"), tokenizer.piece_id("</tool_call>")
    tokens = [think, *tokenizer.encode("a"), call, *tokenizer.encode("b"), tokenizer.im_end_id]
    assert completion_messages(tokens, tokenizer) == [Message("assistant", "ab")]
