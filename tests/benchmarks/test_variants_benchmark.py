"""The benchmark of the variants, on a text and a shape that take a second."""

import json
from pathlib import Path

import pytest

from benchmarks import variants

SHAPE = {"n_layer": 4, "n_head": 6, "head_dim": 8, "n_positions": 48, "vocab_size": 263}


def test_the_table_and_the_record(
    tiny_texts: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = ("GPT-2", "2 key/value heads for 6", "rope, 2 for 6, window 64")
    monkeypatch.setattr(variants, "VARIANTS", {name: dict(variants.VARIANTS[name]) for name in chosen})
    variants.VARIANTS[chosen[2]]["window"] = [5, 5, 5, None]
    monkeypatch.setattr(variants, "SHAPE", SHAPE)
    monkeypatch.setattr(variants, "load_text", lambda source: tiny_texts["train"].read_text())
    out = tmp_path / "variants.json"
    assert variants.main(["--steps", "2", "--rounds", "2", "--text-share", "0.5", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    record = json.loads(out.read_text())
    rows = record["variants"]
    assert list(rows) == list(chosen) and record["steps"] == 2 and record["date"] and record["machine"]["cpu"]
    one_head = 2 * 2 * 8  # keys and values of a layer, FP16
    assert rows[chosen[0]]["kv_bytes_a_token"] == 4 * 6 * one_head
    assert rows[chosen[1]]["kv_bytes_a_token"] == 4 * 2 * one_head
    assert rows[chosen[2]]["kv_bytes_a_token"] == (3 * 4 / 48 + 1) * 2 * one_head
    assert all(
        len(row["latency"]["decode"]["samples"]) == 2 and row["quality"]["perplexity"] > 1 for row in rows.values()
    )
    assert len(printed.splitlines()) == 2 + len(chosen) and "| 768 |" in printed
    assert variants.main(["--table", str(out)]) == 0 and capsys.readouterr().out == printed


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--steps", "0"], "--steps 0: give at least 1"),
        (["--text-share", "nan"], "--text-share nan: give more than 0, up to 1"),
        (["--table", "nowhere.json"], "nowhere.json"),
    ],
)
def test_bad_choices(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert variants.main(words) == 2
    captured = capsys.readouterr()
    assert said in captured.err and captured.err.count("\n") == 1 and captured.out == ""
