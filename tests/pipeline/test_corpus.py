"""Documents out of files and streams: none lost, none split but the overlong, the rest the same from any position."""

import json
import lzma
from pathlib import Path

import pytest

from eval.errors import UserError
from pipeline import corpus
from pipeline.corpus import HubRows, Source, TextFile, sources

MARK = b"<|endoftext|>"


def walk(source: Source) -> list[tuple[bytes, str]]:
    """Each document, with the position after it as JSON."""
    return [(document, json.dumps(source.position)) for document, _ in source.pieces()]


def write(folder: Path, content: bytes, packed: bool) -> TextFile:
    path = folder / ("text.txt.xz" if packed else "text.txt")
    path.write_bytes(lzma.compress(content) if packed else content)
    return TextFile(path)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("count", [0, 2, 9])
def test_marks_part_documents(count: int, packed: bool, tmp_path: Path) -> None:
    documents = [b"", b"one\n", b"<|endoftext", b"\xff\xfe", b"|>two " * 9, b" ", b"<|endoftext|", b"x" * 64, b"last"][
        :count
    ]
    found = walk(write(tmp_path, MARK.join(documents), packed))
    assert [document for document, _ in found] == [document.strip() for document in documents]


@pytest.mark.parametrize("longest", [5, 64, 65, 1000])
@pytest.mark.parametrize("packed", [False, True])
def test_any_position_goes_on_the_same(
    longest: int, packed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus, "LONGEST", longest)
    documents = [
        b"a line\nand a longer line of words\n" * 7 + b"end",
        b"",
        "äöü猫🐈".encode() * 40,
        b"word " * 50 + b".",
        b"z" * longest,
        b"end",
    ]
    file = write(tmp_path, (b"\n" + MARK + b" ").join(documents), packed)
    found = walk(file)
    assert max(len(piece) for piece, _ in found) <= longest
    joined = [b""]
    for piece, ends in TextFile(file.path).pieces():
        joined[-1] += piece
        joined += [b""] * ends
    assert joined == [*documents, b""]
    for number, (_, position) in enumerate(found):
        again = TextFile(file.path)
        again.position = json.loads(position)
        assert walk(again) == found[number + 1 :]


def test_overlong_documents_are_cut_between_lines_words_or_characters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus, "LONGEST", 10)
    for content, parts in [
        ("ab\ncd\nefgh ijkl", ["ab\ncd\n", "efgh ijkl"]),
        ("ab cd efghijkl", ["ab cd ", "efghijkl"]),
        ("🐈🐈🐈🐈", ["🐈🐈", "🐈🐈"]),
        ("0123456789", ["0123456789"]),
        ("0123456789a", ["0123456789", "a"]),
    ]:
        found = walk(write(tmp_path, content.encode(), False))
        assert [document.decode() for document, _ in found] == parts


def test_folders_and_files(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.txt.xz", "a/c.txt", "a/picture.png", "a/d.txt.gz", "e.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    names = [source.name.removeprefix(f"{tmp_path}/") for source in sources([str(tmp_path), str(tmp_path / "e.md")])]
    assert names == ["a/c.txt", "a/d.txt.gz", "a/z.txt.xz", "b.txt", "e.md"]


def test_what_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    with pytest.raises(
        UserError, match=r"none: holds no \.txt or \.jsonl file, packed or not; give files by name, or hub:"
    ):
        sources([str(tmp_path / "none")])
    (tmp_path / "cut.xz").write_bytes(lzma.compress(b"text " * 999)[:-20])
    (tmp_path / "fake.xz").write_bytes(b"no archive")
    for name in ("cut.xz", "fake.xz"):
        with pytest.raises(UserError, match=rf"{name}: not a whole \.xz file") as caught:
            walk(TextFile(tmp_path / name))
        assert "\n" not in str(caught.value)
    for read in (walk, TextFile.sha256):
        with pytest.raises(UserError, match=r"missing\.txt: No such file"):
            read(TextFile(tmp_path / "missing.txt"))


@pytest.fixture
def dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in the Hub's format: three files, rows empty and strange among them."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "set"
    folder.mkdir()
    rows = ["one", "", None, "vier ü\n", "five", "6", "7"]
    for number, part in enumerate((rows[:3], rows[3:6], rows[6:])):
        lines = [json.dumps({"id": number, "text": text}) for text in part]
        (folder / f"train-{number}.jsonl").write_text("\n".join(lines))
    return folder


def test_a_streamed_dataset_goes_on_from_any_row(dataset: Path) -> None:
    name = f"hub:{dataset}:train"
    found = walk(HubRows(name))
    assert [document for document, _ in found][:4] == [b"one", b"", b"", "vier ü\n".encode()] and len(found) == 7
    for number, (_, position) in enumerate(found):
        again = HubRows(name)
        again.position = json.loads(position)
        rest = walk(again)
        assert [document for document, _ in rest] == [document for document, _ in found[number + 1 :]]
        for further, (_, later) in enumerate(rest, number + 1):  # a position reached by going on is one, too
            once_more = HubRows(name)
            once_more.position = json.loads(later)
            assert [row for row, _ in once_more.pieces()] == [document for document, _ in found[further + 1 :]]


def test_datasets_without_text(dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be loaded"):
        HubRows(f"hub:{dataset}:test")
    with pytest.raises(UserError, match=r"give hub:DATASET\[@CONFIG\]:SPLIT"):
        HubRows("hub:set")
    for number, (row, said) in enumerate([({"words": "a"}, r"columns \['words'\]"), ({"text": 3}, "holds int")]):
        folder = tmp_path / f"bad{number}"
        folder.mkdir()
        (folder / "train.jsonl").write_text(json.dumps(row))
        with pytest.raises(UserError, match=said):
            walk(HubRows(f"hub:{folder}:train"))
    (tmp_path / "bad1" / "train.jsonl").write_text('{"text": "a"}\n{"tex')
    with pytest.raises(UserError, match=r"breaks off|cannot be loaded") as caught:
        walk(HubRows(f"hub:{tmp_path / 'bad1'}:train"))
    assert "\n" not in str(caught.value)
