"""A pretraining while it runs, from its curve alone."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from plots import style
from plots.style import QUIET

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class Reference(NamedTuple):
    """What OpenAI's GPT-2 124M reaches on a validation text, and who measured it."""

    loss: float
    source: str


REFERENCES = {
    "fineweb": Reference(3.424958, "FineWeb's validation loss: dev/vislog.ipynb of github.com/karpathy/llm.c"),
    "fineweb-edu": Reference(3.2924, "FineWeb-Edu's validation loss: play.ipynb of github.com/karpathy/build-nanogpt"),
}
HELLASWAG = Reference(0.294463, "HellaSwag: the same notebooks")
_HELLASWAG_DOCUMENTS = 10_042  # which the reference is of

_PANELS = (
    ("loss", "loss (nats per token)"),
    ("hellaswag", "HellaSwag accuracy"),
    ("rate", "learning rate"),
    ("grad_norm", "gradient norm"),
    ("tokens_per_second", "tokens per second"),
    ("mfu", "share of peak FLOPs"),
)

Point = Mapping[str, float]


def draw(curve: Sequence[Point], reference: str | None = None) -> "Figure | None":
    """Losses, scores, learning rate, gradient norm and speed over steps; `reference` names one of `REFERENCES`.

    A score has its reference line where all documents were asked: as `hellaswag_documents` tells.
    """
    if not curve:
        return None
    with style.look():
        return _draw(curve, reference)


def _draw(curve: Sequence[Point], reference: str | None) -> "Figure":
    panels = [(key, label) for key, label in _PANELS if any(key in point for point in curve)]
    note = "Thin: training loss as logged, gradient norms before clipping; with markers: on the validation text."
    asked = {point.get("hellaswag_documents") for point in curve if "hellaswag" in point}
    levels = {"loss": REFERENCES[reference]} if reference else {}
    if reference and asked == {_HELLASWAG_DOCUMENTS}:
        levels["hellaswag"] = HELLASWAG
    if levels:
        note += f" Dashed: OpenAI's GPT-2 124M ({'; '.join(level.source for level in levels.values())})."
    if asked and asked != {_HELLASWAG_DOCUMENTS}:
        note += " HellaSwag: a part of its documents alone, which compares with no published score."
    rows = -(-len(panels) // 2)
    figure = style.frame("Pretraining", 2.3 * rows, note)
    for axes, (key, label) in zip(figure.subplots(rows, 2, squeeze=False).flat, panels, strict=False):
        _line(axes, curve, key, marker=key == "hellaswag")
        if key == "loss":
            _line(axes, curve, "validation_loss", marker=True)
        if key in levels:
            axes.axhline(levels[key].loss, color=QUIET, linestyle="--", linewidth=1)
        axes.set_ylabel(label)
        axes.set_xlabel("optimizer step")
        axes.grid()
    for axes in figure.axes[len(panels) :]:
        axes.set_visible(False)
    return figure


def _line(axes: "Axes", curve: Sequence[Point], key: str, *, marker: bool) -> None:
    points = [(point["step"], point[key]) for point in curve if key in point]
    if points:
        look = style.series(1 if marker else 0)
        axes.plot(
            *zip(*points, strict=True),
            color=look["color"],
            linewidth=1.2 if marker else 0.9,
            marker=look["marker"] if marker else None,
            markersize=3.5,
        )
