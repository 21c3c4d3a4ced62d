"""Fine-tune: recover what pruning cost, with the Hugging Face `Trainer` on FP32 master weights."""

from typing import Any

from pipeline.artifacts import CHECKPOINTS
from pipeline.checkpoint import load_model, save_model
from pipeline.data import tokenize_dataset
from pipeline.recipe import Recipe
from pipeline.stages.half import to_half
from pipeline.stages.job import Job
from pipeline.texts import load_text
from pipeline.tokenizer import load_tokenizer
from pipeline.training import drop_checkpoints, is_main_process, train

VERSION = 1


def config(recipe: Recipe) -> dict[str, Any]:
    """The training choices (not how often it saves) and the seed."""
    return {**recipe.finetune.model_dump(exclude={"save_steps"}), "seed": recipe.seed}


def build(job: Job) -> dict[str, Any]:
    """Write `model/` (FP32) and `model_fp16/`; the details hold the learning curve."""
    assert job.source is not None
    choices = job.recipe.finetune
    model = load_model(job.source / "model")
    tokenizer = load_tokenizer(job.source / "model")
    blocks = tokenize_dataset(
        load_text(job.recipe.data.train), tokenizer, min(choices.block_size, model.config.n_positions)
    )
    teacher = load_model(job.teacher / "model") if choices.distill and job.teacher else None
    checkpoints = job.out / CHECKPOINTS
    with job.tracking.training() as report_to:
        curve = train(
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
    return {"curve": curve, "blocks": len(blocks), "parameters": model.num_parameters()}
