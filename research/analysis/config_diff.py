"""What differs between the resolved configs of two arms."""

from collections.abc import Mapping, Sequence

import yaml

from research.analysis.formatting import NOTHING
from research.analysis.results import RunResult
from research.core.errors import DataError


def config_differences(runs: Mapping[str, Sequence[RunResult]], control: str) -> dict[str, dict[str, tuple[str, str]]]:
    """By arm: dotted config key -> (control's value, arm's value), as the resolved configs have them.

    The whole resolved configs are compared, not only what the arm declares, so that a second variable that
    moved shows. Runs of one seed are compared, so that what follows from the seed does not.

    Raises:
      DataError: a config text is not YAML or JSON.
    """
    differences: dict[str, dict[str, tuple[str, str]]] = {}
    controls = {run.seed: run for run in runs[control]}
    for arm in runs:
        if arm == control:
            continue
        run = next((run for run in runs[arm] if run.seed in controls), runs[arm][0])
        reference = controls.get(run.seed, runs[control][0])
        theirs, ours = (flatten_config(reference.config_text, reference.arm), flatten_config(run.config_text, arm))
        keys = sorted({key for key in theirs.keys() | ours.keys() if theirs.get(key) != ours.get(key)})
        differences[arm] = {key: (theirs.get(key, NOTHING), ours.get(key, NOTHING)) for key in keys}
    return differences


def flatten_config(text: str, source: str) -> dict[str, str]:
    """A config in YAML, JSON or `dotted.key: value` lines as {dotted key: value as text}."""
    try:
        tree = yaml.load(text, Loader=yaml.BaseLoader)  # all scalars as text; runs no constructors
    except yaml.YAMLError as error:
        raise DataError(f"config of arm {source!r}: neither YAML nor JSON ({error}).") from error
    flat: dict[str, str] = {}

    def visit(prefix: str, node: object) -> None:
        if isinstance(node, dict) and node:
            for key, value in node.items():
                visit(f"{prefix}.{key}" if prefix else str(key), value)
        elif prefix:
            flat[prefix] = node if isinstance(node, str) else str(node).replace("'", "")

    visit("", tree)
    return flat
