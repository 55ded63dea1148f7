"""One fine-tuned toy model for all tests of the loops."""

from collections.abc import Iterator

import pytest

from tests.research.algorithms.toy import quick_compilation
from tests.research.train.chain import Shared


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Shared:
    with quick_compilation():
        return Shared(tmp_path_factory.mktemp("chain"))


@pytest.fixture
def quick() -> Iterator[None]:
    with quick_compilation():
        yield
