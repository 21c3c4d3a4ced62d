"""Intervals of means over a text: right for tokens that resemble their neighbours, and sharp between two models."""

import math

import numpy as np
import pytest
from scipy.stats import binomtest, t

from eval.results import Quality, Score
from eval.statistics import (
    accuracy_interval,
    part_means,
    part_sizes,
    perplexity_interval,
    perplexity_ratio,
    standard_error,
)


def quality(losses: np.ndarray) -> Quality:
    nll, parts = float(losses.mean()), part_means(losses)
    error = standard_error(parts, len(losses))
    value = math.exp(nll)
    return Quality(value, nll, len(losses), 64, 64, "", 1.0, None if error is None else value * error, parts.tolist())


@pytest.mark.parametrize("tokens", [1, 319, 320, 351, 11_263, 20_480, 49_157, 10**12 + 1])
def test_parts_hold_all_tokens_in_like_numbers(tokens):
    sizes = part_sizes(tokens)
    if tokens < 320:
        assert len(sizes) == 0
        return
    assert sizes.sum() == tokens and sizes.max() - sizes.min() <= 1 and sizes.min() >= 32
    assert len(sizes) == (10 if tokens < 11 * 1024 else 20)


def test_parts_are_means_of_neighbours():
    values = np.random.default_rng(0).normal(size=353)
    sizes, begin = part_sizes(353), 0
    for size, mean in zip(sizes, part_means(values), strict=True):
        assert mean == pytest.approx(values[begin : begin + size].mean(), rel=1e-12)
        begin += size
    assert begin == 353 and len(part_means(values[:319])) == 0


def test_the_error_of_independent_tokens_is_the_usual_one():
    values = np.random.default_rng(1).normal(size=400_000)
    assert standard_error(part_means(values), 400_000) == pytest.approx(400_000**-0.5, rel=0.35)
    sizes, means = part_sizes(1_283), part_means(values[:1_283])  # a ratio of sums, by hand
    scale = 1_283 / len(sizes)
    off = sizes * means - values[:1_283].mean() * sizes
    assert standard_error(means, 1_283) == pytest.approx((off**2).sum() ** 0.5 / len(sizes) / scale * (10 / 9) ** 0.5)


def correlated(trials: int, tokens: int, rho: float, seed: int = 2) -> np.ndarray:
    """Rows of an autoregressive sequence around 3.5: a token is as hard as its neighbour, all but 1 - rho."""
    noise = np.random.default_rng(seed).normal(size=(trials, tokens)) * (1 - rho**2) ** 0.5
    for at in range(1, tokens):
        noise[:, at] += rho * noise[:, at - 1] if at > 1 else 0
    return 3.5 + noise


@pytest.mark.parametrize(("tokens", "rho"), [(2_000, 0.0), (4_000, 0.9), (12_000, 0.97)])
def test_intervals_cover_the_truth_as_often_as_they_say(tokens, rho):
    """Of 600 texts, 95 %, though neighbours resemble each other; as if they did not, far fewer."""
    texts = correlated(600, tokens, rho)
    middle = math.exp(3.5)
    covered = [low < middle < high for low, high in (perplexity_interval(quality(text)) for text in texts)]
    assert 0.92 <= np.mean(covered) <= 0.98
    naive = 1.96 * texts.std(1, ddof=1) / tokens**0.5
    if rho:
        assert np.mean(abs(texts.mean(1) - 3.5) < naive) < 0.6


def test_pairs_cover_too_and_see_what_single_rows_cannot():
    """A second model is 0.4 % worse, and differs by noise that has memory as well."""
    texts, noise = correlated(300, 4_000, 0.8), 0.02 * (correlated(300, 4_000, 0.9, seed=3) - 3.5)
    found = [perplexity_ratio(quality(b + 0.004 + a), quality(b)) for a, b in zip(noise, texts, strict=True)]
    assert 0.91 <= np.mean([ratio.low < math.exp(0.004) < ratio.high for ratio in found]) <= 0.985
    alone = perplexity_interval(quality(texts[0]))
    assert found[0].high - found[0].low < 0.2 * (alone[1] - alone[0]) / quality(texts[0]).perplexity


def test_a_ratio_by_hand():
    a, b = correlated(2, 1_280, 0.5)
    found = perplexity_ratio(quality(a), quality(b))
    differences = (a - b).reshape(10, 128).mean(1)
    reach = t.ppf(0.975, 9) * differences.std(ddof=1) / 10**0.5
    ends = [math.exp(differences.mean() + sign * reach) for sign in (0, -1, 1)]
    assert found == pytest.approx(ends, rel=1e-12)
    assert (found.lower, found.higher) == (ends[2] < 1, ends[1] > 1)


def test_nothing_is_claimed_of_the_same_or_of_too_little():
    text = quality(correlated(1, 2_000, 0.5)[0])
    assert perplexity_ratio(text, text) == (1, 1, 1) and not perplexity_ratio(text, text).lower
    short = quality(np.full(319, 3.0))
    assert (short.stderr, short.parts, perplexity_ratio(short, short), perplexity_interval(short)) == (
        None,
        [],
        None,
        None,
    )
    assert perplexity_ratio(text, quality(np.full(2_001, 3.0))) is None
    assert perplexity_ratio(text, Quality(2.0, math.log(2), 2_000, 64, 64, "", 1.0)) is None


@pytest.mark.parametrize(("right", "of"), [(0, 8), (8, 8), (3, 8), (2_955, 10_042), (1, 10_042)])
def test_accuracies_have_intervals_at_the_ends_too(right, of):
    wilson = binomtest(right, of).proportion_ci(method="wilson")
    low, high = accuracy_interval(Score(right / of, 0.0, of, of, ""))
    assert (low, high) == pytest.approx((wilson.low, wilson.high), abs=1e-6) and low < high
