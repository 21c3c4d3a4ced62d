"""How well the rows do at tasks, beside what was published for GPT-2 124M."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from eval.results import Results, Row, Score
from eval.statistics import accuracy_interval
from plots import style
from plots.rows import label, labels, measured, unmeasured_note

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class Published(NamedTuple):
    """GPT-2 124M's accuracy, and what guessing gets."""

    name: str
    accuracy: float
    source: str
    chance: float | None
    documents: int
    """How many it is an accuracy of: all of the split."""


PUBLISHED = {
    "hellaswag": Published(
        "HellaSwag",
        0.2955,
        "HellaSwag in completion style, hellaswag.py of github.com/karpathy/build-nanogpt",
        0.25,
        10_042,
    ),
    "lambada": Published(
        "LAMBADA", 0.3256, "LAMBADA in OpenAI's variant, EleutherAI/lm-evaluation-harness issue 2159", None, 5_153
    ),
}


def names(results: Results) -> list[str]:
    """The tasks that any row was scored on, in the order of `PUBLISHED`."""
    return [task for task in PUBLISHED if any(task in row.tasks for row in results.rows)]


def columns(results: Results) -> list[str]:
    """Heads of the table of scores."""
    return ["row", *(PUBLISHED[task].name for task in names(results))]


def lines(results: Results) -> list[tuple[str, ...]]:
    """Each scored row's accuracies with their standard errors."""
    return [
        (label(row), *(_cell(row.tasks.get(task)) for task in names(results)))
        for row in measured(results, lambda row: row.tasks or None)
    ]


def _cell(score: Score | None) -> str:
    if score is None:
        return "–"
    return f"{score.accuracy:.4f} ± {score.stderr:.4f} ({score.documents:,} of {score.of:,})"


def note(results: Results) -> str:
    """What the numbers are, and where the published ones come from."""
    return (
        "Accuracy with its standard error, and how many of the task's documents, from the first on, were asked. "
        "Rows answered the same documents, so differences between them are surer than their errors tell. "
        f"{_published(results)}"
    ).strip()


def _published(results: Results) -> str:
    """Published scores are of all documents: where fewer were asked, there is nothing to compare with."""
    whole = [task for task in names(results) if _whole(results.rows, task)]
    sources = "; ".join(f"{PUBLISHED[task].accuracy} for {PUBLISHED[task].source}" for task in whole)
    parts = [f"Published for GPT-2 124M, on all documents: {sources}."] if whole else []
    parts += [
        f"Only a part of {PUBLISHED[task].name} was asked, which compares with no published score."
        for task in names(results)
        if task not in whole
    ]
    return " ".join(parts)


def _whole(rows: Sequence[Row], task: str) -> bool:
    """Whether every scored row was asked all that the published score is of."""
    return all(row.tasks[task].documents == PUBLISHED[task].documents for row in rows if task in row.tasks)


@style.styled
def draw(results: Results) -> "Figure | None":
    """Accuracy of every row by task, with 95 % intervals; dashed: GPT-2 124M as published, where all was asked."""
    rows = measured(results, lambda row: row.tasks or None)
    tasks = names(results)
    if not rows:
        return None
    caption = (
        f"Whiskers: 95 % interval (Wilson). Dashed: {_published(results)} Dotted: guessing. "
        f"{unmeasured_note(results, rows)}"
    )
    figure = style.frame("Tasks", 0.27 * len(rows) + 0.95, caption, style.role_handles(rows))
    panels = figure.subplots(1, len(tasks), sharey=True, squeeze=False)[0]
    for axes, task in zip(panels, tasks, strict=True):
        _panel(axes, task, rows)
    style.name_bars(panels[0], labels(rows))
    for axes in panels[1:]:
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
    return figure


def _panel(axes: "Axes", task: str, rows: list[Row]) -> None:
    published, most = PUBLISHED[task], PUBLISHED[task].accuracy
    whole = _whole(rows, task)
    asked = {score.documents for row in rows if (score := row.tasks.get(task))}
    for y, row in enumerate(rows):
        if score := row.tasks.get(task):
            axes.barh(y, score.accuracy, height=0.68, **style.fill(row))
            low, high = accuracy_interval(score)
            reach = [[score.accuracy - low], [high - score.accuracy]]
            axes.errorbar(score.accuracy, y, xerr=reach, color=style.INK, linewidth=1, capsize=2)
            style.value_at(axes, high, y, f"{score.accuracy:.3f}")
            most = max(most, high)
    if whole:
        axes.axvline(published.accuracy, color=style.INK, linestyle="--", linewidth=1)
    if published.chance is not None:
        axes.axvline(published.chance, color=style.QUIET, linestyle=":", linewidth=1)
    axes.set_xlim(0, 1.2 * most)
    documents = f"{' or '.join(f'{number:,}' for number in sorted(asked))} documents"
    axes.set_title(f"{published.name}: {documents}{'' if whole else ', a part'}")
    axes.set_xlabel("accuracy")
