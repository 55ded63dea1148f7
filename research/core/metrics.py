"""What a run records, as JSON lines: metrics, performance figures and samples.

    metrics.jsonl      {"step": 10, "loss": 1.25, ...}     deterministic: a resumed run ends with the same bytes
    performance.jsonl  {"step": 10, "seconds": 3.1, ...}   wall-clock figures, which differ from run to run
    samples.jsonl      {"step": 10, "prompt": "...", ...}  what the model wrote; deterministic too

The first two also go to the run's sinks: TensorBoard, Weights & Biases. Numbers are written by `repr`, which Python
reads back to the same float64. JSON has no NaN and no infinity, so that these three are written as the strings "NaN",
"Infinity" and "-Infinity"; `load_metrics` turns them back.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import ArrayLike

from research.core.errors import DataError, WorkdirError
from research.core.files import explained, make_folder
from research.core.sinks import Sink

METRICS, PERFORMANCE, SAMPLES = "metrics.jsonl", "performance.jsonl", "samples.jsonl"
FILES = (METRICS, PERFORMANCE, SAMPLES)
_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def encode_numbers(value: Any) -> Any:
    """`value` with NumPy and JAX scalars as Python numbers and non-finite floats as strings (see above)."""
    if isinstance(value, Mapping):
        return {str(key): encode_numbers(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [encode_numbers(item) for item in value]
    if hasattr(value, "tolist"):  # NumPy and JAX arrays and scalars
        return encode_numbers(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def decode_numbers(value: Any) -> Any:
    """The inverse of `encode_numbers`: "NaN" and "[-]Infinity" become floats again."""
    if isinstance(value, Mapping):
        return {key: decode_numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [decode_numbers(item) for item in value]
    return _NON_FINITE.get(value, value) if isinstance(value, str) else value


def load_jsonl(path: Path | str) -> list[dict[str, Any]]:
    """The records of a JSON-lines file; DataError where there is none, or a whole line is not a JSON object.

    A last line without its newline is a record that the run was killed in, and is left out.
    """
    try:
        lines = Path(path).read_bytes().split(b"\n")[:-1]
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}).") from error
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}, line {number}: not JSON ({error}).") from error
        if not isinstance(record, dict):
            raise DataError(f"{path}, line {number}: got a {type(record).__name__}, expected a JSON object.")
        records.append(record)
    return records


def load_metrics(path: Path | str) -> list[dict[str, float]]:
    """The records of a metrics.jsonl or performance.jsonl, non-finite numbers restored; see `load_jsonl`."""
    return [decode_numbers(record) for record in load_jsonl(path)]


class MetricsWriter:
    """Appends to the files above and to the sinks; every record is handed to the operating system at once."""

    def __init__(
        self, directory: Path | str, *, offsets: Mapping[str, int] | None = None, sinks: Sequence[Sink] = ()
    ) -> None:
        """Opens the files in `directory`, created if need be; the sinks get the same numbers, and are closed with it.

        `offsets` is what `offsets()` returned when the checkpoint was taken that the run resumes from; None is before
        any record. What was written after it is cut off. WorkdirError where a file is missing, shorter than at the
        checkpoint, or has no line end there; or the directory cannot be written.
        """
        self.directory, self.sinks = make_folder(directory), tuple(sinks)
        offsets = offsets or dict.fromkeys(FILES, 0)
        if set(offsets) != set(FILES):
            raise WorkdirError(
                f"{directory}: the checkpoint has offsets for {sorted(offsets)}, expected {list(FILES)}."
            )
        recorded = {name: _recorded(self.directory / name, offsets[name]) for name in FILES}
        self._handles: dict[str, BinaryIO] = {}
        for name in FILES:
            with explained(self.directory / name):
                self._handles[name] = open(self.directory / name, "ab")  # noqa: SIM115 (closed by close())
                if os.fstat(self._handles[name].fileno()).st_size > offsets[name]:
                    self._handles[name].truncate(offsets[name])
        rows = [json.loads(recorded[name].splitlines()[-1]) for name in (METRICS, PERFORMANCE) if recorded[name]]
        for sink in self.sinks:
            sink.restart(max((int(row["step"]) + 1 for row in rows), default=0))

    def write(self, step: int, metrics: Mapping[str, ArrayLike], file: str = METRICS) -> None:
        """Appends scalars (Python, NumPy or JAX), sorted by name; wall-clock figures go into the file PERFORMANCE.

        ValueError where a metric is not one number, WorkdirError where the disk is full.
        """
        numbers = {key: _number(key, metrics[key]) for key in sorted(metrics)}
        self._append(file, [{"step": int(step), **encode_numbers(numbers)}])
        for sink in self.sinks:
            sink.write(int(step), numbers)

    def write_samples(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
        """Appends one line per sample (prompt, completion, reward ...), each with the step."""
        if any("step" in sample for sample in samples):
            raise ValueError("a sample has a key 'step': the name is taken by the step itself; expected another name.")
        self._append(SAMPLES, [{"step": int(step), **encode_numbers(sample)} for sample in samples])

    def offsets(self) -> dict[str, int]:
        """Byte size of each file once all of it is safely on disk; belongs into the checkpoint."""
        sizes = {}
        for name, handle in self._handles.items():
            with explained(self.directory / name):
                handle.flush()
                os.fsync(handle.fileno())
                sizes[name] = os.fstat(handle.fileno()).st_size
        return sizes

    def close(self) -> None:
        """Closes the files and the sinks; a writer that is closed cannot be used again."""
        for handle in self._handles.values():
            handle.close()
        for sink in self.sinks:
            sink.close()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _append(self, name: str, records: Sequence[Mapping[str, Any]]) -> None:
        text = "".join(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n" for record in records)
        with explained(self.directory / name):
            self._handles[name].write(text.encode("utf-8", "backslashreplace"))  # lone surrogates as JSON escapes
            self._handles[name].flush()


def _number(key: str, value: ArrayLike) -> int | float:
    """One metric as a Python number."""
    array = np.asarray(value)
    if key == "step":
        raise ValueError("metric 'step': the name is taken by the step itself; expected another name.")
    if array.size != 1 or array.dtype.kind in "OSUc":
        raise ValueError(f"metric {key!r}: got shape {array.shape}, dtype {array.dtype}; expected one number.")
    return int(array.item()) if array.dtype.kind in "biu" else float(array.item())


def _recorded(path: Path, offset: int) -> bytes:
    """What the checkpoint has seen of a file; refuses another one."""
    if not offset:
        return b""
    if not path.exists():
        raise WorkdirError(f"{path}: missing, but the checkpoint to resume from has {offset} bytes of it.")
    with open(path, "rb") as handle:
        data = handle.read(offset)
    if len(data) < offset:
        raise WorkdirError(
            f"{path}: got {len(data)} bytes, expected at least {offset}, which the checkpoint to resume from has "
            "recorded; the file was shortened or belongs to another run."
        )
    if not data.endswith(b"\n"):
        raise WorkdirError(
            f"{path}: no line ends at byte {offset}, where the checkpoint to resume from says one does; the file was "
            "edited or belongs to another run."
        )
    return data
