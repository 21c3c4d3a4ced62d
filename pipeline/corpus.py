"""Where a corpus comes from: documents of text files and of streamed Hub datasets, from any point on."""

import lzma
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Protocol

from eval.errors import UserError, reason
from pipeline.artifacts import sha256_file
from pipeline.texts import hub_rows
from pipeline.wikitext import DOCUMENT_MARK

LONGEST = 1 << 22
"""Bytes of a document at most: a longer one is cut after a line into documents, for memory's sake."""
_MARK = DOCUMENT_MARK.encode()
_SUFFIXES = (".txt", ".txt.xz")


class Source(Protocol):
    """A part of a corpus. `position` is plain data: where `documents` goes on after those it gave."""

    name: str
    position: Any

    def sha256(self) -> str | None:
        """Of its content, in hex; `None` where only reading it all would tell."""

    def documents(self) -> Iterator[bytes]:
        """The documents from `position` on, as they are: UTF-8 or not, empty or not."""


class TextFile:
    """A text file (`.xz` is unpacked) whose documents are parted by `<|endoftext|>`; its position is in bytes."""

    def __init__(self, path: Path):
        self.path, self.name, self.position = path, str(path), 0

    def sha256(self) -> str:
        """Of the file, as it lies there. Raises `UserError` if it cannot be read."""
        try:
            return sha256_file(self.path)
        except OSError as error:
            raise UserError(f"{self.path}: {error.strerror or error}; give a readable text file") from error

    def documents(self) -> Iterator[bytes]:
        """The documents from `position` on. Raises `UserError` for a file that cannot be read or unpacked."""
        try:
            with lzma.open(self.path) if self.path.suffix == ".xz" else self.path.open("rb") as file:
                file.seek(self.position)
                yield from self._split(file)
        except (lzma.LZMAError, EOFError) as error:
            raise UserError(f"{self.path}: not a whole .xz file ({error}); copy it again") from error
        except OSError as error:
            raise UserError(f"{self.path}: {error.strerror or error}; give a readable text file") from error

    def _split(self, file: IO[bytes]) -> Iterator[bytes]:
        text, start, ended = b"", 0, False
        while True:
            if not ended and len(text) - start < LONGEST + len(_MARK):
                more = file.read(LONGEST + len(_MARK))
                text, start, ended = text[start:] + more, 0, len(more) < LONGEST + len(_MARK)
            if start == len(text) and ended:
                return
            end = text.find(_MARK, start, start + LONGEST + len(_MARK))
            after = end + len(_MARK)
            if end < 0:
                end = after = len(text) if len(text) - start <= LONGEST else _cut(text, start, start + LONGEST)
            self.position += after - start
            yield text[start:end]
            start = after


def _cut(text: bytes, start: int, end: int) -> int:
    """Where to cut `text[start:end]`: after its last line, else its last word, else its last whole character."""
    for space in (b"\n", b" "):
        found = text.rfind(space, start, end)
        if found >= start:
            return found + 1
    while end > start + LONGEST - 3 and text[end] & 0xC0 == 0x80:
        end -= 1
    return end


class HubRows:
    """A streamed dataset, each row's `text` a document; its position is what `datasets` says of itself."""

    def __init__(self, name: str):
        self.name, self.rows = name, hub_rows(name, streaming=True)

    @property
    def position(self) -> Any:
        """The stream's own state."""
        return self.rows.state_dict()

    @position.setter
    def position(self, position: Any) -> None:
        self.rows.load_state_dict(position)

    def sha256(self) -> None:
        """Not known before all is read."""
        return None

    def documents(self) -> Iterator[bytes]:
        """The rows from `position` on. Raises `UserError` for rows without text, or a stream that breaks off."""
        rows = iter(self.rows)
        while True:
            try:
                row = next(rows, None)
            except Exception as error:  # the network, the format, the disk: datasets raises many kinds
                raise UserError(
                    f"text {self.name}: breaks off ({reason(error)}); mend it and run the same command to go on"
                ) from error
            if row is None:
                return
            if "text" not in row:
                raise UserError(f"text {self.name}: has columns {sorted(row)}; one named 'text' is needed")
            text = row["text"]
            if not isinstance(text, str | None):
                raise UserError(f"text {self.name}: a row holds {type(text).__name__}; every row must be text")
            yield (text or "").encode()


def sources(names: Sequence[str]) -> list[Source]:
    """What `hub:DATASET[@CONFIG]:SPLIT`, files, and folders (their .txt and .txt.xz, at any depth) stand for.

    Raises `UserError` for a dataset that cannot be had, a missing file, or a folder without text.
    """
    found: list[Source] = []
    for name in names:
        path = Path(name)
        if name.startswith("hub:"):
            found.append(HubRows(name))
        elif path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.name.endswith(_SUFFIXES) and file.is_file())
            if not files:
                raise UserError(
                    f"{path}: holds no {' or '.join(_SUFFIXES)} file; give files by name, or hub:{path}:SPLIT"
                )
            found += map(TextFile, files)
        else:
            found.append(TextFile(path))
    return found
