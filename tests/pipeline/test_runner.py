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
    Runner(load_recipe(Recipe, tiny_recipe), run_copy).execute()
    err = capfd.readouterr().err
    assert work(err) == [] and err.count("up to date") == len(WANTED)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("change", "force", "said", "remade"),
    [
        (
            "quantize.ignore=['transformer.h.0.mlp.c_fc']",
            "quantize",
            'quantize was made by other choices (quantize.ignore was [], is ["transformer.h.0.mlp.c_fc"])',
            ["quantize"],
        ),
        (
            "finetune.save_steps=5",
            "measure",
            "it was measured by other choices (finetune.save_steps was 2, is 5; measure.latency was true, is false)",
            [],
        ),
        ("measure.text_share=0.1", "measure", "(measure.text_share was 0.2, is 0.1; measure.latency", []),
        ("controls.random_heads=false", "measure", "(controls.random_heads was true, is false; measure.latency", []),
        (
            "prune.ratio=0.4",
            "prune",
            "prune was made by other choices (prune.ratio was 0.2, is 0.4)",
            ["prune", "control-random", "finetune", "quantize"],
        ),
        (
            "quantize.method=gptq",
            "quantize",
            "(quantize.method was rtn, is gptq; data.calibration was none",
            ["quantize"],
        ),
        ("finetune.distill={weight: 0.3}", "finetune", '(finetune.distill was null, is {"temperature"', None),
        ("load.window=4", "load", "load was made by other choices (load.window was null, is 4)", None),
        ("seed=1", "prune", "prune was made by other choices (seed was 0, is 1)", None),
        ("load.source=embedded", "load", "; embedded was another model", None),
        ("data.evaluation=embedded:test", "measure", "it was measured by other choices (data.evaluation was", None),
        ("name=other", "measure", "it was measured by other choices (name was tiny, is other; ", None),
    ],
)
def test_other_choices_are_refused_and_force_allows_them(
    change: str, force: str, said: str, remade: list[str] | None, run_copy: Path, tiny_recipe: Path, capfd
) -> None:
    before = tree(run_copy)
    for weaker in ([], ["measure"] if force != "measure" else [], ["quantize"] if force == "prune" else []):
        with pytest.raises(UserError) as caught:
            runner(run_copy, tiny_recipe, change).execute(force=weaker)
        assert said in str(caught.value) and "\n" not in str(caught.value)
        assert str(caught.value).endswith(f"; give another --out, or --force {force}")
        assert tree(run_copy) == before
    if not remade:
        return
    capfd.readouterr()
    results = runner(run_copy, tiny_recipe, change).execute(force=[force])
    assert work(capfd.readouterr().err) == remade
    if change == "prune.ratio=0.4":
        assert [len(kept) for kept in results.heads["prune"].kept] == [3, 3]
    assert load_recipe(Recipe, run_copy / "recipe.yaml") == runner(run_copy, tiny_recipe, change).recipe
    assert not [*runner(run_copy, run_copy / "recipe.yaml").other_choices(STAGES)]


def test_force_of_what_is_not_made(run_copy: Path, tiny_recipe: Path) -> None:
    before = tree(run_copy)
    for force, until in (("prune", "half"), ("control-plain", None)):
        with pytest.raises(UserError, match=f"--force {force}: no stage of this call"):
            runner(run_copy, tiny_recipe, "prune.ratio=0.4").execute(until=until, force=[force])
    with pytest.raises(UserError, match=r"prune was made by .* give another --out, or leave out --until"):
        runner(run_copy, tiny_recipe, "prune.ratio=0.4").execute(until="half")
    assert tree(run_copy) == before


def test_one_stage_goes_on_by_the_recipe_that_is_kept(run_copy: Path, tiny_recipe: Path, capfd) -> None:
    """Whatever else stands there by other choices: it was forced before."""
    changed = "prune.ratio=0.4"
    runner(run_copy, tiny_recipe, changed).stage("prune", force=True)
    capfd.readouterr()
    runner(run_copy, run_copy / "recipe.yaml").stage("finetune")
    assert work(capfd.readouterr().err) == ["finetune"]
    with pytest.raises(UserError, match=r"control-random was made by other choices .* or --force control-random"):
        runner(run_copy, tiny_recipe, changed).execute()
    without = runner(run_copy, tiny_recipe, changed, "controls.random_heads=false")
    with pytest.raises(UserError, match=f"or delete {run_copy / 'control-random'}"):
        without.execute()


