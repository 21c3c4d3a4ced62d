"""Which rows a run has, that their numbers are right, and that none is measured twice."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from eval.perplexity import perplexity
from eval.results import load_results
from pipeline import hardware
from pipeline.data import encode
from pipeline.engines import load_engine
from pipeline.measure import Measurer, subjects
from pipeline.openvino_runtime import computes_bf16
from pipeline.recipe import Recipe, load_recipe
from pipeline.runner import Runner
from pipeline.stages import STAGES
from pipeline.texts import load_text
from plots.findings import judgements
from plots.pairs import int8_pair

ORDER = [
    "load/torch/cpu/fp32",
    "load/torch/cuda:0/fp32",
    "half/torch/cpu/fp16",
    "half/torch/cuda:0/fp16",
    "prune/torch/cpu/fp16",
    "prune/torch/cuda:0/fp16",
    "prune/cuda/cuda:0/fp16",
    "finetune/torch/cpu/fp32",
    "finetune/torch/cuda:0/fp16",
    "finetune/cuda/cuda:0/fp16",
    "quantize/openvino/cpu/fp32",
    "quantize/openvino/cpu/bf16",
    *([] if computes_bf16() else ["quantize/openvino/cpu/auto"]),
    "quantize/openvino/cpu/fp16",
    "quantize/openvino/cpu/int8",
    "control-finetune/torch/cpu/fp32",
    "control-finetune/torch/cuda:0/fp16",
    "control-random/torch/cpu/fp16",
    "control-random/torch/cuda:0/fp16",
]


def runner(folder: Path, recipe: Path, *changes: str) -> Runner:
    return Runner(load_recipe(Recipe, recipe, changes), folder)


def test_the_rows_of_a_whole_run(finished_run: Path) -> None:
    rows = load_results(finished_run / "results.json").rows
    assert [row.key for row in rows] == ORDER
    roles = {row.key: row.role for row in rows}
    assert {key for key, role in roles.items() if role == "control"} == {key for key in ORDER if "control" in key}
    exports = {key for key in ORDER if "openvino" in key and not key.endswith("int8")}
    assert {key for key, role in roles.items() if role == "baseline"} == exports
    for row in rows:
        absent = {"cuda:0": hardware.why_no_gpu(), "cpu": None}[row.device]
        if row.engine == "cuda":
            absent = "head_dim is 8; the kernels know 32, 64, 128"
        if row.precision == "bf16" and not computes_bf16():
            absent = "this CPU has no bf16 units"
        assert row.skipped == absent, row.key
        assert (row.quality is None) == (absent is not None), row.key
        assert row.bytes_on_disk is not None and row.bytes_on_disk > 1000
    timed = {row.key for row in rows if row.latency is not None and row.device == "cpu"}
    assert {"load/torch/cpu/fp32", "prune/torch/cpu/fp16", "quantize/openvino/cpu/int8"} <= timed
    assert not timed & {"half/torch/cpu/fp16", *(key for key in ORDER if "control" in key)}


def test_int8_has_a_row_that_differs_in_the_weights_alone(finished_run: Path) -> None:
    """Whatever OpenVINO does by default on this CPU, an FP32 IR was run so too; and no step goes unjudged."""
    results = load_results(finished_run / "results.json")
    for value in (lambda row: row.quality, lambda row: row.latency):
        found = int8_pair(results, value)
        assert found is not None and found.differs == ["INT8 weights instead of FP32"]
        assert found.base.compute == found.row.compute
    assert not [each.why for each in judgements(results) if each.verdict == "not judged"]
    assert all(row.quality is None or (row.quality.stderr or 0) > 0 for row in results.rows)


def test_the_defaults_of_a_cpu_without_bf16_have_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    for there in (False, True):
        monkeypatch.setattr("pipeline.measure.computes_bf16", lambda there=there: there)
        found = {subject.precision: subject.skipped for subject in subjects({"quantize": {}})}
        assert ("auto" in found, found["bf16"] is None) == (not there, there)


def test_qualities_are_those_of_the_folders(finished_run: Path, tiny_texts: dict[str, Path], tiny_tokenizer) -> None:
    rows = {row.key: row for row in load_results(finished_run / "results.json").rows}
    ids = encode(load_text(str(tiny_texts["evaluation"])), tiny_tokenizer)
    ids = ids[: round(0.2 * len(ids))]
    for key, folder in (("load/torch/cpu/fp32", "load/model"), ("quantize/openvino/cpu/int8", "quantize/model")):
        stage, engine, device, precision = key.split("/")
        loaded = load_engine(engine, finished_run / folder, device=device, precision=precision)
        again = perplexity(loaded, ids, context=32, stride=32, text_sha256="", text_share=0.2)
        quality = rows[key].quality
        assert quality is not None and stage in folder
        assert quality.perplexity == pytest.approx(again.perplexity, rel=1e-5)
        assert (quality.tokens, quality.context, quality.stride, quality.text_share) == (len(ids) - 1, 32, 32, 0.2)


def test_sizes(finished_run: Path) -> None:
    rows = {row.key: row for row in load_results(finished_run / "results.json").rows}

    def size(key: str) -> int:
        found = rows[key].bytes_on_disk
        assert found is not None
        return found

    assert size("load/torch/cpu/fp32") == (finished_run / "load" / "model" / "model.safetensors").stat().st_size
    assert size("half/torch/cpu/fp16") < 0.6 * size("load/torch/cpu/fp32")
    assert size("prune/torch/cpu/fp16") < size("half/torch/cpu/fp16")
    assert size("quantize/openvino/cpu/int8") == sum(
        (finished_run / "quantize" / "model" / name).stat().st_size
        for name in ("openvino_model.xml", "openvino_model.bin")
    )


def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The keys of rows that get an engine from now on."""
    seen: list[str] = []
    original = Measurer._engine

    def engine(self: Measurer, subject: Any) -> Any:
        seen.append(subject.key)
        return original(self, subject)

    monkeypatch.setattr(Measurer, "_engine", engine)
    return seen


