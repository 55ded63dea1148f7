"""The tools by name, as a config lists them."""

from collections.abc import Sequence
from pathlib import Path

from research.core.errors import ConfigError
from research.environments.base import Tool
from research.environments.calculator import calculator
from research.environments.python import python
from research.environments.search import Index, read_corpus, search
from research.rewards.sandbox.sandbox import Isolation, SandboxLimits, make_sandbox

NAMES = ("calculator", "python", "search")


def make_tools(
    names: Sequence[str],
    *,
    corpus: str | Path | None = None,
    search_results: int = 3,
    sandbox_limits: SandboxLimits | None = None,
    isolation: Isolation = "required",
) -> tuple[Tool, ...]:
    """The tools of these names, in their order.

    Args:
      names: of `NAMES`.
      corpus: the file that "search" searches; see `read_corpus`.
      search_results: documents of one answer of "search".
      sandbox_limits: of one program of "python"; None for the defaults.
      isolation: of "python"; see `make_sandbox`.

    Raises:
      ConfigError: an unknown name, "search" without a corpus or a corpus without it, a missing package, or a
        sandbox that cannot be closed here.
      DataError: the corpus cannot be used.
    """
    unknown = [name for name in names if name not in NAMES]
    if unknown:
        raise ConfigError(f"tools: got {unknown[0]!r}, expected one of {', '.join(NAMES)}.")
    if ("search" in names) != (corpus is not None):
        found = "no corpus" if corpus is None else f"the corpus {corpus}, which no tool reads"
        raise ConfigError(f"tools: found {found}, expected a corpus where 'search' is among the tools.")
    made: list[Tool] = []
    for name in names:
        if name == "search":
            assert corpus is not None
            made.append(search(Index(read_corpus(corpus)), results=search_results))
        elif name == "python":
            made.append(python(make_sandbox(sandbox_limits, isolation=isolation)))
        else:
            made.append(calculator())
    return tuple(made)
