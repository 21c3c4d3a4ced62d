"""The tokenizer of a model folder, without the imports that a model needs: they take longer than many a prompt."""

import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import transformers
from transformers import PreTrainedTokenizerBase

from eval.errors import UserError
from pipeline.refusals import refusals

_DIRECT = {"TokenizersBackend", "PreTrainedTokenizerFast", "GPT2Tokenizer", "GPT2TokenizerFast"}
"""The classes that `AutoTokenizer` takes a GPT-2 folder's word for; it imports all of transformers to tell."""
_STORED = ("truncation", "padding")


def load_tokenizer(folder: Path, vocab_size: int | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder, as `AutoTokenizer` gives it, but for what a file keeps of an earlier call: truncation
    and padding are left out, of the object and of every copy that it saves.

    With `vocab_size`, that of the model it is to serve. Raises `UserError` if there is none, it is empty or damaged,
    or it has tokens that the model does not have.
    """
    with refusals(f"{folder}: no usable tokenizer", "give a folder with tokenizer.json"):
        with _without_stored_state(folder) as clean:
            tokenizer = _class(clean).from_pretrained(clean, local_files_only=True, trust_remote_code=False)
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise ValueError(f"{type(tokenizer).__name__} is no tokenizer's class")
        tokenizer.init_kwargs.pop("fast_tokenizer_files", None)  # a copy has one file, tokenizer.json
        ids = tokenizer.get_vocab()
        # Where files are missing, transformers makes a tokenizer without them: nothing but special tokens.
        if tokenizer.vocab_size == 0 or not ids:
            raise ValueError("it has no vocabulary")
    beyond = sorted((number, token) for token, number in ids.items() if vocab_size is not None and number >= vocab_size)
    if beyond:
        named = ", ".join(f"{token!r} is {number}" for number, token in beyond[:3])
        raise UserError(
            f"{folder}: the tokenizer has tokens that the model does not ({named}{', ...' * (len(beyond) > 3)}); "
            f"its ids are 0 to {vocab_size - 1}: give the tokenizer that the model was trained with"  # type: ignore[operator]
        )
    return tokenizer


def stored_state(folder: Path) -> dict[str, dict[str, Any]]:
    """The tokenizer files in which an earlier call's truncation or padding is kept, as they are without it."""
    found = {}
    for path in sorted(folder.glob("tokenizer*.json")):
        with contextlib.suppress(OSError, ValueError, RecursionError):  # whoever loads it says what is wrong
            raw = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(raw, dict) and any(raw.get(key) for key in _STORED):
                found[path.name] = raw | dict.fromkeys(_STORED)
    return found


@contextlib.contextmanager
def _without_stored_state(folder: Path) -> Iterator[Path]:
    """The folder itself, or else a copy of its small files without what an earlier call left behind."""
    changed = stored_state(folder)
    if not changed:
        yield folder
        return
    with tempfile.TemporaryDirectory() as scratch:
        for pattern in ("*.json", "*.txt", "*.model", "*.jinja"):
            for path in filter(Path.is_file, folder.glob(pattern)):
                shutil.copy(path, scratch)
        for name, raw in changed.items():
            (Path(scratch) / name).write_text(json.dumps(raw), encoding="utf-8")
        yield Path(scratch)


def _class(folder: Path) -> Any:
    """The class that `tokenizer_config.json` names, where it is one of GPT-2's; else `AutoTokenizer`."""
    path = folder / "tokenizer_config.json"
    name = json.loads(path.read_text(encoding="utf-8")).get("tokenizer_class") if path.exists() else None
    if name is None and not (folder / "config.json").exists():
        name = "PreTrainedTokenizerFast"
    return getattr(transformers, name if name in _DIRECT else "AutoTokenizer")
