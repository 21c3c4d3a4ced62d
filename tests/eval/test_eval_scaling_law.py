"""Scaling laws: fits against laws that are known, other minimisers, and where trust must end."""

from typing import Any

import numpy as np
import pytest
from scipy.optimize import minimize, minimize_scalar

from eval.scaling_law import FLOPS, HUBER, PUBLISHED, Law, bootstrap, examine, fit, interval, parabola

CHINCHILLA = Law(1.69, 406.4, 410.7, 0.34, 0.28)
BUDGETS = (1e17, 3e17, 1e18, 3e18)


def trainings(law: Law = CHINCHILLA, noise: float = 0.0, seed: int = 0) -> list[dict[str, float]]:
    """Five sizes at each budget, around the best one."""
    rng = np.random.default_rng(seed)
    found = []
    for budget in BUDGETS:
        for share in (0.2, 0.45, 1.0, 2.2, 5.0):
            parameters = share * float(law.best_size(budget))
            tokens = budget / FLOPS / parameters
            loss = float(law.loss(parameters, tokens) * np.exp(noise * rng.standard_normal()))
            found.append({"parameters": parameters, "tokens": tokens, "loss": loss, "budget": budget})
    return found


def columns(found: list[dict[str, float]]) -> list[list[float]]:
    return [[training[key] for training in found] for key in ("parameters", "tokens", "loss")]


@pytest.mark.parametrize("law", [each.law for each in PUBLISHED if each.law] + [Law(0.3, 9.0, 31.0, 0.2, 0.6)])
def test_a_law_is_found_again_in_what_it_foretells(law: Law) -> None:
    found = fit(*columns(trainings(law)))
    for name in ("E", "A", "B", "alpha", "beta"):
        assert getattr(found, name) == pytest.approx(getattr(law, name), rel=1e-3), name


def test_published_exponents_follow_from_published_laws() -> None:
    for each in PUBLISHED:
        if each.law:
            assert each.law.size_exponent == pytest.approx(each.size_exponent, abs=0.01)


def test_no_other_minimiser_finds_a_better_fit() -> None:
    parameters, tokens, losses = (np.array(column) for column in columns(trainings(noise=0.01)))

    def error(point: np.ndarray) -> float:
        """Equation 3 of the paper, written down once more; E, A and B by their logarithms."""
        law = Law(*np.exp(point[:3]), *point[3:])
        miss = np.abs(np.log(law.loss(parameters, tokens)) - np.log(losses))
        return float(np.where(miss <= HUBER, miss**2 / 2, HUBER * (miss - HUBER / 2)).sum())

    found = fit(parameters.tolist(), tokens.tolist(), losses.tolist())
    ours = error(np.array([np.log(found.E), np.log(found.A), np.log(found.B), found.alpha, found.beta]))
    start = np.array([np.log(1.69), np.log(406.4), np.log(410.7), 0.34, 0.28])
    other = min(
        minimize(
            error, start * scale, method="Nelder-Mead", options={"maxiter": 6000, "xatol": 1e-8, "fatol": 1e-14}
        ).fun
        for scale in (1, 0.9, 1.1)
    )
    assert ours <= other * (1 + 1e-6)


def test_the_best_size_is_where_the_loss_of_a_budget_is_least() -> None:
    for flops in (1e15, 1e19):

        def loss(log_size: float, flops: float = flops) -> float:
            return float(CHINCHILLA.loss(np.exp(log_size), flops / FLOPS / np.exp(log_size)))

        least = minimize_scalar(loss, bounds=(5, 30), method="bounded", options={"xatol": 1e-9})
        assert float(CHINCHILLA.best_size(flops)) == pytest.approx(np.exp(least.x), rel=1e-4)
        assert float(CHINCHILLA.best_loss(flops)) == pytest.approx(least.fun, rel=1e-9)
        assert CHINCHILLA.flops_of(float(CHINCHILLA.best_size(flops))) == pytest.approx(flops)


def test_intervals_hold_the_truth_and_grow_with_the_noise() -> None:
    widths = []
    for noise in (0.001, 0.01):
        found = columns(trainings(noise=noise))
        laws = bootstrap(*found, count=60)
        low, high = interval([law.size_exponent for law in laws])
        assert low < CHINCHILLA.size_exponent < high
        widths.append(high - low)
    assert widths[1] > 2 * widths[0]


