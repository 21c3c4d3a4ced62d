"""Fine-tune: recover what pruning cost, with the Hugging Face `Trainer` on FP32 master weights."""

import re
import shutil
from typing import Any

from pipeline.artifacts import CHECKPOINTS
from pipeline.checkpoint import load_model, save_model
from pipeline.data import tokenize_dataset
from pipeline.model import CompactGPT2Config
from pipeline.recipe import Recipe
from pipeline.stages.half import to_half
from pipeline.stages.job import Job
from pipeline.texts import load_rows
from pipeline.tokenizer import load_tokenizer
from pipeline.training import drop_checkpoints, is_main_process, total_steps, train
from pipeline.watching import training_flops

VERSION = 1


def config(recipe: Recipe) -> dict[str, Any]:
    """The training choices (not how often it saves) and the seed."""
    # Left out where they change nothing: they came after others had made runs, which stay up to date.
    unused = {key for key in ("autocast", "pack") if getattr(recipe.finetune, key)}
    return {**recipe.finetune.model_dump(exclude={"save_steps"} | unused), "seed": recipe.seed}


def plain_config(recipe: Recipe) -> dict[str, Any]:
    """The same without the teacher: the number of steps follows from the two models."""
    return {**config(recipe), "distill": None}


def build(job: Job) -> dict[str, Any]:
    """Write `model/` (FP32) and `model_fp16/`; the details hold the learning curve."""
    return _build(job, plain=False)


def build_plain(job: Job) -> dict[str, Any]:
    """As `build` without the teacher, in as many steps as take the distilled ones' time, counted in FLOPs."""
    return _build(job, plain=True)


def equal_steps(steps: int, student: CompactGPT2Config, teacher: CompactGPT2Config, length: int) -> int:
    """How many plain steps cost what `steps` distilled ones do, on blocks of `length` tokens.

    A student's step is three forward passes' worth; learning from the teacher adds one of the teacher's. FLOPs in
    place of seconds: the same number on any machine, busy or not.
    """
    ours, theirs = training_flops(student, length), training_flops(teacher, length) / 3
    return round(steps * (ours + theirs) / ours)


def _examples(source: str, pack: bool) -> list[str]:
    """The rows of a text; where they are not to be packed, of a plain file its paragraphs."""
    rows = load_rows(source)
    return rows if pack or len(rows) > 1 else re.split(r"\n\s*\n", rows[0])


def _build(job: Job, *, plain: bool) -> dict[str, Any]:
    assert job.source is not None
    choices = job.recipe.finetune
    model = load_model(job.source / "model")
    tokenizer = load_tokenizer(job.source / "model")
    length = min(choices.block_size, model.config.n_positions)
    blocks = tokenize_dataset(_examples(job.recipe.data.train, choices.pack), tokenizer, length, pack=choices.pack)
    teacher = load_model(job.teacher / "model") if choices.distill and job.teacher else None
    if plain and teacher is not None:
        steps = equal_steps(total_steps(choices, len(blocks)), model.config, teacher.config, length)
        choices, teacher = choices.model_copy(update={"steps": steps, "distill": None}), None
    checkpoints = job.out / CHECKPOINTS
    with job.tracking.training() as report_to:
        curve, seconds = train(
            model,
            blocks,
            choices,
            checkpoints,
            seed=job.recipe.seed,
            device=job.device,
            teacher=teacher,
            report_to=report_to,
        )
    if not is_main_process():
        return {}
    model.cpu()
    save_model(model, tokenizer, job.out / "model")
    to_half(model)
    save_model(model, tokenizer, job.out / "model_fp16")
    drop_checkpoints(checkpoints)
    shutil.rmtree(checkpoints)
    return {
        "curve": curve,
        "training_seconds": round(seconds, 3),
        "blocks": len(blocks),
        "parameters": model.num_parameters(),
    }
