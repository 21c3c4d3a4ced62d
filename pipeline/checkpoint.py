"""Model folders in Hub format: what may be loaded, and one clear line for what may not."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import GPT2LMHeadModel, PreTrainedTokenizerBase
from transformers.utils import logging

from eval.errors import UserError, reason
from pipeline.model import CompactGPT2LMHeadModel, from_gpt2

# A bar for each of the many small loads hides the progress that takes time.
logging.disable_progress_bar()

_PICKLES = ("pytorch_model.bin", "model.pt", "model.pth", "pytorch_model.bin.index.json")


def load_model(folder: Path, dtype: torch.dtype | str = torch.float32) -> CompactGPT2LMHeadModel:
    """The model of a folder in Hub format (stock GPT-2 or ours), in `dtype` (`"auto"`: as stored), in eval mode.

    Raises `UserError` where files are missing, damaged, pickled, or of another architecture.
    """
    kind = _config(folder).get("model_type")
    if not list(folder.glob("*.safetensors")):
        pickled = next((name for name in _PICKLES if (folder / name).exists()), None)
        if pickled:
            raise UserError(
                f"{folder / pickled}: a pickle can run code when it is loaded, so none is; "
                "convert it to model.safetensors (save_pretrained does) and try again"
            )
        raise UserError(f"{folder}: holds no model.safetensors; give a folder in Hub format")
    if kind not in ("gpt2", "compact_gpt2"):
        raise UserError(f"{folder / 'config.json'}: model_type is {kind!r}; gpt2 or compact_gpt2 is needed")
    loader = GPT2LMHeadModel if kind == "gpt2" else CompactGPT2LMHeadModel
    try:
        model, info = loader.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, local_files_only=True, output_loading_info=True
        )
    except (SafetensorError, OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise UserError(f"{folder}: damaged or incomplete checkpoint ({reason(error)}); copy it again") from error
    problems = sorted(map(str, (*info["missing_keys"], *info["mismatched_keys"])))
    if problems:
        raise UserError(
            f"{folder}: {problems[0]} is missing or of another shape; the checkpoint does not fit config.json"
        )
    # Old files hold a constant of the causal mask as well.
    surplus = sorted(key for key in info["unexpected_keys"] if not key.endswith("attn.masked_bias"))
    if surplus:
        raise UserError(f"{folder}: {surplus[0]} has no place in this model; the checkpoint does not fit config.json")
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise UserError(f"{folder}: {name} holds NaN or infinity; give an undamaged checkpoint")
    try:
        return (from_gpt2(model) if kind == "gpt2" else model).eval()
    except ValueError as error:
        raise UserError(f"{folder}: {error}") from error


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path}: not found; give a folder in Hub format") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: damaged JSON; copy the checkpoint again") from error
    if not isinstance(config, dict):
        raise UserError(f"{path}: holds no mapping; copy the checkpoint again")
    return config


def save_model(model: CompactGPT2LMHeadModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """A folder in Hub format: safetensors, config, generation config, tokenizer."""
    model.config.use_cache = True  # training switches it off
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
