"""The tokenizer of a model folder, without the imports that a model needs: they take longer than many a prompt."""

import json
from pathlib import Path
from typing import Any

import transformers
from transformers import PreTrainedTokenizerBase

from eval.errors import UserError, reason


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder. Raises `UserError` if there is none or it is damaged."""
    try:
        return _class(folder).from_pretrained(folder, local_files_only=True)
    except Exception as error:  # tokenizers raises bare Exception for a damaged file
        raise UserError(
            f"{folder}: no usable tokenizer ({reason(error)}); give a folder with tokenizer.json"
        ) from error


def _class(folder: Path) -> Any:
    """The class that `tokenizer_config.json` names; else `AutoTokenizer`, which imports all of transformers."""
    path = folder / "tokenizer_config.json"
    name = json.loads(path.read_text(encoding="utf-8")).get("tokenizer_class") if path.exists() else None
    return getattr(transformers, name if name and hasattr(transformers, name) else "AutoTokenizer")
