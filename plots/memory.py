"""What the rows need in memory and on disk."""

from typing import TYPE_CHECKING, Any

from eval.results import Memory, Results, Row
from plots import style
from plots.numbers import megabytes
from plots.rows import by_kind, labels, measured, unmeasured_note

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@style.styled
def draw(results: Results) -> "Figure | None":
    """CPU rows: peak resident size on top of the libraries' own, and USS. GPU rows: device memory, in a panel apart."""
    groups = by_kind(measured(results, _drawable))
    if not groups:
        return None
    height = sum(0.27 * len(group) + 0.75 for group in groups.values())
    figure = style.frame("Memory", height, _note(results, groups), _handles(groups))
    panels = figure.subplots(
        len(groups), 1, squeeze=False, height_ratios=[len(group) + 1 for group in groups.values()]
    )[:, 0]
    for (kind, group), axes in zip(groups.items(), panels, strict=True):
        ends = [
            (_device_bar if kind == "GPU" else _host_bar)(axes, y, row, row.memory)
            for y, row in enumerate(group)
            if row.memory
        ]
        style.name_bars(axes, labels(group))
        axes.set_xlim(0, 1.14 * max(ends))
        axes.set_title("GPU: device memory" if kind == "GPU" else "CPU: resident memory of a fresh process")
        axes.set_xlabel("MB (10⁶ bytes)")
    return figure


def _drawable(row: Row) -> Memory | None:
    memory = row.memory
    if memory and row.device.startswith("cuda") and memory.gpu_process is None and memory.gpu_allocator_peak is None:
        return None
    return memory


def _host_bar(axes: "Axes", y: int, row: Row, memory: Memory) -> float:
    base, peak, unique = (
        size / 1e6 for size in (min(memory.baseline_rss, memory.peak_rss), memory.peak_rss, memory.uss)
    )
    axes.barh(y, base, height=0.68, facecolor=style.LIBRARIES, edgecolor=style.QUIET, linewidth=0.9)
    axes.barh(y, peak - base, left=base, height=0.68, **style.fill(row))
    axes.plot(unique, y, marker="D", markersize=5, color="white", markeredgecolor=style.INK)
    style.value_at(axes, max(peak, unique), y, megabytes(memory.peak_rss))
    return max(peak, unique)


def _device_bar(axes: "Axes", y: int, row: Row, memory: Memory) -> float:
    process, peak = memory.gpu_process, memory.gpu_allocator_peak
    if process is not None:
        axes.barh(y, process / 1e6, height=0.68, facecolor=style.LIBRARIES, edgecolor=style.QUIET, linewidth=0.9)
    if peak is not None:
        axes.barh(y, peak / 1e6, height=0.4, **style.fill(row))
    end = max(process or 0, peak or 0)
    texts = [megabytes(size) for size in (peak, process) if size is not None]
    style.value_at(axes, end / 1e6, y, " of ".join(texts))
    return end / 1e6


def _handles(groups: dict[str, list[Row]]) -> list[object]:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    grey: dict[str, Any] = {"facecolor": style.LIBRARIES, "edgecolor": style.QUIET}
    handles: list[object] = []
    if "CPU" in groups:
        handles.append(Patch(label="libraries before the model", **grey))
        handles.append(
            Line2D([], [], marker="D", linestyle="", color="white", markeredgecolor=style.INK, label="USS at the end")
        )
    else:
        handles.append(Patch(label="whole process", **grey))
    return handles + style.role_handles([row for group in groups.values() for row in group])


def _note(results: Results, groups: dict[str, list[Row]]) -> str:
    parts = []
    if "CPU" in groups:
        parts.append("CPU bars end at the peak resident size (RSS); the grey part was there before the model.")
    if "GPU" in groups:
        parts.append("GPU: the allocator's peak within what the whole process holds (grey).")
    return " ".join((*parts, unmeasured_note(results, [row for group in groups.values() for row in group])))


@style.styled
def draw_size(results: Results) -> "Figure | None":
    """Bytes on disk; rows that run the same files stand once."""
    rows = measured(results, lambda row: row.bytes_on_disk)
    if not rows:
        return None
    files = list({(row.stage, row.precision, row.bytes_on_disk): row for row in reversed(rows)}.values())[::-1]
    note = f"Rows that run the same files stand once. {unmeasured_note(results, rows)}"
    figure = style.frame("Size on disk", 0.27 * len(files) + 0.65, note, style.role_handles(files))
    axes = figure.subplots()
    sizes = [(row.bytes_on_disk or 0) / 1e6 for row in files]
    for y, (row, size) in enumerate(zip(files, sizes, strict=True)):
        axes.barh(y, size, height=0.68, **style.fill(row))
        style.value_at(axes, size, y, megabytes(row.bytes_on_disk))
    style.name_bars(axes, labels(files))
    axes.set_xlim(0, 1.1 * max(*sizes, 1e-6))
    axes.set_xlabel("MB (10⁶ bytes)")
    return figure
