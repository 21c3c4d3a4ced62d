"""Half: the weights in FP16."""

from typing import Any

import torch

from eval.errors import WorkError
from pipeline.checkpoint import load_model, save_model
from pipeline.recipe import Recipe
from pipeline.stages.job import Job
from pipeline.tokenizer import load_tokenizer

VERSION = 1


def config(recipe: Recipe) -> dict[str, Any]:
    """Nothing in the recipe changes this stage."""
    return {}


def to_half(model: torch.nn.Module) -> None:
    """Cast all weights to FP16 in place. Raises `WorkError` if one does not fit its range."""
    for name, parameter in model.named_parameters():
        largest = parameter.detach().abs().max().item()
        if largest > torch.finfo(torch.float16).max:
            raise WorkError(f"{name} reaches {largest:.3g}, beyond FP16's 65504; this model cannot be halved")
    model.half()


def build(job: Job) -> dict[str, Any]:
    """Write `model/`: the same model with FP16 weights."""
    assert job.source is not None
    model = load_model(job.source / "model")
    to_half(model)
    save_model(model, load_tokenizer(job.source / "model"), job.out / "model")
    return {"parameters": model.num_parameters()}
