"""What was measured, with 95 % intervals: medians by bootstrap, means over a text by its parts, shares by Wilson."""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from eval.results import FEWEST_PARTS, Quality, Score, Timing

RESAMPLES = 2000
_SEED = 20240229
_BLOCK = 2**22  # resampled values held at once: 32 MiB


MOST_PARTS, LONG_PART, SHORTEST_PART = 20, 1024, 32
"""A text is cut into the fewest parts, in tokens never shorter; into more where these are long, up to the most."""


class Ratio(NamedTuple):
    """A ratio and its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def lower(self) -> bool:
        """Whether the interval lies below 1."""
        return self.high < 1

    @property
    def higher(self) -> bool:
        """Whether the interval lies above 1."""
        return self.low > 1


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


def part_sizes(tokens: int) -> np.ndarray:
    """How many of `tokens` successive tokens stand in each part; sizes differ by 1 at most. Empty for a short text.

    A mean over a text is judged by batch means: neighbouring tokens are of like difficulty, so that their scatter
    would promise too much; long runs of them depend little on each other. So the number of parts is fixed and their
    length grows with the text, which keeps the interval right for any autocorrelation that is short against a part
    (Glynn and Iglehart 1990); with 10 to 30 parts hardly anything is left to gain (Schmeiser 1982), and Student's t
    accounts for their number. The subject of an article lasts for thousands of tokens, so that long parts come before
    many. Parts are the same for every model that scores the same tokens, so they make pairs.
    """
    if tokens < FEWEST_PARTS * SHORTEST_PART:
        return np.zeros(0, dtype=np.int64)
    return _cut(tokens, min(MOST_PARTS, max(FEWEST_PARTS, tokens // LONG_PART)))


def _cut(tokens: int, count: int) -> np.ndarray:
    """The sizes of `count` parts."""
    return np.diff(np.arange(count + 1) * tokens // count)


def part_means(values: np.ndarray) -> np.ndarray:
    """The mean of each part of a row of values, one a token: `[tokens]` -> `[parts]` FP64."""
    sizes = part_sizes(len(values))
    return np.add.reduceat(values, np.cumsum(sizes) - sizes, dtype=np.float64) / sizes if len(sizes) else sizes * 0.0


def standard_error(parts: Sequence[float] | np.ndarray, tokens: int) -> float | None:
    """The standard error of the mean over `tokens` tokens whose parts have these means; `None` for too few.

    That of a ratio estimator (sum over count), as parts may differ in size by one token.
    """
    means = np.asarray(parts, dtype=np.float64)
    if len(means) < FEWEST_PARTS:
        return None
    sizes = _cut(tokens, len(means))
    off = sizes * (means - np.average(means, weights=sizes))
    return float(math.sqrt(len(means) / (len(means) - 1) * (off @ off)) / tokens)


def perplexity_ratio(a: Quality, b: Quality) -> Ratio | None:
    """The perplexity of `a` over that of `b` on the same tokens, with its interval from the paired parts.

    `None` where either has no parts, or they are others. The interval is that of the mean difference of NLLs, to
    which what the text makes hard for both adds nothing.
    """
    if len(a.parts) != len(b.parts) or a.tokens != b.tokens:
        return None
    factor = _factor(np.subtract(a.parts, b.parts), a.tokens)
    value = a.perplexity / b.perplexity
    return None if factor is None else Ratio(value, value / factor, value * factor)


def perplexity_interval(quality: Quality) -> tuple[float, float] | None:
    """The 95 % interval of one perplexity; `None` where it has none."""
    factor = _factor(quality.parts, quality.tokens)
    return None if factor is None else (quality.perplexity / factor, quality.perplexity * factor)


def _factor(parts: Sequence[float] | np.ndarray, tokens: int) -> float | None:
    """What an interval of an exponentiated mean reaches over and under it: exp(t x standard error)."""
    error = standard_error(parts, tokens)
    if error is None:
        return None
    from scipy.special import stdtrit

    return math.exp(min(error * float(stdtrit(len(parts) - 1, 0.975)), 300.0))


def accuracy_interval(score: Score) -> tuple[float, float]:
    """The 95 % interval of an accuracy (Wilson 1927), which stays within 0 and 1 and is none the narrower at them."""
    count, z = score.documents, 1.959964
    middle = (score.accuracy + z**2 / (2 * count)) / (1 + z**2 / count)
    reach = z * math.sqrt(score.accuracy * (1 - score.accuracy) / count + (z / (2 * count)) ** 2) / (1 + z**2 / count)
    return min(middle - reach, score.accuracy), max(middle + reach, score.accuracy)


def _values(samples: Sequence[float] | np.ndarray) -> np.ndarray:
    values = np.asarray(samples, dtype=np.float64)
    if values.ndim != 1 or not values.size:
        raise ValueError(f"samples must be a non-empty row, not of shape {values.shape}")
    return values


def _resampled_medians(values: np.ndarray, seed: int) -> np.ndarray:
    """`[RESAMPLES]` medians of samples drawn from `values` with replacement."""
    return _medians(tuple(values.tolist()), seed)


@functools.lru_cache(maxsize=512)  # each row is compared with all others
def _medians(samples: tuple[float, ...], seed: int) -> np.ndarray:
    values = np.array(samples)
    rng, count = np.random.default_rng(seed), len(values)
    rows = max(1, _BLOCK // count)
    blocks = [min(rows, RESAMPLES - done) for done in range(0, RESAMPLES, rows)]
    return np.concatenate([np.median(values[rng.integers(0, count, (block, count))], axis=1) for block in blocks])
