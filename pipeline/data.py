"""Text in, token blocks out: reading, checking, tokenising, packing."""

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from eval.errors import UserError
from pipeline.refusals import refusals

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
    are joined by a blank line and cut into full blocks of `block_size` tokens: no padding, nothing
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
    # Any token would do: the mask hides it.
    pad = next((token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None), 0)
    encoded = [ids[:block_size] for ids in _each((row for row in rows if row.strip()), tokenizer) if len(ids)]
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
    """Token ids of `text` as an int64 vector, as the tokenizer itself gives them for the text alone.

    Special tokens that a post-processor would put around it are not added, and nothing is cut or padded; one that is
    written out in the text is that token. Raises `UserError` where the tokenizer cannot.
    """
    return _ids([text], tokenizer)[0]


def encode_many(texts: Iterable[str], tokenizer: Any, batch: int = 512) -> Iterator[np.ndarray]:
    """Token ids of many documents in order, each closed by the end-of-text token; encoded in parallel."""
    for ids in _each(texts, tokenizer, batch):
        yield np.append(ids, tokenizer.eos_token_id)


def _each(texts: Iterable[str], tokenizer: Any, batch: int = 512) -> Iterator[np.ndarray]:
    waiting = iter(texts)
    while pending := list(itertools.islice(waiting, batch)):
        yield from _ids(pending, tokenizer)


def _ids(texts: list[str], tokenizer: Any) -> list[np.ndarray]:
    return [np.asarray(ids, dtype=np.int64) for ids in _call(texts, tokenizer)["input_ids"]]


def _call(texts: list[str], tokenizer: Any) -> Any:
    with refusals("the tokenizer gives up on the text"):
        return tokenizer(
            texts,
            add_special_tokens=False,
            truncation=False,
            padding=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # that a text is longer than the model's context
        )


def scored_bytes(text: str, tokenizer: Any) -> int:
    """UTF-8 bytes of what perplexity scores: all of a text of 2 tokens or more but its first, which nothing predicts.

    That counts as what it stands for in the text: a normalizer may have changed it, and space gone before or into it.
    """
    found = _call([text], tokenizer)
    first = found["input_ids"][0][:1]
    token = tokenizer.convert_ids_to_tokens(first)[0]
    written = tokenizer.decode(first, clean_up_tokenization_spaces=False)
    forms = () if written.endswith("\ufffd") else (written, written.lstrip())  # a part of a character stands for it
    begins = next((form for form in forms if text.startswith(form)), "")
    if tokenizer.is_fast:
        # Both are needed: some tokenizers leave the space out of where a token stands.
        unscored = max(len(begins.encode()), _bytes_in_place(text, found, token, written))
    else:  # what is not there as it is written has a letter for each byte of a character
        unscored = len(begins.encode()) or min(len(token), len(text[0].encode()))
    return len(text.encode()) - unscored


def _bytes_in_place(text: str, found: Any, token: str, written: str) -> int:
    """UTF-8 bytes of the first token, by where it and the second one stand in the text."""
    first, second = found.token_to_chars(0, 0), found.token_to_chars(0, 1)
    size = len(text[: min(first.end, second.start)].encode())
    if second.start < first.end and written.endswith("\ufffd"):  # they share a character
        byte_fallback = token.startswith("<0x")  # else each letter stands for a byte
        size += 1 if byte_fallback else len(token) - len(written.rstrip("\ufffd").encode())
    return size


def sha256_text(text: str) -> str:
    """The sha256 of a text's UTF-8 bytes, in hex."""
    return hashlib.sha256(text.encode()).hexdigest()
