"""Pretraining by two real processes: the losses of one, and what is left when one of them is killed."""

import json
import shutil
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import forks as processes
import pytest
import torch
import yaml
from safetensors.torch import load_file

from pipeline.prepare import prepare

CHOICES = {
    "model": {"n_layer": 2, "n_head": 3, "head_dim": 8, "n_positions": 33, "vocab_size": 280},
    "steps": 7,
    "warmup_steps": 2,
    "decay_steps": 3,
    "batch_size": 3,
    "accumulation": 2,
    "optimizer": "adamw",
    "save_steps": 2,
    "eval_steps": 7,
    "eval_blocks": 5,
    "log_steps": 1,
    "autocast": False,  # in bf16 the order of sums alone changes a loss by 2e-4
}


@pytest.fixture(scope="module")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[processes.Forks]:
    forks = processes.Forks(tmp_path_factory.mktemp("forks"), ("pipeline.cli", "pipeline.pretrain"))
    yield forks
    forks.close()


@pytest.fixture(scope="module")
def shards(tiny_texts: dict[str, Path], tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("data") / "shards"
    prepare([str(tiny_texts["train"])], out, tiny_folder, workers=1, shard_tokens=2000, validation_share=0)
    return out


class Launcher:
    """What `torchrun` does: the same command twice, each told its rank."""

    def __init__(self, forks: processes.Forks, shards: Path, validation: Path, folder: Path):
        self.forks, self.folder = forks, folder
        self.recipe = folder / "recipe.yaml"
        self.recipe.write_text(yaml.safe_dump(CHOICES | {"shards": str(shards), "validation": str(validation)}))

    def start(self, out: Path, count: int, **changes: Any) -> list[processes.Forked]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        sets = [word for key, value in changes.items() for word in ("--set", f"{key}={json.dumps(value)}")]
        words = ("pretrain", "--recipe", self.recipe, "--out", out, *sets)
        if count == 1:
            return [self.forks.start(*words)]
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(count)}
        ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
        return [self.forks.start(*words, env=meeting | rank) for rank in ranks]

    def run(self, name: str, count: int, **changes: Any) -> Path:
        out = self.folder / name
        group = self.start(out, count, **changes)
        ends = [(self.forks.wait(process.pid), process.err()) for process in group]
        assert [code for code, _ in ends] == [0] * count, ends
        assert "".join(process.out() for process in group) == f"Model: {out / 'model'}\n"
        return out


@pytest.fixture(scope="module")
def launch(forks, shards, tiny_texts, tmp_path_factory) -> Launcher:
    return Launcher(forks, shards, tiny_texts["evaluation"], tmp_path_factory.mktemp("launched"))


@pytest.fixture(scope="module")
def alone(launch: Launcher) -> Path:
    """What one process makes."""
    return launch.run("alone", 1)


def losses(out: Path) -> list[float]:
    return [point["loss"] for point in json.loads((out / "curve.json").read_text())]


def near(one: Path, other: Path) -> None:
    """The same training but for the order in which gradients are added."""
    assert losses(one) == pytest.approx(losses(other), rel=1e-5)
    weights, others = (load_file(out / "model" / "model.safetensors") for out in (one, other))
    assert weights.keys() == others.keys()
    for name, weight in weights.items():
        # Adam's first steps are as long for a tiny gradient as for a large one, whatever its rounding.
        torch.testing.assert_close(weight, others[name], atol=2e-4, rtol=0)


def moments(checkpoint: Path) -> dict[int, dict[str, torch.Tensor]]:
    return torch.load(checkpoint / "optimizer.pt", weights_only=True)["state"]


@pytest.mark.parametrize("parallel", ["ddp", "zero1", "fsdp"])
def test_two_processes_learn_what_one_learns(parallel: str, launch: Launcher, alone: Path) -> None:
    out = launch.run(parallel, 2, parallel=parallel)
    near(out, alone)
    states, wanted = moments(out / "checkpoint-6"), moments(alone / "checkpoint-6")
    assert states.keys() == wanted.keys()
    for index, state in states.items():
        assert state["step"] == 6
        torch.testing.assert_close(state["exp_avg"], wanted[index]["exp_avg"], atol=1e-5, rtol=1e-3)


def test_a_killed_process_ends_all_and_the_training_goes_on(launch: Launcher) -> None:
    out = launch.folder / "killed"
    group = launch.start(out, 2, parallel="zero1", steps=100_000)
    whole: Callable[[Any], bool] = lambda _: (out / "checkpoint-4" / "trainer_state.json").exists()  # noqa: E731
    assert group[1].signal_when(whole) == -signal.SIGKILL
    assert launch.forks.wait(group[0].pid) == 1
    assert group[0].err().splitlines()[-1] == (
        "failed: pretrain: another process ended, so this one does; the same command goes on from the last checkpoint"
    )
    assert "Traceback" not in group[0].err()
    reached = max(int(path.parent.name.partition("-")[2]) for path in out.glob("checkpoint-*/trainer_state.json"))
    undisturbed = launch.run("undisturbed", 1, steps=reached + 5)
    near(launch.run(out.name, 2, parallel="fsdp", steps=reached + 5), undisturbed)
    # And from a checkpoint of these to the end in yet another way.
    shutil.rmtree(out / f"checkpoint-{reached + 5}")
    near(launch.run(out.name, 2, parallel="zero1", steps=reached + 5), undisturbed)


def test_what_does_not_go_together(launch: Launcher) -> None:
    out = launch.folder / "refused"
    for changes, said in (
        ({"parallel": "none"}, "parallel is none, but 2 processes were started; set parallel=ddp"),
        ({"parallel": "ddp", "accumulation": 3}, "accumulation 3 is over all processes, of which there are 2"),
        ({"parallel": "zero1", "optimizer": "muon"}, "splits matrices that Muon needs whole; set optimizer=adamw"),
    ):
        (first, second) = launch.start(out, 2, **changes)
        assert launch.forks.wait(first.pid) == launch.forks.wait(second.pid) == 2
        assert said in first.err() and first.err().count("\n") == 1
