"""What each operator of a trace took, as a Markdown table and a bar chart for TensorBoard."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from torch.autograd import DeviceType

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_ROWS, _BARS = 40, 15


class Operator(NamedTuple):
    """All calls of one operator in a trace; milliseconds leave out what it called in turn."""

    name: str
    calls: int
    cpu_ms: float
    cuda_ms: float
    """For an operator the kernels that it launched itself, for a kernel its own time."""


class NodeTime(NamedTuple):
    """One node of a compiled graph, as an engine's `operator_times()` tells it."""

    name: str
    type: str
    ms: float


def operators_of(events: Iterable[Any]) -> tuple[list[Operator], list[Operator]]:
    """Own time of each operator and of each CUDA kernel among profiler events, largest first; no `record_function`."""
    totals: dict[tuple[bool, str], list[float]] = defaultdict(lambda: [0, 0.0, 0.0])
    for event in events:
        if event.is_user_annotation or event.name == "[memory]":
            continue
        total = totals[event.device_type == DeviceType.CPU, event.name]
        total[0] += 1
        total[1] += event.self_cpu_time_total / 1000
        total[2] += event.self_device_time_total / 1000
    rows = [(on_cpu, Operator(name, int(calls), cpu, cuda)) for (on_cpu, name), (calls, cpu, cuda) in totals.items()]
    largest_first = sorted(rows, key=lambda row: (-row[1].cuda_ms, -row[1].cpu_ms))
    return [op for on_cpu, op in largest_first if on_cpu], [op for on_cpu, op in largest_first if not on_cpu]


def add_operators(writer: Any, tag: str, operators: Sequence[Operator]) -> None:
    """A table and a chart, by time on the GPU if any was spent there."""
    if not operators:
        return
    on_gpu = any(op.cuda_ms for op in operators)
    times = [op.cuda_ms if on_gpu else op.cpu_ms for op in operators]
    rows = [
        (op.name, str(op.calls), f"{op.cpu_ms:.3f}", f"{op.cuda_ms:.3f}", share)
        for op, share in zip(operators, _shares(times), strict=True)
    ]
    writer.add_text(tag, markdown_table(("op", "calls", "self CPU ms", "self CUDA ms", "share"), rows))
    place = "GPU" if on_gpu else "CPU"
    writer.add_figure(tag, _chart([op.name for op in operators], times, f"{tag}: own time on the {place} (ms)"))


def add_modules(writer: Any, tag: str, modules: Mapping[str, float], place: str) -> None:
    """A table and a chart of the milliseconds that each module took itself; `place` is CPU or GPU."""
    if not modules:
        return
    names, times = list(modules), list(modules.values())
    rows = [(name, f"{ms:.3f}", share) for name, ms, share in zip(names, times, _shares(times), strict=True)]
    writer.add_text(tag, markdown_table(("module", f"self {place} ms", "share"), rows))
    writer.add_figure(tag, _chart(names, times, f"{tag}: own time on the {place} (ms)"))


def add_nodes(writer: Any, tag: str, nodes: Sequence[NodeTime]) -> None:
    """Tables of the nodes that took time and of their types, and a chart of the types."""
    nodes = sorted((node for node in nodes if node.ms > 0), key=lambda node: -node.ms)
    if not nodes:
        return
    rows = [
        (node.name, node.type, f"{node.ms:.3f}", share)
        for node, share in zip(nodes, _shares([node.ms for node in nodes]), strict=True)
    ]
    writer.add_text(tag, markdown_table(("node", "type", "ms", "share"), rows))
    types: dict[str, list[float]] = defaultdict(list)
    for node in nodes:
        types[node.type].append(node.ms)
    names = sorted(types, key=lambda name: -sum(types[name]))
    times = [sum(types[name]) for name in names]
    rows = [
        (name, str(len(types[name])), f"{ms:.3f}", share)
        for name, ms, share in zip(names, times, _shares(times), strict=True)
    ]
    writer.add_text(f"{tag} by type", markdown_table(("type", "nodes", "ms", "share"), rows))
    writer.add_figure(tag, _chart(names, times, f"{tag}: time by type of node (ms)"))


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table of the first `_ROWS` rows; the first column is a name."""
    lines = [header, ["---"] * len(header)]
    lines += [[f"`{_short(name, 100)}`", *(cell.replace("|", "/") for cell in rest)] for name, *rest in rows[:_ROWS]]
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return text if len(rows) <= _ROWS else f"{text}\n\n{len(rows) - _ROWS} smaller ones are left out."


def _shares(times: Sequence[float]) -> list[str]:
    total = sum(times) or 1.0
    return [f"{each / total:.1%}" for each in times]


def _short(name: str, width: int) -> str:
    # A bar or a back tick would end the table's cell.
    name = name.replace("|", "/").replace("`", "'")
    return name if len(name) <= width else name[: width - 1] + "…"


def _chart(names: Sequence[str], times: Sequence[float], title: str) -> "Figure":
    """Horizontal bars, longest on top."""
    from matplotlib.figure import Figure

    names, times = [_short(name, 60) for name in names[:_BARS]], times[:_BARS]
    figure = Figure(figsize=(9, 1 + 0.3 * len(names)), layout="constrained")
    axes = figure.subplots()
    # By position: names that were cut may be equal.
    bars = axes.barh(range(len(names)), times, color="#0072b2")
    axes.set_yticks(range(len(names)), names)
    axes.bar_label(bars, fmt="%.3g", padding=2)
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(title, loc="left")
    return figure
