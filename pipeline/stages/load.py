"""Load: a GPT-2 from the Hub, a local folder or the embedded default, as CompactGPT2 in FP32."""

from pathlib import Path
from typing import Any

from eval.errors import UserError
from pipeline.artifacts import fingerprint, sha256_file
from pipeline.checkpoint import check_folder, load_model, save_model
from pipeline.model import to_grouped, to_windowed
from pipeline.recipe import Recipe
from pipeline.stages.job import Job
from pipeline.texts import ASSETS
from pipeline.tokenizer import load_tokenizer

VERSION = 1
EMBEDDED = ASSETS / "gpt2-mini"
_CONVERSIONS = {"n_kv_head", "window"}
_WANTED = ["*.json", "*.safetensors", "merges.txt", "*.model"]


def resolve(source: str, revision: str | None = None) -> Path:
    """The local folder of a model source; a Hub id is downloaded (safetensors only).

    Raises `UserError` where there is no such folder and the Hub gives none.
    """
    if source == "embedded":
        return EMBEDDED
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if source.startswith((".", "/", "~")) or source.count("/") > 1 or folder.exists():
        raise UserError(
            f"model {source}: no such folder; give a folder with config.json and model.safetensors, or a Hub id"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import enable_progress_bars

    enable_progress_bars()
    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=_WANTED))
    except Exception as error:  # offline, unknown id, no permission: all mean that the model is not to be had
        raise UserError(
            f"model {source}: no such folder, and the Hub gave none ({type(error).__name__}); "
            "connect, or copy the model to a folder and give its path, or use the embedded model"
        ) from error


def content_fingerprint(folder: Path) -> str:
    """A hash over the files of a model folder that decide what it computes: no other is ever read.

    Raises `UserError` for one that cannot be read.
    """
    files = sorted({path for pattern in _WANTED for path in folder.glob(pattern)})
    try:
        return fingerprint({path.name: sha256_file(path) for path in files if path.is_file()})
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}; give a folder that you may read") from error


def config(recipe: Recipe) -> dict[str, Any]:
    """The part of the recipe that decides this stage, with the content of the model it names.

    Raises `UserError` where that model is none that can be loaded: here, for here nothing is written yet.
    """
    folder = resolve(recipe.load.source, recipe.load.revision)
    check_folder(folder)
    conversions = recipe.load.model_dump(include=_CONVERSIONS, exclude_none=True)
    return recipe.load.model_dump(exclude=_CONVERSIONS) | conversions | {"content": content_fingerprint(folder)}


def build(job: Job) -> dict[str, Any]:
    """Write `model/`: the FP32 model, as a variant where the recipe asks for one, and its tokenizer."""
    folder = resolve(job.recipe.load.source, job.recipe.load.revision)
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    if len(tokenizer) > model.config.vocab_size:
        raise UserError(
            f"{folder}: the tokenizer has {len(tokenizer)} tokens, the model only {model.config.vocab_size}; "
            "give the tokenizer that the model was trained with"
        )
    choices = job.recipe.load
    try:
        if choices.n_kv_head is not None:
            model = to_grouped(model, choices.n_kv_head)
        if choices.window is not None:
            model = to_windowed(model, choices.window)
    except ValueError as error:
        raise UserError(f"recipe, load: {error}") from error
    save_model(model, tokenizer, job.out / "model")
    return {"parameters": model.num_parameters()}
