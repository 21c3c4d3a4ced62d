"""A report as Markdown, as JSON and as a few lines for a terminal. Every time in it is an estimate."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from cuda_ext.report.gpus import GPUS
from cuda_ext.report.subjects import Row, Subject

_KINDS = {
    "load_global": "global loads", "store_global": "global stores", "atomic": "atomics", "async_copy": "async copies",
    "shared": "shared", "tensor": "tensor", "fma": "FP32", "integer": "integer, address",
    "division": "integer division", "convert": "conversions", "special": "special functions", "control": "control",
    "warp": "shuffles, votes", "barrier": "barriers", "wait": "waits",
}  # fmt: skip
_MOST_LINES = 5


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return [*lines, *("| " + " | ".join(str(cell) for cell in row) + " |" for row in rows), ""]


def _us(seconds: float) -> str:
    return f"{seconds * 1e6:.1f}" if seconds < 1e-4 else f"{seconds * 1e6:,.0f}"


def _times(row: Row) -> str:
    return "" if row.count == 1 else f" x {row.count}"


def markdown(reports: Sequence[Sequence[Subject]], title: str, facts: Sequence[str]) -> str:
    """`reports`: the subjects of each GPU; the first GPU's counts are shown. `facts`: how the page was made."""
    first = reports[0]
    lines = [
        f"# {title}",
        "",
        "**No GPU was used: every time below is an estimate by the model at the end.** Counts are exact: the PTX that "
        "nvcc emits was run by an interpreter at the launches' true geometry. What ptxas does with it, and what a GPU "
        "does with that, neither shows.",
        "",
        *(f"- {fact}" for fact in facts),
        "",
        "## Estimated times",
        "",
        *_totals(reports),
    ]
    for subject in first:
        lines += [f"## Look here first: {subject.name}, {subject.gpu.name}", "", *_first(subject), ""]
    for number, subject in enumerate(first):
        same = [report[number] for report in reports if number < len(report)]
        lines += [f"## {subject.name[0].upper()}{subject.name[1:]}, launch by launch", "", *_launches(same)]
    lines += ["## Instructions", "", *_instructions(first)]
    lines += ["## Memory", "", *_memory(first), "## Where warps wait", "", *_waits(first)]
    return "\n".join([*lines, "## The model", "", *_model()])


def _totals(reports: Sequence[Sequence[Subject]]) -> list[str]:
    rows = []
    for report in reports:
        for subject in report:
            over = subject.seconds / subject.floor if subject.floor else 0.0
            rows.append(
                (
                    subject.gpu.name, subject.name, subject.launches, f"{subject.bytes_from_dram / 1e6:,.1f}",
                    f"{subject.useful_bytes / 1e6:,.1f}", _us(subject.floor), _us(subject.seconds), f"{over:.1f}",
                )
            )  # fmt: skip
    head = (
        "GPU",
        "subject",
        "launches",
        "MB from DRAM",
        "MB of weights and KV",
        "floor, us",
        "estimate, us",
        "over floor",
    )
    return _table(head, rows)


def _first(subject: Subject) -> list[str]:
    return [
        f"{number}. **{row.operation.name}**{_times(row)}: estimate {_us(row.seconds)} us of "
        f"{_us(subject.seconds)}, floor {_us(row.count * row.floor)}. {reason(row)}"
        for number, row in enumerate(subject.first_to_look_at(), 1)
    ]


def reason(row: Row) -> str:
    """Why this kernel takes what it takes, by the part of the model that is the longest."""
    launch, guess, path = row.launch, row.estimate, row.launch.path
    places = ", ".join(f"{place} ({cycles:,.0f} cycles)" for place, cycles in _by_line(row)[:3])
    words = {
        "chain": f"Chain-bound: {path.loads} loads one behind the other ({path.dram} of DRAM, {path.l2} of L2, "
        f"{path.l1} of L1), {path.barriers} barriers, {path.cycles:,} cycles; a warp waits {_at_barriers(row):,.0f} of "
        f"them at barriers and longest for results of {places}.",
        "issue": f"Issue-bound: {launch.slots:,} slots, {_share(row, 'integer'):.0%} of them integers and addresses.",
        "DRAM": "Bandwidth-bound: bytes from DRAM.",
        "L2": "Bandwidth-bound: sectors from L2.",
        "shared": "Bound by passes through L1 and shared memory.",
        "tensor": "Bound by the tensor cores.",
    }
    said = [words[guess.bound]]
    if _share(row, "division") > 0.1:
        said.append(f"Integer divisions take {_share(row, 'division'):.0%} of its issue slots.")
    if 1 < guess.waves < 4:
        said.append(f"Its {launch.blocks} blocks are {guess.waves:.2f} waves.")
    if guess.gap > 0.3 * guess.seconds:
        said.append(f"The gap before it is {guess.gap / guess.seconds:.0%} of the estimate.")
    return " ".join(said)


