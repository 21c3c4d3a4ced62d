"""Tables and numbers as text."""

import re

import pytest
import sample_results as sample

from plots import numbers
from plots.rows import labels, speedup
from plots.table import COLUMNS, lines, markdown, markdown_table, text_table


def cells(line: str) -> list[str]:
    """The cells of a Markdown table line; an escaped bar is no border."""
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def test_text_table_is_aligned_and_fits():
    out = text_table(sample.full()).splitlines()
    head, rule, *body = out[: 2 + 14]
    assert all(column in head for column in COLUMNS)
    assert set(rule) == {"-"} and len(rule) == len(head)
    assert max(map(len, out)) <= 120
    ends = [match.end() for match in re.finditer(r"\S+(?: \S+)*", head)][1:]
    full_rows = [line for line in body if len(line) == len(head) and "CUDA" not in line]
    assert len(full_rows) == 10
    for line in full_rows:
        assert [match.end() for match in re.finditer(r"  +(\S+(?: [M×])?)", line)] == ends


def test_text_table_values():
    line = next(line for line in text_table(sample.full()).splitlines() if "int8" in line)
    assert re.split(r"  +", line) == [
        "quantize · openvino · cpu · int8",
        "8.27 M",
        "8.61",
        "60.02",
        "12.7",
        "2.06",
        "2.49 ×",
        "598",
    ]


def test_roles_are_marked_and_explained():
    text = text_table(sample.full())
    assert re.search(r"^control-random · torch · cpu · fp32 c ", text, re.M)
    assert re.search(r"^quantize · openvino · cpu · bf16 b ", text, re.M)
    assert "c: control arm" in text and "b: baseline" in text
    assert "control arm" not in text_table(sample.single())


def test_skipped_rows_show_their_reason_on_one_line():
    results = sample.full()
    results.rows[1].skipped = "no device,\nand " + "so on and on " * 20
    text = text_table(results)
    assert "load · torch · cuda:0 · fp32" in text and "no device, and so on" in text
    assert text.count(sample.NO_GPU) == 3
    assert max(map(len, text.splitlines())) <= 120
    results.rows[6].device = "d" * 180  # wider than the table by itself
    assert "so on" in text_table(results)


def test_speedup_stays_on_one_device_and_one_load():
    results = sample.full(gpu=True)
    by_key = {row.key: row for row in results.rows}
    assert speedup(results, by_key["quantize/openvino/cpu/int8"]).value == pytest.approx(5.13 / 2.06)
    assert speedup(results, by_key["finetune/torch/cuda:0/fp16"]).value == pytest.approx(1.91 / 1.79)
    assert speedup(results, by_key["half/torch/cpu/fp16"]) is None
    row = by_key["prune/torch/cpu/fp32"]
    row.latency = sample.latency(20, 5, prompt=129)
    assert speedup(results, row) is None


@pytest.mark.parametrize("results", [sample.full(), sample.full(gpu=True), sample.empty(), sample.single()])
def test_markdown_table_has_the_same_columns_in_every_line(results):
    out = markdown_table(results).splitlines()
    assert cells(out[0]) == [*COLUMNS, "note"]
    assert {len(cells(line)) for line in out} == {len(COLUMNS) + 1}
    assert len(out) == 2 + len(results.rows)


def test_markdown_table_holds_intervals_and_survives_hostile_text():
    results = sample.full()
    results.rows[1].skipped = sample.HOSTILE
    table = markdown_table(results)
    assert "5.13 (5.08 to 5.23)" in table and "2.49 × (2.47 to 2.51)" in table and "| 1.00 × |" in table
    line = next(line for line in table.splitlines() if "pipe" in line)
    assert len(cells(line)) == len(COLUMNS) + 1
    assert "<script>" not in table


def test_intervals_stand_below_their_own_columns():
    results = sample.full()
    int8 = next(row for row in results.rows if row.precision == "int8")
    int8.latency.decode.samples[::3] = [0.003] * 8  # a third of the rounds were slow
    line = next(line for line in lines(results) if line.row is int8)
    assert len(line.intervals) == len(line.cells) == len(COLUMNS)
    assert [column for column, text in zip(COLUMNS, line.intervals, strict=True) if text] == [
        "perplexity",
        "prefill ms",
        "decode ms/token",
        "speed-up",
    ]
    low, high = (float(text) for text in line.intervals[6].split(" to "))
    assert low < speedup(results, int8).value < high


def test_labels_are_as_short_as_they_can_be():
    rows = sample.full().rows
    assert labels(rows)[0] == "load · torch · cpu · fp32"
    cpu = [row for row in rows if row.device == "cpu"]
    assert labels(cpu)[0] == "load · torch · fp32"
    assert labels(cpu, brief=True)[0] == "load · fp32"
    twins = [sample.row("half", "torch", "cuda:0", "fp16"), sample.row("half", "cuda", "cuda:0", "fp16")]
    assert labels(twins, brief=True) == ["half · torch · fp16", "half · cuda · fp16"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0.00"),
        (0.05123, "0.0512"),
        (5.1, "5.10"),
        (9.996, "10.0"),
        (99.96, "100"),
        (5123.4, "5,123"),
        (1e-7, "0.000000100"),
    ],
)
def test_significant_digits(value, text):
    assert numbers.significant(value) == text


def test_changes_have_signs():
    assert numbers.change(59.9, 59.21) == "+1.17 %"
    assert numbers.change(58.0, 60.0) == "−3.33 %"
    assert numbers.change(60.0, 60.0) == "+0.00 %"
    assert numbers.change(900.0, 60.0) == "+1,400 %"


def test_markdown_escapes():
    assert markdown("a|b_c\n<d> & `e`") == "a\\|b\\_c &lt;d&gt; &amp; \\`e\\`"