@pytest.mark.parametrize("change", ["load.n_kv_head=3", "load.window=[4,5,6]", "load.source=."])
def test_a_model_that_cannot_be_is_refused_before_anything_is_there(
    change: str, tiny_recipe: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError):
        runner(tmp_path / "run", tiny_recipe, change).execute(until="load")
    assert not (tmp_path / "run").exists()


def test_a_recipe_of_an_older_version_is_no_other_choice(run_copy: Path, tiny_recipe: Path) -> None:
    def without(path: Path, read: Any, write: Any) -> None:
        plain = read(path.read_text())
        recipe = plain["run"]["recipe"] if "run" in plain else plain.get("config", plain)
        for part, key in (("measure", "agreement_tokens"), ("prune", "compensate"), ("quantize", "w8a8")):
            recipe.get(part, recipe).pop(key, None)
        path.write_text(write(plain))

    path = run_copy / "results.json"
    path.write_text(path.read_text().replace('"agreement_tokens": 101', '"agreement_tokens": 1024'))
    without(run_copy / "recipe.yaml", yaml.safe_load, lambda plain: yaml.safe_dump(plain, sort_keys=False))
    for stage in ("results", "prune/stage", "quantize/stage"):
        without(run_copy / f"{stage}.json", json.loads, json.dumps)
    older = Runner(load_recipe(Recipe, tiny_recipe, ["measure.agreement_tokens=1024"]), run_copy)
    assert not [*older.other_choices(STAGES)]
    (run_copy / "recipe.yaml").unlink()  # the results themselves tell
    assert not [*older.other_choices(STAGES)]
    (name, said), *_ = Runner(load_recipe(Recipe, tiny_recipe), run_copy).other_choices(STAGES)
    assert name == "measure" and said.endswith("(measure.agreement_tokens was 1024, is 101)")


def test_content_that_changed_is_another_choice(
    tiny_recipe: Path, tiny_folder: Path, tiny_texts: dict[str, Path], tmp_path: Path, capfd
) -> None:
    texts = {name: Path(shutil.copy(path, tmp_path)) for name, path in tiny_texts.items()}
    model, out = Path(shutil.copytree(tiny_folder, tmp_path / "model")), tmp_path / "run"
    changes = [f"data.{name}={path}" for name, path in texts.items()] + [f"load.source={model}"]
    runner(out, tiny_recipe, *changes).execute(until="finetune")
    chosen = out / "recipe.yaml"

    weights = load_file(model / "model.safetensors")
    kept = (model / "model.safetensors").read_bytes()
    weights["transformer.wte.weight"][5, 5] += 1
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=rf"load was made .*{model} was another model.*--force load$"):
        runner(out, chosen).execute()
    (model / "model.safetensors").write_bytes(kept)
    for name, stage in (("calibration", "prune"), ("train", "finetune"), ("evaluation", "measure")):
        kept = texts[name].read_bytes()
        texts[name].write_text(kept.decode().replace("cat", "cow"))
        with pytest.raises(UserError, match=rf"{texts[name]} was another text.*--force {stage}$"):
            runner(out, chosen).execute()
        texts[name].write_bytes(kept)
    capfd.readouterr()
    texts["calibration"].write_text(texts["calibration"].read_text().replace("cat", "cow"))
    runner(out, chosen).execute(until="finetune", force=["prune"])
    remade = work(capfd.readouterr().err)
    assert remade[:2] == ["prune", "control-random"] and set(remade) <= {"prune", "control-random", "finetune"}


