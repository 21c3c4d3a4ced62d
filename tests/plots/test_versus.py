"""Two runs side by side: right ratios, no ratio where none may be drawn, and every row accounted for."""

import copy
import dataclasses

import pytest
import sample_results as sample

from eval.results import Results
from plots import versus
from plots.numbers import NONE

INT8 = "quantize/openvino/cpu/int8"


def row_of(results, key):
    return next(row for row in results.rows if row.key == key)


def line_of(comparison, title, key):
    (table,) = [table for table in comparison.tables if table.title.startswith(title)]
    return next(line for line in table.lines if line.row.key == key)


@pytest.fixture
def runs() -> tuple[Results, Results]:
    """A run, and the same with an INT8 row that is worse, faster, smaller in memory and larger on disk."""
    a, b = sample.full(), sample.full()
    row = row_of(b, INT8)
    row.quality = sample.quality(63.021)
    row.latency = sample.latency(12.7, 1.03, spread=0.1)
    row.memory = sample.memory(538.29)
    row.bytes_on_disk = 9_474_055
    return a, b


@pytest.mark.parametrize(
    ("title", "ratio", "verdict"),
    [
        ("Perplexity", "1.050", "worse"),
        ("Peak RSS", "0.900", "smaller"),
        ("Size on disk", "1.100", "larger"),
        ("Prefill", None, "not measurably different"),
        ("Decode", None, "faster"),
    ],
)
def test_ratios_and_verdicts(runs, title, ratio, verdict):
    line = line_of(versus.compare(*runs), title, INT8)
    assert line.verdict == verdict
    assert bool(line.interval) == (title in ("Perplexity", "Prefill", "Decode"))
    if ratio:
        assert line.ratio == ratio
    else:
        assert line.value.low < line.value.value < line.value.high
        ours, theirs = (getattr(row_of(run, INT8).latency, title.lower()).p50 for run in runs)
        assert line.value.value == pytest.approx(theirs / ours, rel=0.1)  # p50 of the sample is made up


def test_perplexities_are_judged_part_by_part(runs):
    a, b = runs
    ours = row_of(a, INT8).quality
    row_of(b, INT8).quality = sample.quality(ours.perplexity + 0.02)
    line = line_of(versus.compare(a, b), "Perplexity", INT8)
    assert (line.ratio, line.verdict) == ("1.000", "not measurably different") and line.value.low < 1 < line.value.high
    row_of(b, INT8).quality = dataclasses.replace(sample.quality(63.0), stderr=None, parts=[])
    line = line_of(versus.compare(a, b), "Perplexity", INT8)
    assert (line.ratio, line.interval, line.verdict) == ("1.050", "", "not judged (no interval)")
    said = " ".join(versus.compare(a, b).summary)
    assert "B is not judged (no interval) in 1, not measurably different in 9." in said


def test_rows_computed_otherwise_are_said(runs):
    a, _ = runs
    b = sample.full(bf16=True)
    (said,) = [caveat for caveat in versus.compare(a, b).caveats if "computed otherwise" in caveat]
    assert said.startswith("1 row computed otherwise in B") and "int8: B has BF16 arithmetic instead of FP32" in said


def test_swapped_runs_swap_the_ratio(runs):
    there, back = versus.compare(*runs), versus.compare(*reversed(runs))
    for title, word in (("Decode", "slower"), ("Perplexity", "better")):
        one, other = (line_of(each, title, INT8) for each in (there, back))
        assert (one.a, one.b) == (other.b, other.a) and other.verdict == word
        assert one.value.value == pytest.approx(1 / other.value.value)


def test_the_same_run_twice_is_alike():
    found = versus.compare(sample.full(gpu=True), sample.full(gpu=True))
    assert len(found.tables) == 6 and found.lone == []
    assert {line.ratio for table in found.tables for line in table.lines} == {"1.000"}
    assert {line.verdict for table in found.tables for line in table.lines} == {"alike", "not measurably different"}
    assert "On the GPU" not in found.summary[0] and "on the GPU, finetune" in found.summary[1]