def _share(row: Row, kind: str) -> float:
    """Of all issue slots."""
    return row.launch.kinds[kind][1] / max(row.launch.slots, 1)


def _warps(row: Row) -> int:
    return row.launch.blocks * -(-row.launch.threads // 32)


def _at_barriers(row: Row) -> float:
    """Cycles of a warp."""
    return sum(cycles for _, opcode, cycles in row.launch.stalls if opcode.startswith("bar")) / _warps(row)


def _launches(same: Sequence[Subject]) -> list[str]:
    """One table of geometry and occupancy, one of times: the rows of each GPU side by side."""
    first = same[0]
    geometry, times = [], []
    for number, row in enumerate(first.rows):
        launch = row.launch
        rows = [subject.rows[number] for subject in same]
        grid = " x ".join(str(side) for side in launch.grid if side > 1) or "1"
        geometry.append(
            (
                row.operation.name + _times(row), launch.title, grid, launch.threads,
                launch.shared_bytes + row.resources.shared_bytes, row.resources.registers,
                row.resources.spilled_bytes, *(_occupancy(each) for each in rows),
            )
        )  # fmt: skip
        times.append(
            (row.operation.name + _times(row), *(f"{_us(each.seconds)}, {each.estimate.bound}" for each in rows))
        )
    names = [subject.gpu.name for subject in same]
    head = [
        "operation",
        "kernel",
        "grid",
        "threads",
        "shared bytes",
        f"registers, sm_{first.gpu.architecture}",
        "spilled",
    ]
    return [
        "Blocks (and warps) a multiprocessor holds, and waves:",
        "",
        *_table([*head, *names], geometry),
        "Estimated microseconds of all launches of the row, and what bounds them:",
        "",
        *_table(["operation", *names], times),
    ]


def _occupancy(row: Row) -> str:
    held = row.estimate.occupancy
    return f"{held.blocks} ({held.warps}), {row.estimate.waves:.2f} waves; limit {held.limit}"


def _instructions(subjects: Iterable[Subject]) -> list[str]:
    lines = [
        "Instructions of warps a launch, by kind in percent of all (a division counts once here, what ptxas folds away "
        "not):",
        "",
    ]
    used = [(s, r) for s in subjects for r in s.rows]
    kinds = [kind for kind in _KINDS if any(row.launch.kinds[kind][0] for _, row in used)]
    rows = []
    for subject, row in used:
        launch, work = row.launch, row.operation
        each = [f"{100 * launch.kinds[kind][0] / launch.instructions:.0f}" for kind in kinds]
        per_byte = launch.instructions * 32 / work.bytes if work.bytes else 0.0
        per_flop = f"{launch.instructions * 32 / work.operations:.2f}" if work.operations else "-"
        rows.append((subject.name, row.operation.name, f"{launch.instructions:,}", f"{per_byte:.2f}", per_flop, *each))
    head = ["subject", "operation", "instructions", "a thread's per useful byte", "per useful FLOP"]
    return [*lines, *_table([*head, *(_KINDS[kind] for kind in kinds)], rows)]


def _memory(subjects: Iterable[Subject]) -> list[str]:
    rows, worst = [], []
    for subject in subjects:
        for row in subject.rows:
            launch = row.launch
            asked, needed = launch.sectors()
            taken, least = launch.wavefronts()
            path = launch.path
            traffic = [f"{count / 1e6:.2f}" for count in (launch.bytes_read, launch.bytes_written, launch.bytes_cold)]
            rows.append(
                (
                    subject.name,
                    row.operation.name,
                    *traffic,
                    f"{row.operation.bytes / 1e6:.2f}",
                    f"{asked / max(needed, 1):.2f}",
                    f"{taken / max(least, 1):.2f}",
                    f"{path.dram} + {path.l2} + {path.l1}",
                    f"{path.cycles:,}",
                    f"{launch.path_after_wait.cycles:,}",
                    f"{launch.barriers():.0f}",
                )
            )
            worst += [(subject, row, each) for each in _wasteful(row)]
    head = (
        "subject", "operation", "MB read", "MB written", "MB from DRAM", "useful MB", "sectors asked/needed",
        "shared passes/needed", "loads in the chain: DRAM + L2 + L1", "chain, cycles", "of them behind the launch wait",
        "barriers",
    )  # fmt: skip
    lines = _table(head, rows)
    if worst:
        lines += ["Lines that ask for more sectors than their bytes need, or whose lanes meet in a bank:", ""]
        lines += _table(
            ("subject", "operation", "line", "what", "executions", "asked/needed"),
            [
                (s.name, r.operation.name, place, what, f"{count:,}", f"{ratio:.2f}")
                for s, r, (place, what, count, ratio) in worst
            ],
        )
    return lines


def _wasteful(row: Row) -> list[tuple[str, str, int, float]]:
    """The lines that cost the most more than they need: place, kind of access, executions, asked / needed."""
    by_line: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0, 0])
    for each in row.launch.memory:
        what = "shared " if each["shared"] else "global "
        place = by_line[each["place"], what + ("store" if each["write"] else "load")]
        for index, key in enumerate(("executions", "asked", "needed")):
            place[index] += each[key]
    found = [
        (place, what, count, asked / needed)
        for (place, what), (count, asked, needed) in by_line.items()
        if needed and asked >= 1.25 * needed and asked - needed > 0.01 * row.launch.instructions
    ]
    return sorted(found, key=lambda line: -line[2] * line[3])[:3]


