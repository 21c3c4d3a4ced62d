"""Training with the Hugging Face `Trainer`: what fine-tuning and pretraining share."""

import contextlib
import json
import math
import os
import re
import shutil
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import torch
from safetensors import safe_open
from safetensors.torch import load_model as load_weights
from torch.nn import functional as F
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK, OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.utils import SAFE_WEIGHTS_NAME

from eval.errors import UserError, WorkError
from eval.results import save_json
from pipeline import hardware
from pipeline.data import IGNORE, TokenBlocks
from pipeline.model import CompactGPT2LMHeadModel
from pipeline.recipe import Distill, Finetune


def rank() -> int:
    """Which one this is of the processes that `torchrun` or `accelerate` started; 0 if it is alone."""
    return int(os.environ.get("RANK", "0"))


def is_main_process() -> bool:
    """Whether this is the only process, or the first of those."""
    return rank() == 0


def world_size() -> int:
    """The number of processes that train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def arguments(
    folder: Path, device: str, seed: int, *, autocast: bool, report_to: str = "none", **choices: Any
) -> TrainingArguments:
    """`TrainingArguments` with what every training here wants; `choices` adds the rest.

    Master weights stay FP32; `autocast` is to bf16 or fp16, where the device computes it natively.
    """
    dtype = hardware.autocast_dtype(device) if autocast else None
    on_cpu = device == "cpu"
    args = TrainingArguments(
        output_dir=str(folder),
        bf16=dtype is torch.bfloat16,
        fp16=dtype is torch.float16,
        use_cpu=on_cpu,
        ddp_backend="gloo" if on_cpu and world_size() > 1 else None,
        dataloader_pin_memory=not on_cpu,
        # A NaN must stop the training, not vanish in an average.
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_total_limit=2,
        seed=seed,
        data_seed=seed,
        report_to=report_to,
        remove_unused_columns=False,
        **choices,
    )
    # Several GPUs take torchrun; without it the trainer would silently split batches over all that it sees.
    if args.n_gpu > 1:
        args._n_gpu = 1
    return args


class Diverged(WorkError):
    """The loss is no number, or far above those before."""

    def __init__(self, name: str, what: str):
        super().__init__(f"{name}: {what}; lower the learning rate and run again")
        self.what = what


class Watch(TrainerCallback):
    """One line of progress on stderr a log; stops a training that has diverged.

    A loss more than `spike` nats over the median of the ten logged before is a divergence as well.
    """

    def __init__(self, name: str, spike: float | None = None):
        self.name, self.spike = name, spike

    def on_step_end(self, args, state, control, **kwargs):
        # What was not yet logged is not in a checkpoint: a resumed training would log another mean.
        control.should_log = control.should_log or control.should_save

    def on_log(self, args, state, control, logs=None, **kwargs):
        logs = logs or {}
        for key in ("loss", "eval_loss"):
            if key in logs and not math.isfinite(logs[key]):
                raise Diverged(self.name, f"{key} is {logs[key]} at step {state.global_step}")
        *before, last = [log["loss"] for log in state.log_history if "loss" in log][-11:] or [0.0]
        if self.spike and "loss" in logs and len(before) == 10 and last > statistics.median(before) + self.spike:
            raise Diverged(
                self.name,
                f"loss is {last:.4g} at step {state.global_step}, more than {self.spike:g} over the "
                f"{statistics.median(before):.4g} before",
            )
        if state.is_world_process_zero and ("loss" in logs or "eval_loss" in logs):
            shown = "  ".join(
                f"{key} {logs[key]:.4g}" for key in ("loss", "eval_loss", "learning_rate", "grad_norm") if key in logs
            )
            print(f"{self.name}: step {state.global_step}/{state.max_steps}  {shown}", file=sys.stderr, flush=True)


class Clock(TrainerCallback):
    """Puts into each log how many seconds the training took so far, those before it was cut off included. What a kill
    threw away is not counted: like the steps, it goes on from the last checkpoint."""

    def on_train_begin(self, args, state, control, **kwargs):
        before = state.log_history[-1].get("seconds", 0.0) if state.log_history else 0.0
        self.begun = time.perf_counter() - before

    def on_log(self, args, state, control, **kwargs):
        state.log_history[-1]["seconds"] = time.perf_counter() - self.begun


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Raise `UserError` where a file of a checkpoint cannot be understood."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError, PermissionError):  # the file may be whole
        raise
    except Exception as error:  # safetensors, pickle and torch raise many kinds
        raise UserError(
            f"{path}: damaged; delete {path.parent}, and the training goes on from the checkpoint before, or anew"
        ) from error


class ResumingTrainer(Trainer):
    """A `Trainer` that resumes on several processes without a GPU, too."""

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        # The trainer's own way knows nothing of tied weights, and calls the head missing.
        self.load_weights(Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        # By way of the CPU: where there are several, a process calls its device cpu:0, which nothing can be loaded to.
        if checkpoint is not None:
            for part, name in ((self.optimizer, OPTIMIZER_NAME), (self.lr_scheduler, SCHEDULER_NAME)):
                with reading(Path(checkpoint) / name):
                    part.load_state_dict(torch.load(Path(checkpoint) / name, map_location="cpu", weights_only=True))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with reading(Path(checkpoint or "") / "rng_state.pth"):
            super()._load_rng_state(checkpoint)

    def whole_model(self) -> CompactGPT2LMHeadModel:
        """The model, brought together where it is spread over processes; all of them must call it."""
        return self.model

    def load_weights(self, checkpoint: Path) -> None:
        """Take the weights of a checkpoint."""
        with reading(checkpoint / SAFE_WEIGHTS_NAME):
            load_weights(self.model, checkpoint / SAFE_WEIGHTS_NAME)


class DistillingTrainer(ResumingTrainer):
    """Adds the divergence from a teacher's softened distribution (Hinton et al. 2015, section 2)."""

    def __init__(self, *args: Any, teacher: CompactGPT2LMHeadModel, distill: Distill, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.teacher = teacher.to(self.args.device).eval().requires_grad_(False)
        self.distill = distill

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        hard, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        with torch.no_grad():
            target = self.teacher(input_ids=inputs["input_ids"], attention_mask=inputs.get("attention_mask")).logits
        temperature, weight = self.distill.temperature, self.distill.weight
        scored = inputs["labels"][:, 1:] != -100
        student, target = outputs.logits[:, :-1][scored], target[:, :-1][scored]
        soft = F.kl_div(
            F.log_softmax(student.float() / temperature, -1),
            F.log_softmax(target.float() / temperature, -1),
            log_target=True,
            reduction="sum",
        )
        # The hard loss is a mean over the tokens of all accumulated batches and processes, whose gradients
        # are then averaged; the soft one must be, too.
        tokens = scored.sum() if num_items_in_batch is None else num_items_in_batch / world_size()
        loss = (1 - weight) * hard + weight * temperature**2 * soft / tokens
        return (loss, outputs) if return_outputs else loss


def collate(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """A batch whose first labels do not count: nothing predicts them, but the trainer divides by all that do."""
    batch = default_data_collator(rows)
    batch["labels"][:, 0] = IGNORE
    return batch


def checkpoints(folder: Path) -> list[Path]:
    """The folders that the trainer made in `folder`; others' names say no step."""
    return [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-[0-9]{1,18}", path.name)]


def last_checkpoint(folder: Path) -> str | None:
    """The last whole checkpoint in `folder`; what a kill cut off is deleted, what is damaged is passed over."""
    for path in sorted(checkpoints(folder), key=_step, reverse=True):
        if _is_whole(path):
            return str(path)
        if is_main_process():
            if _cut_off(path):
                shutil.rmtree(path)
            else:
                print(f"{path}: damaged, so the training does not go on from it", file=sys.stderr)
    return None


def _cut_off(checkpoint: Path) -> bool:
    """Whether a kill came before the trainer had written all: this file is its last."""
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
        return False
    except (OSError, ValueError):
        return True


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint's files are there and can be read."""
    try:
        state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        with safe_open(checkpoint / SAFE_WEIGHTS_NAME, "numpy"):
            pass
        saved = {checkpoint / OPTIMIZER_NAME, checkpoint / SCHEDULER_NAME, *checkpoint.glob("*.pt*")}
        told = state.global_step == _step(checkpoint) and state.log_history and state.train_batch_size
        return bool(told) and all(ZipFile(path).testzip() is None for path in saved)
    except Exception:  # whatever a damaged file leads its reader to
        return False


class Rollbacks:
    """How often a training went back after a divergence, kept in `folder` so that a resumed one goes on alike."""

    def __init__(self, folder: Path):
        self.folder, self.path = folder, folder / "rollbacks.json"
        try:
            self.steps: list[dict[str, Any]] = json.loads(self.path.read_text()) if self.path.exists() else []
            if not all("to" in step for step in self.steps):
                raise ValueError("no way back")
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{self.path}: damaged; give another --out, which starts anew") from error

    def add(self, step: int, reason: str) -> None:
        """Note a divergence; the next start is from the last checkpoint, or the one before if that led nowhere."""
        last = last_checkpoint(self.folder)
        if last and self.steps and self.steps[-1]["to"] == Path(last).name and is_main_process():
            (Path(last) / TRAINER_STATE_NAME).unlink()
            last = last_checkpoint(self.folder)
        self.steps.append({"step": step, "reason": reason, "to": Path(last).name if last else None})
        if is_main_process():
            save_json(self.steps, self.path)
            print(f"pretrain: {reason}; going back to {self.steps[-1]['to'] or 'the start'}", file=sys.stderr)


def drop_checkpoints(folder: Path) -> None:
    """Delete the checkpoints in `folder`; cut off in between, those that are left are whole or known not to be."""
    found = checkpoints(folder)
    for checkpoint in found:
        (checkpoint / TRAINER_STATE_NAME).unlink(missing_ok=True)
    for checkpoint in found:
        shutil.rmtree(checkpoint)


def run(trainer: ResumingTrainer, name: str, spike: float | None = None) -> list[dict[str, float]]:
    """Train, resuming from the last whole checkpoint; returns the learning curve.

    Each point is `{"step", "epoch", "loss", "rate"}`, loss in nats a token. Raises `Diverged`
    when the loss or a weight is no longer finite, or the loss jumps up by more than `spike`.
    """
    for chatty in (PrinterCallback, DEFAULT_PROGRESS_CALLBACK):  # the second is another one under Jupyter
        trainer.remove_callback(chatty)
    trainer.add_callback(Watch(name, spike))
    last = last_checkpoint(Path(trainer.args.output_dir))
    state = TrainerState.load_from_json(f"{last}/{TRAINER_STATE_NAME}") if last else TrainerState()
    wanted = trainer.args.max_steps if trainer.args.max_steps > 0 else state.max_steps
    if state.global_step > wanted:
        raise UserError(f"{last}: further than {wanted} steps; give as many or more, or another --out")
    if last is not None and state.global_step >= wanted:
        # Resumed at its end, the trainer would take one step too many.
        trainer.load_weights(Path(last))
        trainer.state = state
    else:
        trainer.train(resume_from_checkpoint=last)
    # The last step's update comes after the last loss.
    for key, weight in trainer.whole_model().named_parameters():
        if not torch.isfinite(weight).all():
            raise Diverged(name, f"{key} is no longer finite")
    return [
        {"step": log["step"], "epoch": log["epoch"], "loss": log["loss"], "rate": log["learning_rate"]}
        for log in trainer.state.log_history
        if "loss" in log
    ]


def total_steps(choices: Finetune, blocks: int) -> int:
    """The optimiser's steps that a fine-tuning on so many blocks takes."""
    share = world_size() * choices.batch_size * choices.accumulation
    return choices.steps or choices.epochs * math.ceil(blocks / share)


def train(
    model: CompactGPT2LMHeadModel,
    blocks: TokenBlocks,
    choices: Finetune,
    folder: Path,
    *,
    seed: int,
    device: str,
    teacher: CompactGPT2LMHeadModel | None = None,
    report_to: str = "none",
) -> tuple[list[dict[str, float]], float]:
    """Fine-tune `model` in place; checkpoints go to `folder`, logs to the integration `report_to`.

    Returns the learning curve of `run`, and the seconds that its steps took.
    """
    set_seed(seed)
    total = total_steps(choices, len(blocks))
    args = arguments(
        folder,
        device,
        seed,
        autocast=choices.autocast,
        report_to=report_to,
        max_steps=choices.steps or -1,
        num_train_epochs=choices.epochs,
        per_device_train_batch_size=choices.batch_size,
        gradient_accumulation_steps=choices.accumulation,
        learning_rate=choices.learning_rate,
        weight_decay=choices.weight_decay,
        warmup_steps=round(choices.warmup_share * total),
        lr_scheduler_type="cosine",
        save_steps=choices.save_steps,
        logging_steps=max(1, total // 20),
    )
    kind: Any = ResumingTrainer
    extra: dict[str, Any] = {}
    if teacher is not None and choices.distill is not None:
        kind, extra = DistillingTrainer, {"teacher": teacher, "distill": choices.distill}
    trainer = kind(model=model.float(), args=args, train_dataset=blocks, data_collator=collate, **extra)
    trainer.add_callback(Clock())
    curve = run(trainer, "finetune")
    return curve, next((log["seconds"] for log in reversed(trainer.state.log_history) if "seconds" in log), 0.0)
