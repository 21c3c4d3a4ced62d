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


def sized(ratio: float, parameters: int, worse: float) -> tuple[dict[str, Any], Results]:
    """Fine-tuned, this many times the perplexity of the dense model fine-tuned alike, which has 59.21."""
    choices, results = point({"prune.mlp": ratio, "prune.layers": 1}, 1.0)
    for row in results.rows:
        row.quality = sample.quality(59.21 * worse) if row.stage == "finetune" and row.quality else row.quality
        row.parameters = parameters if row.stage == "finetune" else row.parameters
    return choices, results


def test_the_smallest_that_is_good_enough() -> None:
    """The interval has to be within; where it holds the aim, it cannot be told."""
    points = [sized(0.0, 7_000_001, 1.01), sized(0.25, 6_000_001, 1.047), sized(0.5, 5_000_001, 1.0501)]
    failed = ({"prune.mlp": 0.9, "prune.layers": 1}, "failed: x")
    answer = (
        "The smallest model within 1.05 × the perplexity of the dense model fine-tuned alike is "
        "prune.mlp=0.25, prune.layers=1: 6.00 M parameters, 8.61 MB in INT8, 1.047 × (1.046 to 1.048) its perplexity "
        "after fine-tuning. Whether smaller ones are cannot be told of: prune.mlp=0.5, prune.layers=1 "
        "(1.050 × (1.049 to 1.051))."
    )
    assert sweep.smallest([*points, failed]) == answer
    figure = sweep.draw(points)
    assert figure is not None and "6.00 M parameters" in " ".join(figure.texts[-1].get_text().split())
    assert sweep.smallest(points[2:]) == (
        "No point is surely within 1.05 × the perplexity of the dense model fine-tuned alike; the nearest is "
        "prune.mlp=0.5, prune.layers=1: 5.00 M parameters, 8.61 MB in INT8, 1.050 × (1.049 to 1.051) its perplexity "
        "after fine-tuning. Whether they are cannot be told of: prune.mlp=0.5, prune.layers=1 "
        "(1.050 × (1.049 to 1.051))."
    )
    assert "cannot be told" not in sweep.smallest([*points[:2], sized(0.5, 5_000_001, 1.06)])
    assert sweep.smallest([points[0], points[0]]) is None  # a sweep of something else than size
    for _, results in points:
        results.rows = [row for row in results.rows if row.stage != "control-finetune"]
    assert sweep.smallest([*points, failed]) is None