def test_work_that_fails_leaves_the_recipe(run_copy: Path, tiny_recipe: Path, tmp_path: Path) -> None:
    kept = (run_copy / "recipe.yaml").read_bytes()
    for changes, error in (
        (["load.source=/nope"], UserError),
        (["prune.ratio=0.4"], UserError),
        (["data.train=/nope"], UserError),
        (["measure.context=999"], UserError),
        (["measure.tasks.names=[lambada]", "measure.tasks.data=/nope"], UserError),
        (["finetune.learning_rate=1e30"], WorkError),
    ):
        with pytest.raises(error):
            runner(run_copy, tiny_recipe, *changes).execute(force=["finetune"])
        assert (run_copy / "recipe.yaml").read_bytes() == kept
    broken = tmp_path / "model"
    broken.mkdir()
    (broken / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(UserError):
        runner(tmp_path / "fresh", tiny_recipe, f"load.source={broken}").execute()
    assert not [*(tmp_path / "fresh").glob("[!.]*")]


def test_work_that_is_not_finished_may_go_on_otherwise(tiny_recipe: Path, tmp_path: Path, capfd) -> None:
    out = tmp_path / "run"
    runner(out, tiny_recipe).stage("load")
    runner(out, tiny_recipe).stage("half")
    runner(out, tiny_recipe, "prune.ratio=0.4").stage("prune")
    capfd.readouterr()
    with pytest.raises(
        UserError, match=r"prune was made .*prune.ratio was 0.4, is 0.2\); give another --out, or --force$"
    ):
        runner(out, tiny_recipe).stage("prune")
    runner(out, out / "recipe.yaml", "controls.dense_finetuned=false").execute(until="prune")
    assert work(capfd.readouterr().err) == []


@pytest.mark.parametrize(
    "name",
    ["prune/notes.txt", "measurements/mine.json", "plots/mine.png", "results.json", "report.html", "recipe.yaml"],
)
def test_a_folder_of_somebody_else(name: str, tiny_recipe: Path, tmp_path: Path) -> None:
    path = tmp_path / "theirs" / name
    path.parent.mkdir(parents=True)
    path.write_text("years: of work")
    for force in ([], [stage.name for stage in WANTED]):
        with pytest.raises(UserError, match="give another --out"):
            runner(tmp_path / "theirs", tiny_recipe).execute(force=force)
    with pytest.raises(UserError, match="give another --out"):
        runner(tmp_path / "theirs", tiny_recipe).stage("load", force=True)
    assert tree(tmp_path / "theirs") == {name: b"years: of work"}


def test_a_recipe_that_stands_there_already_is_left_as_it_is(tiny_recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    mine = f"# mine\n{tiny_recipe.read_text()}"
    (out / "recipe.yaml").write_text(mine)
    with pytest.raises(UserError, match=r"recipe.yaml: not written by a run, so none replaces it"):
        runner(out, tiny_recipe).execute(until="load")
    Runner(load_recipe(Recipe, tiny_recipe), out).execute(until="load")
    assert (out / "recipe.yaml").read_text() == mine


@pytest.mark.parametrize("damage", ["whole", "damaged", "linked"])
def test_force_replaces_a_stage_and_nothing_else(
    damage: str, run_copy: Path, tiny_recipe: Path, tmp_path: Path
) -> None:
    stage = run_copy / "prune"
    if damage == "linked":
        stage.rename(tmp_path / "prune")
        stage.symlink_to(tmp_path / "prune")
    else:
        (stage / "notes").mkdir()
        (stage / "notes" / "mine.txt").write_text("years of work")
        if damage == "damaged":
            (stage / "stage.json").unlink()
    before = tree(run_copy)
    with pytest.raises(UserError, match=r"prune.*move it away"):
        Runner(load_recipe(Recipe, tiny_recipe), run_copy).execute(force=["prune"])
    assert tree(run_copy) == before


def test_a_stage_by_itself(finished_run: Path, tiny_recipe: Path, tmp_path: Path, capfd) -> None:
    out = tmp_path / "run"
    with pytest.raises(UserError, match=r"no such stage; first run, by the same recipe: python -m pipeline load --out"):
        runner(out, tiny_recipe).stage("half")
    assert not out.exists()
    results = runner(out, tiny_recipe).stage("load")
    assert [row.key for row in results.rows] == ["load/torch/cpu/fp32", "load/torch/cuda:0/fp32"]
    runner(out, tiny_recipe).stage("half")
    with pytest.raises(
        UserError, match=r"made with other choices than the recipe's \(load.source was .* first run, by"
    ):
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
    with pytest.raises(UserError, match=f"{stage}.* make the stage again: .* --force {stage}") as caught:
        Runner(load_recipe(Recipe, tiny_recipe), run_copy).execute()
    assert "\n" not in str(caught.value)
    capfd.readouterr()
    Runner(load_recipe(Recipe, tiny_recipe), run_copy).execute(force=[stage])
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
    Runner(load_recipe(Recipe, tiny_recipe), run_copy).execute(until="half")
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
    results = runner(run_copy, tiny_recipe, "finetune.distill={weight: 0.5, temperature: 2}").execute(
        until="finetune", force=["finetune"]
    )
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
