"""How loss falls with parameters and tokens: L(N, D) = E + A / N^alpha + B / D^beta, fitted to finished trainings.

Hoffmann et al. 2022 (arXiv 2203.15556), section 3.3, "approach 3", with what Besiroglu et al. 2024 (arXiv 2404.10102)
mended: the losses' errors are added up, not averaged, or the search stops early. Everywhere C = 6 N D, in FLOPs.
"""

import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.optimize import minimize
from threadpoolctl import threadpool_limits

FLOPS = 6
"""Of one parameter and one token, forward and backward."""
HUBER = 1e-3
TRUSTED_ERROR, TRUSTED_SPREAD = 0.01, 2.0
"""What a fit without the largest budget may miss its losses by, and the widest interval of a best size, high over low,
where a fit is still called trustworthy."""
RESAMPLES = 400
_FAR = 200
"""The logarithm of what stands for any larger number: laws of odd resamples reach beyond what a float can hold."""
_EXPONENTS = (0.01, 3.0)
"""Where exponents are searched; a law at an end of it is no power law any more."""
_FEWEST_HELD_OUT = 3
_STARTS = 40
_SEED = 20220329


@dataclass(frozen=True)
class Law:
    """L(N, D), in nats a token for N parameters and D tokens."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float

    def loss(self, parameters: np.ndarray | float, tokens: np.ndarray | float) -> np.ndarray:
        """What a training of so many `parameters` on so many `tokens` ends with; they broadcast."""
        size, text = np.asarray(parameters, dtype=float), np.asarray(tokens, dtype=float)
        return self.E + self.A / size**self.alpha + self.B / text**self.beta

    @property
    def size_exponent(self) -> float:
        """a of N ~ C^a, the number of parameters that makes the most of C FLOPs; tokens grow as C^(1 - a)."""
        return self.beta / (self.alpha + self.beta)

    def best_size(self, flops: np.ndarray | float) -> np.ndarray:
        """That number of parameters (Hoffmann et al. 2022, equation 4)."""
        log_size = self._log_scale + self.size_exponent * np.log(np.asarray(flops, dtype=float) / FLOPS)
        return np.exp(np.clip(log_size, 0, _FAR))

    def flops_of(self, parameters: float) -> float:
        """The FLOPs whose best size is so many parameters."""
        log_pairs = (np.log(parameters) - self._log_scale) / self.size_exponent
        return float(FLOPS * np.exp(np.clip(log_pairs, 0, _FAR)))

    @property
    def _log_scale(self) -> float:
        return float(np.log(self.alpha * self.A) - np.log(self.beta * self.B)) / (self.alpha + self.beta)

    def best_loss(self, flops: np.ndarray | float) -> np.ndarray:
        """The loss at that number."""
        size = self.best_size(flops)
        return self.loss(size, np.asarray(flops, dtype=float) / (FLOPS * size))


@dataclass(frozen=True)
class Published:
    """An exponent a of N ~ C^a that others found, and where they say so."""

    name: str
    size_exponent: float
    source: str
    law: Law | None = None


PUBLISHED = (
    Published("Kaplan et al. 2020", 0.73, "arXiv 2001.08361, section 6.1; N without embeddings"),
    Published("Hoffmann et al. 2022, approach 1", 0.50, "arXiv 2203.15556, table 2"),
    Published("Hoffmann et al. 2022, approach 2", 0.49, "arXiv 2203.15556, table 2"),
    Published(
        "Hoffmann et al. 2022, approach 3",
        0.46,  # of the unrounded exponents: those of the law beside it give 0.452
        "arXiv 2203.15556, table 2 and equation 10",
        Law(1.69, 406.4, 410.7, 0.34, 0.28),
    ),
    Published(
        "Besiroglu et al. 2024, approach 3 again",
        0.51,
        "arXiv 2404.10102",
        Law(1.8172, 482.01, 2085.43, 0.3478, 0.3658),
    ),
)


def fit(parameters: Sequence[float], tokens: Sequence[float], losses: Sequence[float]) -> Law:
    """The law that lies nearest to finished trainings, by the Huber loss of the logarithms.

    Raises `ValueError` for fewer than six trainings, or fewer than three sizes or lengths: five numbers are fitted.
    """
    return _laws(parameters, tokens, losses, 0)[0]


def bootstrap(
    parameters: Sequence[float], tokens: Sequence[float], losses: Sequence[float], count: int = RESAMPLES
) -> list[Law]:
    """The laws of `count` resamples of the trainings, drawn with replacement and a fixed seed.

    Each search starts from the fit to all, and from its neighbours with other exponents. A resample that
    holds fewer than three sizes or lengths is drawn again. Raises `ValueError` as `fit` does.
    """
    return _laws(parameters, tokens, losses, count)[1:]


def interval(values: Sequence[float] | Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The middle 95 % of the first axis."""
    low, high = np.percentile(np.asarray(values), [2.5, 97.5], axis=0)
    return low, high