def test_a_parabola_needs_a_bottom_among_its_sizes() -> None:
    sizes = [1e5, 2e5, 5e5, 1e6]
    losses = [3 + 0.1 * np.log(size / 3e5) ** 2 for size in sizes]
    assert parabola(sizes, losses) == (pytest.approx(3e5), pytest.approx(3))
    assert parabola(sizes[:2], losses[:2]) is None
    assert parabola(sizes, [3 + 0.1 * np.log(size / 3e6) ** 2 for size in sizes]) is None
    assert parabola(sizes, [-loss for loss in losses]) is None


def test_trust_reaches_as_far_as_was_tried() -> None:
    found = examine(trainings(noise=0.0005), resamples=40)
    assert found["trusted"]["from"] == pytest.approx(1e17)
    assert found["trusted"]["to"] == pytest.approx(9e18)
    assert found["held_out"]["budget"] == 3e18 and found["held_out"]["error"] < 0.003
    assert [bottom["budget"] for bottom in found["bottoms"]] == list(BUDGETS)
    for bottom in found["bottoms"]:
        assert bottom["parameters"] == pytest.approx(float(CHINCHILLA.best_size(bottom["budget"])), rel=0.25)
    frontier = found["frontier"]
    assert frontier["flops"][-1] == pytest.approx(3e20)
    for key in ("parameters", "loss"):
        low, high = frontier[f"{key}_interval"]
        assert all(a <= b * 1.01 and b <= c * 1.01 for a, b, c in zip(low, frontier[key], high, strict=True))


def worse_at_the_largest(found: list[dict[str, float]]) -> list[dict[str, float]]:
    return [each | {"loss": each["loss"] * (1.02 if each["budget"] == BUDGETS[-1] else 1)} for each in found]


def only_small_ones(found: list[dict[str, float]]) -> list[dict[str, float]]:
    return [each for each in found if each["parameters"] < 1.3e8]


def with_one_large_budget(found: list[dict[str, float]]) -> list[dict[str, float]]:
    return [each for each in found if each["budget"] == BUDGETS[-1]] + found[:1]


def two_at_the_largest(found: list[dict[str, float]]) -> list[dict[str, float]]:
    return found[:-3]


@pytest.mark.parametrize(
    ("change", "noise", "end", "said"),
    [
        (worse_at_the_largest, 0.0, 3e18, "without the largest budget the fit misses"),
        (only_small_ones, 0.0, 3e18, "larger than any that was trained"),
        (with_one_large_budget, 0.0, 3e18, "too few trainings are left"),
        (two_at_the_largest, 0.0, 3e18, "the largest budget has too few trainings"),
        (list, 0.03, 9e18, "interval is wider than a factor of 2"),
    ],
)
def test_trust_ends_sooner_where_something_speaks_against_it(change: Any, noise: float, end: float, said: str) -> None:
    trusted = examine(change(trainings(noise=noise)), resamples=40)["trusted"]
    assert trusted["to"] <= end * 1.001 and said in trusted["why"]


def test_nothing_is_trusted_where_all_were_larger_than_the_best() -> None:
    found = []
    for budget in BUDGETS:
        for parameters in (1e10, 2e10, 4e10, 8e10):
            tokens = budget / FLOPS / parameters
            loss = float(CHINCHILLA.loss(parameters, tokens))
            found.append({"parameters": parameters, "tokens": tokens, "loss": loss, "budget": budget})
    trusted = examine(found, resamples=5)["trusted"]
    assert trusted["to"] == trusted["from"] and "smaller than any that was trained" in trusted["why"]


def test_odd_laws_stay_numbers() -> None:
    for law in (Law(3, 1, 1, 1.0, 0.01), Law(3, 1e40, 1e-9, 0.01, 0.01), Law(1e-9, 1e-9, 1e45, 3, 3)):
        values = [
            law.flops_of(1e6),
            *law.best_size(np.geomspace(1e10, 1e25, 5)),
            *law.best_loss(np.geomspace(1e10, 1e25, 5)),
        ]
        assert np.isfinite(values).all()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda found: found[:5], "5 trainings of 5 sizes"),
        (lambda found: [each | {"parameters": 1e6} for each in found], "of 1 sizes"),
        (lambda found: [each | {"loss": -1.0} for each in found], "positive"),
        (lambda found: [each | {"loss": float("nan")} for each in found], "positive"),
    ],
)
def test_what_cannot_be_fitted_is_refused(change: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        fit(*columns(change(trainings())))
