"""A small tokenizer and corpus shared by the data tests."""

from pathlib import Path

import pytest

from research.data.split import Split
from research.data.tokenizer import Tokenizer, train_tokenizer
from research.tasks.arithmetic.problems import split_items

SHARED = Path(__file__).parents[3].parent / "shared" / "data"

PROSE = (
    "The quick brown fox jumps over the lazy dog.\n\n"
    "Whoever reads this far knows that a user asks, and an assistant answers; the system only listens.\n"
    "    Four spaces open this line, and a tool closes it: x = (3 + 4) * 2 - 5.\n"
)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "small.model"
    return train_tokenizer([PROSE * 3], vocab_size=400, path=path)


@pytest.fixture(scope="session")
def arithmetic_records() -> list[dict]:
    train, _ = split_items(300, 10, seed=0, split=Split(10))
    return [{"prompt": item.prompt, "completion": item.solution, "answer": item.answer} for item in train]


@pytest.fixture(scope="session")
def text_records() -> list[dict]:
    """Documents of very different lengths; each repeats its own marker, so rows can be traced back."""
    return [{"text": f"doc {index} " * (1 + (index * 7) % 60)} for index in range(40)]


@pytest.fixture
def shared_data() -> Path:
    if not SHARED.exists():
        pytest.skip("../shared/data is not here")
    return SHARED
