"""What quantisation did to each matrix: a table, and its error layer by layer as a figure."""

import re
from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

from eval.results import QuantizedLayer, Results
from plots import style
from plots.numbers import NONE, share, tiny
from plots.rows import count

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = ("matrix", "bits", "method", "scales", "weight error", "multiplied here by")


class Words(NamedTuple):
    """What the report says of quantisation."""

    summary: str
    lines: list[tuple[str, ...]]
    """Cells under `COLUMNS`."""
    note: str


def by_layer(results: Results) -> Words | None:
    """A line a matrix; `None` where nothing was quantised."""
    layers = results.quantization
    if not layers:
        return None
    lines: list[tuple[str, ...]] = [
        (
            layer.name.removeprefix("transformer."),
            str(layer.bits),
            layer.method,
            f"{tiny(layer.scale_min)} to {tiny(layer.scale_max)}",
            share(layer.error),
            layer.kernel or NONE,
        )
        for layer in layers
    ]
    worst = max(layers, key=lambda layer: layer.error)
    summary = (
        f"{_by_scheme(layers)}. The rounding changes a matrix by "
        f"{share(min(layer.error for layer in layers))} to {share(worst.error)} of its norm, "
        f"{worst.name.removeprefix('transformer.')} the most.{_arithmetic([layer.kernel for layer in layers])}"
    )
    note = (
        "Weight error: the norm of the change over that of the weight. Multiplied here by: the node and kernel that "
        "OpenVINO chose on this machine; what ends in f32 or bf16 unpacks integer weights on their way into products "
        "of that type, so they save memory traffic there, not arithmetic."
    )
    return Words(summary, lines, note)


def _by_scheme(layers: list[QuantizedLayer]) -> str:
    """How many layers have which bits and scales."""
    schemes = Counter((layer.bits, layer.scheme) for layer in layers)
    (first, number), *others = sorted(schemes.items(), reverse=True)
    words = f"{count(number, 'linear layer')} in INT{first[0]} ({first[1]})"
    return words + "".join(f", {number} in INT{bits} ({scheme})" for (bits, scheme), number in others)


def _arithmetic(kernels: list[str | None]) -> str:
    """One sentence: how many products compute in which kernel."""
    known = Counter(kernel for kernel in kernels if kernel)
    parts = [f"{kernel} ({number})" for kernel, number in known.most_common()]
    return f" On this machine they are multiplied by {', '.join(parts)}." if parts else ""


@style.styled
def draw(results: Results) -> "Figure | None":
    """Each kind of matrix as a line over the layers; one that stands outside the layers as a level line."""
    from matplotlib.lines import Line2D

    if not results.quantization:
        return None
    kinds: dict[str, list[tuple[int | None, float]]] = {}
    for matrix in results.quantization:
        kind, layer = _place(matrix)
        kinds.setdefault(kind, []).append((layer, 100 * matrix.error))
    note = "The norm of what rounding changed over that of the weight. Dashed: a matrix outside the layers."
    looks = {kind: {**style.series(index), "linewidth": 1.2} for index, kind in enumerate(kinds)}
    layers = 1 + max((layer or 0 for points in kinds.values() for layer, _ in points))
    for kind, points in kinds.items():
        if any(layer is None for layer, _ in points):
            looks[kind] |= {"marker": "", "linestyle": "--"}
    handles = [Line2D([], [], label=kind, **look) for kind, look in looks.items()]
    figure = style.frame("Weight error of quantisation", 2.8, note, handles)
    axes = figure.subplots()
    for kind, points in kinds.items():
        # A matrix outside the layers goes from side to side.
        places = [
            (at, error)
            for layer, error in sorted(points, key=lambda point: point[0] or 0)
            for at in ((layer,) if layer is not None else (-0.5, layers - 0.5))
        ]
        axes.plot(*zip(*places, strict=True), **looks[kind])
    axes.set_xlabel("layer")
    axes.set_ylabel("weight error (%)")
    axes.set_xlim(-0.5, layers - 0.5)
    axes.set_xticks(range(0, layers, -(-layers // 16)))
    axes.set_ylim(0, 1.08 * max(100 * matrix.error for matrix in results.quantization))
    axes.grid()
    return figure


def _place(matrix: QuantizedLayer) -> tuple[str, int | None]:
    """`("mlp.c_fc", 3)` for `transformer.h.3.mlp.c_fc`; no layer for the LM head."""
    found = re.fullmatch(r"transformer\.h\.(\d+)\.(.+)", matrix.name)
    return (found[2], int(found[1])) if found else (matrix.name.removeprefix("transformer."), None)