def parabola(parameters: Sequence[float], losses: Sequence[float]) -> tuple[float, float] | None:
    """The size and the loss at the bottom of losses of one budget (Hoffmann et al. 2022, section 3.2, "approach 2").

    A parabola in log N through all of them; `None` for fewer than three, or where its bottom is not between the
    smallest and the largest size: then these trainings do not show it.
    """
    if len(parameters) < 3:
        return None
    size = np.log(np.asarray(parameters, dtype=float))
    curve = np.polynomial.Polynomial.fit(size, losses, 2).convert()
    if curve.coef[-1] <= 0:
        return None
    bottom = -curve.coef[1] / (2 * curve.coef[2])
    if not size.min() < bottom < size.max():
        return None
    return float(np.exp(bottom)), float(curve(bottom))


def budgets_of(trainings: Sequence[Mapping[str, float]]) -> list[float]:
    """The budgets that trainings are of, ascending."""
    return sorted({training["budget"] for training in trainings})


def enough(parameters: Collection[float], tokens: Collection[float]) -> bool:
    """Whether these are six trainings or more, of three sizes and three lengths at least: five numbers are fitted."""
    return len(parameters) >= 6 and min(len(set(parameters)), len(set(tokens))) >= 3


def examine(trainings: Sequence[Mapping[str, float]], resamples: int = RESAMPLES) -> dict[str, Any]:
    """The law of finished trainings, and how far it can be trusted, as plain data.

    A training has `parameters`, `tokens`, `loss`, and the `budget` of FLOPs that it is one of. Returned are

    - `law`, and `intervals` (low, high) of its numbers and of `size_exponent`, and `error`, the mean of |log L| missed;
    - `held_out`: the largest `budget`, and the `error` there of a fit to all the others; `None` if these are too few;
    - `bottoms`: of each budget that shows one the best size by `parabola`, which knows nothing of the law;
    - `frontier`: over FLOPs, a hundredfold beyond the trainings, best size and loss, each with its interval;
    - `trusted`: from and to how many FLOPs, and why no further.

    Raises `ValueError` as `fit` does.
    """
    parameters, tokens, losses = _columns(trainings)
    law, *laws = _laws(parameters, tokens, losses, resamples)
    budgets = budgets_of(trainings)
    flops = np.geomspace(budgets[0] / 2, 100 * budgets[-1], 60)
    best_sizes = np.stack(interval([each.best_size(flops) for each in laws]))
    best_losses = np.stack(interval([each.best_loss(flops) for each in laws]))
    held_out = _held_out(trainings, budgets[-1])
    return {
        "law": asdict(law),
        "size_exponent": law.size_exponent,
        "intervals": {
            name: [float(end) for end in interval([getattr(each, name) for each in laws])]
            for name in (*asdict(law), "size_exponent")
        },
        "error": _miss(law, trainings),
        "held_out": held_out,
        "bottoms": _bottoms(trainings, budgets),
        "frontier": {
            "flops": flops.tolist(),
            "parameters": law.best_size(flops).tolist(),
            "parameters_interval": best_sizes.tolist(),
            "loss": law.best_loss(flops).tolist(),
            "loss_interval": best_losses.tolist(),
        },
        "trusted": _trusted(law, trainings, flops, best_sizes, held_out),
    }


