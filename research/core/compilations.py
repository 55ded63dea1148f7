"""Counts what XLA compiles, so that a run can show that it compiles nothing after its first iterations."""

from typing import Any

import jax

_EVENT = "/jax/core/compile/backend_compile_duration"
"""What JAX records for each program, compiled or loaded from the persistent cache."""


class CompilationCounter:
    """A context manager: `count` is the number of programs compiled since it was entered, by the whole process."""

    count = 0

    def __enter__(self) -> "CompilationCounter":
        jax.monitoring.register_event_duration_secs_listener(self._record)
        return self

    def __exit__(self, *exc: Any) -> None:
        jax.monitoring.unregister_event_duration_listener(self._record)

    def _record(self, event: str, duration_secs: float, **kwargs: str | int) -> None:  # noqa: ARG002 (JAX's signature)
        self.count += event == _EVENT
