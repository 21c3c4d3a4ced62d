"""What a run logs, read back from where it was logged; and that logging changes nothing."""

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.artifacts import RunFolder
from pipeline.tracking import Tracking


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Tag -> steps and values of a TensorBoard run."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(each.step, each.value) for each in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_has_the_training_and_the_table(
    run_copy: Path, finished_run: Path, tiny_recipe: Path, cli: Callable
) -> None:
    for stage in ("finetune", "control-finetune"):
        shutil.rmtree(run_copy / stage)
    command = ("run", "--recipe", tiny_recipe, "--out", run_copy, "--track", "tensorboard", "--set", "seed=0")
    code, _, err = cli(*command)
    assert code == 0, err
    results = json.loads((run_copy / "results.json").read_text())
    for stage in ("finetune", "control-finetune"):
        manifest = RunFolder(run_copy).verify(stage)
        assert manifest.files == RunFolder(finished_run).verify(stage).files
        found = scalars(run_copy / "tracking" / f"tiny-{stage}-{manifest.fingerprint[:8]}")
        curve = results["curves"][stage]
        assert [step for step, _ in found["train/loss"]] == [point["step"] for point in curve]
        assert [loss for _, loss in found["train/loss"]] == pytest.approx([point["loss"] for point in curve])
        assert [rate for _, rate in found["train/learning_rate"]] == pytest.approx([point["rate"] for point in curve])
    table = scalars(run_copy / "tracking" / "tiny-stages")
    measured = [row for row in results["rows"] if row["skipped"] is None]
    for row in measured:
        key = "/".join(row[part] for part in ("stage", "engine", "device", "precision"))
        assert table[f"perplexity/{key}"] == [(0, pytest.approx(row["quality"]["perplexity"]))]
        if row["latency"]:
            assert table[f"decode_ms_per_token/{key}"] == [(0, pytest.approx(1e3 * row["latency"]["decode"]["p50"]))]
    assert sum(tag.startswith("perplexity/") for tag in table) == len(measured)


def test_mlflow_has_the_training_and_the_table(
    run_copy: Path, tiny_recipe: Path, tmp_path: Path, cli: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow: Any = pytest.importorskip("mlflow", reason="MLflow is an optional extra: pip install mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.chdir(tmp_path)  # its artifacts go to the working directory
    shutil.rmtree(run_copy / "finetune")
    code, _, err = cli("run", "--recipe", tiny_recipe, "--out", run_copy, "--track", "mlflow")
    assert code == 0, err
    results = json.loads((run_copy / "results.json").read_text())
    runs = {run.info.run_name: run for run in mlflow.search_runs(search_all_experiments=True, output_format="list")}
    mark = RunFolder(run_copy).verify("finetune").fingerprint[:8]
    assert set(runs) >= {f"tiny-finetune-{mark}", "tiny-stages"}
    logged = mlflow.MlflowClient().get_metric_history(runs[f"tiny-finetune-{mark}"].info.run_id, "loss")
    curve = results["curves"]["finetune"]
    assert [(point.step, point.value) for point in logged] == [(each["step"], each["loss"]) for each in curve]
    table = runs["tiny-stages"]
    key, row = "perplexity/load/torch/cpu/fp32", results["rows"][0]
    assert table.data.metrics[key] == row["quality"]["perplexity"]
    assert table.data.params["prune.ratio"] == "0.2"
    names = {each.path for each in mlflow.MlflowClient().list_artifacts(table.info.run_id)}
    assert names == {"results.json", "stages.md"}


def test_where_it_cannot_be_logged(tmp_path: Path, tiny_recipe: Path, cli: Callable, monkeypatch) -> None:
    command = ("run", "--recipe", tiny_recipe, "--out", tmp_path / "run", "--track")
    assert cli(*command, "wandb") == (2, "", "error: --track wandb: give tensorboard, mlflow or none\n")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    said = "error: --track mlflow: mlflow is not installed; pip install mlflow\n"
    assert cli(*command, "mlflow") == (2, "", said)
    assert not (tmp_path / "run").exists()


def test_a_hostile_name_stays_below_the_place(tmp_path: Path) -> None:
    place = Tracking("tensorboard", tmp_path / "tracking")
    for name in ("../../victim", "/victim", "..", "x" * 5000):
        folder = place.folder / place.called(f"{name}-stages").name
        assert folder.parent == place.folder and len(folder.name) <= 200 and folder.name not in ("", ".", "..")
