"""All points of a sweep in one table and one figure, from the results of their runs."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from eval.results import Results, Row
from plots import style
from plots import table as cells
from plots.numbers import megabytes, millions, span
from plots.pairs import Pair, finetuned_pair, int8_row
from plots.rows import kind, label

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

AIM = 1.05
"""The perplexity that a small model may have, times that of the dense one fine-tuned alike."""

Choices = Mapping[str, Any]
"""Recipe key -> the value that a point has."""


def table(points: Sequence[tuple[Choices, Results | str]]) -> list[tuple[str, ...]]:
    """A head and one line for each pruned row of the chain that was measured; for a point that failed, its reason."""
    keys = list(points[0][0])
    parts = [key.rpartition(".")[2] for key in keys]
    lines = [(*(parts if len(set(parts)) == len(parts) else keys), *cells.COLUMNS)]
    for choices, found in points:
        values = tuple(str(choices[key]) for key in keys)
        if isinstance(found, str):
            lines.append((*values, found))
        else:
            lines += [
                (*values, *line.cells)
                for line in cells.lines(found)
                if line.row.skipped is None and line.row.role == "chain" and line.row.stage not in ("load", "half")
            ]
    return lines


def text(lines: Sequence[tuple[str, ...]]) -> str:
    """The table, aligned."""
    full = [line for line in lines if len(line) == len(lines[0])]
    widths = [max(map(len, column)) for column in zip(*full, strict=True)]
    first = len(lines[0]) - len(cells.COLUMNS) + 1  # the choices and the row's name stand to the left
    out = [cells.aligned(line, widths, first) for line in lines]
    return "\n".join((out[0], "-" * len(out[0]), *out[1:]))


def markdown(lines: Sequence[tuple[str, ...]]) -> str:
    """The table in Markdown."""
    width = len(lines[0])
    rule = ["---"] * (width - len(cells.COLUMNS) + 1) + ["---:"] * (len(cells.COLUMNS) - 1)
    padded = [[cells.markdown(cell) for cell in line] + [""] * (width - len(line)) for line in lines]
    return "\n".join(map(cells.markdown_line, (padded[0], rule, *padded[1:])))


def smallest(points: Sequence[tuple[Choices, Results | str]]) -> str | None:
    """In a sentence, the smallest point whose perplexity after fine-tuning is within `AIM` of the dense model's that
    was fine-tuned alike, its interval wholly, or the nearest to it, and the smaller ones of which it cannot be told;
    `None` where no point has that control arm, or all are of one size."""
    judged = []
    for choices, found in points:
        pair = finetuned_pair(found) if isinstance(found, Results) else None
        if pair is not None and isinstance(found, Results):
            parameters = next(row.parameters for row in found.rows if row.stage == "finetune") or 0
            judged.append((parameters, pair.change, choices, found, pair))
    if not judged or len({parameters for parameters, *_ in judged}) == 1 < len(judged):
        return None
    within = [each for each in judged if (between := each[-1].perplexity) and between.high <= AIM]
    best = min(within, key=lambda each: each[:2]) if within else min(judged, key=lambda each: each[1])
    open_ones = [each for each in judged if _undecided(each[-1]) and not (within and each[0] >= best[0])]
    parameters, _, choices, found, pair = best
    quantized = int8_row(found)
    size = f", {megabytes(quantized.bytes_on_disk)} MB in {quantized.precision.upper()}" if quantized else ""
    name = _series(choices, list(choices))
    point = f"{name}: {millions(parameters)} parameters{size}, {_ratio(pair)} its perplexity after fine-tuning"
    aim = f"within {AIM} × the perplexity of the dense model fine-tuned alike"
    said = f"The smallest model {aim} is {point}." if within else f"No point is surely {aim}; the nearest is {point}."
    if open_ones:
        names = (f"{_series(choices, list(choices))} ({_ratio(pair)})" for _, _, choices, _, pair in open_ones)
        said += f" Whether {'smaller ones are' if within else 'they are'} cannot be told of: {'; '.join(names)}."
    return said


def _undecided(pair: Pair) -> bool:
    between = pair.perplexity
    return between is None or between.low <= AIM < between.high


def _ratio(pair: Pair) -> str:
    """`1.021 × (1.015 to 1.027)`."""
    between = pair.perplexity
    return f"{pair.change:.3f} × ({span(between.low, between.high, 3, AIM) if between else 'no interval'})"


def draw(points: Sequence[tuple[Choices, Results]]) -> "Figure | None":
    """Perplexity against the first numeric choice, and beside it against decode time, for the end of the chain."""
    with style.look():
        return _draw(points)


def _draw(points: Sequence[tuple[Choices, Results]]) -> "Figure | None":
    found = {name: _last_rows(points, name) for name in ("CPU", "GPU")}
    found = {name: rows for name, rows in found.items() if rows}
    if not found:
        return None
    key = _axis([choices for choices, _ in points])
    others = [other for other in points[0][0] if other != key]
    series = list(dict.fromkeys(_series(choices, others) for choices, _ in points))
    timed = any(row.latency for rows in found.values() for _, row in rows)
    dense = {row.quality.perplexity for _, results in points for row in results.rows if _is_dense(row) and row.quality}
    names = [label(rows[0][1]) for rows in found.values()]
    note = (
        f"{'; '.join(names)}. Down is better, in decode time to the left as well; labels there give {key}, "
        "bars the 95 % intervals of the medians."
        if timed
        else f"{'; '.join(names)}. Down is better."
    )
    if answer := smallest(points):
        note = f"{note} {answer}"
    figure = style.frame(
        f"Perplexity against {key}{' and decode latency' if timed else ''}",
        3.6 * len(found),
        note,
        _handles(series, len(dense) == 1),
    )
    panels = figure.subplots(len(found), 1 + timed, squeeze=False, sharey="row")
    for (left, *right), (name, rows) in zip(panels, found.items(), strict=True):
        for index, each in enumerate(series):
            mine = [(choices[key], row) for choices, row in rows if _series(choices, others) == each]
            look = {**style.series(index), "linewidth": 1, "markersize": 5}
            if mine:
                _choice_panel(left, mine, look)
            for axes in right:
                _decode_panel(axes, mine, look)
        left.set_ylabel(f"perplexity per token ({name})")
        left.set_xlabel(key)
        if all(_numeric(choices[key]) for choices, _ in rows):
            left.set_xticks(sorted({choices[key] for choices, _ in rows}))
        for axes in (left, *right):
            axes.grid()
            axes.margins(0.12)
            if len(dense) == 1:
                axes.axhline(*dense, **_DENSE)
        for axes in right:
            axes.set_xlabel("decode: time per output token (ms)")
            axes.set_xlim(left=max(0.0, axes.get_xlim()[0]))
    return figure


_DENSE: dict[str, Any] = {"color": style.QUIET, "linestyle": "--", "linewidth": 1, "zorder": 1}


def _choice_panel(axes: "Axes", mine: Sequence[tuple[Any, Row]], look: dict[str, Any]) -> None:
    places = [(value, row.quality.perplexity) for value, row in mine if row.quality]
    if all(_numeric(value) for value, _ in places):
        axes.plot(*zip(*sorted(places), strict=True), **look)
    else:
        axes.plot([str(value) for value, _ in places], [y for _, y in places], **look)


def _decode_panel(axes: "Axes", mine: Sequence[tuple[Any, Row]], look: dict[str, Any]) -> None:
    for value, row in mine:
        if row.quality and row.latency:
            timing = row.latency.decode
            x, y = 1e3 * timing.p50, row.quality.perplexity
            reach = [[1e3 * (timing.p50 - timing.ci95[0])], [1e3 * (timing.ci95[1] - timing.p50)]]
            axes.errorbar(x, y, xerr=reach, elinewidth=1, capsize=2, **look)
            axes.annotate(str(value), (x, y), xytext=(5, 4), textcoords="offset points", fontsize=8, bbox=style.PAPER)


def _last_rows(points: Sequence[tuple[Choices, Results]], name: str) -> list[tuple[Choices, Row]]:
    """The last measured row of the chain of each point, on this kind of device."""
    found = []
    for choices, results in points:
        rows = [
            row
            for row in results.rows
            if kind(row) == name and row.role == "chain" and row.skipped is None and row.quality
        ]
        if rows:
            found.append((choices, rows[-1]))
    return found


def _axis(choices: Sequence[Choices]) -> str:
    """The first key whose values are all numbers, else the first."""
    keys = list(choices[0])
    return next((key for key in keys if all(_numeric(each[key]) for each in choices)), keys[0])


def _numeric(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _series(choices: Choices, others: Sequence[str]) -> str:
    return ", ".join(f"{other}={choices[other]}" for other in others)


def _is_dense(row: Row) -> bool:
    return row.stage == "control-finetune" and kind(row) == "CPU"


def _handles(series: Sequence[str], dense: bool) -> list[Any]:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], linewidth=1, label=each, **style.series(index)) for index, each in enumerate(series) if each
    ]
    return [*handles, Line2D([], [], label="dense, fine-tuned alike", **_DENSE)] if dense else handles
