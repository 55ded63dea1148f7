"""What one run of an ablation leaves behind, as JSON, and how runs are grouped into arms."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from research.core.errors import DataError
from research.core.files import read_json, write_json_atomic
from research.core.metrics import decode_numbers, encode_numbers

Status = Literal["finished", "failed"]


@dataclass(frozen=True)
class Budget:
    """What one run has spent."""

    tokens_sampled: int  # completion tokens that the sampler drew
    completions_sampled: int
    tokens_trained: int  # unmasked tokens that entered a loss
    flops: float  # floating-point operations, sampling and training
    seconds: float  # wall-clock time


@dataclass(frozen=True)
class StageUse:
    """One stage of a run."""

    name: str  # as in the config
    folder: str  # where it lies, relative to the working directory
    seconds: float  # wall-clock time, measured when it was run
    reused: bool  # whether it was read from disk, because another run had made it


@dataclass(frozen=True)
class RunResult:
    """One arm at one seed."""

    arm: str
    seed: int  # runs of the same seed are paired across arms
    status: Status
    metrics: dict[str, float]  # the final evaluation
    budget: Budget  # what the compared stage cost
    curve: list[dict[str, float]]  # evaluations on the way: "step", "tokens_spent" (sampled + trained so far), metrics
    error: str | None  # one line saying why the run failed
    overrides: dict[str, object]  # dotted config keys that the arm sets, with their values
    config_text: str  # the resolved config of this run
    run_dir: str  # the compared stage's folder, or a failed run's traceback, relative to the working directory
    grid: Mapping[str, Any] = field(default_factory=dict)  # dotted config key -> value of a point of a grid
    stages: tuple[StageUse, ...] = ()  # in order, as far as the run came; the compared one is the last
    evaluation: str = ""  # identity of the evaluation that measured `metrics`; "" if unknown
    curve_evaluation: str = ""  # identity of the one that measured `curve`; "" if unknown


def save_results(path: Path | str, results: Sequence[RunResult]) -> None:
    """Writes all runs of an ablation into one JSON file; non-finite numbers as in `research.core.metrics`."""
    write_json_atomic(path, [encode_numbers(dataclasses.asdict(result)) for result in results])


def load_results(path: Path | str) -> list[RunResult]:
    """Reads what `save_results` wrote; fields with defaults may be missing, as in files of older versions.

    DataError where keys are missing or unknown, or a status is; WorkdirError where it cannot be read.
    """
    records = read_json(path)
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise DataError(f"{path}: expected a list of run results.")
    return [_load(record, f"{path}, result {index}") for index, record in enumerate(records)]


def _load(record: dict[str, Any], source: str) -> RunResult:
    found = _checked(RunResult, record, source)
    if found["status"] not in get_args(Status):
        raise DataError(f"{source}: got status {found['status']!r}, expected one of {list(get_args(Status))}.")
    found["budget"] = Budget(**decode_numbers(_checked(Budget, found["budget"], f"{source}, budget")))
    stages = [_checked(StageUse, stage, f"{source}, stages") for stage in found.get("stages", ())]
    found["stages"] = tuple(StageUse(**stage) for stage in stages)
    found |= {key: decode_numbers(found[key]) for key in ("metrics", "curve")}
    return RunResult(**found)


def _checked(kind: type, record: Any, source: str) -> dict[str, Any]:
    """A copy of the record, which has the keys of a dataclass."""
    fields = {f.name: f for f in dataclasses.fields(kind)}
    if not isinstance(record, dict):
        raise DataError(f"{source}: got a {type(record).__name__}, expected an object with keys {sorted(fields)}.")
    required = {f.name for f in fields.values() if f.default is f.default_factory}  # both are MISSING
    if missing := sorted(required - record.keys()):
        raise DataError(f"{source}: the keys {missing} are missing.")
    if unknown := sorted(record.keys() - fields.keys()):
        raise DataError(f"{source}: got unknown keys {unknown}, expected {sorted(fields)}.")
    return dict(record)
