"""Prints what a config may say: keys with defaults, units, bounds, effects and meaning.

Example:
  python -m launch.describe rl.objective.grpo
  python -m launch.describe evaluation

Without a key it lists the sections. Stages share their keys: `sft.optimizer` and `rl.optimizer` are the same.
"""

import sys

from rich import get_console
from rich.text import Text

from launch import common
from research.config.describe import describe


def main() -> None:
    """Prints the keys at the paths that the command line names, or without one all sections."""
    paths = [text for text in sys.argv[1:] if not text.startswith("-")]
    console = get_console()
    for section in () if paths else dict.fromkeys(each.path.rpartition(".")[0] for each in describe("")):
        console.print(Text(section))
    for path in paths:
        common.refuse(not path.strip("."), f"{path!r}: expected a key or a section such as rl.optimizer")
        for each in describe(path):
            head, *rest = each.lines()
            console.print(Text(head, style="bold"))
            console.print(Text("\n".join(rest)))


if __name__ == "__main__":
    common.run(main, arguments=True)
