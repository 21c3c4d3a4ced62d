"""`profile` as a person meets it: a run with all its rows, one model on several engines, and mistakes."""

import json
import shutil
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

SHORT = ("--prompt-tokens", 7, "--new-tokens", 3)
FILES = {"prefill.*.pt.trace.json", "decode.*.pt.trace.json", "prefill.cpu.svg", "decode.cpu.svg", "events.*.profile"}


def read(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder), size_guidance={"images": 0, "tensors": 0, "scalars": 0}).Reload()


def test_a_run_is_profiled_row_by_row(run_copy: Path, cli) -> None:
    stages = ["load", "finetune", "quantize"]  # the finished ones, of a run that was not asked for more
    for stage in ("half", "prune", "control-finetune", "control-random"):
        shutil.rmtree(run_copy / stage)
    code, out, err = cli("profile", run_copy, *SHORT)
    assert code == 0, err
    log = run_copy / "traces"
    assert f"tensorboard --logdir {log} " in out
    results = json.loads((run_copy / "results.json").read_text())
    of_stages = [row for row in results["rows"] if row["stage"] in stages]
    rows = {"-".join((r["stage"], r["engine"], r["device"].replace(":", ""), r["precision"])): r for r in of_stages}
    live = {name: row for name, row in rows.items() if row["skipped"] is None}
    assert {row["stage"] for row in live.values()} == set(stages)
    assert {row["engine"] for row in live.values()} >= {"torch", "openvino"}
    trainings = {"finetune-training", "control-finetune-training"}
    assert {folder.name for folder in log.iterdir()} == {*live, *trainings, "summary"}
    for row in rows.values():
        if row["skipped"]:
            key = "/".join(row[part] for part in ("stage", "engine", "device", "precision"))
            assert f"left out: {key}: {row['skipped']}" in err

    for name, row in live.items():
        patterns = FILES | ({"prefill.nodes.svg", "decode.nodes.svg"} if row["engine"] == "openvino" else set())
        found = [path for pattern in patterns for path in (log / name).glob(pattern)]
        assert sorted(found) == sorted((log / name).iterdir()) and len(found) == len(patterns)
        assert all(0 < path.stat().st_size < 20e6 for path in found)
        events = read(log / name)
        assert [e.value for e in events.Scalars("measured/perplexity")] == pytest.approx([row["quality"]["perplexity"]])
        if row["latency"]:
            decode = 1e3 * row["latency"]["decode"]["p50"]
            assert [e.value for e in events.Scalars("measured/decode_ms_per_token")] == pytest.approx([decode])
    nodes = read(log / "quantize-openvino-cpu-int8").Tensors("nodes/decode by type/text_summary")[0]
    assert "FullyConnected" in nodes.tensor_proto.string_val[0].decode()
    assert ">transformer.h.0.attn\nmodule" in (log / "quantize-openvino-cpu-int8/decode.nodes.svg").read_text()

    for stage, curve in results["curves"].items():
        events = read(log / f"{stage}-training")
        for tag, key in (("training/loss", "loss"), ("training/learning_rate", "rate")):
            points = [(e.step, e.value) for e in events.Scalars(tag)]
            assert points == [(p["step"], pytest.approx(p[key])) for p in curve if p[key] is not None] and points
    summary = read(log / "summary")
    assert (
        set(summary.Tags()["images"])
        == {f"run/{path.stem}" for path in (run_copy / "plots").glob("*.png")}
        > {"run/heads"}
    )
    assert "| finetune" in summary.Tensors("stages/text_summary")[0].tensor_proto.string_val[0].decode()


def test_choices_narrow_a_run(run_copy: Path, tmp_path: Path, cli) -> None:
    (run_copy / "results.json").unlink()  # not needed
    code, _, err = cli(
        "profile", run_copy, "--out", tmp_path / "log", "--engine", "openvino", "--precision", "int8", *SHORT
    )
    assert code == 0, err
    assert [folder.name for folder in (tmp_path / "log").iterdir()] == ["quantize-openvino-cpu-int8"]


def test_mistakes_are_one_line(run_copy: Path, tmp_path: Path, cli) -> None:
    model = run_copy / "half/model"
    for words, message in [
        ([run_copy, "--precision", "int4"], "--precision int4: give fp32, fp16"),
        ([run_copy, "--precision", "int4-int8"], "none of its rows is such and can run here"),
        ([run_copy, run_copy], "profile one run at a time"),
        ([model, model, *SHORT], "two of these profiles would be"),
        ([tmp_path / "nowhere"], "nowhere"),
        ([model, "--engine", "onnx"], "--engine onnx: give torch, cuda or openvino"),
    ]:
        code, out, err = cli("profile", *words, "--out", tmp_path / "log")
        lines = [line for line in err.splitlines() if line.startswith("error: ")]
        assert (code, out, len(lines)) == (2, "", 1) and message in lines[0]
        assert "Traceback" not in err
    weights = next(model.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1])
    code, _, err = cli("profile", run_copy, "--out", tmp_path / "log")
    assert code == 2 and "not what its manifest says" in err
