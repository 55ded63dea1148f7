"""Ranges of the sampler's settings, and their checks: every number is finite and cannot overflow what it is used in."""

import math
from typing import Any

from research.config.schema import expect
from research.core.errors import ConfigError

TEMPERATURE = (1e-3, 100.0)
TOP_P = (1e-6, 1.0)
LOGIT_BIAS = (-1e3, 1e3)
REPETITION_PENALTY = (1e-2, 1e2)
"""Inclusive. A logit over its temperature must stay far below 2^24, the integers of float32, or its rounding swallows
the differences between tokens."""
DRAFT_TOKENS = 64
"""Most proposals of a round, which the model scores in one forward pass; longer runs are hardly ever accepted."""
SAMPLES = 65_536
"""Most completions of one prompt."""
INT32 = 2**31 - 1


def check_number(name: str, value: float, bounds: tuple[float, float], *, other: str = "") -> None:
    """ConfigError unless a number is finite and within inclusive bounds; `other` names what is accepted besides."""
    low, high = bounds
    if not (math.isfinite(value) and low <= value <= high):
        raise ConfigError(f"{name}: got {value:g}, expected {other}a number from {low:g} to {high:g}")


def check_count(name: str, value: int, low: int, high: int = INT32) -> None:
    """ConfigError unless an integer is within inclusive bounds."""
    expect(low <= value <= high, name, value, f"an integer from {low} to {high}")


def check_counts(spec: Any, **least: int) -> None:
    """`check_count` of some fields of a dataclass, each given with its lower bound."""
    for name, low in least.items():
        check_count(name, vars(spec)[name], low)


def check_temperature(value: float) -> None:
    """ConfigError unless a temperature is 0, which is greedy, or in range."""
    if value != 0:
        check_number("temperature", value, TEMPERATURE, other="0 (greedy) or ")