def test_other_machines_leave_quality_and_size_but_no_times(runs):
    a, b = runs
    b.run = copy.deepcopy(b.run)
    b.run["machine"]["cpu"]["cores"] = 96
    found = versus.compare(a, b)
    for title in ("Decode", "Prefill"):
        line = line_of(found, title, INT8)
        assert (line.ratio, line.verdict) == (NONE, "not comparable: another machine") and line.a != NONE != line.b
        assert f"{title}" in " ".join(found.summary) and "no row can be compared" in " ".join(found.summary)
    assert line_of(found, "Perplexity", INT8).ratio == "1.050" and line_of(found, "Size", INT8).ratio == "1.100"
    assert any("Latencies are not compared: another machine" in caveat for caveat in found.caveats)
    b.run["machine"] = {}
    assert any("does not say which machine" in caveat for caveat in versus.compare(a, b).caveats)


@pytest.mark.parametrize("change", [{"text_sha256": "cd" * 32}, {"context": 256}, {"stride": 512}, {"text_share": 1.0}])
def test_perplexities_compare_only_on_the_same_text(runs, change):
    a, b = runs
    row_of(b, INT8).quality = dataclasses.replace(row_of(a, INT8).quality, **change)
    found = versus.compare(a, b)
    line = line_of(found, "Perplexity", INT8)
    assert (line.ratio, line.value) == (NONE, None) and "another text" in line.verdict
    assert any(caveat.startswith("Perplexities of 1 row are not compared") for caveat in found.caveats)
    assert "perplexity" not in found.summary[0]


def test_times_compare_only_with_the_same_prompt(runs):
    a, b = runs
    row_of(b, INT8).latency = sample.latency(12.7, 1.03, prompt=64)
    assert "another prompt" in line_of(versus.compare(a, b), "Decode", INT8).verdict


def test_rows_that_one_run_has_are_named_with_the_reason(runs):
    a, b = runs
    a.rows = [row for row in a.rows if row.key != "prune/torch/cpu/fp32"]
    row_of(b, INT8).skipped = "no | such <b>processor</b>"
    found = versus.compare(a, b)
    assert found.lone == [
        ("quantize · openvino · cpu · int8", "A", "not measured in B: no | such <b>processor</b>"),
        ("prune · torch · cpu · fp32", "B", "A has no such row"),
    ]
    line = line_of(found, "Decode", "prune/torch/cpu/fp32")
    assert (line.a, line.ratio, line.verdict) == (NONE, NONE, "in B only") and line.b == "5.08"
    assert any(caveat.startswith("Measured in neither run: load · torch · cuda:0") for caveat in found.caveats)


def test_versions_that_differ_are_said(runs):
    a, b = runs
    assert not any("version" in caveat for caveat in versus.compare(a, b).caveats)
    b.run = b.run | {"versions": {"torch": "3"}}
    assert any("version" in caveat for caveat in versus.compare(a, b).caveats)


def test_nothing_in_common():
    found = versus.compare(sample.empty(), sample.empty())
    assert (found.tables, found.lone) == ([], []) and versus.draw(found) is None
    assert found.summary == ["Nothing at the end of the chain can be compared."]
    assert versus.text_table(found).startswith("B/A")


def test_text_table_is_aligned(runs):
    head, rule, *body = versus.text_table(versus.compare(*runs)).splitlines()
    assert {len(line) for line in (head, rule, *body)} == {len(head)} and len(body) == 10
    (int8,) = [line for line in body if "int8" in line]
    assert int8.split()[-2:] == ["0.900", "1.100"]


def test_the_figure_shows_each_ratio_where_it_is(runs):
    found = versus.compare(*runs)
    figure = versus.draw(found)
    assert [axes.get_title(loc="left") for axes in figure.axes] == [
        table.title.partition(" (")[0] for table in found.tables
    ]
    for axes, table in zip(figure.axes, found.tables, strict=True):
        points = [float(dots.get_offsets()[0][0]) for dots in axes.collections]
        assert points == pytest.approx([line.value.value for line in table.lines])
        low, high = axes.get_xlim()
        assert low < min(points) <= max(points) < high and low * high == pytest.approx(1)
