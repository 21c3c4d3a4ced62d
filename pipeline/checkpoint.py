"""Model folders in Hub format: what may be loaded, and one clear line for what may not."""

import textwrap
from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.activations import ACT2FN
from transformers.utils import logging

from cuda_ext.checkpoint import Checkpoint, read_checkpoint
from cuda_ext.configuration import read_json, shown
from cuda_ext.errors import CheckpointError
from eval.errors import UserError, reason
from pipeline.model import CompactGPT2Config, CompactGPT2LMHeadModel

# A bar for each of the many small loads hides the progress that takes time.
logging.disable_progress_bar()


def load_model(folder: Path, dtype: torch.dtype | str = torch.float32) -> CompactGPT2LMHeadModel:
    """The model of a folder in Hub format (stock GPT-2 or ours), in `dtype` (`"auto"`: as stored), in eval mode.

    transformers' own loading is left out: it fills, drops and converts in silence what does not fit. Raises `UserError`
    where files are missing, damaged, pickled, or of another architecture.
    """
    try:
        checkpoint, config = _read(folder)
        config.architectures = [CompactGPT2LMHeadModel.__name__]
        config.dtype = dtype if isinstance(dtype, torch.dtype) else checkpoint.dtype
        with torch.device("meta"):  # the tensors take the weights' place
            model = CompactGPT2LMHeadModel(config)
        weights = {f"transformer.{name}": tensor for name, tensor in checkpoint.tensors(config.dtype)}
    except CheckpointError as error:
        raise UserError(str(error)) from error
    model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    if (folder / "generation_config.json").exists():
        model.generation_config = _generation_config(folder / "generation_config.json")
    return model.eval()


def check_generation(folder: Path) -> None:
    """Raise `UserError` where `save_model` could not write again what a folder says of generation."""
    if (folder / "generation_config.json").exists():
        _generation_config(folder / "generation_config.json", strict=True)


def _read(folder: Path) -> tuple[Checkpoint, CompactGPT2Config]:
    checkpoint = read_checkpoint(folder)
    fields = {name: value for name, value in checkpoint.fields.items() if name != "model_type"}
    fields["tie_word_embeddings"] = True  # what config.json says has been held against the head
    activation = fields["activation_function"]
    if activation not in ACT2FN:
        raise CheckpointError(
            f"{folder / 'config.json'}: activation_function is {shown(activation)}; known are {', '.join(ACT2FN)}"
        )
    if any(True for _ in ACT2FN[activation].parameters()):
        raise CheckpointError(f"{folder / 'config.json'}: activation_function {activation} has weights, GPT-2's none")
    try:
        return checkpoint, CompactGPT2Config(**fields)
    except Exception as error:  # transformers' own checks raise many types
        raise CheckpointError(f"{folder / 'config.json'}: {reason(error)}") from error


def _generation_config(path: Path, *, strict: bool = False) -> GenerationConfig:
    """`strict`: whether transformers will write it again."""
    try:
        choices = read_json(path)
        odd = next((name for name in choices if callable(getattr(GenerationConfig, name, None))), None)
        if odd is not None:
            raise ValueError(f"{shown(odd)} is no setting")
        config = GenerationConfig.from_dict(choices)
        config.validate(strict=strict)
        return config
    except CheckpointError as error:
        raise UserError(str(error)) from error
    except Exception as error:  # transformers' own checks raise many types
        raise UserError(f"{path}: {textwrap.shorten(str(error), 300)}; mend it, or delete it") from error


def save_model(model: CompactGPT2LMHeadModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """A folder in Hub format: safetensors, config, generation config, tokenizer."""
    model.config.use_cache = True  # training switches it off
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