def _columns(trainings: Sequence[Mapping[str, float]]) -> tuple[list[float], list[float], list[float]]:
    return tuple([training[key] for training in trainings] for key in ("parameters", "tokens", "loss"))  # type: ignore[return-value]


def _miss(law: Law, trainings: Sequence[Mapping[str, float]]) -> float:
    return float(np.mean([abs(np.log(law.loss(t["parameters"], t["tokens"]) / t["loss"])) for t in trainings]))


def _held_out(trainings: Sequence[Mapping[str, float]], budget: float) -> dict[str, float] | None:
    seen = [training for training in trainings if training["budget"] < budget]
    try:
        law = fit(*_columns(seen))
    except ValueError:
        return None
    rest = [training for training in trainings if training["budget"] == budget]
    return {"budget": budget, "trainings": len(rest), "error": _miss(law, rest)}


def _bottoms(trainings: Sequence[Mapping[str, float]], budgets: Sequence[float]) -> list[dict[str, float]]:
    found = []
    for budget in budgets:
        mine = [training for training in trainings if training["budget"] == budget]
        bottom = parabola([training["parameters"] for training in mine], [training["loss"] for training in mine])
        if bottom is not None:
            found.append({"budget": budget, "parameters": bottom[0], "loss": bottom[1]})
    return found


def _trusted(
    law: Law,
    trainings: Sequence[Mapping[str, float]],
    flops: np.ndarray,
    best_sizes: np.ndarray,
    held_out: Mapping[str, float] | None,
) -> dict[str, Any]:
    """As far beyond the trainings as the held-out budget lay beyond the rest, if the fit foresaw that one; but never
    where the best size is uncertain, or smaller or larger than all that were trained. `to` is `from` for nowhere.
    """
    budgets = budgets_of(trainings)
    sizes = [training["parameters"] for training in trainings]
    begin = max(budgets[0], law.flops_of(min(sizes)))
    if held_out is None:
        ends = [(budgets[-1], "too few trainings are left without the largest budget to try the fit on it")]
    elif held_out["trainings"] < _FEWEST_HELD_OUT:
        ends = [(budgets[-1], "the largest budget has too few trainings to try the fit on")]
    elif held_out["error"] > TRUSTED_ERROR:
        ends = [(budgets[-1], f"without the largest budget the fit misses its losses by {held_out['error']:.1%}")]
    else:
        step = budgets[-1] / budgets[-2]
        foreseen = f"the fit to the smaller budgets foresaw losses at {step:.3g} times their FLOPs"
        ends = [(budgets[-1] * step, f"{foreseen} to {held_out['error']:.1%}, and nothing was tried further")]
    inside = flops >= begin
    wide = inside & (best_sizes[1] / best_sizes[0] > TRUSTED_SPREAD)
    if wide.any():
        first = np.argmax(wide)
        # What is wide at the first point that was looked at was so before it.
        at = begin if first == np.argmax(inside) else float(flops[first])
        ends.append((at, f"from there on the best size's interval is wider than a factor of {TRUSTED_SPREAD:g}"))
    ends.append((law.flops_of(max(sizes)), "from there on the best size is larger than any that was trained"))
    if begin > budgets[-1]:
        ends = [(begin, "the best size is smaller than any that was trained")]
    if {law.alpha, law.beta} & set(_EXPONENTS):
        ends = [(begin, "an exponent lies at the end of what was searched, so that these losses are no power law")]
    end, why = min(ends)
    return {"from": float(begin), "to": float(max(begin, end)), "why": why}


