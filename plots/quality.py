"""What the stages cost in quality: perplexity, how fine-tuning went, and which heads went."""

from typing import TYPE_CHECKING, Literal

from eval.results import CurvePoint, Heads, Results, Row
from eval.statistics import perplexity_interval
from plots import style
from plots.numbers import NONE, perplexity
from plots.rows import count, labels, measured, unmeasured_note

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LOG_ABOVE = 20.0  # largest over smallest perplexity
_WHISKERS = (
    "Whiskers: each row's own 95 % interval; rows read one text, so their differences are surer than these tell."
)


@style.styled
def draw(results: Results) -> "Figure | None":
    """Perplexity of every row with its 95 % interval, as horizontal bars; control arms hatched."""
    rows = measured(results, lambda row: row.quality)
    if not rows:
        return None
    whiskers = "" if all(row.quality and row.quality.stderr is None for row in rows) else f"{_WHISKERS} "
    note = f"Lower is better. {whiskers}{unmeasured_note(results, rows)}"
    figure = style.frame("Perplexity", 0.27 * len(rows) + 0.65, note, style.role_handles(rows))
    axes = figure.subplots()
    values = [row.quality.perplexity for row in rows if row.quality]
    ends = [_ends(row) for row in rows]
    for y, (row, value, (low, high)) in enumerate(zip(rows, values, ends, strict=True)):
        axes.barh(y, value, height=0.68, **style.fill(row))
        if low < high:
            axes.errorbar(value, y, xerr=[[value - low], [high - value]], color=style.INK, capsize=2, linewidth=1)
        style.value_at(axes, high, y, perplexity(value))
    style.name_bars(axes, labels(rows))
    if max(values) > _LOG_ABOVE * min(values):
        style.log_scale(axes, "x")
        axes.set_xlim(min(values) / 2, max(high for _, high in ends) * 2)
        axes.set_xlabel("perplexity per token (log scale)")
    else:
        axes.set_xlim(0, 1.1 * max(high for _, high in ends))
        axes.set_xlabel("perplexity per token")
    return figure


def _ends(row: Row) -> tuple[float, float]:
    """The perplexity's interval, of no length where it has none."""
    assert row.quality
    return perplexity_interval(row.quality) or (row.quality.perplexity, row.quality.perplexity)