def _by_line(row: Row) -> list[tuple[str, float]]:
    """Where warps wait, longest first: the line whose result they wait for, cycles of a warp. Barriers left out."""
    lines: dict[str, float] = defaultdict(float)
    for place, opcode, cycles in row.launch.stalls:
        if not opcode.startswith("bar"):
            lines[place] += cycles / _warps(row)
    return sorted(lines.items(), key=lambda line: -line[1])


def _waits(subjects: Iterable[Subject]) -> list[str]:
    rows = []
    for subject in subjects:
        for row in subject.rows:
            places = ", ".join(f"{place} {cycles:,.0f}" for place, cycles in _by_line(row)[:_MOST_LINES])
            rows.append((subject.name, row.operation.name, places, f"{_at_barriers(row):,.0f}"))
    head = ("subject", "operation", "cycles a warp waits for results of, by line", "at barriers")
    return _table(head, rows)


def _model() -> list[str]:
    from cuda_ext.report import estimate, gpus

    head = (
        "GPU", "multiprocessors", "GHz", "DRAM, GB/s", "L2, GB/s", "mma, TFLOP/s", "cycles of a load: DRAM, L2, L1",
        "gap, us", "gap of a dependent launch, us",
    )  # fmt: skip
    rows = [
        (
            g.name, g.limits.multiprocessors, g.clock / 1e9, f"{g.dram / 1e9:,.0f}", f"{g.l2 / 1e9:,.0f}",
            f"{g.tensor / 1e12:.0f}", ", ".join(map(str, g.load_cycles)), g.gap * 1e6,
            "-" if g.dependent_gap is None else g.dependent_gap * 1e6,
        )
        for g in GPUS
    ]  # fmt: skip
    return [
        *(estimate.__doc__ or "").strip().splitlines()[2:],
        "",
        *_table(head, rows),
        *(gpus.__doc__ or "").splitlines()[2:],
    ]


def as_json(reports: Sequence[Sequence[Subject]], facts: dict[str, Any]) -> dict[str, Any]:
    """Everything, with the launches' counts; seconds are estimates."""
    return {
        "all_times_are": "estimates by cuda_ext/report/estimate.py; no GPU was used",
        **facts,
        "subjects": [
            {
                "gpu": subject.gpu.name,
                "subject": subject.name,
                "launches": subject.launches,
                "estimated_seconds": subject.seconds,
                "floor_seconds": subject.floor,
                "bytes_from_dram": subject.bytes_from_dram,
                "useful_bytes": subject.useful_bytes,
                "rows": [_row(row) for row in subject.rows],
            }
            for report in reports
            for subject in report
        ],
    }


def _row(row: Row) -> dict[str, Any]:
    guess = row.estimate
    return {
        **asdict(row.operation),
        "count": row.count,
        "estimated_seconds_each": guess.seconds,
        "bound": guess.bound,
        "parts": guess.parts,
        "gap": guess.gap,
        "waves": guess.waves,
        "occupancy": asdict(guess.occupancy),
        "resources": asdict(row.resources),
        "launch": asdict(row.launch),
    }


def summary(reports: Sequence[Sequence[Subject]]) -> str:
    """For a terminal."""
    lines = ["estimates; no GPU was used", f"{'GPU':<16}{'subject':<36}{'floor, us':>10}{'estimate, us':>14}"]
    for report in reports:
        lines += [f"{s.gpu.name:<16}{s.name:<36}{_us(s.floor):>10}{_us(s.seconds):>14}" for s in report]
    for subject in reports[0]:
        lines += ["", f"look first, {subject.name} on {subject.gpu.name}:"]
        lines += [line.replace("**", "") for line in _first(subject)]
    return "\n".join(lines)
