"""One look for all figures: colours, fonts, the frame around the panels, and saving without a trace of when."""

import functools
import os
import re
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from eval.results import Results, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito (2008): told apart under the common kinds of colour blindness.
COLOURS = {
    "load": "#5f5f5f",
    "half": "#56b4e9",
    "prune": "#e69f00",
    "finetune": "#009e73",
    "quantize": "#0072b2",
    "control-finetune": "#cc79a7",
    "control-random": "#d55e00",
    "control-plain": "#a6761d",  # Okabe and Ito have no eighth that can be seen on white
}
OTHER = "#7a7a7a"
PAPER = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.4}  # keeps grid lines out of text
INK, QUIET, GRID, LIBRARIES = "#222222", "#666666", "#dddddd", "#c9c9c9"
ON_PALE, ON_DEEP = "#212121", "#fefefe"  # on colours that are the same by day and by night
_NIGHT_PAPER = "#17171a"
_NIGHT = {
    "#ffffff": _NIGHT_PAPER,
    INK: "#ececf0",
    QUIET: "#a9a9b2",
    GRID: "#3a3a40",
    LIBRARIES: "#55555c",
    COLOURS["load"]: "#a0a0a8",
}
"""What an SVG puts in the place of a colour where the reader's screen is dark."""
ROLES = {"chain": "step of the chain", "baseline": "export to compare with", "control": "control arm"}
WIDTH = 9.0  # inches
_HEADER, _FOOTER_LINE = 0.58, 0.16  # inches

_LOOK: dict[str, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial", "sans-serif"],
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": QUIET,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": INK,
    "ytick.color": INK,
    "hatch.linewidth": 0.8,
    "figure.facecolor": "white",
    "text.parse_math": False,  # a name may hold dollars
    "svg.fonttype": "none",  # text stays text: it can be searched, selected and read aloud
    "svg.hashsalt": "headroom",
}


@contextmanager
def look() -> Iterator[None]:
    """Matplotlib's defaults with our look on top, whatever the user's own settings are."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        settings: Any = matplotlib.rcParams
        settings.update(_LOOK)
        yield


def styled(draw: "Callable[[Results], Figure | None]") -> "Callable[[Results], Figure | None]":
    """Run a figure function under `look`."""

    @functools.wraps(draw)
    def with_look(results: Results) -> "Figure | None":
        with look():
            return draw(results)

    return with_look


def colour(stage: str) -> str:
    """The colour of a stage."""
    return COLOURS.get(stage, OTHER)


def series(index: int) -> dict[str, Any]:
    """Colour and marker of the `index`-th line of a figure whose lines are no stages."""
    colours = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#5f5f5f")
    return {"color": colours[index % 7], "marker": "os^Dv<>"[index % 7]}


def fill(row: Row) -> dict[str, Any]:
    """Patch properties of a row: solid in the chain, pale for a baseline, hatched for a control arm.

    Solid ones have a deeper edge: the lighter colours alone are hard to see on white.
    """
    shade = colour(row.stage)
    if row.role == "control":
        return {"facecolor": "white", "edgecolor": shade, "hatch": "/////", "linewidth": 0.9}
    if row.role == "baseline":
        return {"facecolor": _pale(shade), "edgecolor": shade, "linewidth": 0.9}
    return {"facecolor": shade, "edgecolor": _mix(shade, "#000000", 0.65), "linewidth": 0.9}


def _pale(shade: str, paper: str = "#ffffff") -> str:
    return _mix(shade, paper, 0.35)


def _mix(shade: str, other: str, part: float) -> str:
    """`part` of a colour, the rest of another."""
    pairs = ((int(shade[i : i + 2], 16), int(other[i : i + 2], 16)) for i in (1, 3, 5))
    return "#" + "".join(f"{round(part * one + (1 - part) * two):02x}" for one, two in pairs)


def role_handles(rows: Sequence[Row]) -> list[Any]:
    """Legend patches for the roles that occur; none where there is but one."""
    from matplotlib.patches import Patch

    present = [role for role in ROLES if any(row.role == role for row in rows)]
    if len(present) < 2:
        return []
    return [Patch(label=ROLES[role], **fill(Row("any", "any", "any", "any", role=role))) for role in present]


def frame(title: str, height: float, note: str = "", handles: Sequence[Any] = (), width: float = WIDTH) -> "Figure":
    """An empty figure whose panels take `height` inches between a title with legend and a note."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = textwrap.wrap(note, int(width * 15.5))
    footer = _FOOTER_LINE * len(lines) + 0.1
    header = _HEADER if handles else _HEADER - 0.26
    total = height + header + footer
    figure = Figure(figsize=(width, total), layout="constrained")
    FigureCanvasAgg(figure)
    engine: Any = figure.get_layout_engine()
    engine.set(rect=(0.01, footer / total, 0.98, height / total))
    left = 0.12 / width
    figure.text(left, 1 - 0.1 / total, title, va="top", fontsize=11, fontweight="bold")
    if handles:
        figure.legend(
            handles=list(handles),
            loc="upper left",
            bbox_to_anchor=(left, 1 - 0.32 / total),
            ncols=len(handles),
            frameon=False,
            fontsize=8.5,
            borderpad=0,
            borderaxespad=0,
            handlelength=1.8,
            handletextpad=0.9,
            columnspacing=1.8,
        )
    if lines:
        figure.text(left, 0.07 / total, "\n".join(lines), va="bottom", fontsize=8, color=QUIET)
    return figure


