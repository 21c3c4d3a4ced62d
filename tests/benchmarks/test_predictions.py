"""Predictions beside invented measurements, and beside the log that they are taken from."""

import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import DECODES, PREFILLS
from benchmarks.predictions import GOALS, PREDICTIONS, goals_table, predictions_table, verdict
from benchmarks.subjects import PEER, kinds

LOG = (Path(__file__).parents[2] / "docs" / "cuda-log.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("low", "high", "measured", "wanted"),
    [
        (100, 100, None, "not measured"),
        (100, 100, 100, "held"),
        (100, 100, 120, "held"),
        (100, 100, 121, "missed: 1.2 times slower"),
        (100, 100, 84, "held"),
        (100, 100, 50, "missed: 2.0 times faster"),
        (70, 80, 96, "held"),
        (70, 80, 200, "missed: 2.5 times slower"),
        (70, 80, 35, "missed: 2.0 times faster"),
    ],
)
def test_verdicts(low: float, high: float, measured: float | None, wanted: str) -> None:
    assert verdict(low, high, measured) == wanted


def entry(case: Any, **subjects: dict[str, Any]) -> dict[str, Any]:
    return {"case": vars(case), "figures": {"subjects": {name.replace("_", " "): s for name, s in subjects.items()}}}


def test_tables() -> None:
    cases = [
        entry(
            DECODES[0],
            cuda_graph={"microseconds": 140.0, "percent_of_ceiling": 61.0},
            cuda_persistent={"microseconds": 120.0, "percent_of_ceiling": 71.0, "over_peer": {"value": 2.0}},
        ),
        entry(DECODES[1], cuda_graph={"microseconds": 150.0, "over_peer": {"value": 1.6}}),
        {"case": vars(PREFILLS[0])},
    ]
    table = predictions_table(cases)
    assert "| decode 7 | decode 1 x 480 | cuda persistent | 70 to 80 | 120.0 | missed: 1.5 times slower |" in table
    assert "| prefill 4 | prefill 1 x 1024 | cuda | 400 |  | not measured |" in table
    goals = goals_table(cases).splitlines()
    assert "| decode 1 x 480 | 60 % of measured bandwidth | cuda persistent | 71 % | reached |" in goals
    assert "| decode 1 x 480 | 80 % of measured bandwidth | cuda persistent | 71 % | missed |" in goals
    assert "| decode 8 x 480 | 1.5 x the peer | cuda graph | 1.60 x | reached |" in goals
    assert "| prefill 1 x 512 | 1.2 x the peer |  | | not measured |" in goals


def test_each_prediction_is_a_line_of_the_log_and_a_subject_of_the_benchmark() -> None:
    cases = {case.name: case for case in (*DECODES, *PREFILLS)}
    for one in PREDICTIONS:
        kind, step = one.step.split()
        section = LOG.split(f"## {kind.capitalize()}\n")[1].split("\n## ")[0]
        (line,) = re.findall(rf"^\| {step} \|.*$", section, re.MULTILINE)
        predicted = line.split("|")[3].replace(",", "")
        scale = 1000 if " ms" in predicted else 1
        numbers = [scale * float(number) for number in re.findall(r"\d+(?:\.\d+)?", predicted)]
        assert numbers[: 2 if " to " in predicted else 1] == sorted({one.low, one.high}), line
        assert one.subject in kinds(cases[one.case])
    for goal in GOALS:
        assert (goal.percent is None) != (goal.over_peer is None) and PEER in kinds(cases[goal.case])
