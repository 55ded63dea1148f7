"""A tool that runs a Python program and answers with what it prints."""

from dataclasses import dataclass
from typing import get_args

from research.config.schema import key
from research.environments.base import Tool, ToolError, ToolTimeout, text_tool
from research.rewards.sandbox.sandbox import Isolation, Sandbox, make_sandbox


def python(sandbox: Sandbox) -> Tool:
    """The tool "python": its answer is the program's output, an error where the program fails."""
    limits = sandbox.limits

    def run(code: str) -> str:
        try:
            outcome = sandbox.run(code)
        except ValueError as error:
            raise ToolError(str(error)) from error
        shown = f"\n{outcome.output}" if outcome.output else ""
        if outcome.ended == "cpu":
            raise ToolTimeout(f"stopped after {limits.cpu_s} seconds of processor time{shown}")
        if outcome.ended == "wall":
            raise ToolTimeout(f"stopped after {limits.deadline_s:g} seconds{shown}")
        if outcome.ended == "output":
            raise ToolError(f"stopped after {limits.output_bytes} bytes of output{shown}")
        if outcome.status:
            # The line that matters comes first: a long traceback may be cut.
            raise ToolError(f"status {outcome.status}: {outcome.last_line}{shown}")
        return outcome.output

    description = (
        f"Runs a Python program (standard library only, {limits.cpu_s} seconds of processor time) and shows its output."
    )
    return text_tool("python", description, "code", "the program; print what is to be seen", run)


@dataclass(frozen=True)
class Python:
    """The tool "python"."""

    isolation: Isolation = key(
        "required",
        "best_effort runs programs where namespaces are not permitted: see `make_sandbox`.",
        choices=get_args(Isolation),
    )

    def __call__(self) -> Tool:
        """Tries the sandbox; ConfigError where it cannot be closed here."""
        return python(make_sandbox(isolation=self.isolation))


PROVIDES = {"tool": {"python": Python}}
