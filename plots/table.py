"""The table of all rows: as text for a terminal, as Markdown, and as cells for any other form."""

import textwrap
from dataclasses import dataclass

from eval.results import Results, Row, Timing
from plots import rows as compare
from plots.numbers import NONE, megabytes, millions, milliseconds, perplexity, times

COLUMNS = ("row", "params", "size MB", "perplexity", "prefill ms", "decode ms/token", "speed-up", "peak RSS MB")
MARKS = {"chain": "", "baseline": "b", "control": "c"}
_WIDTH = 120


@dataclass(frozen=True)
class Line:
    """One row as text. `cells` follow `COLUMNS`, and so do `intervals`: 95 % of the median, or nothing."""

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
    return Line(row, cells, ("", "", "", "", *timed, gained, ""))


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
    return [*notes, "MB: 10^6 bytes; RSS: resident memory of the process"]


def text_table(results: Results) -> str:
    """An aligned table of at most about 120 columns; a row that was not measured shows its reason."""
    table = lines(results)
    names = [" ".join(filter(None, (line.cells[0], MARKS.get(line.row.role, "")))) for line in table]
    first = max(len(text) for text in (*names, COLUMNS[0]))
    widths = [
        max(len(text) for text in column) for column in zip(COLUMNS, *(line.cells for line in table), strict=True)
    ]
    out = [_aligned(COLUMNS, first, widths)]
    out.append("-" * len(out[0]))
    for name, line in zip(names, table, strict=True):
        if line.row.skipped is None:
            out.append(_aligned((name, *line.cells[1:]), first, widths))
        else:
            start = _aligned((name, *line.cells[1:3]), first, widths)
            reason = " ".join(line.row.skipped.split())
            out.append(f"{start}  {textwrap.shorten(reason, _WIDTH - len(start) - 2, placeholder=' …')}")
    return "\n".join((*out, "", *legend(results)))


def _aligned(cells: tuple[str, ...], first: int, widths: list[int]) -> str:
    numbers = (cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=False))
    return "  ".join((cells[0].ljust(first), *numbers))


def markdown_table(results: Results) -> str:
    """The same in Markdown, with the 95 % intervals and a last column of notes."""
    heads = (*COLUMNS, "note")
    out = [_markdown_line(heads), _markdown_line(("---", *["---:"] * (len(COLUMNS) - 1), "---"))]
    for line in lines(results):
        cells = [
            f"{markdown(cell)} ({between})" if between else markdown(cell)
            for cell, between in zip(line.cells, line.intervals, strict=True)
        ]
        out.append(_markdown_line((*cells, markdown(note(line.row)))))
    return "\n".join(out)


def note(row: Row) -> str:
    """The row's role where it is no step of the chain, and why it was not measured."""
    parts = [row.role] if row.role != "chain" else []
    if row.skipped is not None:
        parts.append(f"not measured: {row.skipped}")
    return "; ".join(parts)


def _markdown_line(cells: tuple[str, ...]) -> str:
    return f"| {' | '.join(cells)} |"


def markdown(text: str) -> str:
    """Text that stays itself in Markdown: on one line, no markup, no HTML."""
    text = " ".join(text.split())
    for mark in "\\`*_[]|":
        text = text.replace(mark, f"\\{mark}")
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
