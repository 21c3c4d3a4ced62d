"""A corpus to shards: what is in them, that neither processes nor kills change a byte, and what is refused."""

import contextlib
import itertools
import json
import lzma
import multiprocessing
import os
import shutil
import signal
import sqlite3
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from prose import prose
from transformers import AutoTokenizer

from eval.errors import UserError, WorkError
from pipeline import prepare as module
from pipeline import tokenizing
from pipeline.artifacts import sha256_file, sha256_tree
from pipeline.journal import FATES, Journal, begun_here
from pipeline.prepare import prepare
from pipeline.shards import find_shards
from pipeline.wikitext import styled_documents

ROOT = Path(__file__).parents[2]
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
    choices = {"shard_tokens": 1000, "validation_share": 0.1} | changes
    return prepare(names, out, tokenizer, workers=workers, **choices)


def contents(out: Path) -> dict[str, str]:
    return {name: digest for name, digest in sha256_tree(out).items() if name != ".lock"}


def tokens(out: Path, split: str) -> list[int]:
    return [token for shard in find_shards(out, split) for token in shard.read(0, shard.tokens).tolist()]


def expected(documents: list[str], tokenizer: Any) -> list[int]:
    return [token for text in documents for token in [*tokenizer(text).input_ids, tokenizer.eos_token_id]]


def shared_out(sizes: list[int], share: float, limit: int) -> list[bool]:
    """Which documents are held out: one whenever fewer tokens are than should be, if there is room for it."""
    held_out: list[bool] = []
    for number, size in enumerate(sizes):
        so_far = sum(size for size, held in zip(sizes, held_out, strict=False) if held)
        due_after = 1.5 * share * sum(sizes[: number + 1])
        held_out.append(so_far < share * sum(sizes[:number]) and so_far + size <= min(due_after, limit))
    return held_out


