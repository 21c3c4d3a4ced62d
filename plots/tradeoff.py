"""Quality against speed against size, in one picture for each kind of device."""

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from eval.results import Results, Row
from plots import style
from plots.numbers import megabytes
from plots.pairs import Pair
from plots.placing import Box, Circle, gap, leader, place
from plots.rows import by_kind, labels, measured, same_load, same_text, unmeasured_note

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LARGEST = 300.0  # square points, of the largest files
_SMALLEST = 14.0
_LOG_ABOVE = 20.0
_LEADER = {"arrowstyle": "-", "color": style.INK, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 0}


@style.styled
def draw(results: Results) -> "Figure | None":
    """Perplexity against decode time; marker area is bytes on disk; rows that none beats measurably are ringed."""
    rows = measured(results, lambda row: row.quality and row.latency)
    if not rows:
        return None
    groups = by_kind(rows)
    note = (
        "Down and to the left is better. Ringed: the Pareto front, rows that no other measurably beats in one way "
        f"without measurably losing in the other, by 95 % intervals of pairs. {unmeasured_note(results, rows)}"
    )
    handles = [*style.role_handles(rows), *_size_handles(rows)]
    figure = style.frame("Perplexity against decode latency", 4.3 * len(groups), note, handles)
    panels = figure.subplots(len(groups), 1, squeeze=False)[:, 0]
    largest = max((row.bytes_on_disk or 0 for row in rows), default=0)
    for (kind, group), axes in zip(groups.items(), panels, strict=True):
        _panel(axes, group, [_area(row.bytes_on_disk, largest) for row in group])
        axes.set_title(kind)
    figure.draw_without_rendering()  # settles the layout, so that labels can be placed
    for group, axes in zip(groups.values(), panels, strict=True):
        _write_labels(axes, group, [_area(row.bytes_on_disk, largest) for row in group])
    return figure


def unbeaten(rows: Sequence[Row]) -> list[Row]:
    """The rows that no other beats, by the 95 % intervals of pairs; none where a pair has no interval."""
    comparable = all(
        same_load(one, other) and one.quality and other.quality and same_text(one.quality, other.quality)
        for one, other in itertools.pairwise(rows)
    )
    if not comparable or (len(rows) > 1 and any(row.quality and not row.quality.parts for row in rows)):
        return []
    return [row for row in rows if not any(_beats(other, row) for other in rows if other is not row)]


def _beats(row: Row, base: Row) -> bool:
    """Measurably faster or better, and measurably neither slower nor worse."""
    pair = Pair(row, base, [])
    speed, perplexity = pair.speed("decode"), pair.perplexity
    if perplexity is None:
        return False
    return (speed.higher or perplexity.lower) and not speed.lower and not perplexity.higher


def front(results: Results) -> list[str]:
    """For each kind of device, one sentence that names the rows on its Pareto front."""
    found = []
    for kind, rows in by_kind(measured(results, lambda row: row.quality and row.latency)).items():
        best = unbeaten(rows)
        names = [name for name, row in zip(labels(rows), rows, strict=True) if row in best]
        if not names:
            found.append(
                f"On the {kind}, which rows no other beats cannot be told: not all were scored and timed alike, with "
                "intervals."
            )
            continue
        several = f"{', '.join(names[:-1])} or " if len(names) > 1 else ""
        found.append(f"On the {kind}, no row measurably beats {several}{names[-1]} without losing in the other way.")
    return found


def _panel(axes: "Axes", rows: list[Row], areas: list[float]) -> None:
    points, best = _points(rows), unbeaten(rows)
    # Large markers first: a small one must not vanish under them.
    for (x, y), row, area in sorted(zip(points, rows, areas, strict=True), key=lambda each: -each[2]):
        axes.scatter(x, y, s=area, zorder=2, **style.fill(row))
        if row in best:
            ring = (math.sqrt(area) + 5) ** 2
            axes.scatter(x, y, s=ring, zorder=2, facecolor="none", edgecolor=style.INK, linewidth=1.1)
    axes.set_xlabel("decode: time per output token (ms)")
    xs, ys = zip(*points, strict=True)
    axes.set_xlim(*_around(xs, 0.12, 0.35))
    if max(ys) > _LOG_ABOVE * min(ys):
        style.log_scale(axes, "y")
        axes.set_ylim(min(ys) / 1.6, max(ys) * 1.6)
        axes.set_ylabel("perplexity per token (log scale)")
    else:
        axes.set_ylim(*_around(ys, 0.18, 0.18))
        axes.set_ylabel("perplexity per token")
    axes.grid()


def _around(values: Sequence[float], below: float, above: float) -> tuple[float, float]:
    """Limits with room on both sides, as shares of the span, which is at least a twentieth of the values."""
    span = max(max(values) - min(values), 0.05 * max(values))
    return min(values) - below * span, max(values) + above * span


def _points(rows: list[Row]) -> list[tuple[float, float]]:
    return [(1e3 * row.latency.decode.p50, row.quality.perplexity) for row in rows if row.latency and row.quality]


def _area(size: int | None, largest: int) -> float:
    return max(_LARGEST * (size or 0) / largest, _SMALLEST) if largest else _SMALLEST


def _write_labels(axes: "Axes", rows: list[Row], areas: list[float]) -> None:
    """Name the points. Lengths are in points (1/72 inch), which hold at any resolution."""
    figure: Any = axes.figure
    scale = 72 / figure.dpi
    places = axes.transData.transform(_points(rows)) * scale
    circles = [(float(x), float(y), math.sqrt(area / math.pi) + 4) for (x, y), area in zip(places, areas, strict=True)]
    names = labels(rows, brief=True)
    sizes = [_extent(axes, name, scale) for name in names]
    frame = axes.get_window_extent()
    bounds = (frame.x0 * scale, frame.y0 * scale, frame.x1 * scale, frame.y1 * scale)
    boxes = place(circles, sizes, bounds)
    for name, circle, box, data in zip(names, circles, boxes, _points(rows), strict=True):
        x, y, _ = circle
        middle = ((box[0] + box[2]) / 2 - x, (box[1] + box[3]) / 2 - y)
        if _needs_leader(box, circle, circles):
            _, (end_x, end_y) = leader(circle, box)
            axes.annotate("", data, (end_x - x, end_y - y), textcoords="offset points", arrowprops=_LEADER, zorder=3)
        axes.annotate(
            name,
            data,
            middle,
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=8,
            zorder=4,
            bbox=style.PAPER,
        )


def _needs_leader(box: Box, own: Circle, circles: Sequence[Circle]) -> bool:
    """Whether a label stands off its point, or nearly as near to another."""
    space = gap(box, own)
    return space > 6 or any(gap(box, other) <= space + 4 for other in circles if other is not own)


def _extent(axes: "Axes", name: str, scale: float) -> tuple[float, float]:
    text = axes.text(0, 0, name, fontsize=8)
    box = text.get_window_extent()
    text.remove()
    return box.width * scale + 4, box.height * scale + 2


def _size_handles(rows: list[Row]) -> list[object]:
    """Two markers that tell what the areas mean."""
    from matplotlib.lines import Line2D

    sizes = sorted({row.bytes_on_disk for row in rows if row.bytes_on_disk})
    ends = (sizes[0], sizes[-1]) if len(sizes) > 1 else ()
    return [
        Line2D(
            [],
            [],
            marker="o",
            linestyle="",
            color=style.LIBRARIES,
            markeredgecolor=style.QUIET,
            markersize=2 * math.sqrt(_area(size, sizes[-1]) / math.pi),
            label=f"{megabytes(size)} MB on disk",
        )
        for size in ends
    ]
