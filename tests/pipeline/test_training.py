"""Fine-tuning: exact resumption, distillation, and a stop where numbers end."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import Trainer, TrainerCallback

from eval.errors import UserError, WorkError
from pipeline.data import TokenBlocks
from pipeline.model import CompactGPT2LMHeadModel, from_gpt2
from pipeline.recipe import Distill, Finetune, Recipe, parse_recipe
from pipeline.stages import Job, finetune, load
from pipeline.training import ResumingTrainer, Rollbacks, drop_checkpoints, last_checkpoint, train

CHOICES = {"steps": 6, "batch_size": 2, "learning_rate": 1e-3, "save_steps": 2}


@pytest.fixture
def blocks() -> TokenBlocks:
    """Nine blocks of 17 tokens with something to learn."""
    rng = np.random.default_rng(2)
    return TokenBlocks((rng.integers(1, 5, (9, 17)) * 7).astype(np.uint16))


@pytest.fixture
def student(make_gpt2: Callable[..., Any]) -> CompactGPT2LMHeadModel:
    return from_gpt2(make_gpt2(5, n_layer=2))


@pytest.fixture
def teacher(make_gpt2: Callable[..., Any]) -> CompactGPT2LMHeadModel:
    return from_gpt2(make_gpt2(6, n_layer=2)).half()


def fit(
    model: CompactGPT2LMHeadModel,
    blocks: TokenBlocks,
    folder: Path,
    teacher: CompactGPT2LMHeadModel | None = None,
    **changes: Any,
) -> tuple[CompactGPT2LMHeadModel, list[dict[str, float]]]:
    """A trained copy and its learning curve."""
    model = copy.deepcopy(model)
    choices = Finetune(**(CHOICES | changes))
    curve, _ = train(model, blocks, choices, folder, seed=3, device="cpu", teacher=copy.deepcopy(teacher))
    return model, curve


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_it_learns_and_the_curve_says_so(student, blocks, tmp_path: Path) -> None:
    trained, curve = fit(student, blocks, tmp_path / "a", steps=30, save_steps=30)
    assert [point["step"] for point in curve] == list(range(1, 31))
    assert curve[-1]["loss"] < 0.8 * curve[0]["loss"]
    assert curve[-1]["rate"] < curve[10]["rate"]
    assert all(parameter.dtype == torch.float32 for parameter in trained.parameters())


def test_the_first_loss_is_the_untouched_models(student, blocks, tmp_path: Path) -> None:
    # One step over all blocks in FP32: the curve's point can be computed by hand.
    student.config.resid_pdrop = student.config.embd_pdrop = student.config.attn_pdrop = 0.0
    still = CompactGPT2LMHeadModel(student.config)
    still.load_state_dict(student.state_dict())
    _, curve = fit(still, blocks, tmp_path / "a", steps=1, batch_size=9, autocast=False)
    ids = torch.from_numpy(blocks.tokens.astype(np.int64))
    with torch.no_grad():
        logits = still.eval()(ids).logits
    by_hand = F.cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]), ids[:, 1:].reshape(-1))
    assert curve[0]["loss"] == pytest.approx(by_hand.item(), rel=1e-5)


class Pulled(TrainerCallback):
    """Ends the training right after a step's checkpoint was written, as a kill would."""

    def __init__(self, step: int):
        self.step = step

    def on_save(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("step", [2, 4])
def test_resumed_training_is_bit_exact(step: int, student, blocks, tmp_path: Path, monkeypatch) -> None:
    # Dropout is on, so the random state counts as well; the points of the curve span several steps.
    changes = {"steps": 43, "save_steps": step}
    whole, whole_curve = fit(student, blocks, tmp_path / "whole", **changes)
    with monkeypatch.context() as patch:
        original = Trainer.train

        def pulled(self: Trainer, *args: Any, **kwargs: Any) -> Any:
            self.add_callback(Pulled(5 * step))
            return original(self, *args, **kwargs)

        patch.setattr(Trainer, "train", pulled)
        with pytest.raises(KeyboardInterrupt):
            fit(student, blocks, tmp_path / "cut", **changes)
    resumed, curve = fit(student, blocks, tmp_path / "cut", **changes)
    assert same(whole, resumed)
    assert curve == whole_curve


def test_seconds_of_steps_that_were_thrown_away_do_not_count(student, blocks, tmp_path: Path, monkeypatch) -> None:
    now = [100.0]
    monkeypatch.setattr("pipeline.training.time.perf_counter", lambda: now[0])

    class Ticking(TrainerCallback):
        """A second a step; the fifth is the last before a kill."""

        def on_step_begin(self, args, state, control, **kwargs):
            now[0] += 1
            if state.global_step == 5 and now[0] < 200:
                raise KeyboardInterrupt

    original = Trainer.train

    def ticking(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        self.add_callback(Ticking())
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "train", ticking)
    choices = Finetune(**(CHOICES | {"steps": 7, "save_steps": 2}))
    with pytest.raises(KeyboardInterrupt):
        train(copy.deepcopy(student), blocks, choices, tmp_path / "a", seed=3, device="cpu")
    now[0] = 1000.0
    for _ in range(2):  # the second time there is nothing left to do
        _, seconds = train(copy.deepcopy(student), blocks, choices, tmp_path / "a", seed=3, device="cpu")
        assert seconds == 7


def test_a_finished_training_is_not_repeated(student, blocks, tmp_path: Path) -> None:
    whole, curve = fit(student, blocks, tmp_path / "a")
    again, same_curve = fit(student, blocks, tmp_path / "a")
    assert same(whole, again) and curve == same_curve


def test_other_seeds_other_weights(student, blocks, tmp_path: Path) -> None:
    made = []
    for seed in (3, 3, 4):
        model = copy.deepcopy(student)
        folder = tmp_path / str(len(made))
        train(model, blocks, Finetune(**CHOICES), folder, seed=seed, device="cpu")
        made.append(model)
    assert same(made[0], made[1]) and not same(made[0], made[2])


def test_a_cut_off_checkpoint_is_not_used(student, blocks, tmp_path: Path) -> None:
    fit(student, blocks, tmp_path / "a")
    for name, text in (("checkpoint-8", None), ("checkpoint-10", ""), ("checkpoint-11", '{"epoch"')):
        cut = tmp_path / "a" / name
        shutil.copytree(tmp_path / "a" / "checkpoint-4", cut)
        (cut / "trainer_state.json").unlink()
        if text is not None:
            (cut / "trainer_state.json").write_text(text)
    assert last_checkpoint(tmp_path / "a") == str(tmp_path / "a" / "checkpoint-6")
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["checkpoint-4", "checkpoint-6"]
    assert last_checkpoint(tmp_path / "nothing") is None
    (tmp_path / "a" / "kept.json").write_text("{}")
    drop_checkpoints(tmp_path / "a")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["kept.json"]


def test_a_damaged_checkpoint_is_not_used(student, blocks, tmp_path: Path, capsys) -> None:
    whole, curve = fit(student, blocks, tmp_path / "a")
    damages: list[tuple[str, Callable[[bytes], bytes]]] = [
        ("model.safetensors", lambda raw: raw[:-9]),
        ("model.safetensors", lambda raw: b"\xff" * len(raw)),
        ("optimizer.pt", lambda raw: raw[: len(raw) // 2]),
        ("scheduler.pt", lambda raw: b"{}"),
        ("rng_state.pth", lambda raw: b""),
        ("trainer_state.json", lambda raw: b"[]"),
        ("trainer_state.json", lambda raw: raw.replace(b'"global_step": 6', b'"global_step": "6"')),
        ("optimizer.pt", lambda raw: raw[:3000] + bytes([raw[3000] ^ 1]) + raw[3001:]),
    ]
    for number, (name, damage) in enumerate(damages):
        folder = Path(shutil.copytree(tmp_path / "a", tmp_path / str(number)))
        path = folder / "checkpoint-6" / name
        path.write_bytes(damage(path.read_bytes()))
        if number < len(damages) - 1:
            assert last_checkpoint(folder) == str(folder / "checkpoint-4")
    again, same_curve = fit(student, blocks, folder)
    assert same(whole, again) and curve == same_curve
    told = capsys.readouterr().err
    assert all(f"{number}/checkpoint-6: damaged, so the training does not" in told for number in range(len(damages)))


@pytest.mark.parametrize("text", ["{", "[1]", "7", '[{"step": 3}]', "\xff"])
def test_damaged_rollbacks(text: str, tmp_path: Path) -> None:
    (tmp_path / "rollbacks.json").write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=r"rollbacks\.json: damaged; give another --out"):
        Rollbacks(tmp_path)


def test_nothing_of_a_teacher_without_weight(student, teacher, blocks, tmp_path: Path) -> None:
    plain, plain_curve = fit(student, blocks, tmp_path / "a")
    weightless, curve = fit(student, blocks, tmp_path / "b", teacher, distill=Distill(weight=0.0))
    taught, taught_curve = fit(student, blocks, tmp_path / "c", teacher, distill=Distill(weight=0.5))
    assert same(plain, weightless) and plain_curve == curve
    assert not same(plain, taught) and plain_curve != taught_curve


def test_a_teacher_alone_draws_the_student_to_itself(student, teacher, blocks, tmp_path: Path) -> None:
    ids = torch.from_numpy(blocks.tokens.astype(np.int64))

    @torch.no_grad()
    def divergence(model: CompactGPT2LMHeadModel) -> float:
        wanted, got = (F.log_softmax(each.eval().float()(ids).logits, -1) for each in (copy.deepcopy(teacher), model))
        return (wanted.exp() * (wanted - got)).sum(-1).mean().item()

    before = divergence(copy.deepcopy(student))
    only = Distill(weight=1.0, temperature=1.0)
    taught, curve = fit(student, blocks, tmp_path / "a", teacher, steps=40, save_steps=40, distill=only)
    assert divergence(taught) < 0.7 * before
    assert curve[-1]["loss"] < curve[0]["loss"]


def test_the_distillation_loss_by_hand(student, teacher, blocks, tmp_path: Path) -> None:
    student.config.resid_pdrop = student.config.embd_pdrop = student.config.attn_pdrop = 0.0
    still = CompactGPT2LMHeadModel(student.config)
    still.load_state_dict(student.state_dict())
    teacher = teacher.float()
    temperature, weight = 2.5, 0.3
    distill = Distill(temperature=temperature, weight=weight)
    padded = TokenBlocks(blocks.tokens, lengths=[17, 5, 17, 9, 17, 17, 2, 17, 11])
    # Three batches of three in one step: the mean must run over all their tokens.
    changes = {"steps": 1, "batch_size": 3, "accumulation": 3, "distill": distill, "autocast": False}
    _, curve = fit(still, padded, tmp_path / "a", teacher, **changes)
    hard = soft = count = 0.0
    for index, length in enumerate(padded.lengths or []):
        ids = torch.from_numpy(blocks.tokens[index].astype(np.int64))[None, :length]
        with torch.no_grad():
            mine, wanted = still.eval()(ids).logits[0, :-1].double(), teacher.eval()(ids).logits[0, :-1].double()
        hard -= mine.log_softmax(-1).gather(1, ids[0, 1:, None]).sum().item()
        p, q = (wanted / temperature).softmax(-1), (mine / temperature).softmax(-1)
        soft += (p * (p.log() - q.log())).sum().item()
        count += length - 1
    expected = ((1 - weight) * hard + weight * temperature**2 * soft) / count
    assert curve[0]["loss"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(("steps", "rate"), [(1, 1e39), (12, 1e30)])
def test_a_training_that_diverges(steps: int, rate: float, student, blocks, tmp_path: Path) -> None:
    with pytest.raises(WorkError, match=r"finetune: .*; lower the learning rate and run again") as caught:
        fit(student, blocks, tmp_path / "a", steps=steps, learning_rate=rate)
    assert "\n" not in str(caught.value)


def test_a_loss_that_is_no_number_at_once(student, blocks, tmp_path: Path) -> None:
    with torch.no_grad():
        student.transformer.h[1].mlp.c_fc.bias[3] = float("nan")
    with pytest.raises(WorkError, match="loss is nan at step 1"):
        fit(student, blocks, tmp_path / "a")


@pytest.mark.parametrize("kind", ["jsonl", "txt", "wikitext"])
def test_rows_reach_the_trainer_padded_and_masked(
    kind: str, tiny_choices: dict[str, Any], tiny_tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`finetune.pack=false`: each example, its mask and labels are what one makes by hand with the tokenizer's call."""
    rows = ["the cat sat on the mat. " * count + "äh" for count in (1, 9, 3, 2, 1)]
    text = tmp_path / f"text.{kind}"
    if kind == "jsonl":
        text.write_text("\n".join(json.dumps({"text": row}) for row in [*rows, "", "  "]))
    else:
        text.write_text(("\n" if kind == "wikitext" else "\n \n\n").join(rows) + "\n")
    source = f"wikitext:{text}" if kind == "wikitext" else str(text)
    choices = {"steps": None, "epochs": 1, "batch_size": 2, "block_size": 32, "pack": False, "distill": {}}
    recipe = parse_recipe(
        Recipe, tiny_choices | {"data": tiny_choices["data"] | {"train": source}, "finetune": choices}
    )
    seen: list[tuple[list[int], list[int], list[int]]] = []
    loss = ResumingTrainer.compute_loss

    def recorded(self, model, inputs, *rest, **named):
        seen.extend(zip(*(inputs[key].tolist() for key in ("input_ids", "attention_mask", "labels")), strict=True))
        return loss(self, model, inputs, *rest, **named)

    monkeypatch.setattr(ResumingTrainer, "compute_loss", recorded)
    load.build(Job(recipe, tmp_path / "load", None, "cpu"))
    finetune.build(Job(recipe, tmp_path / "finetune", tmp_path / "load", "cpu", teacher=tmp_path / "load"))

    wanted = []
    for number, row in enumerate(rows):
        if kind == "wikitext" or (kind == "txt" and number == len(rows) - 1):
            row += "\n"
        ids = tiny_tokenizer(row, add_special_tokens=False)["input_ids"][:32]
        pad = 32 - len(ids)
        wanted.append((ids + [0] * pad, [1] * len(ids) + [0] * pad, [-100, *ids[1:]] + [-100] * pad))
    assert sorted(seen) == sorted(wanted)
    plain = parse_recipe(Recipe, tiny_choices)
    assert "pack" not in finetune.config(plain) and finetune.config(recipe)["pack"] is False