def log_scale(axes: "Axes", which: Literal["x", "y"]) -> None:
    """A log scale with plain numbers at its ticks: matplotlib's own are formulas, which `look` leaves unread."""
    from matplotlib.ticker import LogFormatter

    axes.set(**{f"{which}scale": "log"})
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_formatter(LogFormatter())
    axis.set_minor_formatter(LogFormatter(labelOnlyBase=False, minor_thresholds=(1, 0.4)))


def name_bars(axes: "Axes", names: Sequence[str]) -> None:
    """Name horizontal bars from the top down."""
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x")


def value_at(axes: "Axes", x: float, y: float, text: str) -> None:
    """Write a bar's value beside its end."""
    axes.annotate(text, (x, y), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8, bbox=PAPER)


def save(figure: "Figure", folder: Path, name: str) -> list[Path]:
    """Write NAME.png (150 dpi) and NAME.svg: the same bytes for the same figure, each file whole or not at all.

    The SVG follows the reader's screen, light or dark; on paper it is light.
    """
    paths = []
    with look():
        for suffix, metadata in ((".png", {"Software": None}), (".svg", {"Date": None, "Creator": None})):
            path = folder / f"{name}{suffix}"
            temporary = folder / f".{name}.{os.getpid()}{suffix}"
            try:
                figure.savefig(temporary, dpi=150, metadata=metadata)
                if suffix == ".svg":
                    drawing = _named_clips(temporary.read_text(encoding="utf-8"), name)
                    temporary.write_text(drawing.replace("</style>", f"{_at_night()}</style>", 1), encoding="utf-8")
                os.replace(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)
            paths.append(path)
    return paths


def _named_clips(drawing: str, name: str) -> str:
    """Clip paths by number: matplotlib hashes coordinates, whose last bits differ from one process to the next."""
    for number, found in enumerate(dict.fromkeys(re.findall(r'<clipPath id="(p[0-9a-f]{10})"', drawing))):
        drawing = drawing.replace(found, f"{name}-clip-{number}")
    return drawing


def _at_night() -> str:
    """CSS that overrules the colours matplotlib writes into each element."""
    pales = {_pale(shade): _pale(_NIGHT.get(shade, shade), _NIGHT_PAPER) for shade in (*COLOURS.values(), OTHER)}
    rules = (
        f'[style*="fill: {day}"],[fill="{day}"]{{fill:{night}!important}}'
        f'[style*="stroke: {day}"]{{stroke:{night}!important}}'
        for day, night in (_NIGHT | pales).items()
    )
    return f"@media screen and (prefers-color-scheme: dark){{{''.join(rules)}}}"
