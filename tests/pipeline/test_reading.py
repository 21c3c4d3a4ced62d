"""What a text file is: each kind read byte for byte, in evaluation and in corpora alike, and all else refused."""

import bz2
import gzip
import json
import lzma
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from eval.errors import UserError
from pipeline.corpus import TextFile, sources
from pipeline.reading import read_rows, read_text
from pipeline.texts import load_rows, load_text

PACK: dict[str, Callable[[bytes], bytes]] = {
    "": lambda raw: raw,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}
RAW = "\r\n the cat\r\nsät\x85on\u2028the\x0cmat\x1c\x0b\n\n\n  "
ROWS = ["the cat\r\n", "", "sät\x85on\u2028the mat", " \ufeff "]
LINES = "".join(json.dumps({"id": 1, "text": row}, ensure_ascii=False) + "\r\n" for row in ROWS)


def documents(path: Path) -> list[str]:
    return [document.decode() for document, _ in TextFile(path).pieces()]


def refused(path: Path) -> str:
    """What all ways of reading say."""
    said = []
    for read in (read_rows, documents, lambda path: load_text(str(path))):
        with pytest.raises(UserError) as caught:
            read(path)
        said.append(str(caught.value))
    assert "\n" not in said[0] and said[0].startswith(str(path))
    assert said[0] == said[2]
    return said[0] if said[0] == said[1] else "\t".join(said[:2])


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("packed", PACK)
def test_text_is_read_as_it_is(packed: str, mark: bytes, tmp_path: Path) -> None:
    path = tmp_path / f"text.txt{packed}"
    path.write_bytes(PACK[packed](mark + RAW.encode()))
    assert read_rows(path) == load_rows(str(path)) == documents(path) == [RAW]
    assert read_text(path) == load_text(str(path)) == RAW
    other = path.rename(tmp_path / "text.md")  # the content tells how it is packed
    assert read_text(other) == RAW and documents(other) == [RAW]


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("name", ["rows.jsonl", "ROWS.NDJSON", "rows.json"])
@pytest.mark.parametrize("packed", PACK)
def test_json_lines_are_read_as_rows(packed: str, name: str, mark: bytes, tmp_path: Path) -> None:
    path = tmp_path / f"{name}{packed}"
    path.write_bytes(PACK[packed](mark + f"\n{LINES} \n".encode()))
    assert read_rows(path) == load_rows(str(path)) == documents(path) == ROWS
    assert load_text(str(path)) == "\n\n".join(ROWS)


def test_a_stream_of_json_lines_goes_on_from_any_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(b"\xef\xbb\xbf" + LINES.encode()))
    file = TextFile(path)
    found = [(document.decode(), file.position) for document, _ in file.pieces()]
    for number, (_, position) in enumerate(found):
        again = TextFile(path)
        again.position = position
        assert [document.decode() for document, _ in again.pieces()] == ROWS[number + 1 :]


BAD_LINES = {
    "no JSON": ('{"text": "a"', "is no JSON"),
    "a list": ('["a"]', "holds list"),
    "a number": ("3", "holds int"),
    "a whole array": ('[\n{"text": "a"}\n]', "is no JSON"),
    "another column": ('{"content": "a"}', r"has columns \['content'\]; one named 'text' is needed"),
    "no text": ('{"text": 3}', "holds int for a text"),
    "nested": ('{"text": ["a"]}', "holds list for a text"),
    "half a character": ('{"text": "\\ud800"}', "holds a NUL or half a character"),
    "NUL": ('{"text": "a\\u0000"}', "holds a NUL"),
    "too deep": ("[" * 100_000, "is no JSON"),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_lines_that_hold_no_text_are_named(name: str, tmp_path: Path) -> None:
    line, said = BAD_LINES[name]
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "ä"}\n' + line)
    with pytest.raises(UserError, match=f"line 2 {said}") as caught:
        read_rows(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=f"the line at byte 15 {said}") as caught:
        documents(path)
    assert "\n" not in str(caught.value)


FILES = {
    "zstd.txt": (b"\x28\xb5\x2f\xfd\x00", "packed by zstd"),
    "text.txt.zst": (b"words", r"not a whole \.zst file"),
    "zip.txt": (b"PK\x03\x04\x14\x00", "a zip archive"),
    "plain.txt.gz": (b"words", r"not a whole \.gz file"),
    "plain.bz2": (b"BZh9 is no mark", r"not a whole \.bz2 file"),
    "none.gz": (b"", r"not a whole \.gz file"),
    "cut.gz": (gzip.compress(b"text " * 999)[:-12], r"not a whole \.gz file"),
    "flipped.gz": (gzip.compress(os.urandom(999))[:40] + bytes(99), r"not a whole \.gz file"),
    "more.gz": (gzip.compress(b"text") + b"more", r"not a whole \.gz file"),
    "cut.bz2": (bz2.compress(b"text " * 999)[:-9], r"not a whole \.bz2 file"),
    "hidden.txt": (bz2.compress(b"text " * 999)[:-9], r"not a whole \.bz2 file"),
    "cut.xz": (lzma.compress(b"text " * 999)[:-9], r"not a whole \.xz file"),
}


@pytest.mark.parametrize("name", FILES)
def test_what_is_no_text_is_never_taken_for_prose(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(FILES[name][0])
    with pytest.raises(UserError, match=FILES[name][1]):
        raise UserError(refused(tmp_path / name))


@pytest.mark.parametrize("kind", ["utf-16", "utf-32", "utf-16-be", "utf-32-be"])
def test_other_encodings_are_named_and_left_out_of_a_corpus(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(("\ufeff" * kind.endswith("be") + "a cat").encode(kind))
    with pytest.raises(UserError, match=r"not UTF-8 text \(its byte order mark is another's\); save it as UTF-8"):
        read_rows(path)
    assert list(TextFile(path).pieces()) == [(path.read_bytes(), True)]  # which `data prepare` counts as no UTF-8


def test_text_that_begins_like_a_packed_file(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("BZh9 PK PAR1 is prose")
    assert read_text(tmp_path / "text.txt") == "BZh9 PK PAR1 is prose"


def test_places_that_are_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for path, said in (
        (tmp_path / "pipe", "no regular file, but a pipe or device"),
        (Path("/dev/zero"), "no regular file, but a pipe or device"),
        (tmp_path, "Is a directory"),
        (tmp_path / "missing", "No such file"),
        (tmp_path / "loop", "symbolic links"),
        (tmp_path / ("x" * 300), "File name too long"),
        (tmp_path / "a\0b", "null byte"),
    ):
        assert said in refused(path)
        if path.name not in (tmp_path.name, "a\0b"):
            with pytest.raises(UserError, match=said):
                TextFile(path).sha256()


def test_home_is_where_the_shell_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "text.txt").write_text("words")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "~no-such-user").write_text("a file of that name")
    assert load_text("~/text.txt") == load_text("wikitext:~/text.txt").strip() == "words"
    assert load_text("~no-such-user") == "a file of that name"
    assert [source.name for source in sources(["~/text.txt", "~"])] == [str(tmp_path / "text.txt")] * 2


def test_wikitexts_joins_belong_to_wikitext(tmp_path: Path) -> None:
    path = tmp_path / "wiki.raw"
    path.write_bytes(" \n = Title = \n \n Text\x85of one\u2028line . \r\n".encode())
    assert load_text(f"wikitext:{path}") == "\n\n".join(["", " = Title = \n", "", " Text\x85of one\u2028line . \r\n"])
    assert load_text(str(path)) == path.read_bytes().decode()
