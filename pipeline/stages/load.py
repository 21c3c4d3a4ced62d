"""Load: a GPT-2 from the Hub, a local folder or the embedded default, as CompactGPT2 in FP32."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from eval.errors import UserError
from pipeline.artifacts import fingerprint, sha256_file
from pipeline.checkpoint import check_generation, load_model, save_model
from pipeline.hub import WANTED, resolve
from pipeline.model import CompactGPT2LMHeadModel, to_grouped, to_windowed
from pipeline.recipe import Recipe
from pipeline.stages.job import Job
from pipeline.tokenizer import load_tokenizer, stored_state

VERSION = 1
_CONVERSIONS = {"n_kv_head", "window"}


def content_fingerprint(folder: Path) -> str:
    """A hash over the files of a model folder that decide what it computes: no other is ever read.

    Raises `UserError` for one that cannot be read.
    """
    files = sorted({path for pattern in WANTED for path in folder.glob(pattern)})
    try:
        return fingerprint({path.name: sha256_file(path) for path in files if path.is_file()})
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}; give a folder that you may read") from error


def config(recipe: Recipe) -> dict[str, Any]:
    """The part of the recipe that decides this stage, with the content of the model it names."""
    folder = resolve(recipe.load.source, recipe.load.revision)
    conversions = recipe.load.model_dump(include=_CONVERSIONS, exclude_none=True)
    # Copies of such a tokenizer that earlier versions made, and all that was made with them, are not up to date.
    cleaned = {"left_out": sorted(stored_state(folder))} if stored_state(folder) else {}
    content = {"content": content_fingerprint(folder)}
    return recipe.load.model_dump(exclude=_CONVERSIONS) | conversions | content | cleaned


def build(job: Job) -> dict[str, Any]:
    """Write `model/`: the FP32 model, as a variant where the recipe asks for one, and its tokenizer."""
    model, tokenizer = wanted(job.recipe)
    save_model(model, tokenizer, job.out / "model")
    return {"parameters": model.num_parameters()}


def wanted(recipe: Recipe) -> tuple[CompactGPT2LMHeadModel, PreTrainedTokenizerBase]:
    """What the stage is to write. Raises `UserError` where the recipe's model is none that can be loaded."""
    choices = recipe.load
    folder = resolve(choices.source, choices.revision)
    model = load_model(folder)
    check_generation(folder)
    tokenizer = load_tokenizer(folder, model.config.vocab_size)
    try:
        if choices.n_kv_head is not None:
            model = to_grouped(model, choices.n_kv_head)
        if choices.window is not None:
            model = to_windowed(model, choices.window)
    except ValueError as error:
        raise UserError(f"recipe, load: {error}") from error
    return model, tokenizer
