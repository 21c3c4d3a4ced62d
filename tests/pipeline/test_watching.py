"""What is written down of a pretraining, and what it does when it diverges."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_pretrain import curve, on_shards, recipe
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from eval.errors import WorkError
from pipeline import hardware
from pipeline.model import CompactGPT2LMHeadModel
from pipeline.parallel import PretrainTrainer
from pipeline.prepare import prepare
from pipeline.pretrain import pretrain
from pipeline.shards import ShardBlocks, ShuffledBlocks, find_shards
from pipeline.task_scores import score_folder
from pipeline.tracking import Tracking
from pipeline.training import Diverged, Watch, collate
from pipeline.watching import Meter, learning_curve, training_flops
from pipeline.wikitext import DOCUMENT_MARK
from plots import pretraining


@pytest.fixture
def shards(tiny_texts: dict[str, Path], tiny_folder: Path, tmp_path: Path) -> Path:
    """Some of its documents are held out."""
    out = tmp_path / "shards"
    text = tmp_path / "text.txt"
    text.write_text(tiny_texts["train"].read_text().replace("\n\n", f"\n{DOCUMENT_MARK}\n"))
    prepare([str(text)], out, tiny_folder, workers=1, shard_tokens=2000, validation_share=0.25)
    return out


def test_flops_as_counted(tiny_model: CompactGPT2LMHeadModel) -> None:
    length = tiny_model.config.n_positions
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        tiny_model(torch.zeros(2, length, dtype=torch.int64))
    assert training_flops(tiny_model.config) * 2 * length == 3 * counter.get_total_flops()


def test_speed_leaves_out_what_is_no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    meter, state = Meter(50, 7, 700.0), SimpleNamespace(global_step=3)
    meter.on_train_begin(None, state, None)
    now[0] += 4
    with meter.paused():
        now[0] += 1000
    assert meter.read(11) == {"tokens_per_second": 100.0, "mfu": 1.0}
    now[0] += 30
    meter.on_save(None, SimpleNamespace(global_step=11), None)
    now[0] += 2
    assert meter.read(12) == {"tokens_per_second": 25.0, "mfu": 0.25}
    meter.peak = None
    now[0] += 1
    assert meter.read(13) == {"tokens_per_second": 50.0}


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA L40", None),
        ("Some GPU", None),
    ],
)
def test_peaks_by_name(name: str, teraflops: float | None) -> None:
    assert hardware.peak_flops(name) == (teraflops and pytest.approx(teraflops * 1e12))


def test_logs_of_one_step_are_one_point() -> None:
    history = [
        {"step": 2, "hellaswag": 0.25, "hellaswag_documents": 8},
        {"step": 2, "epoch": 0.1, "loss": 3.0, "learning_rate": 0.1, "grad_norm": 2.0, "tokens_per_second": 9.0},
        {"step": 2, "epoch": 0.1, "eval_loss": 3.5, "eval_runtime": 1.0},
        {"step": 4, "train_runtime": 1.0},
    ]
    wanted = {
        "step": 2,
        "hellaswag": 0.25,
        "hellaswag_documents": 8,
        "epoch": 0.1,
        "loss": 3.0,
        "rate": 0.1,
        "grad_norm": 2.0,
    }
    assert learning_curve(history) == [wanted | {"tokens_per_second": 9.0, "validation_loss": 3.5}]


def test_all_is_watched_and_nothing_changed_by_it(
    shards: Path, task_data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    plain = pretrain(on_shards(shards), [], tmp_path / "plain", None)
    asked = {"every": 3, "data": str(task_data), "limit": 2}
    choices = on_shards(shards, hellaswag=asked, reference="fineweb-edu", peak_tflops=0.001)
    tracking = Tracking("tensorboard", tmp_path / "tracking", "tiny")
    watched = pretrain(choices, [], tmp_path / "watched", None, tracking)
    assert (plain / "model.safetensors").read_bytes() == (watched / "model.safetensors").read_bytes()
    points = {point["step"]: point for point in curve(tmp_path / "watched")}
    assert sorted(points) == [2, 3, 4, 6, 8]
    assert [step for step, point in points.items() if "hellaswag" in point] == [3, 6]
    assert points[6]["hellaswag_documents"] == 2
    assert re.search(
        r"pretrain: step 6/8  hellaswag \d\S+ ± \d\S+ \(the first 2 of 5 documents\)", capfd.readouterr().err
    )
    assert [step for step, point in points.items() if "validation_loss" in point] == [4, 8]
    for point in json.loads((tmp_path / "watched" / "curve.json").read_text()):
        assert point["grad_norm"] > 0 and point["tokens_per_second"] > 0
        flops = training_flops(CompactGPT2LMHeadModel.from_pretrained(watched).config)
        assert point["mfu"] == pytest.approx(point["tokens_per_second"] * flops / 1e9)
    scored = on_shards(shards, steps=6, warmup_steps=2, decay_steps=3, hellaswag={"every": 6, "data": str(task_data)})
    last = pretrain(scored, [], tmp_path / "scored", None)
    alone = score_folder(last, ["hellaswag"], dict.fromkeys(("engine", "device", "precision")), data=task_data,
                         limit=None, cache=tmp_path / "cache")  # fmt: skip
    assert curve(tmp_path / "scored")[-1]["hellaswag"] == alone["tasks"]["hellaswag"]["accuracy"]
    assert list((tmp_path / "tracking" / "tiny").glob("events*"))
    drawn = (tmp_path / "watched" / "plots" / "pretraining.svg").read_text()
    for text in ("loss (nats per token)", "HellaSwag accuracy", "share of peak FLOPs", "karpathy/build-nanogpt"):
        assert text in drawn
    assert "a part of its documents alone" in drawn and "the same notebooks" not in drawn


@pytest.mark.parametrize(("asked", "levels"), [(10_042, [3.2924, 0.294463]), (8, [3.2924]), (None, [3.2924])])
def test_a_part_of_hellaswag_has_no_reference_line(asked: int | None, levels: list[float]) -> None:
    score = {"hellaswag": 0.25} | ({"hellaswag_documents": asked} if asked else {})
    figure = pretraining.draw([{"step": step, "loss": 4.0 - step, **score} for step in (1, 2)], "fineweb-edu")
    assert figure is not None
    dashed = [line.get_ydata()[0] for axes in figure.axes for line in axes.lines if line.get_linestyle() == "--"]
    assert dashed == levels


def test_a_loss_that_jumps_up() -> None:
    watch = Watch("pretrain", 0.5)
    state: Any = SimpleNamespace(global_step=11, max_steps=99, is_world_process_zero=False)
    args = (None, state, None)
    losses = [3.0, 2.9, 9.0, 2.8, 2.7, 2.7, 2.6, 2.6, 2.5, 2.5]  # one that was high before does not count
    state.log_history = [{"loss": loss} for loss in [*losses, 3.1]]
    watch.on_log(*args, logs={"loss": 3.1})
    state.log_history[-1] = {"loss": 3.3}
    with pytest.raises(Diverged, match=r"loss is 3.3 at step 11, more than 0.5 over the 2.7 before"):
        watch.on_log(*args, logs={"loss": 3.3})
    Watch("pretrain").on_log(*args, logs={"loss": 3.3})


def test_a_divergence_goes_back_and_on_over_other_text(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[int]] = []
    original = PretrainTrainer.compute_loss

    def once(self: Any, *args: Any, **kwargs: Any) -> Any:
        loss = original(self, *args, **kwargs)
        spoilt = self.state.global_step == 4 and not (tmp_path / "out" / "rollbacks.json").exists()
        return loss * float("nan") if spoilt else loss

    def recording(rows: list[Any]) -> Any:
        batch = collate(rows)
        seen.extend(batch["input_ids"].tolist())
        return batch

    choices = on_shards(shards, steps=6, log_steps=1, rollbacks=1, eval_steps=99)
    with monkeypatch.context() as patch:
        patch.setattr(PretrainTrainer, "compute_loss", once)
        patch.setattr("pipeline.pretrain.collate", recording)
        pretrain(choices, [], tmp_path / "out", None)
    (noted,) = json.loads((tmp_path / "out" / "rollbacks.json").read_text())
    assert noted == {"step": 5, "reason": "loss is nan at step 5", "to": "checkpoint-4"}
    other = ShuffledBlocks(ShardBlocks(find_shards(shards, "train"), 101, 280), choices.seed + 1)
    steps_an_epoch = -(-len(other) // 6)
    epoch, first = divmod(4, steps_an_epoch)
    other.set_epoch(epoch)
    assert other[6 * first]["input_ids"].tolist() in seen
    assert [point["step"] for point in curve(tmp_path / "out")] == [1, 2, 3, 4, 5, 6]


def test_no_more_rollbacks_than_allowed(shards: Path, tmp_path: Path) -> None:
    wild = {"muon_learning_rate": 1e30, "adam_learning_rate": 1e30, "rollbacks": 2, "log_steps": 1}
    with pytest.raises(WorkError, match="lower the learning rate"):
        pretrain(on_shards(shards, **wild), [], tmp_path / "out", None)
    assert len(json.loads((tmp_path / "out" / "rollbacks.json").read_text())) == 2
    assert recipe().rollbacks == 0
