"""A corpus to shards: what is in them, that neither processes nor kills change a byte, and what is refused."""

import contextlib
import json
import lzma
import multiprocessing
import os
import signal
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prose import prose

from eval.errors import UserError
from pipeline import prepare as module
from pipeline.artifacts import sha256_file, sha256_tree
from pipeline.journal import FATES, Journal
from pipeline.prepare import prepare
from pipeline.shards import find_shards
from pipeline.wikitext import styled_documents

MARK = "<|endoftext|>"
DOCUMENTS = prose(7, 60).strip().split("\n\n")


@pytest.fixture
def tokenizer(tiny_folder: Path) -> Path:
    return tiny_folder


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BATCH_BYTES", 700)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Documents in three files: plain with repetitions and gaps, packed, and one with Latin-1 and NUL among UTF-8."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    first = [*DOCUMENTS[:20], DOCUMENTS[3], "", " \n", f"\n {DOCUMENTS[0]} \n"]
    (folder / "a.txt").write_text(MARK.join(first), encoding="utf-8")
    packed = [*DOCUMENTS[20:50], DOCUMENTS[7], *DOCUMENTS[20:22]]
    (folder / "b.txt.xz").write_bytes(lzma.compress(f"\n{MARK}\n".join(packed).encode()))
    mixed = [document.encode() for document in DOCUMENTS[50:]]
    mixed[2:2] = ["déjà vu".encode("latin-1"), b"a\x00b", "déjà vu".encode(), b"\xff\xfe"]
    (folder / "c.txt").write_bytes(MARK.encode().join(mixed))
    return folder


KEPT = [*DOCUMENTS[:52], "déjà vu", *DOCUMENTS[52:]]


def make(inputs: Path | list[str], out: Path, tokenizer: Path, workers: int = 1, **changes: Any) -> dict[str, Any]:
    names = inputs if isinstance(inputs, list) else [str(inputs)]
    choices = {"shard_tokens": 1000, "validation_every": 9} | changes
    return prepare(names, out, tokenizer, workers=workers, **choices)


def contents(out: Path) -> dict[str, str]:
    return {name: digest for name, digest in sha256_tree(out).items() if name != ".lock"}


def tokens(out: Path, split: str) -> list[int]:
    return [token for shard in find_shards(out, split) for token in shard.read(0, shard.tokens).tolist()]


def expected(documents: list[str], tokenizer: Any) -> list[int]:
    return [token for text in documents for token in [*tokenizer(text).input_ids, tokenizer.eos_token_id]]


