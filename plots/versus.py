"""Two runs side by side: each row's numbers in A and in B, their ratio, and where no ratio may be drawn."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from eval.results import Quality, Results, Row, Timing
from eval.statistics import Ratio, perplexity_ratio, ratio
from plots import style
from plots.numbers import NONE, megabytes, milliseconds, perplexity, significant, span
from plots.pairs import paired
from plots.rows import by_kind, count, label, labels, same_text
from plots.table import aligned

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMNS = ("row", "A", "B", "B/A", "verdict")
_Pair = tuple[Row | None, Row | None]


class Line(NamedTuple):
    """One row of a measure as text, and its ratio as numbers too. `interval`, of 95 %, is empty where there is none."""

    row: Row
    a: str
    b: str
    ratio: str
    interval: str
    value: Ratio | None
    verdict: str
    """`faster`, `alike`, ...; else why there is no ratio."""


class Table(NamedTuple):
    """One measure of all rows that either run has."""

    title: str
    lines: list[Line]


class Comparison(NamedTuple):
    """All that the numbers of two runs say together."""

    summary: list[str]
    tables: list[Table]
    lone: list[tuple[str, str, str]]
    """Rows that were measured in one run only: name, which run, and why the other has none."""
    caveats: list[str]


@dataclass(frozen=True)
class _Measure:
    title: str
    value: Callable[[Row], Timing | Quality | float | None]
    """Samples or parts where there are any: then the ratio has an interval."""
    show: Callable[[float], str]
    less: str = "smaller"
    more: str = "larger"
    barrier: Callable[[Row, Row], str] = lambda a, b: ""
    """Why two rows' values make no ratio; empty where they do."""


def _bytes(value: float) -> str:
    return megabytes(round(value))


def _text(a: Row, b: Row) -> str:
    same = a.quality is None or b.quality is None or same_text(a.quality, b.quality)
    return "" if same else "another text, share of it, tokenizer, context or stride"


def _load(a: Row, b: Row) -> str:
    loads = [(each.prompt_tokens, each.new_tokens, each.batch) for each in (a.latency, b.latency) if each]
    return "" if len(set(loads)) < 2 else "another prompt, number of new tokens or batch"


_SPEED = ("faster", "slower", _load)
_MEASURES = (
    _Measure("Perplexity", lambda r: r.quality, perplexity, "better", "worse", _text),
    _Measure("Decode (ms per token)", lambda r: r.latency.decode if r.latency else None, milliseconds, *_SPEED),
    _Measure("Prefill (ms)", lambda r: r.latency.prefill if r.latency else None, milliseconds, *_SPEED),
    _Measure("Peak RSS (MB)", lambda r: (r.memory.peak_rss or None) if r.memory else None, _bytes),
    _Measure("GPU memory (MB)", lambda r: (r.memory.gpu_process or None) if r.memory else None, _bytes),
    _Measure("Size on disk (MB)", lambda r: r.bytes_on_disk or None, _bytes),
)


def compare(a: Results, b: Results) -> Comparison:
    """The rows of A in their order, then those that only B has."""
    pairs, apart = _pairs(a, b), _other_machine(a, b)
    tables = []
    for measure in _MEASURES:
        lines = [line for pair in pairs if (line := _line(measure, *pair, apart))]
        if lines:
            tables.append(Table(measure.title, lines))
    caveats = _caveats(a, b, pairs, apart)
    return Comparison([*_ends(pairs, apart), *map(_tally, tables)], tables, _lone(pairs), caveats)


def _pairs(a: Results, b: Results) -> list[_Pair]:
    ours, theirs = ({row.key: row for row in results.rows} for results in (a, b))
    return [(ours.get(key), theirs.get(key)) for key in dict.fromkeys([*ours, *theirs])]


def _live(row: Row | None) -> bool:
    return row is not None and row.skipped is None


