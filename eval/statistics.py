"""Medians of samples and their ratios, with bootstrap 95 % intervals."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from eval.results import Timing

RESAMPLES = 2000
_SEED = 20240229
_BLOCK = 2**22  # resampled values held at once: 32 MiB


class Ratio(NamedTuple):
    """A ratio of two medians and its 95 % interval."""

    value: float
    low: float
    high: float


def timing(samples: Sequence[float] | np.ndarray) -> Timing:
    """Percentiles (linear interpolation), mean, and the median's bootstrap interval, of samples in seconds.

    The interval is the percentile bootstrap's (Efron and Tibshirani 1993, section 13.3), of
    `RESAMPLES` resamples with a fixed seed. Raises `ValueError` without samples.
    """
    values = _values(samples)
    p50, p90, p99 = np.percentile(values, [50, 90, 99]).tolist()
    low, high = np.percentile(_resampled_medians(values, _SEED), [2.5, 97.5]).tolist()
    return Timing(values.tolist(), len(values), float(values.mean()), p50, p90, p99, (low, high))


def ratio(a: Timing, b: Timing, *, interleaved: bool = True) -> Ratio:
    """Median of `a` over median of `b`, with a bootstrap 95 % interval.

    `interleaved` samples of one round share what the machine did in that round: where the counts are equal
    they are resampled in pairs. All others are resampled each side on its own.
    """
    first, second = _values(a.samples), _values(b.samples)
    # The same seed and count draw the same rounds on both sides.
    other_seed = _SEED if interleaved and len(first) == len(second) else _SEED + 1
    ratios = _resampled_medians(first, _SEED) / _resampled_medians(second, other_seed)
    low, high = np.percentile(ratios, [2.5, 97.5]).tolist()
    return Ratio(float(np.median(first) / np.median(second)), low, high)


def _values(samples: Sequence[float] | np.ndarray) -> np.ndarray:
    values = np.asarray(samples, dtype=np.float64)
    if values.ndim != 1 or not values.size:
        raise ValueError(f"samples must be a non-empty row, not of shape {values.shape}")
    return values


def _resampled_medians(values: np.ndarray, seed: int) -> np.ndarray:
    """`[RESAMPLES]` medians of samples drawn from `values` with replacement."""
    rng, count = np.random.default_rng(seed), len(values)
    rows = max(1, _BLOCK // count)
    blocks = [min(rows, RESAMPLES - done) for done in range(0, RESAMPLES, rows)]
    return np.concatenate([np.median(values[rng.integers(0, count, (block, count))], axis=1) for block in blocks])
