"""What a reader sees, made from `results.json` alone: figures, tables, sentences."""

from pathlib import Path

from eval.results import Results

FIGURES = ("latency", "perplexity", "memory", "size", "tradeoff", "agreement", "tasks", "heads", "learning_curves")


def draw_all(results: Results, folder: Path) -> list[Path]:
    """Write NAME.png and NAME.svg for each of `FIGURES` that the results hold something for.

    A figure left from earlier results that these no longer support is removed. Returns the files written.
    """
    from plots import agreement, latency, memory, quality, style, tasks, tradeoff

    draws = {
        "latency": latency.draw,
        "perplexity": quality.draw,
        "memory": memory.draw,
        "size": memory.draw_size,
        "tradeoff": tradeoff.draw,
        "agreement": agreement.draw,
        "tasks": tasks.draw,
        "heads": quality.draw_heads,
        "learning_curves": quality.draw_learning_curves,
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
