"""Prefill and decode of every row; each kind of device on a scale of its own."""

from typing import TYPE_CHECKING

from eval.results import Results, Row, Timing
from plots import style
from plots.numbers import milliseconds
from plots.rows import by_kind, count, labels, measured, unmeasured_note

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@style.styled
def draw(results: Results) -> "Figure | None":
    """Median prefill and decode time in milliseconds with the 95 % interval, as horizontal bars."""
    rows = measured(results, lambda row: row.latency)
    if not rows:
        return None
    groups = by_kind(rows)
    note = f"Bars: median of the samples; whiskers: its bootstrap 95 % interval. {unmeasured_note(results, rows)}"
    height = sum(0.27 * len(group) + 0.75 for group in groups.values())
    figure = style.frame("Latency", height, note, style.role_handles(rows))
    panels = figure.subplots(
        len(groups), 2, squeeze=False, sharey="row", height_ratios=[len(group) + 1 for group in groups.values()]
    )
    for (kind, group), (prefill, decode) in zip(groups.items(), panels, strict=True):
        _bars(prefill, group, [row.latency.prefill for row in group if row.latency])
        _bars(decode, group, [row.latency.decode for row in group if row.latency])
        prefill.set_title(f"{kind}: prefill{_load(group)}")
        decode.set_title(f"{kind}: decode of one token")
        prefill.set_xlabel("time to first token (ms)")
        decode.set_xlabel("time per output token (ms)")
    return figure


def _bars(axes: "Axes", rows: list[Row], timings: list[Timing]) -> None:
    for y, (row, timing) in enumerate(zip(rows, timings, strict=True)):
        low, middle, high = (1e3 * seconds for seconds in (timing.ci95[0], timing.p50, timing.ci95[1]))
        spread = [[max(middle - low, 0)], [max(high - middle, 0)]]
        axes.barh(y, middle, height=0.68, **style.fill(row))
        axes.errorbar(middle, y, xerr=spread, color=style.INK, capsize=2, linewidth=1)
        style.value_at(axes, max(high, middle), y, milliseconds(timing.p50))
    style.name_bars(axes, labels(rows))
    axes.set_xlim(0, 1.17e3 * max(max(timing.p50, timing.ci95[1]) for timing in timings))


def _load(rows: list[Row]) -> str:
    """What was prefilled, where all rows agree on it."""
    loads = {(row.latency.prompt_tokens, row.latency.batch) for row in rows if row.latency}
    if len(loads) != 1:
        return ""
    ((tokens, batch),) = loads
    return f" of {count(tokens, 'token')}, batch {batch}"
