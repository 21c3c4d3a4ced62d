"""Token shards as files that llm.c reads and writes, and shuffled blocks of them without loading any.

A shard (llm.c, dev/data/data_common.py) is a header of 256 little-endian int32: magic, version, number of
tokens, zeros; then the tokens as uint16.
"""

import hashlib
import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch.utils.data import Dataset

from eval.errors import UserError

MAGIC, VERSION = 20240520, 1
HEADER_BYTES = 1024
MOST_TOKENS = (2**31 - 1 - HEADER_BYTES) // 2
"""llm.c's loader seeks in bytes, by a 32-bit number."""
_PART = 1 << 20
_MAGIC_32_BITS = 20240801


@dataclass(frozen=True)
class Shard:
    """A whole shard: its file and number of tokens."""

    path: Path
    tokens: int

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens `start` to `start + count` as a uint16 memory map.

        The map lasts as long as its array: what was read does not stay in this process.
        """
        return np.memmap(self.path, "<u2", "r", HEADER_BYTES + 2 * start, (count,))


def open_shard(path: Path) -> Shard:
    """A shard whose header is right and whose length is what the header says; `UserError` otherwise."""
    try:
        with path.open("rb") as file:
            raw = file.read(HEADER_BYTES)
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}; give a readable shard") from error
    if len(raw) < HEADER_BYTES:
        raise UserError(f"{path}: {len(raw)} bytes, less than a shard's header of {HEADER_BYTES}; make it again")
    magic, version, tokens = np.frombuffer(raw, "<i4", 3).tolist()
    if magic == _MAGIC_32_BITS:
        raise UserError(f"{path}: holds 32-bit tokens; only shards of 16-bit tokens (GPT-2's) are read")
    if (magic, version) != (MAGIC, VERSION):
        raise UserError(
            f"{path}: begins with {magic}, {version}, a shard of llm.c's with {MAGIC}, {VERSION}; make it again"
        )
    if tokens < 1 or size != HEADER_BYTES + 2 * tokens:
        raise UserError(
            f"{path}: the header says {tokens} tokens, the file holds {(size - HEADER_BYTES) / 2:g}; make it again"
        )
    return Shard(path, tokens)


def find_shards(folder: Path, split: str) -> list[Shard]:
    """The shards whose names hold the split (`train`, `val`) as a word, in order: `fineweb_train_000001.bin`."""
    return [open_shard(path) for path in sorted(folder.glob("*.bin")) if split in path.stem.split("_")]


class ShardWriter:
    """Appends tokens to `SPLIT_000000.bin`, `SPLIT_000001.bin`, ... of `limit` tokens each.

    It goes on after the first `tokens` tokens of an earlier writer, whatever that one wrote after them.
    A shard has no valid header until it is complete, so that nobody takes half of one for whole.
    """

    def __init__(self, folder: Path, split: str, limit: int, tokens: int = 0):
        self.folder, self.split, self.limit, self.tokens = folder, split, limit, tokens
        self.file: IO[bytes] | None = None

    def add(self, ids: np.ndarray) -> None:
        """Append a vector of tokens, across shards where need be."""
        while len(ids):
            file = self.file = self.file or self._open()
            part = ids[: self.limit - self.tokens % self.limit]
            file.write(part.astype("<u2").tobytes())
            self.tokens += len(part)
            ids = ids[len(part) :]
            if self.tokens % self.limit == 0:
                self._close()
                _seal(self._path(self.tokens // self.limit - 1), self.limit)

    def sync(self) -> None:
        """Force onto the disk what was added."""
        if self.file is not None:
            self.file.flush()
            os.fsync(self.file.fileno())

    def read(self, start: int, stop: int) -> Iterator[np.ndarray]:
        """Tokens `start` to `stop` of those that are on the disk, in parts of uint16."""
        while start < stop:
            number, inside = divmod(start, self.limit)
            count = min(stop - start, self.limit - inside, _PART)
            _check_holds(self._path(number), inside + count)
            yield Shard(self._path(number), self.limit).read(inside, count)
            start += count

    def finish(self, tokens: int) -> None:
        """Complete the shards with the first `tokens` tokens; cut off at any instant, another call ends the same.

        A last shard less than half full takes as many as it has then from the one before: llm.c's loader refuses
        one that is shorter than a batch.
        """
        self._close()
        self.tokens = tokens
        whole, rest = divmod(tokens, self.limit)
        if whole and 0 < 2 * rest < self.limit:
            self._level(self._path(whole - 1), self._path(whole), rest)
        elif rest:
            _seal(self._path(whole), rest)
        for path in self.folder.glob(f"{self.split}_*.bin"):
            if path >= self._path(whole + bool(rest)):
                path.unlink()

    def _level(self, first: Path, last: Path, rest: int) -> None:
        """Spread a full shard and the `rest` tokens after it over both."""
        kept = (self.limit + rest + 1) // 2
        moved = self.limit - kept
        _check_holds(last, rest)
        # Once the last one has its new content, it says so, and the other one may be cut.
        if not _is_sealed(last, moved + rest):
            _check_holds(first, self.limit)
            partial = last.with_suffix(".partial")
            with partial.open("wb") as file:
                file.write(_header(moved + rest))
                file.write(Shard(first, self.limit).read(kept, moved).tobytes())
                file.write(Shard(last, rest).read(0, rest).tobytes())
                file.flush()
                os.fsync(file.fileno())
            partial.replace(last)
        _seal(first, kept)

    def _path(self, number: int) -> Path:
        return self.folder / f"{self.split}_{number:06d}.bin"

    def _open(self) -> IO[bytes]:
        number, inside = divmod(self.tokens, self.limit)
        if inside:
            return _cut(self._path(number), inside)
        file = self._path(number).open("wb")
        file.write(bytes(HEADER_BYTES))
        return file

    def _close(self) -> None:
        if self.file is not None:
            self.file.close()
            self.file = None


def _header(tokens: int) -> bytes:
    return np.array([MAGIC, VERSION, tokens], "<i4").tobytes().ljust(HEADER_BYTES, b"\0")


def _is_sealed(path: Path, tokens: int) -> bool:
    with path.open("rb") as file:
        return file.read(HEADER_BYTES) == _header(tokens)


def _cut(path: Path, tokens: int) -> IO[bytes]:
    """A file of at least so many tokens, open behind them. Raises `UserError` where they are no longer there."""
    _check_holds(path, tokens)
    file = path.open("r+b")
    file.truncate(HEADER_BYTES + 2 * tokens)
    file.seek(HEADER_BYTES + 2 * tokens)
    return file


def _check_holds(path: Path, tokens: int) -> None:
    """Raise `UserError` unless at least so many tokens, which were written, are still there."""
    size = path.stat().st_size if path.is_file() else -1
    if size < HEADER_BYTES + 2 * tokens:
        what = "missing" if size < 0 else "shorter than it was"
        raise UserError(f"{path}: {what}; delete the folder and prepare it again")


def _seal(path: Path, tokens: int) -> None:
    """Make a file of at least so many tokens a shard of exactly these."""
    with _cut(path, tokens) as file:
        os.fsync(file.fileno())
        file.seek(0)
        file.write(_header(tokens))
        file.flush()
        os.fsync(file.fileno())


class ShardBlocks:
    """Shards cut into blocks of `length` tokens; what is left at a shard's end belongs to none."""

    def __init__(self, shards: Sequence[Shard], length: int, vocab_size: int):
        self.shards, self.length, self.vocab_size = shards, length, vocab_size
        self.ends = list(accumulate(shard.tokens // length for shard in shards))

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def __getitem__(self, index: int) -> np.ndarray:
        """Block `index` in the order of the files: int64 `[length]`.

        Raises `UserError` for a token that the vocabulary does not have, `IndexError` past the end.
        """
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = bisect_right(self.ends, index)
        start = (index - (self.ends[number - 1] if number else 0)) * self.length
        ids = self.shards[number].read(start, self.length).astype(np.int64)
        if ids.max() >= self.vocab_size:
            raise UserError(
                f"{self.shards[number].path}: holds token {ids.max()}, the vocabulary has {self.vocab_size}; "
                "give the tokenizer that the shards were made with"
            )
        return ids


class ShuffledBlocks(Dataset):
    """One process's share of an epoch: all blocks in an order that seed and epoch alone decide.

    Process `rank` of `world` takes every `world`-th of that order; the rest, too few for one each, wait for
    another epoch. Nothing is drawn or stored: a walk's whole state is its epoch and how far it is in it.
    """

    def __init__(self, blocks: ShardBlocks, seed: int, rank: int = 0, world: int = 1):
        self.blocks, self.seed, self.rank, self.world = blocks, seed, rank, world
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Take another order."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.blocks) // self.world

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        place = permuted(index * self.world + self.rank, len(self.blocks), f"{self.seed},{self.epoch}")
        ids = torch.from_numpy(self.blocks[place])
        return {"input_ids": ids, "labels": ids.clone()}


def permuted(index: int, count: int, key: str) -> int:
    """Where a shuffle of `0 ... count - 1`, drawn by `key`, puts `index`; in constant memory.

    A Feistel network (Luby and Rackoff 1988; eight rounds, since their four favour some orders of a few blocks)
    permutes the next even power of two; what falls outside is sent through again until it falls inside (Black and
    Rogaway 2002, cycle walking).
    """
    half = max(1, ((count - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for turn in range(8):
            digest = hashlib.blake2b(f"{key},{turn},{right}".encode(), digest_size=8).digest()
            left, right = right, left ^ (int.from_bytes(digest, "little") & mask)
        index = left << half | right
        if index < count:
            return index
