"""What a reader sees, made from `results.json` alone: figures, tables, sentences."""

from pathlib import Path

from eval.results import Results

FIGURES = (
    "tradeoff",
    "latency",
    "perplexity",
    "memory",
    "size",
    "heads",
    "learning_curves",
    "quantization",
    "agreement",
    "tasks",
)
"""In the report's order."""


def draw_all(results: Results, folder: Path) -> list[Path]:
    """Write NAME.png and NAME.svg for each of `FIGURES` that the results hold something for.

    A figure left from earlier results that these no longer support is removed. Returns the files written.
    """
    from plots import agreement, latency, memory, quality, quantization, style, tasks, tradeoff

    draws = {
        "tradeoff": tradeoff.draw,
        "latency": latency.draw,
        "perplexity": quality.draw,
        "memory": memory.draw,
        "size": memory.draw_size,
        "heads": quality.draw_heads,
        "learning_curves": quality.draw_learning_curves,
        "quantization": quantization.draw,
        "agreement": agreement.draw,
        "tasks": tasks.draw,
    }
    folder.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    for name in FIGURES:
        figure = draws[name](results)
        if figure is None:
            for suffix in (".png", ".svg"):
                (folder / f"{name}{suffix}").unlink(missing_ok=True)
        else:
            written += style.save(figure, folder, name)
    return written
