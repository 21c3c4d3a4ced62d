"""A scaling law, from the record of its trainings alone: a figure and a page of Markdown."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from eval.scaling_law import FLOPS, PUBLISHED, Law, budgets_of
from plots import style
from plots.table import markdown_line

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Record = Mapping[str, Any]
"""What `scaling.json` holds."""

_NAMES = {"E": "E", "A": "A", "B": "B", "alpha": "alpha", "beta": "beta", "size_exponent": "a of N ~ C^a"}


def draw(record: Record) -> "Figure":
    """Losses over sizes, the compute frontier, the best size over FLOPs, and the exponent beside published ones."""
    with style.look():
        note = (
            "C = 6 N D. Left above: points are trainings, lines the fitted law, crosses bottoms of parabolas through "
            "one budget's points, which know nothing of the law. Bands and bars: 95 % of bootstrap resamples. "
            f"Trust the law {_trust(record['trusted'])}: {record['trusted']['why']}. Dotted: outside that."
        )
        figure = style.frame(f"Scaling law: {record['name']}", 6.6, note, _handles(record))
        (sizes, losses), (best, exponents) = figure.subplots(2, 2)
        _sizes(sizes, record)
        _frontier(losses, record, "loss", "loss (nats per token)")
        for training in record["trainings"]:
            flops = FLOPS * training["parameters"] * training["tokens"]
            losses.plot(flops, training["loss"], **_budget(record, training["budget"]), markersize=4, linestyle="")
        _frontier(best, record, "parameters", "best number of parameters")
        style.log_scale(best, "y")
        for bottom in record["bottoms"]:
            best.plot(bottom["budget"], bottom["parameters"], "x", color=style.INK, markersize=7)
        _exponents(exponents, record)
        return figure


def _handles(record: Record) -> list[Any]:
    from matplotlib.lines import Line2D

    budgets = budgets_of(record["trainings"])
    return [Line2D([], [], linestyle="", label=f"{budget:.2g} FLOPs", **_budget(record, budget)) for budget in budgets]


def _budget(record: Record, budget: float) -> dict[str, Any]:
    return style.series(budgets_of(record["trainings"]).index(budget))


def _sizes(axes: "Axes", record: Record) -> None:
    import numpy as np

    law = Law(**record["law"])
    for budget in budgets_of(record["trainings"]):
        mine = sorted((t["parameters"], t["loss"]) for t in record["trainings"] if t["budget"] == budget)
        look = _budget(record, budget)
        axes.plot(*zip(*mine, strict=True), **look, linestyle="", markersize=4.5)
        grid = np.geomspace(mine[0][0] / 1.15, mine[-1][0] * 1.15, 60)
        axes.plot(grid, law.loss(grid, budget / (FLOPS * grid)), color=look["color"], linewidth=1)
    for bottom in record["bottoms"]:
        axes.plot(bottom["parameters"], bottom["loss"], "x", color=style.INK, markersize=7)
    style.log_scale(axes, "x")
    axes.set_xlabel("parameters")
    axes.set_ylabel("loss (nats per token)")
    axes.grid()


def _frontier(axes: "Axes", record: Record, key: str, label: str) -> None:
    frontier, trusted = record["frontier"], record["trusted"]
    flops, values = frontier["flops"], frontier[key]
    low, high = frontier[f"{key}_interval"]
    axes.fill_between(flops, low, high, color=style.series(0)["color"], alpha=0.18, linewidth=0)
    inside = [
        value if trusted["from"] <= each <= trusted["to"] else float("nan")
        for each, value in zip(flops, values, strict=True)
    ]
    look = {"color": style.series(0)["color"], "linewidth": 1.4}
    axes.plot(flops, values, linestyle=":", **look)
    axes.plot(flops, inside, **look)
    style.log_scale(axes, "x")
    axes.set_xlabel("FLOPs of a training")
    axes.set_ylabel(label)
    axes.grid()


def _exponents(axes: "Axes", record: Record) -> None:
    low, high = record["intervals"]["size_exponent"]
    value = record["size_exponent"]
    names = ["here", *(each.name.replace(", ", ",\n") for each in PUBLISHED)]
    axes.errorbar(value, 0, xerr=[[max(0, value - low)], [max(0, high - value)]], capsize=3, **style.series(0))
    for place, each in enumerate(PUBLISHED, 1):
        axes.plot(each.size_exponent, place, color=style.OTHER, marker="s", markersize=5)
    style.name_bars(axes, names)
    axes.set_xlabel("a of N ~ C^a: how the best size grows with FLOPs")


def markdown(record: Record) -> str:
    """The law, its intervals, published ones beside them, where trust ends, and all trainings."""
    trainings, trusted = record["trainings"], record["trusted"]
    numbers = record["law"] | {"size_exponent": record["size_exponent"]}
    with_laws = [each for each in PUBLISHED if each.law]
    lines = [
        f"# Scaling law: {record['name']}",
        "",
        f"{len(trainings)} trainings of {_span(trainings, 'parameters')} parameters on {_span(trainings, 'tokens')} "
        f"tokens of {', '.join(record['text'])} ({_short(record['text_tokens'])} tokens), "
        f"{sum(training['seconds'] for training in trainings) / 60:.0f} minutes of training.",
        "",
        "L(N, D) = E + A / N^alpha + B / D^beta, in nats a token; C = 6 N D. On average the fit misses a loss by "
        f"{record['error']:.2%}.",
        "",
        markdown_line(("", "here", "95 % interval", *(each.name for each in with_laws))),
        f"|---|---:|---:|{'---:|' * len(with_laws)}",
    ]
    for key, name in _NAMES.items():
        low, high = record["intervals"][key]
        others = [each.size_exponent if key == "size_exponent" else getattr(each.law, key) for each in with_laws]
        here = (f"{numbers[key]:.4g}", f"{low:.4g} to {high:.4g}")
        lines.append(markdown_line((name, *here, *(f"{other:.4g}" for other in others))))
    published = ", ".join(f"{each.size_exponent:.2f} ({each.name}; {each.source})" for each in PUBLISHED)
    lines += [
        "",
        f"Published a: {published}.",
        "",
        "E, A and B depend on text and tokenizer, the exponents less so. N counts the embedding, as Hoffmann et al. do "
        "and Kaplan et al. do not; in the smallest models it is most of N. Batch and learning rates are the same for "
        "all sizes.",
        "",
        f"**Trust it {_trust(trusted)}**: {trusted['why']}.",
        "",
        "| FLOPs | best parameters | 95 % interval | by a parabola alone | best loss |",
        "|---:|---:|---:|---:|---:|",
        *_best(record),
        "",
        "| parameters | tokens | FLOPs | loss | law | seconds |",
        "|---:|---:|---:|---:|---:|---:|",
    ]
    law = Law(**record["law"])
    for each in sorted(trainings, key=lambda each: (each["budget"], each["parameters"])):
        size, text = each["parameters"], each["tokens"]
        lines.append(
            f"| {size:,} | {text:,} | {FLOPS * size * text:.2g} | {each['loss']:.4f} | {law.loss(size, text):.4f} "
            f"| {each['seconds']:.0f} |"
        )
    if record["left_out"]:
        lines += ["", "Left out:", "", *(f"- {reason}" for reason in record["left_out"])]
    return "\n".join([*lines, ""])


def _trust(trusted: Mapping[str, Any]) -> str:
    low, high = trusted["from"], trusted["to"]
    return f"from {low:.2g} to {high:.2g} FLOPs" if low < high else f"nowhere, not even from {low:.2g} FLOPs on"


def _best(record: Record) -> list[str]:
    """The frontier at each budget, and ten times beyond the largest."""
    import numpy as np

    budgets = budgets_of(record["trainings"])
    bottoms = {bottom["budget"]: bottom["parameters"] for bottom in record["bottoms"]}
    frontier = record["frontier"]
    grid = np.log(frontier["flops"])

    def at(flops: float, values: list[float]) -> float:
        return float(np.exp(np.interp(np.log(flops), grid, np.log(values))))

    lines = []
    for flops in (*budgets, 10 * budgets[-1]):
        low, high = (at(flops, values) for values in frontier["parameters_interval"])
        mark = "" if record["trusted"]["from"] <= flops <= record["trusted"]["to"] else " (not to be trusted)"
        bottom = f"{bottoms[flops]:,.0f}" if flops in bottoms else "–"
        lines.append(
            f"| {flops:.2g}{mark} | {at(flops, frontier['parameters']):,.0f} | {low:,.0f} to {high:,.0f} | {bottom} "
            f"| {at(flops, frontier['loss']):.3f} |"
        )
    return lines


def _span(trainings: list[dict[str, float]], key: str) -> str:
    values = [training[key] for training in trainings]
    return f"{_short(min(values))} to {_short(max(values))}"


def _short(value: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {letter}"
    return f"{value:g}"