def test_what_the_shards_hold(corpus: Path, tokenizer: Path, tiny_tokenizer: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    manifest = make(corpus, out, tokenizer)
    held_out, rest = [], []
    for number, text in enumerate(KEPT):
        full = len(expected([*held_out, text], tiny_tokenizer)) > 1000
        (held_out if number % 9 == 0 and not full else rest).append(text)
    assert tokens(out, "val") == expected(held_out, tiny_tokenizer) and held_out
    assert tokens(out, "train") == expected(rest, tiny_tokenizer)
    assert {shard.tokens for shard in find_shards(out, "train")[:-1]} == {1000}

    assert json.loads((out / "manifest.json").read_text()) == manifest
    assert [(shard["file"], shard["split"]) for shard in manifest["shards"]][-2:][1] == ("val_000000.bin", "val")
    for shard in manifest["shards"]:
        assert shard["sha256"] == sha256_file(out / shard["file"])
        assert (out / shard["file"]).stat().st_size == 1024 + 2 * shard["tokens"]
    wanted = {"a.txt": (24, 20, 2, 2, 0), "b.txt.xz": (33, 30, 3, 0, 0), "c.txt": (14, 11, 0, 0, 3)}
    for given, (name, counts) in zip(manifest["inputs"], wanted.items(), strict=True):
        assert given["name"] == str(corpus / name) and given["sha256"] == sha256_file(corpus / name)
        assert tuple(given[key] for key in ("documents", *FATES)) == counts
    assert tuple(manifest[key] for key in ("documents", *FATES)) == (71, len(KEPT), 5, 2, 3)
    assert manifest["tokens"] == len(tokens(out, "train")) + len(tokens(out, "val"))
    assert manifest["tokenizer"]["sha256"] == sha256_file(out / "tokenizer" / "tokenizer.json")
    assert not (out / "state.db").exists()


def test_the_number_of_processes_changes_no_byte(corpus: Path, tokenizer: Path, tmp_path: Path) -> None:
    make(corpus, tmp_path / "one", tokenizer, workers=1)
    make(corpus, tmp_path / "three", tokenizer, workers=3)
    assert contents(tmp_path / "one") == contents(tmp_path / "three")


def test_killed_over_and_over_it_ends_with_the_same_bytes(
    corpus: Path, tokenizer: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    make(corpus, tmp_path / "whole", tokenizer)
    total = sum(shard.tokens for shard in find_shards(tmp_path / "whole", "train"))
    out = tmp_path / "killed"
    fork: Any = multiprocessing.get_context("fork")
    for share in (0, 0.1, 0.4, 0.41, 0.8):
        process = fork.Process(target=make, args=(corpus, out, tokenizer, 2))
        process.start()
        while _written(out) < share * total or not (out / "state.db").exists():
            assert process.is_alive()
            time.sleep(0.001)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL and not (out / "manifest.json").exists()
    capfd.readouterr()
    make(corpus, out, tokenizer)
    assert "data: going on after" in capfd.readouterr().err
    assert contents(out) == contents(tmp_path / "whole")
    before = {path: path.stat().st_mtime_ns for path in out.iterdir() if path.is_file() and path.name != ".lock"}
    make(corpus, out, tokenizer)  # and once more: nothing to do
    assert {path: path.stat().st_mtime_ns for path in before} == before


def _written(out: Path) -> int:
    return sum(max(0, path.stat().st_size - 1024) // 2 for path in out.glob("train_*.bin"))


def test_broken_off_around_each_commit(
    corpus: Path, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before and after a commit, with shards beginning and ending in between."""
    monkeypatch.setattr(module, "BATCH_BYTES", 300)
    make(corpus, tmp_path / "whole", tokenizer)
    commit: Callable[[Any], None] = Journal.commit
    out = tmp_path / "out"
    for stop in range(2, 8):
        left = stop

        def broken(journal: Any, early: bool = stop % 2 == 0) -> None:
            nonlocal left
            left -= 1
            if left == 0 and early:
                raise KeyboardInterrupt
            commit(journal)
            if left == 0:
                raise KeyboardInterrupt

        monkeypatch.setattr(Journal, "commit", broken)
        with pytest.raises(KeyboardInterrupt):
            make(corpus, out, tokenizer)
    monkeypatch.setattr(Journal, "commit", commit)
    make(corpus, out, tokenizer, workers=2)
    assert contents(out) == contents(tmp_path / "whole")


def test_a_streamed_dataset_resumes_too(
    tokenizer: Path, tiny_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "set"
    folder.mkdir()
    for number in range(3):
        rows = [*DOCUMENTS[10 * number : 10 * number + 11], ""]
        (folder / f"train-{number}.jsonl").write_text("\n".join(json.dumps({"text": row}) for row in rows))
    inputs = [f"hub:{folder}:train"]
    whole = make(inputs, tmp_path / "whole", tokenizer, validation_every=0)
    assert tokens(tmp_path / "whole", "train") == expected(DOCUMENTS[:31], tiny_tokenizer)
    (given,) = whole["inputs"]
    assert (given["documents"], given["duplicates"], given["empty"]) == (36, 2, 3)
    assert given["sha256"] is None and len(given["documents_sha256"]) == 64
    commits, commit = iter(range(99)), Journal.commit

    def broken(journal: Any) -> None:
        commit(journal)
        if next(commits) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "commit", broken)
    with pytest.raises(KeyboardInterrupt):
        make(inputs, tmp_path / "out", tokenizer, validation_every=0)
    assert make(inputs, tmp_path / "out", tokenizer, validation_every=0) == whole
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_small_files_share_a_batch(tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BATCH_BYTES", 1 << 20)
    commits: list[int] = []
    monkeypatch.setattr(Journal, "commit", lambda journal: commits.append(journal.state.kept))
    folder = tmp_path / "files"
    folder.mkdir()
    for number, document in enumerate(DOCUMENTS):
        (folder / f"{number:03d}.txt").write_text(document)
    (tmp_path / "one.txt").write_text(MARK.join(DOCUMENTS))
    manifest = make(folder, tmp_path / "out", tokenizer)
    assert commits == [0, 60] and [given["kept"] for given in manifest["inputs"]] == [1] * 60
    assert make(tmp_path / "one.txt", tmp_path / "out1", tokenizer)["shards"] == manifest["shards"]


def test_wikitext_style(tokenizer: Path, tiny_tokenizer: Any, tmp_path: Path) -> None:
    text = "A title\nPlain prose, well-known (1,000 words).\n"
    (tmp_path / "a.txt").write_text(f"{text}{MARK}only a title")
    manifest = make(tmp_path / "a.txt", tmp_path / "out", tokenizer, style="wikitext", validation_every=0)
    assert tokens(tmp_path / "out", "train") == expected(list(styled_documents(text)), tiny_tokenizer)
    assert manifest["empty"] == 1


def test_the_folder_holds_something_else(corpus: Path, tokenizer: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    make(corpus, out, tokenizer)
    before = contents(out)
    for changes, said in (({"shard_tokens": 5}, "other shard_tokens"), ({"style": "wikitext"}, "other style")):
        with pytest.raises(UserError, match=said):
            make(corpus, out, tokenizer, **changes)
    (corpus / "a.txt").write_text("changed")
    with pytest.raises(UserError, match="other inputs; give another --out or delete it"):
        make(corpus, out, tokenizer)
    assert contents(out) == before

    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "fineweb_train_000001.bin").touch()
    with pytest.raises(UserError, match="shards of another origin"):
        make(corpus, tmp_path / "foreign", tokenizer)
    for name, content in (("manifest.json", b"{"), ("manifest.json", b"[]")):
        (out / name).write_bytes(content)
        with pytest.raises(UserError, match=rf"{name}: damaged"):
            make(corpus, out, tokenizer)


@pytest.mark.parametrize("name", ["tokenizer/mine.json", "manifest.json", "state.db", "others.db"])
def test_a_folder_of_somebody_else(name: str, corpus: Path, tokenizer: Path, tmp_path: Path) -> None:
    path = tmp_path / "theirs" / name.replace("others.db", "state.db")
    path.parent.mkdir(parents=True)
    if name == "others.db":  # a database, but another program's
        with contextlib.closing(sqlite3.connect(path)) as database:
            database.execute("CREATE TABLE thesis (chapter TEXT)")
    else:
        path.write_text("years of work")
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"theirs: holds .*, but no preparation of Headroom's; give another --out"):
        make(corpus, tmp_path / "theirs", tokenizer)
    assert path.read_bytes() == before
    assert [each for each in (tmp_path / "theirs").rglob("*") if each.is_file()] == [path]


def test_a_finished_folder(corpus: Path, tokenizer: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    manifest = make(corpus, out, tokenizer)
    sqlite3.connect(out / "state.db").close()  # killed after it wrote the manifest
    with pytest.raises(UserError, match="not finished"):
        module.prepared_shards(out, "train")
    assert make(corpus, out, tokenizer) == manifest and not (out / "state.db").exists()
    path = out / "train_000001.bin"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(UserError, match=r"train_000001\.bin: the header says 1000 tokens, the file holds 999;"):
        make(corpus, out, tokenizer)
    path.unlink()
    with pytest.raises(UserError, match=r"train_000001\.bin: No such file"):
        module.prepared_shards(out, "train")


@pytest.mark.parametrize("content", [b"", b" \n", MARK.encode() * 3, b"\xff\xfe", b"one document, held out"])
def test_nothing_to_train_on(content: bytes, tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(UserError, match="all documents were held out or left out"):
        make(tmp_path / "a.txt", tmp_path / "out", tokenizer)


def test_tokenizers_that_will_not_do(tiny_folder: Path, corpus: Path, tmp_path: Path) -> None:
    import shutil

    from transformers import PreTrainedTokenizerFast

    folder = Path(shutil.copytree(tiny_folder, tmp_path / "tokenizer"))
    endless = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    endless.save_pretrained(folder)
    manifest = make(corpus, tmp_path / "gpt2s", folder)  # it has GPT-2's mark, though it does not say so
    assert manifest["tokenizer"]["end_of_text"] == 0
    raw = json.loads((folder / "tokenizer.json").read_text())
    raw["model"]["vocab"] |= {f"w{number}": number for number in range(269, (1 << 16) + 1)}
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(UserError, match="65537 tokens; shards hold 16 bits"):
        make(corpus, tmp_path / "out", folder)
    with pytest.raises(UserError, match="no usable tokenizer"):
        make(corpus, tmp_path / "out2", corpus)


def test_the_command(cli: Any, corpus: Path, tokenizer: Path, tmp_path: Path) -> None:
    words = ("data", "prepare", corpus, "--tokenizer", tokenizer, "--workers", 1, "--out")
    code, stdout, err = cli(*words, tmp_path / "out")
    assert code == 0, err
    assert "left out: 5 duplicates, 2 empty, 3 not UTF-8 text" in stdout
    assert f"not UTF-8 text: {corpus}/c.txt (3 of 14 documents)" in stdout
    assert "data: input 3/3 (all)  61 documents" in err
    code, stdout, err = cli(*words, tmp_path / "out", "--json")
    assert (code, json.loads(stdout)["kept"], err) == (0, 61, "")
    for extra, said in (
        (("--style", "latin"), "--style latin: give plain or wikitext"),
        (("--shard-tokens", 2**31), "a shard can hold 1 to 2147483647 tokens"),
        (("--tokenizer", "./nowhere"), "nowhere: no such folder"),
        ((tmp_path / "no.txt",), "no.txt: No such file"),
    ):
        code, stdout, err = cli(*words, tmp_path / "out2", *extra)
        assert (code, stdout, err.count("\n")) == (2, "", 1) and err.startswith("error: ") and said in err
    code, stdout, err = cli("data", "prepare", "--help")
    assert code == 0 and stdout.startswith("Usage: ")
