"""Random inputs for the tests: padded left and right, with holes, truncated away, of a single token."""

import numpy as np

SHAPES = [(4, 7), (6, 3), (3, 1), (1, 1)]  # few, so that 52 cases need four compilations
SEEDS = range(52)
GARBAGE = np.array([np.nan, np.inf, -np.inf, 1e30], np.float32)


def random_mask(rng: np.random.Generator, batch: int, time: int) -> np.ndarray:
    """Each row: right-padded, left-padded, with holes, full, of one token, or empty."""
    mask = np.zeros((batch, time), bool)
    for row in mask:
        kind, length = rng.integers(6), rng.integers(1, time + 1)
        if kind == 0:
            row[:length] = True
        elif kind == 1:
            row[time - length :] = True
        elif kind == 2:
            row[:] = rng.random(time) < 0.5
        elif kind == 3:
            row[:] = True
        elif kind == 4:
            row[rng.integers(time)] = True
    return mask


def random_logps(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return -rng.exponential(1.0, shape).astype(np.float32)


def fill(values: np.ndarray, mask: np.ndarray, filler: float | str = "garbage") -> np.ndarray:
    """`values` with the masked slots overwritten, by NaN and infinities unless told otherwise."""
    padding = np.resize(GARBAGE, values.shape) if filler == "garbage" else np.float32(filler)
    return np.where(mask, values, padding)