@style.styled
def draw_learning_curves(results: Results) -> "Figure | None":
    """Training loss over steps, one line a training; long curves also as a running mean.

    The control arm without a teacher has a panel of its own: its loss is another one than that of those with.
    """
    curves = {stage: curve for stage, curve in results.curves.items() if curve}
    if not curves:
        return None
    windows = {stage: max(1, len(curve) // 20) for stage, curve in curves.items()}
    note = "Training loss as logged."
    if max(windows.values()) > 1:
        note = "Thin: training loss as logged; thick: its running mean over a twentieth of the logged points."
    figure = style.frame("Learning curves", 3.2, note, [_line(stage) for stage in curves])
    alone = "control-plain"
    split = ([stage for stage in curves if (stage == alone) == own] for own in (False, True))
    groups = [group for group in split if group]
    panels = figure.subplots(1, len(groups), squeeze=False)[0]
    for axes, group in zip(panels, groups, strict=True):
        for stage in group:
            _curve(axes, stage, curves[stage], windows[stage])
        if alone in curves:
            axes.set_title("learning from the text alone" if alone in group else "learning from text and teacher")
        axes.set_xlabel("optimizer step")
        axes.set_ylabel("loss (nats per token)")
        axes.grid()
    return figure


def _dashes(stage: str) -> Literal["-", "--"]:
    return "--" if stage.startswith("control") else "-"


def _line(stage: str) -> object:
    from matplotlib.lines import Line2D

    return Line2D([], [], color=style.colour(stage), linestyle=_dashes(stage), linewidth=2, label=stage)


def _curve(axes: "Axes", stage: str, curve: list[CurvePoint], window: int) -> None:
    shade, dashes = style.colour(stage), _dashes(stage)
    steps, losses = [point.step for point in curve], [point.loss for point in curve]
    if window > 1:
        axes.plot(steps, losses, color=shade, linewidth=0.6, alpha=0.45)
        means = [sum(losses[i : i + window]) / window for i in range(len(losses) - window + 1)]
        axes.plot(steps[window - 1 :], means, dashes, color=shade, linewidth=2)
    else:
        axes.plot(steps, losses, dashes, color=shade, linewidth=1.4, marker="o", markersize=3.5)


def heads_by_layer(results: Results) -> list[tuple[str, ...]]:
    """A head and a line a layer: how many of its heads each pruning kept, and which it cut. Empty without any."""
    if not results.heads:
        return []
    layers = max(len(heads.influence) or len(heads.kept) for heads in results.heads.values())
    lines = [("layer", *results.heads)]
    for layer in range(layers):
        lines.append((str(layer), *(_choice(heads, layer) for heads in results.heads.values())))
    return lines


def _choice(heads: Heads, layer: int) -> str:
    if layer not in heads.original:
        return "gone" if layer < len(heads.influence) else NONE
    at = heads.original.index(layer)
    total, kept = len(heads.scores[at]), heads.kept[at]
    cut = [str(head) for head in range(total) if head not in kept]
    return f"{len(kept)} of {total}, without {', '.join(cut)}" if cut else f"all {total}"


@style.styled
def draw_heads(results: Results) -> "Figure | None":
    """Head scores as a heat map, layers by heads; a cross marks a pruned head."""
    maps = {stage: heads for stage, heads in results.heads.items() if any(heads.scores)}
    if not maps:
        return None
    deepest = max(len(heads.scores) for heads in maps.values())
    height = max(min(0.36, 6.0 / deepest) * deepest, 1.1) + 1.0
    gone = " Layers without a line went whole." if any(heads.influence for heads in maps.values()) else ""
    figure = style.frame("Attention heads: score and choice", height, f"× marks a pruned head.{gone}")
    panels = figure.subplots(1, max(2, len(maps)), squeeze=False)[0]
    for axes, (stage, heads) in zip(panels, maps.items(), strict=False):
        _heat_map(axes, stage, heads)
    for axes in panels[len(maps) :]:
        axes.set_visible(False)
    return figure


def _heat_map(axes: "Axes", stage: str, heads: Heads) -> None:
    width = max(len(layer) for layer in heads.scores)
    grid = [[*layer, *[float("nan")] * (width - len(layer))] for layer in heads.scores]
    image = axes.imshow(grid, cmap="viridis", aspect="auto", interpolation="nearest")
    pruned = [
        (head, layer)
        for layer, (scores, kept) in enumerate(zip(heads.scores, heads.kept, strict=True))
        for head in range(len(scores))
        if head not in kept
    ]
    total = sum(len(layer) for layer in heads.scores)
    if pruned:
        x, y = zip(*pruned, strict=True)
        # White under red: the cross shows on dark and on light cells.
        axes.scatter(x, y, marker="x", s=46, c=style.ON_DEEP, linewidths=3.6)
        axes.scatter(x, y, marker="x", s=40, c="#c00000", linewidths=1.8)
    axes.set_title(
        f"{stage}: {heads.method}, {heads.scope} scope\n{len(pruned)} of {count(total, 'head')} pruned", size=9
    )
    axes.set_xlabel("head")
    axes.set_ylabel("layer")
    axes.set_xticks(_ticks(width))
    ticks = _ticks(len(grid))
    axes.set_yticks(ticks, [str(heads.original[at]) for at in ticks])
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    bar = axes.figure.colorbar(image, ax=axes, fraction=0.06, pad=0.03)
    bar.set_label(f"{heads.method} score")
    bar.outline.set_visible(False)


def _ticks(size: int) -> range:
    return range(0, size, -(-size // 16))
