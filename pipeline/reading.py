"""Text files as users bring them: UTF-8 text, or JSON lines with a `text`, perhaps packed by gzip, bzip2 or xz.

A file's first bytes say how it is packed, its name whether its lines are JSON. Whatever else a file can be is refused,
so that nothing is taken for prose that is none. The text is left as it is: no newline is translated, no line joined.
"""

import bz2
import contextlib
import gzip
import json
import lzma
import re
import stat
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from eval.errors import UserError

JSON_LINES = (".jsonl", ".ndjson", ".json")
_BOM = b"\xef\xbb\xbf"
_OTHER_BOMS = (b"\xff\xfe", b"\xfe\xff", b"\x00\x00\xfe\xff")
_HEAD = 10


class _Packing(NamedTuple):
    begins: re.Pattern[bytes]
    """No text begins so: these bytes are not UTF-8, but for bzip2's, of which the first block's mark is taken too."""
    unpacked: Callable[[Any], Any]


_PACKINGS: dict[str, _Packing] = {
    ".gz": _Packing(re.compile(rb"\x1f\x8b"), lambda file: gzip.GzipFile(fileobj=file)),
    ".bz2": _Packing(re.compile(rb"BZh[1-9](?:1AY&SY|\x17rE8P\x90)"), bz2.BZ2File),
    ".xz": _Packing(re.compile(rb"\xfd7zXZ\x00"), lzma.LZMAFile),
}
_REFUSED = {
    rb"\x28\xb5\x2f\xfd": "is packed by zstd; unpack it, or pack it by gzip, bzip2 or xz",
    rb"PK\x03\x04": "is a zip archive; unpack it and give the files in it",
}


def expanded(path: str | Path) -> Path:
    """A path that perhaps no shell has seen: `~` is expanded, if there is such a home."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def suffixes() -> tuple[str, ...]:
    """How the names of text files end that are looked for in a folder."""
    return tuple(kind + packed for kind in (".txt", *JSON_LINES[:2]) for packed in ("", *_PACKINGS))


def holds_json(path: Path) -> bool:
    """Whether the file's name says that its lines are JSON."""
    name = path.name.lower()
    return next((name.removesuffix(end) for end in _PACKINGS if name.endswith(end)), name).endswith(JSON_LINES)


def check_file(path: Path) -> None:
    """Raise `UserError` unless a path leads to a regular file: a pipe could only be read once, a device for ever."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:  # a name with a NUL in it is a ValueError
        raise _unreadable(path, error) from error
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):  # of a folder the system says it itself
        raise UserError(f"{path}: no regular file, but a pipe or device; give a readable text file")


@contextlib.contextmanager
def unpacked(path: Path) -> Iterator[IO[bytes]]:
    """The bytes of a text file, unpacked, at their beginning.

    Raises `UserError` where there is no such file, it cannot be read, is damaged or no text by its first bytes: also
    for what goes wrong while it is read.
    """
    check_file(path)
    suffix = next((end for end in (*_PACKINGS, ".lzma", ".zst") if path.name.lower().endswith(end)), None)
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD)
            file.seek(0)
            for begins, what in _REFUSED.items():
                if re.match(begins, head):
                    raise UserError(f"{path}: {what}")
            found = next((end for end, packing in _PACKINGS.items() if packing.begins.match(head)), None)
            if suffix is not None and found is None:
                raise UserError(f"{path}: not a whole {suffix} file (it begins otherwise); copy it again")
            suffix = found
            with _PACKINGS[found].unpacked(file) if found else contextlib.nullcontext(file) as content:
                yield content
    except (EOFError, zlib.error, lzma.LZMAError) as error:
        raise UserError(f"{path}: not a whole {suffix} file ({error}); copy it again") from error
    except OSError as error:
        if error.errno is None:  # what gzip and bz2 say of a damaged file
            raise UserError(f"{path}: not a whole {suffix} file ({error}); copy it again") from error
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError | ValueError) -> UserError:
    return UserError(f"{path}: {getattr(error, 'strerror', None) or error}; give a readable text file")


def begin_text(file: IO[bytes]) -> int:
    """Step over the byte order mark, if there is one, which is no part of the text; returns where the text begins."""
    return file.seek(len(_BOM) if file.read(len(_BOM)) == _BOM else 0)


def read_rows(path: str | Path) -> list[str]:
    """The texts in a file: each line's `text` where the lines are JSON, else the whole as the only one.

    Raises `UserError` where the file is missing, unreadable, damaged, without text, or no UTF-8.
    """
    path = expanded(path)
    with unpacked(path) as file:
        begin_text(file)
        raw = file.read()
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        where = "its byte order mark is another's" if raw.startswith(_OTHER_BOMS) else f"byte {error.start}"
        raise UserError(f"{path}: not UTF-8 text ({where}); save it as UTF-8") from error
    if "\x00" in text:
        raise UserError(f"{path}: holds NUL bytes, so it is no text file; give a plain text file")
    rows = list(_json_rows(text, path)) if holds_json(path) else [text]
    if not any(row.strip() for row in rows):
        raise UserError(f"{path}: empty; give a file with text")
    return rows


def _json_rows(text: str, path: Path) -> Iterator[str]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield json_text(line)
            except ValueError as error:
                raise UserError(f"{path}: line {number} {error}") from error


def json_text(line: str | bytes) -> str:
    """The text that a line of JSON holds. Raises `ValueError` that says what is wrong with it."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError('is no JSON; give lines such as {"text": "..."}, or plain text under another name') from error
    return row_text(row)


def row_text(row: Any) -> str:
    """The `text` of a row, `""` for null. Raises `ValueError` that says what is wrong with the row."""
    if not isinstance(row, dict):
        raise ValueError(f"holds {type(row).__name__}; an object with a 'text' is needed")
    if "text" not in row:
        raise ValueError(f"has columns {sorted(map(str, row))[:8]}; one named 'text' is needed")
    text = row["text"]
    if not isinstance(text, str | None):
        raise ValueError(f"holds {type(text).__name__} for a text; every row must be text")
    if text and ("\x00" in text or not is_unicode(text)):
        raise ValueError("holds a NUL or half a character; give plain text")
    return text or ""


def is_unicode(text: str) -> bool:
    """Whether a text has a UTF-8 form: halves of characters (lone surrogates) have none."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def read_text(path: str | Path) -> str:
    """The text of a file as it is; the rows of JSON lines joined by a blank line. Raises what `read_rows` raises."""
    return "\n\n".join(read_rows(path))
