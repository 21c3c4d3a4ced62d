"""Whatever happens to a run, running again ends with the artifacts of an undisturbed one."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import forks as processes
import pytest

from pipeline.artifacts import RunFolder
from pipeline.recipe import Recipe, load_recipe
from pipeline.runner import Runner

STAGES = ("load", "half", "prune", "control-random", "finetune", "control-finetune", "quantize")


def digests(run: Path) -> dict[str, dict[str, str]]:
    """The sha256 of each artifact, after checking that the manifests tell the truth."""
    return {stage: RunFolder(run).verify(stage).files for stage in STAGES if (run / stage).exists()}


def curves(run: Path) -> dict[str, list]:
    return {name: json.loads((run / name / "stage.json").read_text())["details"].get("curve") for name in STAGES}


@pytest.fixture(scope="module")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[processes.Forks]:
    forks = processes.Forks(tmp_path_factory.mktemp("forks"))
    yield forks
    forks.close()


def left_behind(out: Path, pattern: str):
    return lambda process: next(out.glob(pattern), None)


def test_killed_at_every_stage_it_ends_with_the_same_artifacts(
    forks: processes.Forks, tiny_recipe: Path, finished_run: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    command = ("run", "--recipe", tiny_recipe, "--out", out)
    moments = [
        left_behind(out, ".load-*.partial/model"),
        left_behind(out, ".half-*.partial/model"),
        left_behind(out, ".prune-*.partial/model"),
        lambda process: "control-random: at work" in process.err(),
        left_behind(out, ".finetune-*.partial/checkpoints/checkpoint-4/trainer_state.json"),
        left_behind(out, ".finetune-*.partial/model_fp16"),
        left_behind(out, ".control-finetune-*.partial/checkpoints/checkpoint-2/model.safetensors"),
        left_behind(out, ".quantize-*.partial/model/.export-*"),
        left_behind(out, ".quantize-*.partial/ir_fp16"),
        lambda process: "perplexity of prune/" in process.err(),
        lambda process: "latency of" in process.err(),
        left_behind(out, "plots/*.png"),
    ]
    finetuning = []
    for moment in moments:
        process = forks.start(*command)
        assert process.signal_when(moment) == -signal.SIGKILL
        assert set(digests(out)) <= set(STAGES)  # and none is damaged
        finetuning += [line for line in process.err().splitlines() if line.startswith("finetune: step")]
    code, _, err = forks.run(*command)
    assert code == 0, err
    assert digests(out) == digests(finished_run)
    assert curves(out) == curves(finished_run)
    assert not [*out.glob(".*.partial"), *out.glob(".*.old")]
    rows = [json.loads((run / "results.json").read_text())["rows"] for run in (out, finished_run)]
    assert [row["quality"] for row in rows[0]] == [row["quality"] for row in rows[1]]


def test_interrupted_from_the_keyboard(forks: processes.Forks, tiny_recipe: Path, tmp_path: Path) -> None:
    process = forks.start("run", "--recipe", tiny_recipe, "--out", tmp_path / "run", "--set", "finetune.steps=5000")
    assert process.signal_when(lambda process: "finetune: step" in process.err(), signal.SIGINT) == 130
    assert process.err().splitlines()[-1] == "interrupted; run the same command to resume"
    assert "Traceback" not in process.err()


def test_two_runs_in_one_folder(forks: processes.Forks, tiny_recipe: Path, tmp_path: Path, cli) -> None:
    out = tmp_path / "run"
    first = forks.start("run", "--recipe", tiny_recipe, "--out", out, "--set", "finetune.steps=5000")

    def second(process: processes.Forked) -> bool:
        if "finetune: step" not in process.err():
            return False
        code, stdout, err = cli("run", "--recipe", tiny_recipe, "--out", out)
        assert (code, stdout, len(err.splitlines())) == (2, "", 1)
        assert f"{out}: another run is at work here" in err
        return True

    assert first.signal_when(second) == -signal.SIGKILL
    with RunFolder(out).locked():
        pass  # the lock fell with its holder


def test_finetuning_goes_on_from_its_checkpoint(
    forks: processes.Forks, tiny_recipe: Path, finished_run: Path, run_copy: Path
) -> None:
    shutil.rmtree(run_copy / "finetune")
    command = ("finetune", "--out", run_copy)
    whole = left_behind(run_copy, ".finetune-*.partial/checkpoints/checkpoint-4/trainer_state.json")
    forks.start(*command).signal_when(whole)
    (checkpoints,) = run_copy.glob(".finetune-*.partial/checkpoints")
    # A kill may as well have cut off the checkpoint after.
    cut = Path(shutil.copytree(checkpoints / "checkpoint-4", checkpoints / "checkpoint-40"))
    (cut / "trainer_state.json").write_text('{"global_st')
    code, _, err = forks.run(*command)
    assert code == 0, err
    steps = [line.split()[2] for line in err.splitlines() if line.startswith("finetune: step")]
    assert steps and all(int(step.split("/")[0]) > 4 for step in steps)
    assert digests(run_copy) == digests(finished_run)


@pytest.fixture
def small_disk(tmp_path: Path):
    """A factory of folders on a disk of so many kilobytes; calling it again resizes or protects the disk."""
    disk = tmp_path / "disk"

    def make(options: str) -> Path:
        fresh = not disk.exists()
        disk.mkdir(exist_ok=True)
        how = f"{options}" if fresh else f"remount,{options}"
        command = ["mount", "-t", "tmpfs", "-o", how, "tmpfs", str(disk)]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("a small disk of its own needs the right to mount one")
        return disk

    yield make
    if os.path.ismount(disk):
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_full_disk(small_disk, tiny_recipe: Path, finished_run: Path, cli) -> None:
    out = small_disk("size=64k") / "run"
    command = ("run", "--recipe", tiny_recipe, "--out", out)
    reached = []
    for size in ("64k", "480k", "1000k", "1500k", "2100k"):
        small_disk(f"size={size}")
        code, stdout, err = cli(*command)
        assert code == 1 and stdout == "" and "Traceback" not in err, err
        assert err.splitlines()[-1] == (
            f"failed: {out}: no space left on the disk; free some and run again, finished stages stay"
        )
        reached.append(len(digests(out)))
    assert reached == sorted(reached) and reached[0] == 0 and reached[-1] > 2
    small_disk("size=64m")
    code, _, err = cli(*command)
    assert code == 0, err
    assert digests(out) == digests(finished_run)


def test_a_folder_that_may_not_be_written(small_disk, finished_run: Path, tiny_recipe: Path, cli) -> None:
    disk = small_disk("size=64m")
    shutil.copytree(finished_run, disk / "run")
    small_disk("ro")
    for out in (disk / "run", disk / "new"):
        code, stdout, err = cli("run", "--recipe", tiny_recipe, "--out", out)
        assert (code, stdout, len(err.splitlines())) == (2, "", 1)
        assert os.strerror(errno.EROFS) in err and "a folder that you may write to" in err and str(disk) in err
    assert digests(disk / "run") == digests(finished_run)


def test_out_is_a_file(tmp_path: Path, tiny_recipe: Path, cli) -> None:
    file = tmp_path / "file"
    file.write_text("precious")
    for out in (file, file / "below"):
        code, _, err = cli("run", "--recipe", tiny_recipe, "--out", out)
        assert (code, len(err.splitlines())) == (2, 1) and "give a folder" in err
    assert file.read_text() == "precious"


def test_a_training_that_diverges(run_copy: Path, tiny_recipe: Path, cli) -> None:
    before = digests(run_copy)
    for steps in (7, 1):  # with one step only the weights can show it
        changes = ("--set", "finetune.learning_rate=1e30", "--set", f"finetune.steps={steps}", "--force", "finetune")
        code, stdout, err = cli("run", "--recipe", tiny_recipe, "--out", run_copy, *changes)
        assert code == 1 and stdout == "" and "Traceback" not in err
        assert err.splitlines()[-1].startswith("failed: ")
        assert steps == 1 or ("failed: finetune: loss is nan at step" in err and "lower the learning rate" in err)
    assert digests(run_copy) == before  # even the old fine-tuning is there


def test_another_seed_other_weights(tiny_recipe: Path, finished_run: Path, tmp_path: Path) -> None:
    recipe = load_recipe(Recipe, tiny_recipe, ["seed=1", "measure.latency=false"])
    Runner(recipe, tmp_path / "run").execute(until="finetune")
    made, before = digests(tmp_path / "run"), digests(finished_run)
    assert made["prune"] == before["prune"]  # Taylor scores draw nothing
    weights = "model/model.safetensors"
    assert made["finetune"][weights] != before["finetune"][weights]


def launched(launcher: list[str], out: Path) -> str:
    """The stderr of `finetune` under a launcher."""
    command = [sys.executable, "-m", *launcher, "-m", "pipeline", "finetune", "--out", str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_two_processes_train_and_one_publishes(run_copy: Path, finished_run: Path) -> None:
    shutil.rmtree(run_copy / "finetune")
    err = launched(["torch.distributed.run", "--standalone", "--nproc-per-node", "2"], run_copy)
    assert err.count("finetune: done") == 1
    manifest, alone = (RunFolder(folder).verify("finetune") for folder in (run_copy, finished_run))
    assert manifest.details["curve"][-1]["step"] == 7
    assert manifest.files.keys() == alone.files.keys()  # no checkpoint is left, nothing is missing
    assert manifest.files["model/model.safetensors"] != alone.files["model/model.safetensors"]  # twice the batch


@pytest.mark.slow
def test_accelerate_launches_the_same_training(run_copy: Path, finished_run: Path) -> None:
    shutil.rmtree(run_copy / "finetune")
    choices = [
        "--cpu",
        "--num_processes",
        "1",
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
    ]
    launched(["accelerate.commands.launch", *choices], run_copy)
    assert digests(run_copy) == digests(finished_run)
