"""What quantisation did to each matrix, in a table."""

from collections import Counter
from typing import NamedTuple

from eval.results import Results
from plots.numbers import NONE, share, tiny
from plots.rows import count

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
        f"{count(len(layers), 'linear layer')} in INT8 ({layers[0].scheme}). The rounding changes a matrix by "
        f"{share(min(layer.error for layer in layers))} to {share(worst.error)} of its norm, "
        f"{worst.name.removeprefix('transformer.')} the most.{_arithmetic([layer.kernel for layer in layers])}"
    )
    note = (
        "Weight error: the norm of the change over that of the weight. Multiplied here by: the node and kernel that "
        "OpenVINO chose on this machine; what ends in f32 or bf16 unpacks INT8 weights on their way into products of "
        "that type, so INT8 saves memory traffic there, not arithmetic."
    )
    return Words(summary, lines, note)


def _arithmetic(kernels: list[str | None]) -> str:
    """One sentence: how many products compute in which kernel."""
    known = Counter(kernel for kernel in kernels if kernel)
    parts = [f"{kernel} ({number})" for kernel, number in known.most_common()]
    return f" On this machine they are multiplied by {', '.join(parts)}." if parts else ""
