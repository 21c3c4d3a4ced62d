"""Text in, token blocks out: reading, checking, tokenising, packing."""

import hashlib
import lzma
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from eval.errors import UserError
from pipeline.wikitext import join_rows

IGNORE = -100
"""The label of a position that does not count in a loss."""


class TokenBlocks(Dataset):
    """Token rows of one length, as `Trainer` wants them.

    `tokens` is `[blocks, length]` of any integer dtype (a memory map will do); `lengths`, if given,
    says how many tokens of each row are text: the rest is padding, masked and not scored.
    """

    def __init__(self, tokens: np.ndarray, lengths: Sequence[int] | None = None):
        self.tokens = tokens
        self.lengths = lengths

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.from_numpy(self.tokens[index].astype(np.int64))
        if self.lengths is None:
            return {"input_ids": ids, "labels": ids.clone()}
        mask = (torch.arange(len(ids)) < self.lengths[index]).long()
        return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, IGNORE)}


def tokenize_dataset(dataset: Any, tokenizer: Any, block_size: int, *, pack: bool = True) -> TokenBlocks:
    """Tokenise text for causal language modelling.

    `dataset` is a `datasets.Dataset` with a `text` column, one string, or strings. With `pack`, rows
    are joined WikiText's way and cut into full blocks of `block_size` tokens: no padding, nothing
    scored twice, the last partial block dropped. Without it each row is one example, cut at
    `block_size` and padded on the right; GPT-2 has no padding token, so the end-of-text token stands
    in, masked out of attention and loss.

    Raises `UserError` where the text does not fill one block.
    """
    rows = [dataset] if isinstance(dataset, str) else _text_rows(dataset)
    if pack:
        ids = encode("\n\n".join(rows), tokenizer)
        count = len(ids) // block_size
        if not count:
            raise UserError(f"the text has {len(ids)} tokens, shorter than one block of {block_size}: give more text")
        return TokenBlocks(ids[: count * block_size].reshape(count, block_size))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    encoded = [encode(row, tokenizer)[:block_size] for row in rows if row.strip()]
    if not encoded:
        raise UserError("every row of the text is empty: give text")
    tokens = np.full((len(encoded), max(map(len, encoded))), pad, dtype=np.int64)
    for row, ids in zip(tokens, encoded, strict=True):
        row[: len(ids)] = ids
    return TokenBlocks(tokens, [len(ids) for ids in encoded])


def _text_rows(dataset: Any) -> list[str]:
    columns = getattr(dataset, "column_names", None)
    if columns is not None and "text" not in columns:
        raise UserError(f"the dataset has columns {columns}; one named 'text' is needed")
    rows = list(dataset if columns is None else dataset["text"])
    for number, row in enumerate(rows):
        if not isinstance(row, str):
            raise UserError(f"row {number} of the dataset holds {type(row).__name__}; every row must be text")
    return rows


def encode(text: str, tokenizer: Any) -> np.ndarray:
    """Token ids of `text` as an int64 vector, without special tokens and without a length warning."""
    return np.asarray(tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int64)


def encode_many(texts: Iterable[str], tokenizer: Any, batch: int = 512) -> Iterator[np.ndarray]:
    """Token ids of many documents in order, each closed by the end-of-text token; encoded in parallel."""
    end = [tokenizer.eos_token_id]
    pending: list[str] = []

    def flush() -> Iterator[np.ndarray]:
        for encoding in tokenizer.backend_tokenizer.encode_batch_fast(pending, add_special_tokens=False):
            yield np.asarray(encoding.ids + end)
        pending.clear()

    for text in texts:
        pending.append(text)
        if len(pending) == batch:
            yield from flush()
    yield from flush()


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file (`.xz` is unpacked).

    Raises `UserError` where the file is missing, unreadable, empty, or not UTF-8 text.
    """
    path = Path(path)
    try:
        raw = path.read_bytes()
        if path.suffix == ".xz":
            raw = lzma.decompress(raw)
        text = raw.decode("utf-8")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}; give a readable text file") from error
    except lzma.LZMAError as error:
        raise UserError(f"{path}: not a whole .xz file ({error}); copy it again") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}); give a plain text file") from error
    if "\x00" in text:
        raise UserError(f"{path}: holds NUL bytes, so it is no text file; give a plain text file")
    if not text.strip():
        raise UserError(f"{path}: empty; give a file with text")
    return text


def sha256_text(text: str) -> str:
    """The sha256 of a text's UTF-8 bytes, in hex."""
    return hashlib.sha256(text.encode()).hexdigest()


def read_wikitext(path: str | Path) -> str:
    """A raw WikiText file with its rows joined as the Hub's are."""
    return join_rows(read_text(path).splitlines())
