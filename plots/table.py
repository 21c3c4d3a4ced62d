"""The table of all rows: as text for a terminal, as Markdown, and as cells for any other form."""

import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from eval.results import Results, Row, Timing
from eval.statistics import perplexity_interval
from plots import rows as compare
from plots.numbers import NONE, megabytes, millions, milliseconds, perplexity, times

COLUMNS = ("row", "params", "size MB", "perplexity", "prefill ms", "decode ms/token", "speed-up", "peak RSS MB")
MARKS = {"chain": "", "baseline": "b", "control": "c"}
_WIDTH, _REASON = 120, 30


@dataclass(frozen=True)
class Line:
    """One row as text. `cells` follow `COLUMNS`, and so do `intervals`: of 95 %, or nothing."""

    row: Row
    cells: tuple[str, ...]
    intervals: tuple[str, ...]


def lines(results: Results) -> list[Line]:
    """All rows in order; a dash where there is no value."""
    return [_line(results, row) for row in results.rows]


def _line(results: Results, row: Row) -> Line:
    latency, speedup = row.latency, compare.speedup(results, row)
    cells = (
        compare.label(row),
        millions(row.parameters),
        megabytes(row.bytes_on_disk),
        perplexity(row.quality.perplexity) if row.quality else NONE,
        milliseconds(latency.prefill.p50) if latency else NONE,
        milliseconds(latency.decode.p50) if latency else NONE,
        times(speedup.value) if speedup else NONE,
        megabytes(row.memory.peak_rss) if row.memory else NONE,
    )
    own = compare.reference(results, row) is row
    gained = f"{speedup.low:,.2f} to {speedup.high:,.2f}" if speedup and not own else ""
    timed = (interval(latency.prefill), interval(latency.decode)) if latency else ("", "")
    scored = perplexity_interval(row.quality) if row.quality else None
    between = " to ".join(map(perplexity, scored)) if scored else ""
    return Line(row, cells, ("", "", "", between, *timed, gained, ""))


def interval(timing: Timing) -> str:
    """The 95 % interval of the median in milliseconds: `5.08 to 5.23`."""
    return " to ".join(milliseconds(seconds) for seconds in timing.ci95)


def legend(results: Results) -> list[str]:
    """What the marks and units mean, and which row each speed-up refers to."""
    roles = {row.role for row in results.rows}
    notes = []
    if "baseline" in roles:
        notes.append("b: baseline, an export to compare with")
    if "control" in roles:
        notes.append("c: control arm")
    bases = {row.device: compare.reference(results, row) for row in results.rows}
    for device, base in bases.items():
        if base is not None:
            notes.append(f"speed-up on {device}: median decode time against {compare.label(base)}")
    if any(row.quality and row.quality.parts for row in results.rows):
        notes.append("perplexity: the interval is the row's own; rows on one text differ more surely than it tells")
    return [*notes, "MB: 10^6 bytes; RSS: resident memory of the process"]


def text_table(results: Results) -> str:
    """An aligned table of about 120 columns, more for long names; a row that was not measured shows its reason."""
    table = lines(results)
    names = [" ".join(filter(None, (line.cells[0], MARKS.get(line.row.role, "")))) for line in table]
    cells = [(name, *line.cells[1:]) for name, line in zip(names, table, strict=True)]
    widths = [max(map(len, column)) for column in zip(COLUMNS, *cells, strict=True)]
    out = [aligned(COLUMNS, widths)]
    out.append("-" * len(out[0]))
    for texts, line in zip(cells, table, strict=True):
        if line.row.skipped is None:
            out.append(aligned(texts, widths))
        else:
            start = aligned(texts[:3], widths)
            room = max(_WIDTH - len(start) - 2, _REASON)  # names may take more than the whole width
            out.append(f"{start}  {textwrap.shorten(line.row.skipped, room, placeholder=' …')}")
    return "\n".join((*out, "", *legend(results)))


def aligned(cells: Sequence[str], widths: Sequence[int], left: int = 1) -> str:
    """A line of a table: the first `left` cells flush left, the others flush right. Cells may end before the widths."""
    padded = (
        cell.ljust(width) if index < left else cell.rjust(width)
        for index, (cell, width) in enumerate(zip(cells, widths, strict=False))
    )
    return "  ".join(padded).rstrip()


def markdown_table(results: Results) -> str:
    """The same in Markdown, with the 95 % intervals and a last column of notes."""
    heads = (*COLUMNS, "note")
    out = [markdown_line(heads), markdown_line(("---", *["---:"] * (len(COLUMNS) - 1), "---"))]
    for line in lines(results):
        cells = [
            f"{markdown(cell)} ({between})" if between else markdown(cell)
            for cell, between in zip(line.cells, line.intervals, strict=True)
        ]
        out.append(markdown_line((*cells, markdown(note(line.row)))))
    return "\n".join(out)


def note(row: Row) -> str:
    """The row's role where it is no step of the chain, and why it was not measured."""
    parts = [row.role] if row.role != "chain" else []
    if row.skipped is not None:
        parts.append(f"not measured: {row.skipped}")
    return "; ".join(parts)


def markdown_line(cells: Iterable[str]) -> str:
    """A line of a table in Markdown; the cells are Markdown already."""
    return f"| {' | '.join(cells)} |"


def markdown(text: str) -> str:
    """Text that stays itself in Markdown: on one line, no markup, no HTML."""
    text = " ".join(text.split())
    for mark in "\\`*_[]|":
        text = text.replace(mark, f"\\{mark}")
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
