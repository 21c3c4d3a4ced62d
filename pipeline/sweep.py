"""Many runs that differ in a few choices: stages are shared, made in parallel, and measured one point at a time."""

import contextlib
import itertools
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from eval.errors import UserError
from eval.results import Results, load_results, save_json, save_text
from pipeline import hardware, launchers
from pipeline.artifacts import RunFolder, disk_errors
from pipeline.grids import Point, expand
from pipeline.launchers import Launcher, Local, Ray, Task
from pipeline.runner import RESULTS, Runner
from pipeline.stages import BY_NAME, STAGES
from pipeline.store import link

__all__ = ["Outcome", "Point", "expand", "plain", "report", "sweep"]


@dataclass
class Outcome:
    """What became of a point: results, or why there are none."""

    point: Point
    results: Results | None = None
    failure: str | None = None


def sweep(points: Sequence[Point], out: Path, *, launcher: str = "local", workers: int = 1) -> list[Outcome]:
    """Work on all points below `out`; what is there already is not done again.

    `out/points/NAME/` are run folders with a `log.txt`, `out/stages/` holds what they share; `sweep.json`,
    `sweep.md` and `sweep.png`, `.svg` tell of all of them. `workers` build at a time, on this machine or
    (`launcher="ray"`) on Ray's; then one point after the other is measured here, with nothing beside it.
    A point that fails is an outcome like the others. Raises `UserError` for an unknown launcher or an
    `out` that cannot be used.
    """
    if launcher not in ("local", "ray"):
        raise UserError(f"--launcher {launcher}: give local or ray")
    out = out.absolute()  # other machines have other working directories
    _refuse_other_choices(points, out)
    outcomes = [Outcome(point) for point in points]
    with RunFolder(out).locked(), disk_errors(out):
        local = Local()
        builder: Launcher = Ray(workers) if launcher == "ray" else local
        try:
            threads = max(1, hardware.cpu()["cores"] // workers)
            _each(builder, "built", _leaders_first(outcomes), out, workers, threads)
        finally:
            if builder is not local:
                builder.stop()
        built = [outcome for outcome in outcomes if outcome.failure is None]
        for index, outcome in enumerate(built):
            _share_measurements(out, [other.point for other in built[:index]], outcome.point)
            _each(local, "measured", [outcome], out, 1, None)
            if outcome.failure is None:
                outcome.results = load_results(_folder(out, outcome.point) / RESULTS)
        _write(outcomes, out)
    return outcomes


def _folder(out: Path, point: Point) -> Path:
    return out / "points" / point.name


def _refuse_other_choices(points: Sequence[Point], out: Path) -> None:
    """Raise `UserError` where a point was worked on by another recipe than this sweep's."""
    for folder, point in ((_folder(out, point), point) for point in points):
        found: list[tuple[str, str]] = []
        with contextlib.suppress(UserError):  # what a point misses is told when its turn comes
            found = [*Runner(point.recipe, folder).other_choices(STAGES)] if folder.exists() else []
        if found:
            raise UserError(f"{folder}: {found[0][1]}; give another --out, or delete it")


def _leaders_first(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """First one point of each set that shares all but the last stage, then the others, which find most work done."""
    seen: Counter[str] = Counter()
    order = []
    for outcome in outcomes:
        shared = outcome.point.recipe.model_dump_json(exclude={"quantize", "measure"})
        order.append((seen[shared], outcome))
        seen[shared] += 1
    return [outcome for _, outcome in sorted(order, key=lambda each: each[0])]


def _each(
    launch: Launcher, done: str, outcomes: Sequence[Outcome], out: Path, workers: int, threads: int | None
) -> None:
    """Build (with `threads` given) or measure these points, `workers` at a time; failures are noted in them."""
    tasks = [
        Task(
            each.point.recipe.model_dump(mode="json"),
            _folder(out, each.point),
            out / "stages",
            threads is None,
            threads,
        )
        for each in outcomes
    ]
    ended = itertools.count(1)

    def note(number: int, failure: str | None) -> None:
        outcome = outcomes[number]
        outcome.failure = failure
        state = done if failure is None else f"failed: {failure}"
        progress = f" ({next(ended)} of {len(tasks)})" if len(tasks) > 1 else ""
        print(f"sweep: {outcome.point.name}: {state}{progress}", file=sys.stderr, flush=True)

    launchers.each(launch, tasks, workers, note)


def _share_measurements(out: Path, earlier: Sequence[Point], point: Point) -> None:
    """Hand on quality and memory of stages that an earlier point has as well.

    Nothing is trusted: a measurement carries the fingerprint of what was measured, and how.
    """
    here = RunFolder(_folder(out, point))
    target = here.path / "measurements"
    target.mkdir(exist_ok=True)
    for stage, other in itertools.product(BY_NAME, earlier):
        there = RunFolder(_folder(out, other))
        mine, theirs = here.manifest(stage), there.manifest(stage)
        if mine is None or theirs is None or mine.content != theirs.content:
            continue
        for kind in ("quality", "memory"):
            for path in (there.path / "measurements").glob(f"{kind}-{stage}-*.json"):
                if not (target / path.name).exists():
                    link(path, target / path.name)


def _write(outcomes: Sequence[Outcome], out: Path) -> None:
    """The table and the figure of all points."""
    from plots import style
    from plots import sweep as drawing
    from plots import table as cells

    save_json(list(plain(outcomes)), out / "sweep.json")
    figure = drawing.draw([(each.point.choices, each.results) for each in outcomes if each.results])
    picture = []
    if figure is not None:
        style.save(figure, out, "sweep")
        picture = ["", "![Perplexity of each point against its choices and its decode time](sweep.png)"]
    lines = _lines(outcomes)
    answer = drawing.smallest(lines)
    said = [cells.markdown(answer), ""] if answer else []
    save_text("\n".join(["# Sweep", "", *said, drawing.markdown(drawing.table(lines)), *picture, ""]), out / "sweep.md")


def report(outcomes: Sequence[Outcome]) -> str:
    """The table of all points, as text, and which is the smallest that is good enough."""
    from plots import sweep as drawing

    lines = _lines(outcomes)
    answer = drawing.smallest(lines)
    return drawing.text(drawing.table(lines)) + (f"\n\n{answer}" if answer else "")


def _lines(outcomes: Sequence[Outcome]) -> list[tuple[dict[str, Any], Results | str]]:
    return [(each.point.choices, each.results or f"failed: {each.failure}") for each in outcomes]


def plain(outcomes: Sequence[Outcome]) -> Iterator[dict[str, Any]]:
    """The outcomes as plain data."""
    for each in outcomes:
        rows = [asdict(row) for row in each.results.rows] if each.results else []
        yield {"choices": each.point.choices, "point": each.point.name, "failure": each.failure, "rows": rows}
