"""results.json: what goes in comes out, and damage is told in one line."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from eval.errors import UserError
from eval.latency import timing
from eval.results import (
    Agreement,
    CurvePoint,
    Heads,
    Latency,
    Memory,
    Quality,
    QuantizedLayer,
    Results,
    Row,
    Score,
    load_results,
    save_results,
)


@pytest.fixture
def full() -> Results:
    """Every field in use."""
    measured = Row(
        stage="finetune",
        engine="torch",
        device="cuda:0",
        precision="fp16",
        compute="FP16 weights, FP32 accumulation",
        parameters=12_345_679,
        bytes_on_disk=24_691_358,
        quality=Quality(29.94, 3.399, 287_643, 1024, 512, "ab" * 32, 1 / 3, 0.25, [3.3, 3.498] * 5),
        latency=Latency(7, 4, 2, timing([0.1, 0.30000000000000004, 0.2]), timing([1e-5])),
        memory=Memory(5, 4, 3, None, 1, gpu_allocator_peak=7, gpu_process=None),
        tasks={"lambada": Score(1 / 3, 0.1, 7, 5153, "cd" * 32)},
    )
    absent = Row("quantize", "openvino", "cpu", "bf16", role="baseline", skipped="this CPU has no bf16")
    return Results(
        run={"name": "läuft", "machine": {"cpu": {"model": "x", "isa": ["avx2"], "cores": 2}, "gpu": None}},
        rows=[measured, absent],
        heads={"prune": Heads("taylor", "layer", [[0.1, 0.2], [0.3, 0.4]], [[1], [0, 1]])},
        curves={"finetune": [CurvePoint(1, 0.5, 3.25, 1e-4), CurvePoint(2, 1.0, 3.0)]},
        quantization=[QuantizedLayer("lm_head", "rtn", 8, "symmetric", 1e-4, 0.5, 0.01)],
        agreement=Agreement(
            rows=["a/b/c/d", "e/f/g/h"],
            tokens=7,
            context=4,
            text_sha256="ab" * 32,
            logit_mean=[[0.0, 0.1], [0.1, 0.0]],
            logit_max=[[0.0, 0.2], [0.2, 0.0]],
            kl=[[0.0, 1e-9], [1.1e-9, 0.0]],
            top1=[[1.0, 0.875], [0.875, 1.0]],
            prompt_tokens=3,
            new_tokens=2,
            diverged=[[[None], [1]], [[1], [None]]],
            kl_stderr=[[0.0, 1e-9], [1e-9, 0.0]],
            top1_stderr=[[0.0, 0.125], [0.125, 0.0]],
        ),
    )


def as_json(results: Results) -> str:
    return json.dumps(dataclasses.asdict(results))


def test_round_trip(full: Results, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    save_results(full, path)
    assert load_results(path) == full
    assert [row.key for row in load_results(path).rows] == ["finetune/torch/cuda:0/fp16", "quantize/openvino/cpu/bf16"]


def test_results_from_before_agreement_and_tasks(full: Results, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    raw = json.loads(as_json(full))
    del raw["agreement"], raw["rows"][0]["tasks"], raw["rows"][1]["tasks"]
    path.write_text(json.dumps(raw))
    full.rows[0].tasks = {}
    assert load_results(path) == dataclasses.replace(full, agreement=None)


def test_saving_replaces_and_leaves_nothing_else(full: Results, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text("old")
    save_results(full, path)
    assert load_results(path) == full
    assert list(tmp_path.iterdir()) == [path]
    ours = tmp_path / "ours"
    ours.touch()
    assert path.stat().st_mode == ours.stat().st_mode  # the umask's, not a temporary file's


def test_what_cannot_be_saved_leaves_the_old_file_alone(full: Results, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    save_results(full, path)
    before = path.read_bytes()
    full.curves["finetune"][0].loss = float("nan")
    with pytest.raises(ValueError, match="not JSON compliant"):
        save_results(full, path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]

    blocked = tmp_path / "folder"
    blocked.mkdir()
    full.curves.clear()
    with pytest.raises(OSError, match="folder"):
        save_results(full, blocked)
    assert sorted(tmp_path.iterdir()) == [blocked, path]


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent\.json: No such file.*run the pipeline first"):
        load_results(tmp_path / "absent.json")


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_truncated_file(full: Results, tmp_path: Path, share: float) -> None:
    path = tmp_path / "results.json"
    text = as_json(full)
    path.write_text(text[: int(len(text) * share)])
    with pytest.raises(UserError, match="damaged JSON"):
        load_results(path)


def test_binary_file(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_bytes(bytes(range(256)))
    with pytest.raises(UserError, match="damaged JSON"):
        load_results(path)


@pytest.mark.parametrize("content", [[], 3, None, {}, {"schema": 2}, {"schema": "1"}])
def test_unknown_schema(tmp_path: Path, content: object) -> None:
    path = tmp_path / "results.json"
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match="this version reads 1"):
        load_results(path)


def without(raw: dict, *keys: str | int) -> None:
    *outer, last = keys
    for key in outer:
        raw = raw[key]
    del raw[last]


@pytest.mark.parametrize(
    "keys",
    [
        ("run",),
        ("rows",),
        ("heads",),
        ("curves",),
        ("rows", 0, "stage"),
        ("rows", 1, "quality"),
        ("rows", 0, "quality", "tokens"),
        ("rows", 0, "latency", "decode"),
        ("rows", 0, "latency", "prefill", "ci95"),
        ("rows", 0, "memory", "uss"),
        ("heads", "prune", "kept"),
        ("curves", "finetune", 1, "loss"),
        ("agreement", "kl"),
        ("rows", 0, "tasks", "lambada", "of"),
    ],
)
def test_missing_key(full: Results, tmp_path: Path, keys: tuple) -> None:
    raw = json.loads(as_json(full))
    without(raw, *keys)
    path = tmp_path / "results.json"
    path.write_text(json.dumps(raw))
    with pytest.raises(UserError, match="does not follow schema 1") as caught:
        load_results(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        {"rows": 3},
        {"rows": [3]},
        {"heads": []},
        {"curves": {"finetune": 3}},
        {"rows": [{"stage": "load", "engine": "torch", "device": "cpu", "precision": "fp32", "surprise": 1}]},
    ],
)
def test_wrong_shapes(full: Results, tmp_path: Path, change: dict) -> None:
    path = tmp_path / "results.json"
    path.write_text(json.dumps(json.loads(as_json(full)) | change))
    with pytest.raises(UserError, match="does not follow schema 1"):
        load_results(path)


HUGE = 10**400
WRONG = [
    ("rows.0.quality.perplexity", None, "rows.0.quality.perplexity: Input should be a valid number"),
    ("rows.0.quality.perplexity", "29.94", "rows.0.quality.perplexity: Input should be a valid number"),
    ("rows.0.quality.perplexity", True, "rows.0.quality.perplexity"),
    ("rows.0.quality.perplexity", 0, "rows.0.quality: perplexity is 0"),
    ("rows.0.quality.perplexity", -3.0, "perplexity holds -3.0"),
    ("rows.0.quality.perplexity", HUGE, "rows.0.quality.perplexity: Input should be a finite number"),
    ("rows.0.quality.tokens", 1.5, "rows.0.quality.tokens: Input should be a valid integer"),
    ("rows.0.quality.tokens", 0, "tokens holds 0"),
    ("rows.0.quality.context", HUGE, "context holds 1000"),
    ("rows.0.quality.text_share", 1.5, "text_share holds 1.5"),
    ("rows.0.quality.stderr", None, "stderr and parts: one is there without the other"),
    ("rows.0.quality.parts", [], "stderr and parts: one is there without the other"),
    ("rows.0.quality.parts", [3.4] * 9, "parts are 9, not 10 to 287643, the tokens"),
    ("rows.0.quality.parts", [[3.0]], "rows.0.quality.parts.0"),
    ("rows.0.quality.text_sha256", 3, "rows.0.quality.text_sha256"),
    ("rows.0.latency.decode.samples", [], "rows.0.latency.decode: 0 samples, where count is 1"),
    ("rows.0.latency.decode.samples", [0.0], "samples holds 0.0"),
    ("rows.0.latency.decode.samples", ["1"], "rows.0.latency.decode.samples.0"),
    ("rows.0.latency.prefill.p50", 0, "p50 holds 0"),
    ("rows.0.latency.prefill.count", 2, "3 samples, where count is 2"),
    ("rows.0.latency.prefill.ci95", [0.1], "rows.0.latency.prefill.ci95.1"),
    ("rows.0.latency.prefill.ci95", [0.2, 0.1], "ci95 ends before it begins"),
    ("rows.0.latency.batch", 0, "batch holds 0"),
    ("rows.0.memory.peak_rss", -1, "peak_rss holds -1"),
    ("rows.0.memory.uss", 1e9, "rows.0.memory.uss"),
    ("rows.0.tasks.lambada.accuracy", 1.01, "accuracy holds 1.01"),
    ("rows.0.tasks.lambada.documents", 5154, "documents holds 5154"),
    ("rows.0.tasks", [], "rows.0.tasks"),
    ("rows.0.bytes_on_disk", HUGE, "bytes_on_disk holds 1000"),
    ("rows.0.parameters", "many", "rows.0.parameters"),
    ("rows.0.role", "hero", "role is 'hero'"),
    ("rows.0.stage", "", "stage is no name"),
    ("rows.0.stage", "a/b", "hold no slash"),
    ("rows.0.stage", "a\x00b", "stage is no name"),
    ("rows.0.stage", "a\nb", "stage is no name"),
    ("rows.0.device", "x" * 201, "device is no name"),
    ("rows.0.compute", "\x1b[2J", "rows.0.compute: holds control characters"),
    ("rows.1.skipped", 3, "rows.1.skipped"),
    ("rows.1.stage", None, "rows.1.stage"),
    ("rows.1", "finetune", "rows.1"),
    ("rows", {}, "rows"),
    ("run", [], "run"),
    ("run.name", 3, "run.name"),
    ("run.machine", "x", "run.machine"),
    ("run.recipe", {"finetune": 3}, "run.recipe.finetune"),
    ("run.recipe", {"load": {"source": None}}, "run.recipe.load.source"),
    ("run.recipe", {"data": {"train": ["x"]}}, "run.recipe.data.train"),
    ("run.versions", {"torch": None}, "run.versions.torch"),
    ("run.seconds", {"load": "1"}, "run.seconds.load"),
    ("run.note", "\x07", "run.note: holds control characters"),
    ("heads.prune.kept", [[1]], "scores of 2 layers, where kept has 1"),
    ("heads.prune.kept", [[2], [0, 1]], "kept.0 names heads"),
    ("heads.prune.kept", [[1, 1], [0]], "kept.0 names heads"),
    ("heads.prune.scores", [[0.1, None], [0.3, 0.4]], "heads.prune.scores.0.1"),
    ("heads.prune.layers", [0], "layers names 1, where kept has 2"),
    ("heads.prune.influence", [0.1], "influence one for each layer"),
    ("heads.prune.n_inner", [3], "n_inner holds two numbers or none"),
    ("curves.finetune.0.loss", "low", "curves.finetune.0.loss"),
    ("curves.finetune.0.step", -1, "step holds -1"),
    ("curves.finetune", {}, "curves.finetune"),
    ("quantization.0.bits", 0, "bits holds 0"),
    ("quantization.0.error", -0.1, "error holds -0.1"),
    ("agreement.kl", [[0.0, 0.1]], "kl is no square matrix of 2 rows"),
    ("agreement.kl", [[0.0, 0.1], [0.1]], "kl is no square matrix of 2 rows"),
    ("agreement.kl", [[0.0, -0.1], [0.1, 0.0]], "kl holds a number"),
    ("agreement.top1", [[1.0, 1.1], [1.0, 1.0]], "top1 holds a number that is not from 0 to 1"),
    ("agreement.top1_stderr", [], "top1_stderr is no square matrix"),
    ("agreement.rows", [], "rows are none"),
    ("agreement.rows", ["a/b/c/d", "a/b/c/d"], "one stands twice"),
    ("agreement.rows", ["a", "b/c/d/e"], "agreement: a row"),
    ("agreement.diverged", [[[None], [1]], [[1], []]], "diverged does not hold as many prompts"),
    ("agreement.diverged", [[[None], [3]], [[3], [None]]], "diverged holds a number"),
    ("surprise", 1, "surprise: Unexpected"),
]


@pytest.mark.parametrize(("where", "value", "said"), WRONG)
def test_the_first_wrong_place_is_named(full: Results, tmp_path: Path, where: str, value: object, said: str) -> None:
    raw: Any = json.loads(as_json(full))
    *outer, last = (int(part) if part.isdigit() else part for part in where.split("."))
    inner = raw
    for part in outer:
        inner = inner[part]
    inner[last] = value
    path = tmp_path / "results.json"
    path.write_text(json.dumps(raw))
    with pytest.raises(UserError, match="does not follow schema 1") as caught:
        load_results(path)
    assert said in str(caught.value) and str(caught.value).isprintable() and len(str(caught.value)) < 800


def test_a_row_that_stands_twice(full: Results, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    raw = json.loads(as_json(full))
    path.write_text(json.dumps(raw | {"rows": [raw["rows"][0]] * 2}))
    with pytest.raises(UserError, match=r"rows holds finetune/torch/cuda:0/fp16 twice"):
        load_results(path)


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"schema": 1, "run": {"x": ' + "[" * 900 + "]" * 900 + "}}", '{"schema": true}']
)
def test_odd_json(tmp_path: Path, text: str) -> None:
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        load_results(path)
    assert "\n" not in str(caught.value)


def test_results_from_before_intervals(full: Results, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    raw = json.loads(as_json(full))
    for key in ("stderr", "parts"):
        del raw["rows"][0]["quality"][key]
    for key in ("kl_stderr", "top1_stderr"):
        del raw["agreement"][key]
    path.write_text(json.dumps(raw))
    found = load_results(path)
    assert found.rows[0].quality == dataclasses.replace(full.rows[0].quality, stderr=None, parts=[])
    assert found.agreement == dataclasses.replace(full.agreement, kl_stderr=None, top1_stderr=None)
