"""Sweeps: nothing is made twice, however they are launched, and one point's end is not the others'."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from eval.errors import UserError
from pipeline.artifacts import RunFolder
from pipeline.launchers import Local, Task
from pipeline.runner import Runner
from pipeline.store import Store
from pipeline.sweep import Outcome, _leaders_first, expand, plain, sweep

GRID = ["finetune.learning_rate=1e-3,2e-3"]


@pytest.fixture(scope="module")
def brief(tmp_path_factory: pytest.TempPathFactory, tiny_choices: dict[str, Any]) -> str:
    """The tiny recipe with less of everything: no control arms, no times."""
    choices = tiny_choices | {
        "name": "brief",
        "controls": {"dense_finetuned": False, "random_heads": False},
        "finetune": tiny_choices["finetune"] | {"steps": 41},
        "measure": tiny_choices["measure"] | {"latency": False, "text_share": 0.1},
    }
    path = tmp_path_factory.mktemp("recipe") / "brief.yaml"
    path.write_text(yaml.safe_dump(choices), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory, brief: str) -> tuple[Path, list[Outcome]]:
    """A sweep of two points, both at a time. Only to be looked at."""
    out = tmp_path_factory.mktemp("swept") / "out"
    return out, sweep(expand(brief, GRID), out, workers=2)


def at_work(out: Path) -> list[str]:
    """The stages that were made, of all points."""
    lines = [line for log in out.glob("points/*/log.txt") for line in log.read_text().splitlines()]
    return sorted(line.partition(":")[0] for line in lines if line.endswith(": at work"))


def perplexities(outcomes: list[Outcome]) -> list[list[float | None]]:
    return [
        [row.quality.perplexity if row.quality else None for row in each.results.rows] if each.results else []
        for each in outcomes
    ]


def test_a_grid_is_all_combinations(brief: str) -> None:
    points = expand(brief, ["prune.ratio=0.1, 0.2", "quantize.ignore=[a,b],[]", "prune.scope=layer"], ["seed=3"])
    assert [(p.choices["prune.ratio"], p.choices["quantize.ignore"]) for p in points] == [
        (0.1, ["a", "b"]),
        (0.1, []),
        (0.2, ["a", "b"]),
        (0.2, []),
    ]
    assert points[2].recipe.prune.ratio == 0.2 and points[2].recipe.quantize.ignore == ["a", "b"]
    assert all(point.recipe.seed == 3 for point in points)
    names = [point.name for point in points]
    assert len(set(names)) == 4 and all("/" not in name and len(name) < 130 for name in names)
    assert expand(brief, ["prune.ratio=0.1"])[0].name == "prune.ratio=0.1"


@pytest.mark.parametrize(
    ("grids", "said"),
    [
        (["prune.ratio"], "--grid prune.ratio: give KEY=VALUE,VALUE as in prune.ratio=0.1,0.2,0.4"),
        (["prune.ratio="], "give KEY=VALUE,VALUE"),
        (["prune.ratio=0.1,,0.2"], "give KEY=VALUE,VALUE"),
        (["=0.1"], "give KEY=VALUE,VALUE"),
        (["prune.ratio=[0.1"], "give KEY=VALUE,VALUE"),
        (["prune.ratio=0.1,1e-1"], "prune.ratio=0.1 is given twice; give each value once"),
        (["prune.ratio=0.1", "prune.ratio=0.2"], "the key is given twice"),
        (["prune.ratio=0.1,1.5"], "prune.ratio is 1.5"),
        (["prune.rato=0.1"], "unknown key 'prune.rato'; known here: ratio"),
        (["quantize.method=rtn,awq"], "quantize.method is 'awq'"),
    ],
)
def test_a_wrong_grid_is_one_line_before_any_work(
    grids: list[str], said: str, brief: str, tmp_path: Path, cli: Callable
) -> None:
    options = [word for grid in grids for word in ("--grid", grid)]
    code, out, err = cli("sweep", "--recipe", brief, "--out", tmp_path / "out", *options)
    assert (code, out, err.count("\n")) == (2, "", 1) and said in err
    assert not (tmp_path / "out").exists()


def test_those_that_share_most_wait_for_the_first(brief: str) -> None:
    points = expand(brief, ["prune.ratio=0.2,0.4", "quantize.method=rtn,gptq"])
    order = [each.point.choices for each in _leaders_first([Outcome(point) for point in points])]
    assert [each["prune.ratio"] for each in order] == [0.2, 0.4, 0.2, 0.4]
    assert [each["quantize.method"] for each in order] == ["rtn", "rtn", "gptq", "gptq"]


def test_stages_are_made_once(swept: tuple[Path, list[Outcome]], tmp_path: Path) -> None:
    out, outcomes = swept
    assert [each.failure for each in outcomes] == [None, None]
    assert at_work(out) == ["finetune", "finetune", "half", "load", "prune", "quantize", "quantize"]
    runs = [RunFolder(out / "points" / each.point.name) for each in outcomes]
    for stage in ("load", "half", "prune"):
        assert len({(run.stage(stage) / "model/model.safetensors").stat().st_ino for run in runs}) == 1
    alone = Runner(outcomes[1].point.recipe, tmp_path / "alone")
    alone.build()
    for stage in ("load", "half", "prune", "finetune", "quantize"):
        assert runs[1].verify(stage).files == alone.run.verify(stage).files, stage
    # What the points have in common is measured once as well.
    logs = "".join((run.path / "log.txt").read_text() for run in runs)
    assert [logs.count(f"perplexity of {stage}/") for stage in ("load", "prune", "finetune")] == [1, 1, 2]


def test_table_and_figure(swept: tuple[Path, list[Outcome]]) -> None:
    out, outcomes = swept
    stored = json.loads((out / "sweep.json").read_text())
    assert stored == json.loads(json.dumps(list(plain(outcomes))))
    table = (out / "sweep.md").read_text()
    for each in outcomes:
        assert each.results is not None
        assert each.results.run["recipe"]["finetune"]["learning_rate"] == each.point.choices["finetune.learning_rate"]
        row = next(row for row in each.results.rows if row.key == "quantize/openvino/cpu/int8")
        assert row.quality is not None
        start = " | ".join(["", *map(str, each.point.choices.values()), row.key.replace("/", " · ")]).strip()
        line = next(line for line in table.splitlines() if line.startswith(start))
        assert f"| {row.quality.perplexity:,.2f} |" in line
    assert (out / "sweep.png").stat().st_size > 10_000 and "finetune.learning_rate" in (out / "sweep.svg").read_text()


def test_a_point_that_fails(swept: tuple[Path, list[Outcome]], brief: str, tmp_path: Path, cli: Callable) -> None:
    out = Path(shutil.copytree(swept[0], tmp_path / "out"))
    command = ("sweep", "--recipe", brief, "--grid", "finetune.learning_rate=1e30,1e-3", "--out", out)
    code, printed, err = cli(*command)
    assert code == 1 and err.splitlines()[-1].startswith("failed: 1 of 2 points, as the table says")
    reason = "lower the learning rate and run again"
    assert "failed: finetune: " in printed and reason in printed and reason in (out / "sweep.md").read_text()
    # The other one was there, and nothing of it was done again.
    assert [line.split()[0] for line in printed.splitlines() if "int8" in line] == ["0.001"]
    assert at_work(out) == sorted([*at_work(swept[0]), "finetune"])
    stored = json.loads((out / "sweep.json").read_text())
    assert stored[1]["rows"] == next(plain(swept[1][:1]))["rows"] and stored[0]["rows"] == []


@pytest.mark.slow
def test_ray_gives_the_same(swept: tuple[Path, list[Outcome]], brief: str, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="Ray is an optional extra: pip install ray")
    out, outcomes = swept
    again = sweep(expand(brief, GRID), tmp_path / "ray", launcher="ray", workers=2)
    assert [each.failure for each in again] == [None, None]
    assert perplexities(again) == perplexities(outcomes)
    assert (tmp_path / "ray/sweep.md").read_text() == (out / "sweep.md").read_text()
    assert at_work(tmp_path / "ray") == at_work(out)


def test_a_worker_that_was_killed(swept: tuple[Path, list[Outcome]], brief: str, tmp_path: Path) -> None:
    (point,) = expand(brief, ["finetune.steps=5000"])
    recipe = point.recipe.model_dump(mode="json")
    task = Task(recipe, tmp_path / "point", Path(shutil.copytree(swept[0] / "stages", tmp_path / "stages")), False, 1)
    launch, answers = Local(), []
    thread = threading.Thread(target=lambda: answers.append(launch(task)))
    thread.start()
    log = task.folder / "log.txt"
    while not (log.exists() and "finetune: step" in log.read_text()):
        assert thread.is_alive(), answers
        time.sleep(0.01)
    (process,) = launch.running
    os.kill(process.pid, signal.SIGKILL)
    thread.join()
    assert answers == [f"its process ended with exit code -9 (see {log})"]


@pytest.mark.thorough
def test_killed_it_goes_on(swept: tuple[Path, list[Outcome]], brief: str, tmp_path: Path) -> None:
    out = Path(shutil.copytree(swept[0], tmp_path / "out"))
    whole = RunFolder(swept[0] / "points" / swept[1][1].point.name)
    point = out / "points" / whole.path.name
    shutil.rmtree(point)
    shutil.rmtree(out / "stages" / f"finetune-{whole.verify('finetune').fingerprint}")
    options = ["--recipe", brief, "--grid", *GRID, "--workers", "2", "--out", out]
    command = [sys.executable, "-m", "pipeline", "sweep", *options]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while not next(point.glob(".finetune-*.partial/checkpoints/checkpoint-2/trainer_state.json"), None):
        assert process.poll() is None
        time.sleep(0.001)
    process.kill()
    process.wait()
    while True:  # its worker sees that it is alone, and ends
        with contextlib.suppress(UserError), RunFolder(point).locked():
            break
    assert not (point / "finetune").exists()
    outcomes = sweep(expand(brief, GRID), out, workers=2)
    assert perplexities(outcomes) == perplexities(swept[1])
    assert (point / "log.txt").read_text().count("finetune: step 2/41") == 1  # it went on from its checkpoint
    assert [at_work(out).count(stage) <= 1 for stage in ("load", "half", "prune")] == [True] * 3


def test_a_damaged_stage_of_the_store_is_made_anew(run_copy: Path, tmp_path: Path) -> None:
    run, store = RunFolder(run_copy), Store(tmp_path / "stages")
    mark = run.verify("half").fingerprint
    assert not store.take("half", mark, run)
    store.keep("half", mark, run)
    other = RunFolder(tmp_path / "other")
    other.path.mkdir()
    assert store.take("half", mark, other) and other.verify("half") == run.verify("half")
    weights = tmp_path / "stages" / f"half-{mark}" / "model/model.safetensors"
    content = weights.read_bytes()
    weights.unlink()
    weights.write_bytes(content[:-1])
    assert not store.take("half", mark, other) and not weights.exists()
    assert other.verify("half") == run.verify("half")


def test_other_choices_of_a_point_are_refused(
    swept: tuple[Path, list[Outcome]], brief: str, tmp_path: Path, cli: Callable
) -> None:
    out = Path(shutil.copytree(swept[0], tmp_path / "out"))
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    command = ("sweep", "--recipe", brief, "--grid", GRID[0], "--out", out)
    for change, said in (
        ("prune.ratio=0.4", "prune was made by other choices (prune.ratio was 0.2, is 0.4)"),
        ("measure.latency=true", "it was measured by other choices (measure.latency was false, is true)"),
    ):
        code, _, err = cli(*command, "--set", change)
        assert (code, err.count("\n")) == (2, 1) and f"{said}; give another --out, or delete it" in err
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}


def test_launchers_by_name(brief: str, tmp_path: Path, cli: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ("sweep", "--recipe", brief, "--grid", "prune.ratio=0.2", "--out", tmp_path / "out", "--launcher")
    assert cli(*command, "slurm") == (2, "", "error: --launcher slurm: give local or ray\n")
    monkeypatch.setitem(sys.modules, "ray", None)
    said = "error: --launcher ray: Ray is not installed; pip install ray, or give --launcher local\n"
    assert cli(*command, "ray") == (2, "", said)
