"""What docs/cuda-log.md predicted, beside what a run of the benchmark measured.

The log keeps a table for people; `PREDICTIONS` is the same in numbers, and a test holds one against the other.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.subjects import EAGER, NO_DEPENDENT, PEER, Case

HELD = 1.2
"""A prediction holds within a fifth: up to this factor above its range, or below."""
PREDICTED_ON = "H200"


@dataclass(frozen=True)
class Prediction:
    """Microseconds of a subject in a case, from `low` to `high`: a line of the log, named by its `step`."""

    step: str
    case: str
    subject: str
    low: float
    high: float


# Steps 4 and 6 are no longer to be had alone; step 3 is today's graph without dependent launches.
PREDICTIONS = (
    Prediction("decode 0", "decode 1 x 480", EAGER, 500, 1500),
    Prediction("decode 1", "decode 1 x 480", PEER, 200, 300),
    Prediction("decode 2", "decode 1 x 480", "cuda eager", 250, 250),
    Prediction("decode 3", "decode 1 x 480", NO_DEPENDENT, 130, 130),
    Prediction("decode 5", "decode 1 x 480", "cuda graph", 95, 95),
    Prediction("decode 7", "decode 1 x 480", "cuda persistent", 70, 80),
    Prediction("prefill 0", "prefill 1 x 1024", EAGER, 2000, 3000),
    Prediction("prefill 1", "prefill 1 x 1024", PEER, 600, 800),
    Prediction("prefill 4", "prefill 1 x 1024", "cuda", 400, 400),
)


@dataclass(frozen=True)
class Goal:
    """Of a case: percent of the card's own measured bandwidth, or how many times faster than the compiled peer."""

    case: str
    percent: float | None = None
    over_peer: float | None = None


GOALS = (
    Goal("decode 1 x 480", percent=60),
    Goal("decode 1 x 480", percent=80),
    Goal("decode 8 x 480", over_peer=1.5),
    Goal("decode 32 x 480", over_peer=1.5),
    Goal("prefill 1 x 512", over_peer=1.2),
    Goal("prefill 1 x 1024", over_peer=1.2),
    Goal("prefill 8 x 1024", over_peer=1.2),
)


def verdict(low: float, high: float, measured: float | None) -> str:
    """ "held", by what factor it missed, or "not measured". Times in one unit, positive."""
    if measured is None:
        return "not measured"
    factor = measured / high if measured > high else low / measured if measured < low else 1.0
    if factor <= HELD:
        return "held"
    return f"missed: {factor:.1f} times {'slower' if measured > high else 'faster'}"


def measured(cases: Iterable[Mapping[str, Any]], case: str, subject: str) -> Mapping[str, Any] | None:
    """The figures of a subject in a case of gpu.json's `cases`, None where it was not timed."""
    for entry in cases:
        if name_of(entry) == case:
            found: Mapping[str, Any] | None = entry.get("figures", {}).get("subjects", {}).get(subject)
            return found
    return None


def name_of(entry: Mapping[str, Any]) -> str:
    """The case of an entry of gpu.json's."""
    return Case(**entry["case"]).name


def predictions_table(cases: Iterable[Mapping[str, Any]]) -> str:
    """Markdown: each prediction with what was measured."""
    rows = list(cases)
    lines = ["| step | case | subject | predicted, us | measured, us | |", "|---|---|---|---:|---:|---|"]
    for one in PREDICTIONS:
        figures = measured(rows, one.case, one.subject)
        time = None if figures is None else figures["microseconds"]
        wanted = f"{one.low:,.0f}" if one.low == one.high else f"{one.low:,.0f} to {one.high:,.0f}"
        shown = "" if time is None else f"{time:,.1f}"
        lines.append(
            f"| {one.step} | {one.case} | {one.subject} | {wanted} | {shown} | {verdict(one.low, one.high, time)} |"
        )
    return "\n".join(lines) + "\n"


def goals_table(cases: Iterable[Mapping[str, Any]]) -> str:
    """Markdown: each goal with the engine's fastest subject of that case."""
    rows = list(cases)
    lines = ["| case | goal | fastest | reached | |", "|---|---|---|---:|---|"]
    for goal in GOALS:
        wanted = f"{goal.percent:.0f} % of measured bandwidth" if goal.percent else f"{goal.over_peer:g} x the peer"
        name, figures = _fastest(rows, goal.case)
        value = None
        if figures is not None and goal.percent:
            value = figures.get("percent_of_ceiling")
        elif figures is not None and "over_peer" in figures:
            value = figures["over_peer"]["value"]
        if value is None:
            lines.append(f"| {goal.case} | {wanted} | {name} | | not measured |")
            continue
        shown = f"{value:.0f} %" if goal.percent else f"{value:.2f} x"
        reached = value >= (goal.percent or goal.over_peer or 0.0)
        lines.append(f"| {goal.case} | {wanted} | {name} | {shown} | {'reached' if reached else 'missed'} |")
    return "\n".join(lines) + "\n"


def _fastest(cases: Iterable[Mapping[str, Any]], case: str) -> tuple[str, Mapping[str, Any] | None]:
    for entry in cases:
        if name_of(entry) == case:
            subjects = entry.get("figures", {}).get("subjects", {})
            ours = {name: found for name, found in subjects.items() if name.startswith("cuda")}
            if ours:
                return min(ours.items(), key=lambda item: item[1]["microseconds"])
    return "", None