def test_what_was_measured_is_kept_until_it_changes(
    run_copy: Path, tiny_recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    seen = counted(monkeypatch)
    before = (run_copy / "results.json").read_text()
    runner(run_copy, tiny_recipe).execute()
    assert not seen
    rows = [json.loads(text)["rows"] for text in (before, (run_copy / "results.json").read_text())]
    assert rows[0] == rows[1]

    key = "quality-prune-torch-cpu-fp16.json"
    kept = (run_copy / "measurements" / key).read_text()
    for damage in ("{", '{"fingerprint": "other", "value": 1}', "[]"):
        (run_copy / "measurements" / key).write_text(damage)
        seen.clear()
        runner(run_copy, tiny_recipe).execute()
        assert seen == ["prune/torch/cpu/fp16"]
        assert (run_copy / "measurements" / key).read_text() == kept

    seen.clear()
    changes = ("measure.stride=16", "measure.latency=false", "measure.agreement_tokens=0")
    assert runner(run_copy, tiny_recipe, *changes).execute(until="half", force=["measure"]).agreement is None
    assert seen == ["load/torch/cpu/fp32", "half/torch/cpu/fp16"]


def live_rows(run: Path) -> list[str]:
    return [row.key for row in load_results(run / "results.json").rows if row.skipped is None]


def test_agreement_of_all_rows(finished_run: Path, tiny_texts: dict[str, Path], tiny_tokenizer) -> None:
    found = load_results(finished_run / "results.json").agreement
    assert found is not None and found.rows == live_rows(finished_run)
    ids = encode(load_text(str(tiny_texts["evaluation"])), tiny_tokenizer)[:101]
    assert (found.tokens, found.context, found.prompt_tokens, found.new_tokens) == (len(ids), 32, 16, 16)
    a, b = (found.rows.index(key) for key in ("finetune/torch/cpu/fp32", "quantize/openvino/cpu/int8"))
    engines = [load_engine("torch", finished_run / "finetune/model", device="cpu"), None]
    engines[1] = load_engine("openvino", finished_run / "quantize/model")
    p, q = (
        torch.cat([engine.logits(part[None])[0] for part in torch.from_numpy(ids).split(32)]).double().softmax(-1)
        for engine in engines
    )
    assert found.kl[a][b] == pytest.approx(float((p * (p / q).log()).sum() / len(ids)), rel=1e-3)
    assert found.top1[a][b] == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
    exact = found.rows.index("quantize/openvino/cpu/fp32")
    assert found.kl[a][exact] < 1e-6 < found.kl[a][b] and found.diverged[a][exact] == [None] * 4


def test_tasks_are_asked_once(
    run_copy: Path, tiny_recipe: Path, tiny_folder: Path, task_data: Path, tiny_tokenizer, monkeypatch
) -> None:
    from eval.task_data import load_documents
    from eval.tasks import EngineLM, evaluate

    changes = ["measure.tasks.names=[lambada, hellaswag]", f"measure.tasks.data={task_data}", "measure.tasks.limit=4"]
    seen = counted(monkeypatch)
    choices = (*changes, "measure.agreement_tokens=0")
    rows = runner(run_copy, tiny_recipe, *choices).execute(until="half", force=["measure"]).rows
    assert seen.count("half/torch/cpu/fp16") == 1  # for the tasks alone: its quality was measured before
    documents = {name: load_documents(name, task_data) for name in ("lambada", "hellaswag")}
    lm = EngineLM(load_engine("torch", tiny_folder, device="cpu"), tiny_tokenizer, encode)
    assert rows[0].tasks == evaluate(lm, documents, limit=4)
    assert not rows[1].tasks or torch.cuda.is_available()
    assert not list((run_copy / "measurements").glob(".responses*"))
    seen.clear()
    again = runner(run_copy, tiny_recipe, *choices).execute(until="half").rows
    assert not seen and [row.tasks for row in again] == [row.tasks for row in rows]
    assert "What can they do?" in (run_copy / "report.md").read_text(encoding="utf-8")


def test_memory_comes_from_a_fresh_process(run_copy: Path, tiny_recipe: Path) -> None:
    changes = ("measure.memory=true", "measure.latency=false")
    results = runner(run_copy, tiny_recipe, *changes).execute(until="load", force=["measure"])
    memory = results.rows[0].memory
    assert memory is not None
    assert 0 < memory.baseline_rss <= memory.rss <= memory.peak_rss and memory.uss <= memory.rss
    assert (memory.gpu_allocator_peak, memory.gpu_process) == (None, None)
    assert results.rows[1].memory is None or torch.cuda.is_available()


def test_control_rows_go_with_their_stages() -> None:
    keys = [subject.key for subject in subjects({"load": {}, "quantize": {}})]
    assert keys == [key for key in ORDER if key.split("/")[0] in ("load", "quantize")]
    assert {key.split("/")[0] for key in ORDER} == {stage.name for stage in STAGES} - {"control-plain"}