def test_what_the_shards_hold(corpus: Path, tokenizer: Path, tiny_tokenizer: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    manifest = make(corpus, out, tokenizer)
    held = shared_out([len(expected([text], tiny_tokenizer)) for text in KEPT], 0.1, 1000)
    held_out, rest = (
        [text for text, is_held in zip(KEPT, held, strict=True) if is_held is side] for side in (True, False)
    )
    assert tokens(out, "val") == expected(held_out, tiny_tokenizer)
    assert tokens(out, "train") == expected(rest, tiny_tokenizer)
    places = [number for number, is_held in enumerate(held) if is_held]
    assert places[0] < 20 and places[-1] >= 40 and 0.05 < len(tokens(out, "val")) / manifest["tokens"] < 0.15
    assert {shard.tokens for shard in find_shards(out, "train")[:-2]} == {1000}
    assert min(shard.tokens for shard in find_shards(out, "train")) >= 500

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


def test_a_journal_that_was_half_written_is_ours(tmp_path: Path) -> None:
    """Killed in a transaction of which a part is on the disk already."""
    path = tmp_path / "state.db"
    program = (
        "import os, sqlite3, sys\n"
        "database = sqlite3.connect(sys.argv[1])\n"
        "database.execute('CREATE TABLE seen (digest BLOB PRIMARY KEY) WITHOUT ROWID')\n"
        "database.execute('PRAGMA cache_size = 1')\n"
        "database.executemany('INSERT INTO seen VALUES (?)', ((os.urandom(99),) for _ in range(2000)))\n"
        "os.kill(os.getpid(), 9)\n"
    )
    assert subprocess.run([sys.executable, "-c", program, path]).returncode == -signal.SIGKILL
    assert path.with_name("state.db-journal").exists()
    assert begun_here(path)


def _written(out: Path) -> int:
    return sum(max(0, path.stat().st_size - 1024) // 2 for path in out.glob("train_*.bin"))


@pytest.mark.parametrize(("asked", "which"), [(0, 0), (0, 1), (1, 0), (5, 1)])
def test_a_worker_that_dies_ends_the_work_at_once_and_it_goes_on(
    asked: int, which: int, corpus: Path, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed as it starts, before its first answer, or later; whichever is waited for."""
    make(corpus, tmp_path / "whole", tokenizer)
    out, started, count = tmp_path / "out", [], itertools.count()
    start, ask = tokenizing._Worker.__init__, tokenizing._Worker.ask

    def starting(self: Any, *args: Any) -> None:
        start(self, *args)
        started.append(self.process)
        if asked == 0 and len(started) == which + 1:
            self.process.kill()

    def asking(self: Any, documents: list[bytes]) -> Any:
        if next(count) == 2 * asked and asked:
            started[min(which, len(started) - 1)].send_signal(signal.SIGKILL)
        return ask(self, documents)

    with monkeypatch.context() as patch:
        patch.setattr(tokenizing._Worker, "__init__", starting)
        patch.setattr(tokenizing._Worker, "ask", asking)
        with pytest.raises(WorkError, match=r"a tokenising process was ended from outside .*run the same command"):
            make(corpus, out, tokenizer, workers=2)
    assert all(process.returncode is not None for process in started)
    make(corpus, out, tokenizer, workers=2)
    assert contents(out) == contents(tmp_path / "whole")


def test_what_a_worker_cannot_do_is_one_line(corpus: Path, tokenizer: Path, tmp_path: Path) -> None:
    how = tokenizing.How(str(tmp_path / "none.json"), False, "plain")
    with pytest.raises(WorkError, match=r"a text cannot be tokenised: .*No such file"):
        list(tokenizing.encoded([(None, [b"text"])], how, 1))
    assert list(tokenizing.encoded([], how, 3)) == []


@pytest.mark.parametrize(
    ("number", "code", "count"),
    [(signal.SIGINT, 130, 1), (signal.SIGINT, 130, 2), (signal.SIGTERM, -signal.SIGTERM, 2)],
)
def test_told_to_end_it_leaves_nobody_behind(
    number: signal.Signals, code: int, count: int, tokenizer: Path, tmp_path: Path
) -> None:
    """To the whole group, as a terminal's Ctrl-C; while workers start, which takes them some tenths of a second."""
    errors, corpus = tmp_path / "stderr", tmp_path / "text.txt"
    text = "\n".join(DOCUMENTS)  # 3 MiB of it: three batches, so that two workers start
    corpus.write_text(MARK.join(f"{number} {text}" for number in range((3 << 20) // len(text))))
    words = ["data", "prepare", corpus, "--tokenizer", tokenizer, "--workers", "2", "--out", tmp_path / "out"]
    with errors.open("wb") as file:
        command = [sys.executable, "-m", "pipeline", *words]
        process = psutil.Popen(command, cwd=ROOT, stderr=file, stdout=subprocess.DEVNULL, start_new_session=True)
    workers: list[psutil.Process] = []
    while len(workers) < count:
        assert process.poll() is None, errors.read_text()
        workers = process.children()
        time.sleep(0.001)
    os.killpg(process.pid, number)
    process.wait()
    err = errors.read_text()
    assert process.returncode == code and "Traceback" not in err
    if number == signal.SIGINT:
        assert err.splitlines()[-1] == "interrupted; run the same command to resume"
    assert not psutil.wait_procs(workers, timeout=60)[1]
    choices: dict[str, Any] = {"shard_tokens": 100_000_000, "validation_share": None}
    for name in ("whole", "out"):
        prepare([str(corpus)], tmp_path / name, tokenizer, workers=2, **choices)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_broken_off_around_each_commit(
    corpus: Path, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before and after a commit, with shards beginning and ending in between."""
    monkeypatch.setattr(module, "BATCH_BYTES", 300)
    monkeypatch.setattr("pipeline.corpus.LONGEST", 250)  # so that a commit falls inside of documents, too
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
    whole = make(inputs, tmp_path / "whole", tokenizer, validation_share=0)
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
        make(inputs, tmp_path / "out", tokenizer, validation_share=0)
    assert make(inputs, tmp_path / "out", tokenizer, validation_share=0) == whole
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
    assert commits == [0, 60, 60] and [given["kept"] for given in manifest["inputs"]] == [1] * 60
    assert make(tmp_path / "one.txt", tmp_path / "out1", tokenizer)["shards"] == manifest["shards"]


def test_wikitext_style(tokenizer: Path, tiny_tokenizer: Any, tmp_path: Path) -> None:
    text = "A title\nPlain prose, well-known (1,000 words).\n"
    (tmp_path / "a.txt").write_text(f"{text}{MARK}only a title")
    manifest = make(tmp_path / "a.txt", tmp_path / "out", tokenizer, style="wikitext", validation_share=0)
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
    manifest = json.loads((out / "manifest.json").read_text())
    wrong = ({"kept": "x"}, {"tokens": None}, {"shards": []}, {"inputs": [{"name": "a", "sha256": "b"}]})
    for content in ("{", "[]", "[" * 100_000, *(json.dumps(manifest | each) for each in wrong)):
        (out / "manifest.json").write_text(content)
        with pytest.raises(UserError, match=r"manifest\.json: damaged"):
            make(corpus, out, tokenizer)


def test_a_folder_of_an_earlier_version(corpus: Path, tokenizer: Path, tmp_path: Path) -> None:
    """Which held out by documents and knew no order of the end-of-text token: readable, but not to be gone on with."""
    out = tmp_path / "out"
    manifest = make(corpus, out, tokenizer, validation_share=None)
    for key in ("validation_share", "end_of_text"):
        del manifest[key]
    (out / "manifest.json").write_text(json.dumps(manifest | {"validation_every": 200}))
    assert module.prepared_shards(out, "train") == find_shards(out, "train")
    said = "an earlier version of Headroom, which had no validation_share; give another --out, or delete it"
    with pytest.raises(UserError, match=said):
        make(corpus, out, tokenizer, validation_share=None)
    (out / "manifest.json").unlink()
    for path in out.glob("*.bin"):
        path.unlink()
    choices = {key: manifest[key] for key in ("tokenizer", "style", "shard_tokens")}
    inputs = [{key: given[key] for key in ("name", "sha256")} for given in manifest["inputs"]]
    with contextlib.closing(Journal(out, {"inputs": inputs, **choices, "validation_every": 200})) as journal:
        journal.state.tokens["train"] = 1
        journal.commit()
    with pytest.raises(UserError, match=said):
        make(corpus, out, tokenizer, validation_share=None)


@pytest.mark.parametrize("lost", ["train_000000.bin", "train_000006.bin", "train_000007.bin"])
def test_a_shard_is_lost_while_a_preparation_is_cut_off(
    lost: str, corpus: Path, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module.ShardWriter, "finish", interrupted)
        with pytest.raises(KeyboardInterrupt):
            make(corpus, out, tokenizer)
    (out / lost).unlink()
    with pytest.raises(UserError, match="delete the folder and prepare it again"):
        make(corpus, out, tokenizer)
    assert not (out / "manifest.json").exists()


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
    path.write_bytes(struct.pack("<3i", 20240520, 1, 3).ljust(1024, b"\0") + bytes(6))
    with pytest.raises(UserError, match=r"train_000001\.bin: holds 3 tokens, manifest\.json says 1,000;"):
        make(corpus, out, tokenizer)
    path.write_bytes((out / "train_000000.bin").read_bytes()[:-2])
    with pytest.raises(UserError, match=r"train_000001\.bin: the header says 1000 tokens, the file holds 999;"):
        make(corpus, out, tokenizer)
    path.unlink()
    with pytest.raises(UserError, match=r"train_000001\.bin: No such file"):
        module.prepared_shards(out, "train")


@pytest.mark.parametrize("content", [b"", b" \n", MARK.encode() * 3, b"\xff\xfe"])
@pytest.mark.parametrize("there", [False, True])
def test_nothing_to_train_on_leaves_the_folder_as_it_was(
    content: bytes, there: bool, corpus: Path, tokenizer: Path, tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    out = tmp_path / "new" / "out"
    if there:
        out.mkdir(parents=True)
        (out / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"a\.txt: no document is left \(\d empty, \d not UTF-8 text\); give text"):
        make(tmp_path / "a.txt", out, tokenizer)
    assert [path.name for path in out.iterdir()] == ["notes.txt"] if there else not out.parent.exists()
    make(corpus, out, tokenizer)
    assert tokens(out, "train")


def test_other_choices_after_a_kill_before_the_first_token(corpus: Path, tokenizer: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    make(corpus, tmp_path / "whole", tokenizer, end_of_text="before")
    out.mkdir()
    Journal(out, {"inputs": [1, 2], "style": "plain"}).close()
    (out / "train_000000.bin").write_bytes(b"what a kill left")
    make(corpus, out, tokenizer, end_of_text="before")
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.parametrize("length", [40, 3000, 30_000])
@pytest.mark.parametrize("order", ["after", "before"])
def test_one_text_is_held_out_from_its_end(
    length: int, order: Any, tokenizer: Path, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    """About the last tenth, from a line on, as nanoGPT's preparation does."""
    text = prose(3, 400)[:length].strip()
    (tmp_path / "a.txt").write_text(text)
    manifest = make(tmp_path / "a.txt", tmp_path / "out", tokenizer, shard_tokens=10**6, validation_share=None,
                    end_of_text=order)  # fmt: skip
    train, val = tokens(tmp_path / "out", "train"), tokens(tmp_path / "out", "val")
    ids = tiny_tokenizer(text).input_ids
    assert train + val == ([*ids, 0] if order == "after" else [0, *ids])
    assert 0.05 * len(ids) - 1 <= len(val) <= 0.1 * len(ids) + 1
    assert manifest["tokens"] == len(ids) + 1 and val
    assert length == 40 or tiny_tokenizer.decode(train).endswith("\n")


def test_a_long_text_is_cut_and_held_out_from_its_end(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.corpus.LONGEST", 2000)
    (tmp_path / "a.txt").write_text(prose(3, 60))
    make(tmp_path / "a.txt", tmp_path / "none", tokenizer, shard_tokens=10**6, validation_share=0)
    for share, low in ((0.01, 0.005), (0.5, 0.25)):
        out = tmp_path / f"out{share}"
        made = make(tmp_path / "a.txt", out, tokenizer, shard_tokens=10**6, validation_share=share)["tokens"]
        assert low * made <= len(tokens(out, "val")) <= 1.5 * share * made
        assert len(tokens(out, "train")) + len(tokens(out, "val")) == len(tokens(tmp_path / "none", "train"))
    assert not tokens(tmp_path / "none", "val")
    limited = make(tmp_path / "a.txt", tmp_path / "limited", tokenizer, shard_tokens=100, validation_share=0.5)
    assert [shard["tokens"] for shard in limited["shards"] if shard["split"] == "val"] in ([100], [*range(50, 100)])


@pytest.mark.parametrize("moment", ["before", "after", "train", "val"])
def test_broken_off_as_its_end_is_held_out(
    moment: str, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_text(prose(3, 60))
    how: dict[str, Any] = {"shard_tokens": 400, "validation_share": 0.05}
    make(tmp_path / "a.txt", tmp_path / "whole", tokenizer, **how)
    commit, finish = Journal.commit, module.ShardWriter.finish

    def committing(journal: Journal) -> None:
        if journal.state.complete and moment == "before":
            raise KeyboardInterrupt
        commit(journal)
        if journal.state.complete and moment == "after":
            raise KeyboardInterrupt

    def finishing(writer: Any, count: int) -> None:
        finish(writer, count)
        if writer.split == moment:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "commit", committing)
        patch.setattr(module.ShardWriter, "finish", finishing)
        with pytest.raises(KeyboardInterrupt):
            make(tmp_path / "a.txt", tmp_path / "out", tokenizer, **how)
    make(tmp_path / "a.txt", tmp_path / "out", tokenizer, **how)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole") and tokens(tmp_path / "out", "val")


def test_too_little_to_hold_out(tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("hi")
    manifest = make(tmp_path / "a.txt", tmp_path / "out", tokenizer, validation_share=None)
    assert [shard["split"] for shard in manifest["shards"]] == ["train"]
    assert "too little text to hold any out" in module.summary(manifest)
    none = make(tmp_path / "a.txt", tmp_path / "out0", tokenizer, validation_share=0)
    assert "too little" not in module.summary(none)


def test_what_is_due_grows_slower_from_ten_million_tokens_on() -> None:
    due = [round(module._due(tokens, None)) for tokens in (10, 10**6, 10**7, 3 * 10**7, 10**10)]
    assert due == [1, 10**5, 10**6, 1_100_000, 50_950_000]
    assert module._due(10**10, 0.3) == 3 * 10**9


def test_llm_cs_bytes(tokenizer: Path, tiny_tokenizer: Any, tmp_path: Path) -> None:
    """What dev/data/fineweb.py writes of the same documents: a mark, then the text's tokens, over and over."""
    (tmp_path / "a.txt").write_text(MARK.join(DOCUMENTS))
    for order, chosen in (("before", {"end_of_text": "before"}), ("after", {})):
        out = tmp_path / order
        manifest = make(tmp_path / "a.txt", out, tokenizer, shard_tokens=10**6, validation_share=0, **chosen)
        ids: list[int] = []
        for document in DOCUMENTS:
            text = tiny_tokenizer(document).input_ids
            ids += [0, *text] if order == "before" else [*text, 0]
        header = [20240520, 1, len(ids), *[0] * 253]
        by_hand = struct.pack("<256i", *header) + struct.pack(f"<{len(ids)}H", *ids)
        assert (out / "train_000000.bin").read_bytes() == by_hand
        assert manifest["end_of_text"] == order
    with pytest.raises(UserError, match="other end_of_text"):
        make(tmp_path / "a.txt", out, tokenizer, shard_tokens=10**6, validation_share=0, end_of_text="before")


@pytest.mark.parametrize("order", ["before", "after"])
def test_a_long_document_is_one_and_nothing_of_it_is_lost(
    order: Any, tokenizer: Path, tiny_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pieces of it have no end-of-text token between them, and keep the space where they were cut."""
    monkeypatch.setattr("pipeline.corpus.LONGEST", 300)
    long = f"{prose(3, 9)}\n\n\n \n{prose(4, 3)} 猫"
    repeated = " \n" + "the cat sat\n" * 90 + "\n"
    (tmp_path / "a.txt").write_text(MARK.join([DOCUMENTS[0][:200], long, DOCUMENTS[1][:200]]))
    (tmp_path / "b.txt").write_text(repeated)  # no mark: as it is
    names = [str(tmp_path / "a.txt"), str(tmp_path / "b.txt"), str(tmp_path / "b.txt")]
    make(names, tmp_path / "out", tokenizer, shard_tokens=10**6, validation_share=0, end_of_text=order)
    texts = [DOCUMENTS[0][:200], long, DOCUMENTS[1][:200], repeated]
    wanted = "".join(MARK + text if order == "before" else text + MARK for text in texts)
    found = tokens(tmp_path / "out", "train")
    assert tiny_tokenizer.decode(found, clean_up_tokenization_spaces=False) == wanted and found.count(0) == 4


@pytest.mark.parametrize("split", [False, True])
def test_rows_are_taken_as_they_are(split: bool, tmp_path: Path, tiny_folder: Path) -> None:
    """As llm.c's scripts take them, and as the tokenizer's own call does: with the space around, and what marks say."""
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "tokenizer"))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"split_special_tokens": split}))
    rows = ["the cat\n\n", " sat", f"on {MARK}the mat", "\u3000\x85hat\r\n"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in [*rows, " \n", rows[0]]))
    manifest = make(tmp_path / "a.jsonl", tmp_path / "out", folder, validation_share=0)
    own = AutoTokenizer.from_pretrained(folder)
    assert tokens(tmp_path / "out", "train") == [token for row in rows for token in [*own(row).input_ids, 0]]
    assert (manifest["kept"], manifest["empty"], manifest["duplicates"]) == (4, 1, 1)


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
        (("--shard-tokens", 2**31), "a shard can hold 1 to 1073741311 tokens"),
        (("--tokenizer", "./nowhere"), "nowhere: no such folder"),
        ((tmp_path / "no.txt",), "no.txt: No such file"),
        (("--end-of-text", "both"), "--end-of-text both: give after or before"),
        (("--validation-share", 0.51), "--validation-share 0.51: give a share from 0 to 0.5"),
        (("--validation-share", "nan"), "--validation-share nan: give a share"),
        (("--validation-every", 200), "give --validation-share, such as 0.005"),
        (("--workers", 10**6), "--workers 1000000: more than this machine can use; give at most "),
    ):
        code, stdout, err = cli(*words, tmp_path / "out2", *extra)
        assert (code, stdout, err.count("\n")) == (2, "", 1) and err.startswith("error: ") and said in err
        assert not (tmp_path / "out2").exists()
    code, stdout, err = cli("data", "prepare", "--help")
    assert code == 0 and stdout.startswith("Usage: ")