def _line(measure: _Measure, a: Row | None, b: Row | None, apart: str) -> Line | None:
    """The row's line; `None` where neither run has a value."""
    row = a or b
    ours, theirs = (measure.value(each) if each and each.skipped is None else None for each in (a, b))
    if row is None or (ours is None and theirs is None):
        return None
    left, right = (NONE if value is None else measure.show(_middle(value)) for value in (ours, theirs))
    if a is None or b is None or ours is None or theirs is None:
        return Line(row, left, right, NONE, "", None, f"in {'B' if ours is None else 'A'} only")
    if why := measure.barrier(a, b) or (apart if isinstance(ours, Timing) else ""):
        return Line(row, left, right, NONE, "", None, f"not comparable: {why}")
    value = _middle(theirs) / _middle(ours)
    found = _with_interval(theirs, ours)
    if found is not None:
        between = span(found.low, found.high, 3)
        verdict = measure.less if found.lower else measure.more if found.higher else "not measurably different"
    elif isinstance(ours, Quality):
        found, between, verdict = Ratio(value, value, value), "", "not judged (no interval)"
    else:
        found, between = Ratio(value, value, value), ""
        verdict = "alike" if _ratio(value) == "1.000" else measure.less if value < 1 else measure.more
    return Line(row, left, right, _ratio(found.value), between, found, verdict)


def _with_interval(theirs: Timing | Quality | float, ours: Timing | Quality | float) -> Ratio | None:
    if isinstance(theirs, Timing) and isinstance(ours, Timing):
        return ratio(theirs, ours, interleaved=False)
    if isinstance(theirs, Quality) and isinstance(ours, Quality):
        return perplexity_ratio(theirs, ours)
    return None


def _middle(value: Timing | Quality | float) -> float:
    return value.p50 if isinstance(value, Timing) else value.perplexity if isinstance(value, Quality) else value


def _ratio(value: float) -> str:
    return f"{value:,.3f}"


def _other_machine(a: Results, b: Results) -> str:
    """Why times of the two do not compare; empty where one machine made both."""
    machines = [results.run.get("machine") for results in (a, b)]
    if not all(machines):
        return "a run does not say which machine made it"
    return "" if machines[0] == machines[1] else "another machine"


def _ends(pairs: list[_Pair], apart: str) -> list[str]:
    """One sentence for each kind of device: the last step of the chain that both runs measured."""
    both = {a.key: (a, b) for a, b in pairs if a and b and _live(a) and _live(b) and a.role == "chain"}
    found = []
    for name, rows in by_kind(a for a, _ in both.values()).items():
        a, b = both[rows[-1].key]
        parts = []
        for measure in _MEASURES:
            line = _line(measure, a, b, apart)
            if line and line.ratio != NONE:
                between = f" ({line.interval})" if line.interval else ""
                what = measure.title.partition(" (")[0]
                parts.append(f"{what[0].lower()}{what[1:]} {line.ratio} ×{between}")
        if parts:
            found.append(f"At the end of the chain on the {name}, {label(a)}, B against A: {', '.join(parts)}.")
    return found or ["Nothing at the end of the chain can be compared."]


def _tally(table: Table) -> str:
    """How many rows went which way."""
    verdicts = [line.verdict for line in table.lines if line.ratio != NONE]
    if not verdicts:
        return f"{table.title}: no row can be compared."
    ways = ", ".join(f"{verdict} in {verdicts.count(verdict)}" for verdict in dict.fromkeys(sorted(verdicts)))
    return f"{table.title}: of {count(len(verdicts), 'comparable row')}, B is {ways}."


def _lone(pairs: list[_Pair]) -> list[tuple[str, str, str]]:
    found = []
    for a, b in pairs:
        if _live(a) != _live(b):
            has, other, names = (a, b, "AB") if _live(a) else (b, a, "BA")
            why = f"not measured in {names[1]}: {other.skipped}" if other else f"{names[1]} has no such row"
            found.append((label(has) if has else "", names[0], why))
    return found


