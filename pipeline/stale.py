"""Whether the stages that stand in a run folder are those that its results were measured on."""

from collections.abc import Sequence
from pathlib import Path

from eval.errors import UserError
from eval.results import Results
from pipeline.artifacts import RunFolder


def stale_stages(folder: Path, results: Results) -> tuple[list[str], list[str]]:
    """The stages made again since, and those of which results from before this was recorded cannot tell.

    A stage that is not there, or not in the results, is in neither.
    """
    recorded, date = results.run.get("stages"), results.run.get("date")
    changed, unknown = [], []
    for stage in dict.fromkeys(row.stage for row in results.rows):
        try:
            manifest = RunFolder(folder).manifest(stage)
        except UserError:
            changed.append(stage)  # damaged: not what was measured, whatever it is
            continue
        if manifest is None:
            continue
        if isinstance(recorded, dict) and stage in recorded:
            if recorded[stage] != manifest.content:
                changed.append(stage)
        elif not isinstance(date, str) or not isinstance(manifest.date, str):
            unknown.append(stage)
        elif manifest.date > date:  # both in UTC and ISO's form
            changed.append(stage)
    return changed, unknown


def stale_caveat(folder: Path, results: Results) -> list[str]:
    """A sentence on the stages that are not what was measured, or none."""
    changed, unknown = stale_stages(folder, results)
    lines = []
    if changed:
        lines.append(f"{_named(changed)} made again after these results were measured: they tell of other files.")
    if unknown:
        lines.append(f"Whether {_named(unknown)} made again after these results were measured cannot be told.")
    return lines


def _named(stages: Sequence[str]) -> str:
    *others, last = stages
    return f"{', '.join(others)} and {last} were" if others else f"{last} was"
