"""Where texts come from, and one line for those that cannot be used."""

import hashlib
import re
from pathlib import Path

import pytest

from eval.errors import UserError
from pipeline.texts import ASSETS, load_text, refuse_overlap


@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_embedded_texts(split: str) -> None:
    text = load_text(f"embedded:{split}")
    raw = (ASSETS / "wikitext-2" / f"{split}.txt").read_text(encoding="utf-8")
    assert text.split() == raw.split()  # the rows are joined anew, no word is lost
    assert re.search(r"^ = [^=]+ = $", text, re.MULTILINE)


def test_the_embedded_test_text_is_wikitext_2() -> None:
    # The word counts that Merity et al. 2016 (table 1) give for WikiText-2, with one end mark a line.
    counts = {"valid": 217_646, "test": 245_569}
    for split, count in counts.items():
        rows = (ASSETS / "wikitext-2" / f"{split}.txt").read_text(encoding="utf-8").splitlines()
        assert sum(len(row.split()) + 1 for row in rows) == pytest.approx(count, rel=0.02)


def test_the_embedded_texts_keep_apart() -> None:
    evaluation = load_text("embedded:test")
    for split in ("train", "valid"):
        refuse_overlap(split, load_text(f"embedded:{split}"), evaluation)


def test_a_file(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("eins\nzwei ü\n", encoding="utf-8")
    assert load_text(str(tmp_path / "text.txt")) == "eins\nzwei ü\n"


@pytest.mark.parametrize("source", ["embedded:dev", "embedded:", "embedded:test:test"])
def test_an_unknown_split(source: str) -> None:
    with pytest.raises(UserError, match=r"no such split; give embedded:train\|valid\|test"):
        load_text(source)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "empty"),
        (b" \n\t\n", "empty"),
        (b"\x7fELF\x02\x01\x00\x00", "NUL bytes"),
        (bytes(range(128, 256)), "not UTF-8 text"),
        (None, "No such file"),
    ],
)
def test_an_unusable_file(tmp_path: Path, content: bytes | None, said: str) -> None:
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=re.escape(str(path)) + ".*" + said):
        load_text(str(path))


def test_a_folder_is_no_text(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="give a readable text file"):
        load_text(str(tmp_path))


@pytest.mark.parametrize("source", ["hub:wikitext", "hub:", "hub::test", "hub:a:"])
def test_a_malformed_dataset_name(source: str) -> None:
    with pytest.raises(UserError, match=r"give hub:DATASET\[@CONFIG\]:SPLIT"):
        load_text(source)


def test_a_local_dataset_folder_in_the_hubs_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    data = tmp_path / "set"
    data.mkdir()
    (data / "test.jsonl").write_text('{"text": "one"}\n{"text": ""}\n{"text": "two"}\n')
    (data / "other.jsonl").write_text('{"words": "one"}\n')
    config = "configs:\n- config_name: good\n  data_files: [{split: test, path: test.jsonl}]\n"
    config += "- config_name: bad\n  data_files: [{split: test, path: other.jsonl}]\n"
    (data / "README.md").write_text(f"---\n{config}---\n")
    assert load_text(f"hub:{data}@good:test") == "one\n\n\n\ntwo"
    with pytest.raises(UserError, match=r"'words'.*one named 'text' is needed"):
        load_text(f"hub:{data}@bad:test")
    with pytest.raises(UserError, match="cannot be loaded") as caught:
        load_text(f"hub:{data}@good:train")
    assert "\n" not in str(caught.value)


def test_a_shared_paragraph_is_refused_a_shared_heading_is_not() -> None:
    long, short = "word " * 25, " = Heading = "
    evaluation = f"{short}\n\n{long}\n\nsomething else"
    refuse_overlap("calibration", f"{short}\n\n{long} and more", evaluation)
    with pytest.raises(UserError, match="the calibration text shares a paragraph") as caught:
        refuse_overlap("calibration", f"first\n\n{long}\n", evaluation)
    assert "\n" not in str(caught.value)


def test_texts_of_short_lines_are_known_as_a_whole() -> None:
    """Prose wrapped at 72 columns, source code: no line says much, but the same text is the same text."""
    lines = [f"line {number} of some code\n" for number in range(20)]
    evaluation = "".join(lines)
    refuse_overlap("train", "".join(reversed(lines)), evaluation)
    for same in (evaluation, evaluation.replace("\n", "\r\n"), "more\n" + evaluation, "".join(lines[3:15])):
        with pytest.raises(UserError, match="the train text shares a paragraph") as caught:
            refuse_overlap("train", same, evaluation)
        assert "\n" not in str(caught.value)
    refuse_overlap("train", lines[0], evaluation)  # too little to tell


def test_rows_with_null_are_empty_and_others_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    for name, value in (("null", "null"), ("number", "3")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "test.jsonl").write_text(
            f'{{"text": {value if name == "number" else chr(34) + "a" + chr(34)}}}\n{{"text": {value}}}\n'
        )
    assert load_text(f"hub:{tmp_path / 'null'}:test") == "a\n\n"
    with pytest.raises(UserError, match="a row holds int for a text"):
        load_text(f"hub:{tmp_path / 'number'}:test")


def test_a_hub_that_cannot_be_reached_is_called_so(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="the Hub cannot be reached") as caught:
        load_text("hub:no-one/nothing:test")
    assert "\n" not in str(caught.value) and "client" not in str(caught.value)


def test_the_digest_in_a_report_can_be_checked_by_hand() -> None:
    from pipeline.data import sha256_text

    assert sha256_text("ü") == hashlib.sha256(b"\xc3\xbc").hexdigest()