def _caveats(a: Results, b: Results, pairs: list[_Pair], apart: str) -> list[str]:
    found = []
    both = [(ours, theirs) for ours, theirs in pairs if ours and theirs]
    if apart:
        found.append(f"Latencies are not compared: {apart}. Memory depends on the machine as well.")
    elif any(ours.latency and theirs.latency for ours, theirs in both):
        found.append(
            "The runs were not timed in turns: an interval holds the scatter within each run, not what else changed on "
            "the machine between them. The verb bench times models in turns."
        )
    computed = [(label(ours), what) for ours, theirs in both if (what := _computed(ours, theirs))]
    if computed:
        names = "; ".join(f"{name}: B has {what}" for name, what in computed)
        found.append(f"{count(len(computed), 'row')} computed otherwise in B, which the ratios hold as well: {names}.")
    if a.run.get("versions") != b.run.get("versions"):
        found.append("Libraries differ in version: what differs between the runs may come from these.")
    texts = [why for ours, theirs in both if (why := _text(ours, theirs))]
    if texts:
        found.append(f"Perplexities of {count(len(texts), 'row')} are not compared: {texts[0]}.")
    neither = [label(ours) for ours, theirs in both if not _live(ours) and not _live(theirs)]
    if neither:
        found.append(f"Measured in neither run: {', '.join(neither)}.")
    return found


def _computed(ours: Row, theirs: Row) -> str:
    """What differs in how a row was computed in the two runs; its model may differ in all that the recipes do."""
    if not _live(ours) or not _live(theirs):
        return ""
    found = paired(theirs, ours)
    return ", ".join(found.differs) if found else ""


def draw(comparison: Comparison) -> "Figure | None":
    """Every ratio as a point on a log scale, a panel for each measure, with the 95 % interval where there is one."""
    with style.look():
        return _draw(comparison)


def _draw(comparison: Comparison) -> "Figure | None":
    tables = [table for table in comparison.tables if any(line.value for line in table.lines)]
    rows = {line.row.key: line.row for table in tables for line in table.lines if line.value}
    if not rows:
        return None
    places = {key: y for y, key in enumerate(rows)}
    note = "Left of the dashed line B has less than A, which is better in every panel; whiskers: 95 % intervals."
    figure = style.frame("B/A", 0.27 * len(rows) + 0.8, note, style.role_handles(list(rows.values())))
    panels = figure.subplots(1, len(tables), sharey=True, squeeze=False)[0]
    for axes, table in zip(panels, tables, strict=True):
        for line in table.lines:
            if found := line.value:
                y = places[line.row.key]
                axes.plot((found.low, found.high), (y, y), color=style.INK, linewidth=1)
                axes.scatter(found.value, y, s=30, zorder=3, **style.fill(line.row))
        axes.axvline(1, color=style.QUIET, linestyle="--", linewidth=1)
        axes.set_title(table.title.partition(" (")[0])
        _log_scale(axes, [line.value for line in table.lines if line.value])
    style.name_bars(panels[0], labels(list(rows.values())))
    for axes in panels[1:]:
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.grid(axis="x")
    return figure


def _log_scale(axes: "Axes", found: list[Ratio]) -> None:
    """As far to the left of 1 as to the right, with three ticks that say their ratio."""
    reach = max(1.02, *(max(ratio.high, 1 / ratio.low) for ratio in found))
    style.log_scale(axes, "x")
    axes.set_xlim(reach**-1.15, reach**1.15)
    ticks = (reach**-0.8, 1.0, reach**0.8)
    axes.set_xticks(ticks, [significant(tick) for tick in ticks])
    axes.minorticks_off()


def text_table(comparison: Comparison) -> str:
    """The ratios B/A of all measures, aligned for a terminal; a dash where there is none."""
    rows = list(dict.fromkeys(label(line.row) for table in comparison.tables for line in table.lines))
    found = {(table.title, label(line.row)): line.ratio for table in comparison.tables for line in table.lines}
    heads = [table.title for table in comparison.tables]
    names = [head.partition(" (")[0] for head in heads]
    widths = [max(map(len, ("B/A", *rows))), *map(len, names)]
    head = aligned(("B/A", *names), widths)
    lines = (aligned((row, *(found.get((title, row), NONE) for title in heads)), widths) for row in rows)
    return "\n".join((head, "-" * len(head), *lines))
