"""What one run of an ablation leaves behind, as JSON, and how runs are grouped into arms."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from research.core.errors import DataError
from research.core.files import write_json_atomic
from research.core.metrics import decode_number, encode_numbers

Status = Literal["finished", "failed"]


@dataclass(frozen=True)
class Budget:
    """What one run has spent.

    Attributes:
      tokens_sampled: completion tokens that the sampler drew.
      completions_sampled: completions drawn.
      tokens_trained: unmasked tokens that entered a loss.
      flops: floating-point operations, sampling and training.
      seconds: wall-clock time.
    """

    tokens_sampled: int
    completions_sampled: int
    tokens_trained: int
    flops: float
    seconds: float


@dataclass(frozen=True)
class StageUse:
    """One stage of a run.

    Attributes:
      name: as in the config.
      folder: where it lies, relative to the working directory.
      seconds: wall-clock time, measured when it was run.
      reused: whether it was read from disk, because another run had made it.
    """

    name: str
    folder: str
    seconds: float
    reused: bool


@dataclass(frozen=True)
class RunResult:
    """One arm at one seed.

    Attributes:
      arm: name of the arm.
      seed: its seed; runs of the same seed are paired across arms.
      status: "finished", or "failed" with `error`.
      metrics: final evaluation.
      budget: what the compared stage cost.
      curve: evaluations on the way: "step", "tokens_spent" (sampled + trained so far) and metrics.
      error: one line saying why the run failed.
      overrides: dotted config keys that the arm sets, with their values.
      config_text: the resolved config of this run.
      run_dir: the compared stage's folder, or a failed run's traceback, relative to the working directory.
      grid: dotted config key -> value where the arm is a point of a grid; else empty.
      stages: the run's stages in order, as far as it came; the compared one is the last.
      evaluation: identity of the evaluation that measured `metrics`; "" if unknown.
      curve_evaluation: identity of the one that measured `curve`; "" if unknown.
    """

    arm: str
    seed: int
    status: Status
    metrics: dict[str, float]
    budget: Budget
    curve: list[dict[str, float]]
    error: str | None
    overrides: dict[str, object]
    config_text: str
    run_dir: str
    grid: Mapping[str, Any] = field(default_factory=dict)
    stages: tuple[StageUse, ...] = ()
    evaluation: str = ""
    curve_evaluation: str = ""

    def to_json(self) -> dict[str, Any]:
        """A dict that strict JSON can express; non-finite numbers become strings as in `research.core.metrics`."""
        return encode_numbers(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, record: dict[str, Any], source: str) -> "RunResult":
        """The inverse of `to_json`; fields with defaults may be missing, as in files of older versions.

        Args:
          record: what `to_json` returned.
          source: where it was read, for error messages.

        Raises:
          DataError: keys are missing or unknown, or the status is.
        """
        _check_keys(cls, record, source)
        _check_keys(Budget, record["budget"], f"{source}, budget")
        if record["status"] not in get_args(Status):
            raise DataError(f"{source}: got status {record['status']!r}, expected one of {list(get_args(Status))}.")
        fields = dict(record)
        fields["metrics"] = _numbers(record["metrics"])
        fields["budget"] = Budget(**_numbers(record["budget"]))
        fields["curve"] = [_numbers(point) for point in record["curve"]]
        stages = record.get("stages", [])
        for stage in stages:
            _check_keys(StageUse, stage, f"{source}, stages")
        fields["stages"] = tuple(StageUse(**_numbers(stage)) for stage in stages)
        return cls(**fields)


def save_results(path: Path | str, results: Sequence[RunResult]) -> None:
    """Writes all runs of an ablation into one JSON file."""
    write_json_atomic(path, [result.to_json() for result in results])


def load_results(path: Path | str) -> list[RunResult]:
    """Reads what `save_results` wrote.

    Raises:
      DataError: the file cannot be read, or does not hold results.
    """
    try:
        records = json.loads(Path(path).read_text("utf-8"))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}).") from error
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error}).") from error
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise DataError(f"{path}: expected a list of run results.")
    return [RunResult.from_json(record, f"{path}, result {index}") for index, record in enumerate(records)]


def arm_names(results: Sequence[RunResult], control: str) -> list[str]:
    """The arms: control first, then in the order of `results`.

    Raises:
      DataError: there is no such control arm, or an arm has two results for one seed.
    """
    names = list(dict.fromkeys(result.arm for result in results))
    if control not in names:
        raise DataError(f"control arm {control!r}: not among the results; expected one of {names}.")
    seen: set[tuple[str, int]] = set()
    for result in results:
        if (result.arm, result.seed) in seen:
            raise DataError(f"arm {result.arm!r}: has two results for seed {result.seed}, expected one.")
        seen.add((result.arm, result.seed))
    return [control, *(name for name in names if name != control)]


def _numbers(record: dict[str, Any]) -> dict[str, Any]:
    return {key: decode_number(value) for key, value in record.items()}


def _check_keys(kind: type, record: Any, source: str) -> None:
    fields = dataclasses.fields(kind)
    expected = {f.name for f in fields}
    optional = {f.name for f in fields if (f.default, f.default_factory) != (dataclasses.MISSING,) * 2}
    if not isinstance(record, dict):
        raise DataError(f"{source}: got a {type(record).__name__}, expected an object with keys {sorted(expected)}.")
    if missing := sorted(expected - optional - set(record)):
        raise DataError(f"{source}: the keys {missing} are missing.")
    if unknown := sorted(set(record) - expected):
        raise DataError(f"{source}: got unknown keys {unknown}, expected {sorted(expected)}.")
