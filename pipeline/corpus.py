"""Where a corpus comes from: documents of text files and of streamed Hub datasets, from any point on."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Protocol

from eval.errors import UserError, reason
from pipeline.artifacts import sha256_file
from pipeline.reading import begin_text, check_file, expanded, holds_json, json_text, row_text, suffixes, unpacked
from pipeline.texts import hub_rows
from pipeline.wikitext import DOCUMENT_MARK

LONGEST = 1 << 22
"""Bytes of a piece at most: a longer document is cut after a line, for memory's sake."""
Piece = tuple[bytes, bool]
"""A document, or a part of a long one, as it is (UTF-8 or not, empty or not); and whether the document ends with it."""
_MARK = DOCUMENT_MARK.encode()


class Source(Protocol):
    """A part of a corpus. `position` is plain data: where `pieces` goes on after those it gave."""

    name: str
    position: Any

    def sha256(self) -> str | None:
        """Of its content, in hex; `None` where only reading it all would tell."""

    def pieces(self) -> Iterator[Piece]:
        """The documents from `position` on."""


class TextFile:
    """A text file as `reading` knows them, in documents: the lines of JSON lines, else what `<|endoftext|>` parts,
    without the space around it.

    Its position is in unpacked bytes.
    """

    def __init__(self, path: Path):
        self.path, self.name, self.position = path, str(path), 0

    def sha256(self) -> str:
        """Of the file, as it lies there. Raises `UserError` if it cannot be read."""
        check_file(self.path)
        try:
            return sha256_file(self.path)
        except OSError as error:
            raise UserError(f"{self.path}: {error.strerror or error}; give a readable text file") from error

    def pieces(self) -> Iterator[Piece]:
        """The documents from `position` on. Raises `UserError` for a file that cannot be read or understood."""
        with unpacked(self.path) as file:
            start = begin_text(file)
            self.position = max(self.position, start)
            file.seek(max(start, self.position - len(_MARK)))
            before = file.read(self.position - file.tell())
            yield from self._lines(file) if holds_json(self.path) else self._split(file, before)

    def _lines(self, file: IO[bytes]) -> Iterator[Piece]:
        while line := file.readline():
            try:
                document = json_text(line).encode() if line.strip() else None
            except ValueError as error:
                raise UserError(f"{self.path}: the line at byte {self.position} {error}") from error
            self.position += len(line)
            if document is not None:
                yield document, True

    def _split(self, file: IO[bytes], before: bytes) -> Iterator[Piece]:
        begins, marked = before in (b"", _MARK), before == _MARK
        text, start, ended = b"", 0, False
        while True:
            if not ended and len(text) - start < LONGEST + len(_MARK):
                more = file.read(LONGEST + len(_MARK))
                text, start, ended = text[start:] + more, 0, len(more) < LONGEST + len(_MARK)
            if start == len(text) and ended:
                return
            end = text.find(_MARK, start, start + LONGEST + len(_MARK))
            after, ends, marks = end + len(_MARK), True, True
            if end < 0:
                ends, marks = len(text) - start <= LONGEST, False
                end = after = len(text) if ends else _cut(text, start, start + LONGEST)
            self.position += after - start
            piece = text[start:end]
            if marked or marks:
                piece = piece.lstrip() if begins else piece
                piece = piece.rstrip() if ends else piece
            yield piece, ends
            start, begins, marked = after, ends, marks


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

    def pieces(self) -> Iterator[Piece]:
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
            try:
                yield row_text(row).encode(), True
            except ValueError as error:
                raise UserError(f"text {self.name}: a row {error}") from error


def sources(names: Sequence[str]) -> list[Source]:
    """What `hub:DATASET[@CONFIG]:SPLIT`, files, and folders (their .txt and .jsonl, packed or not, at any depth) stand
    for.

    Raises `UserError` for a dataset that cannot be had, a missing file, or a folder without text.
    """
    found: list[Source] = []
    for name in names:
        path = expanded(name)
        if name.startswith("hub:"):
            found.append(HubRows(name))
        elif path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.name.endswith(suffixes()) and file.is_file())
            if not files:
                raise UserError(
                    f"{path}: holds no .txt or .jsonl file, packed or not; give files by name, or hub:{path}:SPLIT"
                )
            found += map(TextFile, files)
        else:
            found.append(TextFile(path))
    return found
