"""Whether the rows say the same: a matrix of every pair, and a table against the first row."""

from typing import TYPE_CHECKING, NamedTuple

from eval.results import Agreement, Results, Row
from plots import style
from plots.numbers import share, significant, tiny
from plots.pairs import base_name, int8_pair
from plots.rows import codes, count, label, labels

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = ("row", "mean logit gap", "largest", "KL (nats/token)", "top-1", "greedy tokens alike")
_FLOOR, _CEILING = 1e-6, 1.0  # nats a token: below, nobody can tell; above, little is left in common
_WHITE_ABOVE = 5e-3  # where the cell is dark


class Words(NamedTuple):
    """What the report says of agreement."""

    summary: str
    lines: list[tuple[str, ...]]
    """Cells under `COLUMNS`."""
    note: str


def against_first(results: Results) -> Words | None:
    """Each row against the first, which is the dense model; `None` where nothing was compared."""
    found = results.agreement
    if found is None:
        return None
    rows = [_row(key) for key in found.rows]
    lines: list[tuple[str, ...]] = [
        (
            label(row),
            tiny(found.logit_mean[0][index]),
            tiny(found.logit_max[0][index]),
            tiny(found.kl[0][index]) + (f" ± {tiny(found.kl_stderr[0][index])}" if found.kl_stderr else ""),
            _with_error(found.top1, found.top1_stderr, 0, index),
            ", ".join("all" if shared is None else str(shared) for shared in found.diverged[0][index]),
        )
        for index, row in enumerate(rows)
        if index
    ]
    note = (
        f"On {count(found.tokens, 'token')} of the evaluation text in windows of {found.context:,}: the absolute "
        "difference of the logits; what is lost a token by taking the row for the first one; the share of positions "
        "with the same likeliest token; and, for each of "
        f"{count(len(found.diverged[0][0]), 'prompt')} of {count(found.prompt_tokens, 'token')}, how many of "
        f"{count(found.new_tokens, 'greedy new token')} come before the first that differs."
        f"{' After ±: the standard error.' if found.kl_stderr else ''}"
    )
    return Words(f"{_int8(results, found)}Against {label(rows[0])}:", lines, note)


def _row(key: str) -> Row:
    stage, engine, device, precision = key.split("/")
    return Row(stage, engine, device, precision)


def _int8(results: Results, found: Agreement) -> str:
    """One sentence: whether the quantised row says what the FP32 weights say with the same arithmetic."""
    pair = int8_pair(results)
    if pair is None or not {pair.row.key, pair.base.key} <= set(found.rows):
        return ""
    a, b = found.rows.index(pair.base.key), found.rows.index(pair.row.key)
    whole = sum(shared is None for shared in found.diverged[a][b])
    besides = f" (besides: {pair.besides})" if pair.besides else ""
    return (
        f"{codes(pair.row)} holds the same token for the likeliest as its {base_name(pair)}{besides} at "
        f"{_with_error(found.top1, found.top1_stderr, a, b)} of "
        f"{count(found.tokens, 'position')} and loses {tiny(found.kl[a][b])}"
        f"{f' ± {tiny(found.kl_stderr[a][b])}' if found.kl_stderr else ''} nats a token by KL divergence; "
        f"{whole} of {count(len(found.diverged[a][b]), 'greedy continuation')} of "
        f"{count(found.new_tokens, 'token')} are the same throughout. "
    )


def _with_error(shares: list[list[float]], errors: list[list[float]] | None, a: int, b: int) -> str:
    """`99.1 ± 0.3 %`: a share with its standard error."""
    error = f" ± {significant(100 * errors[a][b], 2)} %" if errors else ""
    return f"{share(shares[a][b]).removesuffix(' %') if errors else share(shares[a][b])}{error}"


@style.styled
def draw(results: Results) -> "Figure | None":
    """KL(row || column) as colour; in each cell its value, and below it the top-1 agreement."""
    from matplotlib.colors import LogNorm

    found = results.agreement
    if found is None:
        return None
    size = len(found.rows)
    note = (
        "In each cell: KL(row || column) in nats a token, the colour too; below it the share of positions with the "
        f"same likeliest token. {count(found.tokens, 'token')}, windows of {found.context:,}."
    )
    side = max(0.46, min(0.8, 6 / size))
    figure = style.frame("Agreement", 0.62 * side * size + 0.9, note, width=max(style.WIDTH, side * size + 3.4))
    axes = figure.subplots()
    colours = [
        [float("nan") if a == b else min(max(value, _FLOOR), _CEILING) for b, value in enumerate(row)]
        for a, row in enumerate(found.kl)
    ]
    image = axes.imshow(colours, cmap="YlOrBr", norm=LogNorm(_FLOOR, _CEILING), aspect="auto")
    for a in range(size):
        for b in range(size):
            dark = colours[a][b] > _WHITE_ABOVE
            text = "–" if a == b else f"{tiny(found.kl[a][b])}\n{share(found.top1[a][b]).replace(' %', '%')}"
            ink = style.INK if a == b else style.ON_DEEP if dark else style.ON_PALE
            cell = axes.text(b, a, text, ha="center", va="center", fontsize=7, color=ink)
            cell.set_in_layout(False)  # it lies within the axes; to measure it again and again takes a second
    names = labels([_row(key) for key in found.rows])
    axes.set_yticks(range(size), [f"{name}   {index + 1}" for index, name in enumerate(names)])
    axes.set_xticks(range(size), [str(index + 1) for index in range(size)])
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=axes, fraction=0.03, pad=0.02, extend="both")
    bar.set_ticks([10.0**power for power in range(-6, 1)], labels=[tiny(10.0**power) for power in range(-6, 1)])
    bar.minorticks_off()
    bar.set_label("KL divergence (nats a token)")
    bar.outline.set_visible(False)
    return figure
