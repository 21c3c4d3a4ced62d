"""Order, fingerprints, and what a run refuses before it works."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from eval.errors import UserError, WorkError
from pipeline.artifacts import RunFolder
from pipeline.recipe import Recipe, load_recipe, parse_recipe
from pipeline.runner import Runner
from pipeline.stages import BY_NAME, STAGES


def runner(folder: Path, recipe: Path, *changes: str) -> Runner:
    return Runner(load_recipe(Recipe, recipe, ["measure.latency=false", *changes]), folder)


WANTED = [stage for stage in STAGES if stage.name != "control-plain"]  # which only a teacher brings


def work(err: str) -> list[str]:
    """The stages that were made."""
    return [line.partition(":")[0] for line in err.splitlines() if line.endswith(": at work")]


def test_each_stage_comes_after_its_source() -> None:
    seen: list[str] = []
    for stage in STAGES:
        assert stage.after is None or stage.after in seen
        seen.append(stage.name)


def test_a_second_run_works_on_nothing(run_copy: Path, tiny_recipe: Path, capfd) -> None:
    runner(run_copy, tiny_recipe).execute()
    err = capfd.readouterr().err
    assert work(err) == [] and err.count("up to date") == len(WANTED)


@pytest.mark.parametrize(
    ("change", "remade"),
    [
        ("quantize.ignore=['transformer.h.0.mlp.c_fc']", ["quantize"]),
        ("finetune.save_steps=5", []),
        ("measure.text_share=0.1", []),
        ("controls.random_heads=false", []),
        ("prune.ratio=0.4", ["prune", "control-random", "finetune", "quantize"]),
        ("quantize.method=gptq", ["quantize"]),
    ],
)
def test_a_change_remakes_what_stands_on_it(
    change: str, remade: list[str], run_copy: Path, tiny_recipe: Path, capfd
) -> None:
    results = runner(run_copy, tiny_recipe, change).execute()
    assert work(capfd.readouterr().err) == remade
    assert ("control-random" in results.heads) == (change != "controls.random_heads=false")
    if change == "prune.ratio=0.4":
        assert [len(kept) for kept in results.heads["prune"].kept] == [3, 3]


def test_a_changed_model_or_text_remakes_everything_on_it(
    run_copy: Path, tiny_recipe: Path, tiny_folder: Path, tiny_texts: dict[str, Path], tmp_path: Path, capfd
) -> None:
    text = tmp_path / "calibration.txt"
    text.write_text(tiny_texts["calibration"].read_text().replace("cat", "cow"))
    runner(run_copy, tiny_recipe, f"data.calibration={text}").execute(until="finetune")
    remade = work(capfd.readouterr().err)
    assert remade[:2] == ["prune", "control-random"] and set(remade) <= {"prune", "control-random", "finetune"}

    folder = Path(shutil.copytree(tiny_folder, tmp_path / "model"))
    weights = load_file(folder / "model.safetensors")
    weights["transformer.wte.weight"][5, 5] += 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    runner(run_copy, tiny_recipe, f"load.source={folder}").execute(until="half")
    assert work(capfd.readouterr().err) == ["load", "half"]


def test_a_stage_by_itself(finished_run: Path, tiny_recipe: Path, tmp_path: Path, capfd) -> None:
    out = tmp_path / "run"
    with pytest.raises(UserError, match=r"no such stage; run: python -m pipeline load --out"):
        runner(out, tiny_recipe).stage("half")
    results = runner(out, tiny_recipe).stage("load")
    assert [row.key for row in results.rows] == ["load/torch/cpu/fp32", "load/torch/cuda:0/fp32"]
    runner(out, tiny_recipe).stage("half")
    with pytest.raises(UserError, match="made with other choices than the recipe's"):
        runner(out, tiny_recipe, "load.source=embedded").stage("half")
    assert RunFolder(out).verify("half").files == RunFolder(finished_run).verify("half").files


@pytest.mark.parametrize("stage", ["load", "finetune", "quantize"])
def test_damage_is_found_and_force_mends_it(
    stage: str, run_copy: Path, finished_run: Path, tiny_recipe: Path, capfd
) -> None:
    folder = run_copy / stage / "model"
    harms = {
        "load": lambda: (folder / "config.json").unlink(),
        "finetune": lambda: (folder / "model.safetensors").write_bytes(
            (folder / "model.safetensors").read_bytes()[:-1]
        ),
        "quantize": lambda: (run_copy / stage / "stage.json").write_text("{"),
    }
    harms[stage]()
    with pytest.raises(UserError, match=f"{stage}.* make the stage again with --force {stage}") as caught:
        runner(run_copy, tiny_recipe).execute()
    assert "\n" not in str(caught.value)
    capfd.readouterr()
    runner(run_copy, tiny_recipe).execute(force=[stage])
    assert work(capfd.readouterr().err) == [stage]
    for each in WANTED:
        assert RunFolder(run_copy).verify(each.name).files == RunFolder(finished_run).verify(each.name).files


def test_an_absent_manifest_counts_as_damage(run_copy: Path, tiny_recipe: Path) -> None:
    (run_copy / "prune" / "stage.json").unlink()
    with pytest.raises(UserError, match="--force prune"):
        runner(run_copy, tiny_recipe).execute(until="prune")


def test_a_manifest_of_another_fingerprint_is_remade(run_copy: Path, tiny_recipe: Path, capfd) -> None:
    path = run_copy / "half" / "stage.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"fingerprint": "0" * 16}))
    runner(run_copy, tiny_recipe).execute(until="half")
    assert work(capfd.readouterr().err) == ["half"]


@pytest.mark.parametrize("how", [{"until": "measure"}, {"force": ["finetune", "all"]}])
def test_unknown_stages(how: dict[str, Any], tmp_path: Path, tiny_recipe: Path) -> None:
    with pytest.raises(UserError, match=f"no such stage; give one of {', '.join(BY_NAME)}"):
        runner(tmp_path / "run", tiny_recipe).execute(**how)
    assert not (tmp_path / "run").exists()


def test_texts_are_judged_before_any_work(
    tmp_path: Path, tiny_recipe: Path, tiny_texts: dict[str, Path], capfd
) -> None:
    shared = tmp_path / "shared.txt"
    shared.write_text("\n\n".join(tiny_texts[name].read_text() for name in ("calibration", "evaluation")))
    binary = tmp_path / "binary.txt"
    binary.write_bytes(bytes(range(256)))
    empty = tmp_path / "empty.txt"
    empty.touch()
    for change, said in (
        (f"data.calibration={shared}", "shares a paragraph with the evaluation text"),
        (f"data.train={shared}", "shares a paragraph with the evaluation text"),
        (f"data.train={binary}", "not UTF-8"),
        (f"data.calibration={empty}", "empty"),
        (f"data.evaluation={empty}", "empty"),
        ("data.train=embedded:nothing", "no such split"),
    ):
        with pytest.raises(UserError, match=said):
            runner(tmp_path / "run", tiny_recipe, change).execute()
    assert work(capfd.readouterr().err) == []


def test_a_text_shorter_than_a_window(tmp_path: Path, tiny_recipe: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("Call me Ishmael.")
    for key, until in (("calibration", "prune"), ("train", "finetune")):
        with pytest.raises(UserError, match="shorter than one block of 32"):
            runner(tmp_path / "run", tiny_recipe, f"data.{key}={short}").execute(until=until)
    assert RunFolder(tmp_path / "run").verify("half")  # what was finished stays


def test_a_row_longer_than_the_context_is_refused_before_any_work(tmp_path: Path, tiny_recipe: Path) -> None:
    for change in ("measure.context=49", "measure.prompt_tokens=45", "measure.stride=33", "measure.new_tokens=1"):
        with pytest.raises(UserError, match=r"measure\."):
            Runner(load_recipe(Recipe, tiny_recipe, [change]), tmp_path / "run").execute()
        assert not (tmp_path / "run" / "prune").exists(), change


def test_weights_beyond_fp16(tmp_path: Path, tiny_folder: Path, tiny_recipe: Path) -> None:
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "model"))
    weights = load_file(folder / "model.safetensors")
    weights["transformer.h.1.mlp.c_fc.weight"][3, 7] = -70000.0
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    change = f"load.source={folder}"
    with pytest.raises(WorkError, match=r"h\.1\.mlp\.c_fc\.weight reaches 7e\+04, beyond FP16's 65504"):
        runner(tmp_path / "run", tiny_recipe, change).execute()
    assert RunFolder(tmp_path / "run").verify("load")
    assert not (tmp_path / "run" / "half").exists()


def test_distillation_in_a_run(run_copy: Path, finished_run: Path, tiny_recipe: Path) -> None:
    results = runner(run_copy, tiny_recipe, "finetune.distill={weight: 0.5, temperature: 2}").execute(until="finetune")
    before = json.loads((finished_run / "results.json").read_text())["curves"]["finetune"]
    assert results.curves["finetune"][0].loss != before[0]["loss"]


def test_the_run_folder_keeps_its_recipe(finished_run: Path, tiny_choices: dict[str, Any]) -> None:
    kept = yaml.safe_load((finished_run / "recipe.yaml").read_text())
    assert parse_recipe(Recipe, kept) == parse_recipe(Recipe, tiny_choices)


def test_what_the_results_tell_of_the_run(finished_run: Path) -> None:
    run = json.loads((finished_run / "results.json").read_text())["run"]
    assert {"name", "recipe", "machine", "versions", "git_commit", "date", "seconds", "command"} <= run.keys()
    assert list(run["seconds"]) == [stage.name for stage in WANTED]
    assert (
        run["versions"]["torch"] == torch.__version__.partition("+")[0] or run["versions"]["torch"] == torch.__version__
    )
