"""Rows by device, by name, and against one another."""

import itertools
from collections.abc import Callable, Iterable, Sequence

from eval.results import Quality, Results, Row
from eval.statistics import Ratio, ratio

SEPARATOR = " · "
_FIELDS = (("stage", "precision"), ("stage", "engine", "precision"), ("stage", "engine", "device", "precision"))


def label(row: Row) -> str:
    """The row's full name, as in `finetune · torch · cpu · fp32`."""
    return SEPARATOR.join((row.stage, row.engine, row.device, row.precision))


def labels(rows: Sequence[Row], brief: bool = False) -> list[str]:
    """The shortest names that tell these rows apart; `brief` may leave out the engine too."""
    for fields in _FIELDS[0 if brief else 1 :]:
        names = [SEPARATOR.join(getattr(row, field) for field in fields) for row in rows]
        if len(set(names)) == len(names):
            break
    return names


def kind(row: Row) -> str:
    """`CPU` or `GPU`."""
    return "GPU" if row.device.startswith("cuda") else "CPU"


def by_kind(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows of each kind of device, the CPU first: what may be compared stands together."""
    ordered = sorted(rows, key=kind)
    return {name: list(group) for name, group in itertools.groupby(ordered, key=kind)}


def measured(results: Results, value: Callable[[Row], object]) -> list[Row]:
    """Rows that were measured here and have `value`."""
    return [row for row in results.rows if row.skipped is None and value(row) is not None]


def codes(row: Row) -> str:
    """What a quantised row holds: `INT8`, `INT4-INT8`."""
    return row.precision.upper()


def reference(results: Results, row: Row) -> Row | None:
    """The first row on the same device whose latency was measured: what speed-ups refer to."""
    return next((other for other in measured(results, lambda r: r.latency) if other.device == row.device), None)


def speedup(results: Results, row: Row) -> Ratio | None:
    """Median decode time of the `reference` over this row's; `None` where the two cannot be compared.

    The rows of a device are timed in one interleaved run, so its interval is that of pairs.
    """
    base = reference(results, row)
    if row.skipped is not None or row.latency is None or base is None or not same_load(row, base):
        return None
    assert base.latency is not None
    return ratio(base.latency.decode, row.latency.decode)


def same_load(one: Row, other: Row) -> bool:
    """Whether both latencies were measured with the same prompt, new tokens and batch, on one device."""
    if one.latency is None or other.latency is None or one.device != other.device:
        return False
    loads = [(row.prompt_tokens, row.new_tokens, row.batch) for row in (one.latency, other.latency)]
    return loads[0] == loads[1]


def same_text(one: Quality, other: Quality) -> bool:
    """Whether two perplexities were scored on the same tokens in the same windows."""
    scored = [(q.tokens, q.context, q.stride, q.text_sha256, q.text_share) for q in (one, other)]
    return scored[0] == scored[1]


def unmeasured_note(results: Results, drawn: Sequence[Row]) -> str:
    """One line on the rows that a figure leaves out; empty where it shows all."""
    skipped = sum(row.skipped is not None for row in results.rows)
    shown = {id(row) for row in drawn}
    without = sum(row.skipped is None and id(row) not in shown for row in results.rows)
    parts = []
    if skipped:
        parts.append(f"{count(skipped, 'row')} not measured here (the table says why)")
    if without:
        parts.append(f"{count(without, 'row')} without this figure's measurement")
    return f"Left out: {', '.join(parts)}." if parts else ""


def count(number: int, noun: str) -> str:
    """`1 row`, `2 rows`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