def _laws(parameters: Sequence[float], tokens: Sequence[float], losses: Sequence[float], resamples: int) -> list[Law]:
    """The fit to all trainings, then those to the resamples.

    Searched are `[5]`: the logarithms of both terms at the trainings' middle (which makes them independent of the
    exponents, and the search quick), log E, alpha and beta.
    """
    data = np.array([parameters, tokens, losses], dtype=float)
    if not enough(parameters, tokens):
        raise ValueError(
            f"{data.shape[1]} trainings of {len(set(parameters))} sizes and {len(set(tokens))} lengths; "
            "the fit wants six or more, of at least three of each"
        )
    if not (np.isfinite(data).all() and (data > 0).all()):
        raise ValueError("parameters, tokens and losses must be positive numbers")
    data = np.log(data)
    middle = data[:2].mean(axis=1)
    data[:2] -= middle[:, None]
    # On several threads BLAS waits longer for them than it computes: these are vectors of five.
    with threadpool_limits(1, "blas"):
        points = _points(data, resamples)
    return [
        Law(
            E=float(np.exp(e)),
            A=float(np.exp(a + alpha * middle[0])),
            B=float(np.exp(b + beta * middle[1])),
            alpha=float(alpha),
            beta=float(beta),
        )
        for a, b, e, alpha, beta in points
    ]


def _points(data: np.ndarray, resamples: int) -> list[np.ndarray]:
    """What is searched, for all trainings and then for resamples; `data` is `[3, trainings]`, logarithms."""
    first = _search(data, _starts(data))
    changes = np.array([[0, 0, 0, 0, 0], [0, 0, 0, 0.2, 0], [0, 0, 0, 0, 0.2], [0, 0, -0.5, -0.1, -0.1]])
    rng = np.random.default_rng(_SEED)
    points = [first]
    while len(points) <= resamples:
        drawn = data[:, rng.integers(data.shape[1], size=data.shape[1])]
        if enough(drawn[0], drawn[1]):
            points.append(_search(drawn, first + changes))
    return points


def _starts(data: np.ndarray) -> np.ndarray:
    """The best points of a grid around every law that fits anywhere near, `[starts, 5]`."""
    exponents, floor = np.linspace(0.1, 1.3, 7), data[2].min()
    # At the middle of the trainings each term is some share of the loss.
    axes = (floor + np.array([-3, -2, -1]), floor + np.array([-3, -2, -1]), floor + np.array([-2, -0.7, -0.2]))
    starts = np.array(list(itertools.product(*axes, exponents, exponents)))
    return starts[np.argsort([_error(start, data)[0] for start in starts])[:_STARTS]]


def _search(data: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """The best end of L-BFGS from `starts`."""
    # No loss is below E.
    top = data[2].max()
    bounds = [(top - 20, top), (top - 20, top), (top - 20, data[2].min()), _EXPONENTS, _EXPONENTS]
    ends = [minimize(_error, start, (data,), "L-BFGS-B", jac=True, bounds=bounds) for start in starts]
    return min(ends, key=lambda end: end.fun).x


def _error(point: np.ndarray, data: np.ndarray) -> tuple[float, np.ndarray]:
    """Sum of Huber losses of log L, and its gradient."""
    a, b, e, alpha, beta = point
    terms = np.stack([a - alpha * data[0], b - beta * data[1], np.full(data.shape[1], e)])
    top = terms.max(axis=0)
    weights = np.exp(terms - top)
    total = weights.sum(axis=0)
    miss = top + np.log(total) - data[2]
    slope = np.clip(miss, -HUBER, HUBER)
    # The factor changes no minimum, but the search stops where gradients are small.
    error = np.where(np.abs(miss) <= HUBER, miss**2 / 2, HUBER * (np.abs(miss) - HUBER / 2)).sum() / HUBER
    share = slope * weights / total / HUBER
    gradient = [share[0].sum(), share[1].sum(), share[2].sum(), -share[0] @ data[0], -share[1] @ data[1]]
    return float(error), np.array(gradient)
