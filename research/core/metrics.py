"""What a run records, as JSON lines: metrics, performance figures and samples.

    metrics.jsonl      {"step": 10, "loss": 1.25, ...}     deterministic: an interrupted and resumed run ends
                                                           with the bytes of an uninterrupted one
    performance.jsonl  {"step": 10, "seconds": 3.1, ...}   wall-clock figures, which differ from run to run
    samples.jsonl      {"step": 10, "prompt": "...", ...}  what the model wrote; deterministic too

The first two also go to the run's sinks (`research.core.sinks`): TensorBoard, Weights & Biases.
Numbers are written by `repr`, which Python reads back to the same float64. JSON has no NaN and no infinity,
so these three are written as the strings "NaN", "Infinity" and "-Infinity"; `load_metrics` turns them back.
"""

import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import ArrayLike

from research.core.errors import DataError, WorkdirError
from research.core.files import explain_os_error
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


def decode_number(value: Any) -> Any:
    """The inverse of `encode_numbers` for one value: "NaN" and "[-]Infinity" become floats again."""
    return _NON_FINITE.get(value, value) if isinstance(value, str) else value


def decode_numbers(value: Any) -> Any:
    """The inverse of `encode_numbers`, for a whole tree."""
    if isinstance(value, Mapping):
        return {key: decode_numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [decode_numbers(item) for item in value]
    return decode_number(value) if isinstance(value, str) else value


def load_jsonl(path: Path | str) -> list[dict[str, Any]]:
    """The records of a JSON-lines file.

    A last line without its newline is a record that the run was killed in, and is left out.

    Raises:
      DataError: there is no such file, or a whole line is not a JSON object.
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
    return [{key: decode_number(value) for key, value in record.items()} for record in load_jsonl(path)]


class MetricsWriter:
    """Appends to the files above and to the sinks; every record is handed to the operating system at once.

    A new run: `MetricsWriter(directory)`. A resumed run: `MetricsWriter(directory, offsets=...)` with what
    `offsets()` returned when the checkpoint was taken; what was written after it is cut off. A run that was
    killed before its first checkpoint resumes with `offsets=dict.fromkeys(FILES, 0)`.
    On several hosts, only process 0 may have a writer.
    """

    def __init__(
        self, directory: Path | str, *, offsets: Mapping[str, int] | None = None, sinks: Sequence[Sink] = ()
    ) -> None:
        """Opens the files.

        Args:
          directory: where they are; created if need be.
          offsets: byte size of each file at the checkpoint that the run resumes from; None for a new run.
          sinks: get the same numbers; closed with the writer.

        Raises:
          WorkdirError: the directory holds another run's records (new run); a file is missing, shorter than
            at the checkpoint, or has no line end there (resumed run); or the directory cannot be written.
        """
        self.directory, self.sinks = Path(directory), tuple(sinks)
        _check_offsets(self.directory, offsets)
        self._handles: dict[str, BinaryIO] = {}
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            for name in FILES:
                handle = open(self.directory / name, "ab")  # noqa: SIM115 (closed by close())
                self._handles[name] = handle
                if offsets is not None:
                    handle.truncate(offsets[name])
                    handle.seek(0, io.SEEK_END)
        except OSError as error:
            raise WorkdirError(explain_os_error(error, error.filename or self.directory)) from error
        if offsets is not None:
            first = 1 + max(_last_step(self.directory / name) for name in (METRICS, PERFORMANCE))
            for sink in self.sinks:
                sink.restart(first)

    def write(self, step: int, metrics: Mapping[str, ArrayLike]) -> None:
        """Appends deterministic metrics; put wall-clock figures into `write_performance`.

        Args:
          step: optimizer steps done.
          metrics: scalars by name (Python, NumPy or JAX); written in the order of their names.

        Raises:
          ValueError: a metric is not one number.
          WorkdirError: the disk is full; names the file.
        """
        self._write_scalars(METRICS, step, metrics)

    def write_performance(self, step: int, figures: Mapping[str, ArrayLike]) -> None:
        """Appends wall-clock figures (seconds, tokens/s, bytes in use); otherwise like `write`."""
        self._write_scalars(PERFORMANCE, step, figures)

    def write_samples(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
        """Appends one line per sample (prompt, completion, reward ...), each with the step."""
        if any("step" in sample for sample in samples):
            raise ValueError("a sample has a key 'step': the name is taken by the step itself; expected another name.")
        self._append(SAMPLES, [{"step": int(step), **encode_numbers(sample)} for sample in samples])

    def offsets(self) -> dict[str, int]:
        """Byte size of each file once all of it is safely on disk; belongs into the checkpoint."""
        sizes = {}
        for name, handle in self._handles.items():
            try:
                handle.flush()
                os.fsync(handle.fileno())
                sizes[name] = os.fstat(handle.fileno()).st_size
            except OSError as error:
                raise WorkdirError(explain_os_error(error, self.directory / name)) from error
        return sizes

    def close(self) -> None:
        """Closes the files and the sinks; a writer that is closed cannot be used again."""
        for handle in self._handles.values():
            handle.close()
        for sink in self.sinks:
            sink.close()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _write_scalars(self, name: str, step: int, metrics: Mapping[str, ArrayLike]) -> None:
        numbers = {key: _number(key, metrics[key]) for key in sorted(metrics)}
        self._append(name, [{"step": int(step), **encode_numbers(numbers)}])
        for sink in self.sinks:
            sink.write(int(step), numbers)

    def _append(self, name: str, records: Sequence[Mapping[str, Any]]) -> None:
        text = "".join(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n" for record in records)
        try:
            self._handles[name].write(text.encode("utf-8", "backslashreplace"))  # lone surrogates as JSON escapes
            self._handles[name].flush()
        except OSError as error:
            raise WorkdirError(explain_os_error(error, self.directory / name)) from error


def _number(key: str, value: ArrayLike) -> int | float:
    """One metric as a Python number."""
    array = np.asarray(value)
    if key == "step":
        raise ValueError("metric 'step': the name is taken by the step itself; expected another name.")
    if array.size != 1 or array.dtype.kind in "OSUc":
        raise ValueError(f"metric {key!r}: got shape {array.shape}, dtype {array.dtype}; expected one number.")
    return int(array.item()) if array.dtype.kind in "biu" else float(array.item())


def _check_offsets(directory: Path, offsets: Mapping[str, int] | None) -> None:
    """Refuses before anything is touched."""
    sizes = {name: os.path.getsize(directory / name) for name in FILES if (directory / name).exists()}
    if offsets is None:
        for name, size in sizes.items():
            if size:
                raise WorkdirError(
                    f"{directory / name}: holds {size} bytes of an earlier run; resume that run or choose "
                    "another working directory."
                )
        return
    if set(offsets) != set(FILES):
        raise WorkdirError(f"{directory}: the checkpoint has offsets for {sorted(offsets)}, expected {list(FILES)}.")
    for name, offset in offsets.items():
        path = directory / name
        if offset and name not in sizes:
            raise WorkdirError(f"{path}: missing, but the checkpoint to resume from has {offset} bytes of it.")
        if sizes.get(name, 0) < offset:
            raise WorkdirError(
                f"{path}: got {sizes[name]} bytes, expected at least {offset}, which the checkpoint to "
                "resume from has recorded; the file was shortened or belongs to another run."
            )
        if offset:
            with open(path, "rb") as handle:
                handle.seek(offset - 1)
                if handle.read(1) != b"\n":
                    raise WorkdirError(
                        f"{path}: no line ends at byte {offset}, where the checkpoint to resume from says "
                        "one does; the file was edited or belongs to another run."
                    )


def _last_step(path: Path) -> int:
    """The step of the last record; -1 where there is none."""
    last = b""
    with open(path, "rb") as handle:
        for last in handle:  # noqa: B007 (the last value is what is wanted)
            pass
    return int(json.loads(last)["step"]) if last else -1
