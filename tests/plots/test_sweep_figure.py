"""The figure and the table of a sweep: every point, failed ones too, on each kind of device."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import sample_results as sample

from eval.results import Results
from plots import style, sweep


def point(choices: dict[str, Any], worse: float, gpu: bool = False) -> tuple[dict[str, Any], Results]:
    results = deepcopy(sample.full(gpu))
    for row in results.rows:
        if row.quality and row.stage in ("prune", "finetune", "quantize"):
            row.quality.perplexity *= worse
    return choices, results


def grid(gpu: bool = False) -> list[tuple[dict[str, Any], Results]]:
    return [
        point({"quantize.method": method, "prune.ratio": ratio}, 1 + ratio + shift, gpu)
        for method, shift in (("rtn", 0.0), ("gptq", 0.01))
        for ratio in (0.4, 0.1, 0.2)
    ]


@pytest.mark.parametrize("gpu", [False, True])
def test_each_point_is_drawn_in_each_panel(gpu: bool, tmp_path: Path) -> None:
    figure = sweep.draw(grid(gpu))
    assert figure is not None and len(figure.axes) == 2 * (1 + gpu)
    left, right = figure.axes[:2]
    lines = [line for line in left.lines if len(line.get_xdata()) == 3]
    assert [list(line.get_xdata()) for line in lines] == [[0.1, 0.2, 0.4]] * 2
    assert len(right.containers) == 6 and right.get_xlim()[0] >= 0
    labels = [text.get_text() for text in figure.legends[0].texts]
    assert labels == ["quantize.method=rtn", "quantize.method=gptq", "dense, fine-tuned alike"]
    assert [path.stat().st_size > 0 for path in style.save(figure, tmp_path, "sweep")] == [True, True]


def test_words_no_times_one_point() -> None:
    points = [point({"prune.scores": name}, worse) for name, worse in (("taylor", 1.0), ("random", 1.2))]
    for _, results in points:
        for row in results.rows:
            row.latency = None
    figure = sweep.draw(points)
    assert figure is not None and len(figure.axes) == 1
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["taylor", "random"]
    assert sweep.draw(points[:1]) is not None
    assert sweep.draw([]) is None and sweep.draw([({"seed": 1}, sample.empty())]) is None


def test_the_dense_line_stands_only_where_it_is_one() -> None:
    points = grid()
    dense = next(row for row in points[0][1].rows if row.stage == "control-finetune" and row.quality)
    dense.quality.perplexity += 1
    figure = sweep.draw(points)
    assert figure is not None and len(figure.legends[0].texts) == 2


def test_the_table() -> None:
    lines = sweep.table([*grid()[:1], ({"quantize.method": "gptq", "prune.ratio": 0.9}, "failed: no | space")])
    assert lines[0][:3] == ("method", "ratio", "row") and {len(line) for line in lines} == {3, len(lines[0])}
    stages = [line[2].split(" · ")[0] for line in lines[1:-1]]
    assert stages == ["prune", "finetune", "quantize"]
    text = sweep.text(lines)
    assert text.splitlines()[-1].split() == ["gptq", "0.9", "failed:", "no", "|", "space"]
    rows = sweep.markdown(lines).splitlines()
    assert len({row.replace("\\|", "").count("|") for row in rows}) == 1 and "no \\| space" in rows[-1]
    clash = sweep.table([({"prune.block_size": 1, "quantize.block_size": 2}, "failed: x")])
    assert clash[0][:2] == ("prune.block_size", "quantize.block_size")
