"""A corpus to token shards: tokenised by many processes, each document once, resumed wherever it was cut off.

Batches come back in the order they were read, so that the number of processes decides nothing. After each, what was
written is forced onto the disk, and then one transaction of `state.db` says how far it reaches.
"""

import contextlib
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from eval.errors import UserError
from eval.results import save_json
from pipeline import hardware
from pipeline.artifacts import RunFolder, disk_errors, refuse_strangers, replace_folder, sha256_file
from pipeline.corpus import Source, sources
from pipeline.journal import DUPLICATE, FATES, KEPT, SPLITS, STATE, Journal, State, begun_here, check_same, damaged
from pipeline.shards import MOST_TOKENS, Shard, ShardWriter, find_shards, open_shard
from pipeline.tokenizer import load_tokenizer
from pipeline.tokenizing import BAD_ENCODING, EMPTY, EndOfText, How, Style, encoded, line_ends
from pipeline.wikitext import DOCUMENT_MARK

MANIFEST = "manifest.json"
TOKENIZER, TOKENIZER_FILE = "tokenizer", "tokenizer.json"
BATCH_BYTES = 1 << 20
"""Text a process is given at a time, and at most lost by a kill for each that works or waits."""
_REPORT_SECONDS = 5.0
_MOST_WORKERS = 8
"""Processes a core."""
_MOST_SHARE = 0.5
_SMALL = 10_000_000
_SMALL_SHARE, _LARGE_SHARE = 0.1, 0.005
_OVER = 1.5
"""A document is held out only if that does not come to so many times what is due."""


def prepare(
    inputs: Sequence[str],
    out: Path,
    tokenizer: Path,
    *,
    workers: int,
    shard_tokens: int,
    validation_share: float | None = None,
    end_of_text: EndOfText = "after",
    style: Style = "plain",
) -> dict[str, Any]:
    """Write `train_*.bin`, `val_000000.bin`, `tokenizer/` and `manifest.json` to `out`; returns the manifest.

    Documents already seen (by the sha256 of their text), empty ones, and those that are not UTF-8 text are counted and
    left out. `validation_share` of the tokens (`None`: see `_due`) are held out, at most one shard: whole documents
    from all over the corpus, or its end where it has too few. The end-of-text token stands `end_of_text` each document.
    Cut off, the same call goes on and ends with the same bytes, with any number of `workers`.
    Raises `UserError` for unusable inputs or tokenizer, or a folder that holds something else; a folder in which
    nothing was made is left as it was.
    """
    if not 1 <= shard_tokens <= MOST_TOKENS:
        raise UserError(f"--shard-tokens {shard_tokens}: a shard can hold 1 to {MOST_TOKENS} tokens")
    if validation_share is not None and not 0 <= validation_share <= _MOST_SHARE:
        raise UserError(f"--validation-share {validation_share:g}: give a share from 0 to {_MOST_SHARE}")
    most = _MOST_WORKERS * hardware.cpu()["cores"]
    if workers > most:
        raise UserError(f"--workers {workers}: more than this machine can use; give at most {most}")
    partial = out / f".{TOKENIZER}.partial"
    if not (begun_here(out / STATE) or ((out / MANIFEST).is_file() and find_shards(out, "train"))):
        refuse_strangers(out, (TOKENIZER, STATE, MANIFEST), "preparation")
    new = [path for path in (out / ".lock", out, *out.parents) if not os.path.lexists(path)]
    with RunFolder(out).locked(), _as_before(out, new), disk_errors(out), contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, partial, ignore_errors=True)
        corpus = sources(inputs)
        choices = {
            "inputs": [{"name": source.name, "sha256": source.sha256()} for source in corpus],
            "tokenizer": _save_tokenizer(tokenizer, partial),
            "style": style,
            "shard_tokens": shard_tokens,
            "validation_share": validation_share,
            "end_of_text": end_of_text,
        }
        manifest = read_manifest(out)
        if manifest is not None:
            (out / STATE).unlink(missing_ok=True)  # a kill may have come before it went
            begun = manifest | {"inputs": [_only(given, "name", "sha256") for given in manifest["inputs"]]}
            check_same(choices, begun, out)
            for split in SPLITS:
                prepared_shards(out, split)  # which says so if one was damaged since
        else:
            with contextlib.closing(Journal(out, choices)) as journal, _worth_keeping(journal, out):
                replace_folder(partial, out / TOKENIZER)
                _write(corpus, journal, out, choices, workers)
                manifest = _manifest(choices, journal, out)
            save_json(manifest, out / MANIFEST)
            (out / STATE).unlink()
    return manifest


@contextlib.contextmanager
def _as_before(out: Path, new: Sequence[Path]) -> Iterator[None]:
    """Take away what is `new` after a failure, the lock and empty folders, unless a preparation was begun in `out`."""
    try:
        yield
    except BaseException:
        if not (out / STATE).exists():
            for path in new:
                with contextlib.suppress(OSError):
                    path.rmdir() if path.is_dir() else path.unlink()
        raise


@contextlib.contextmanager
def _worth_keeping(journal: Journal, out: Path) -> Iterator[None]:
    """Take away what a preparation wrote that failed before it made a token."""
    try:
        yield
    except BaseException:
        if not journal.state.made:
            journal.close()
            for path in (out / STATE, *out.glob("*.bin")):
                path.unlink(missing_ok=True)
            shutil.rmtree(out / TOKENIZER, ignore_errors=True)
        raise


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a finished preparation; `None` if there is none. Raises `UserError` if it is damaged."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        inputs, shards = manifest["inputs"], manifest["shards"]
        whole = bool(shards) and {"tokenizer", "style"} <= manifest.keys() and isinstance(manifest["tokens"], int)
        whole &= all({"name", "sha256"} <= given.keys() for given in inputs)
        whole &= all(isinstance(each[count], int) for each in (manifest, *inputs) for count in ("documents", *FATES))
        whole &= all(
            isinstance(shard["file"], str) and shard["split"] in SPLITS and isinstance(shard["tokens"], int)
            for shard in shards
        )
        return manifest if whole else damaged(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, AttributeError, KeyError, TypeError, RecursionError):
        return damaged(path)


def prepared_shards(folder: Path, split: str) -> list[Shard]:
    """The `train` or `val` shards of a folder, ours or another's.

    Raises `UserError` if the preparation is not finished, or a shard is damaged or missing.
    """
    if (folder / STATE).exists():
        raise UserError(f"{folder}: not finished; run its data prepare again")
    manifest = read_manifest(folder)
    if manifest is None:
        return find_shards(folder, split)
    shards = []
    for given in manifest["shards"]:
        if given["split"] == split:
            shards.append(open_shard(folder / given["file"]))
            if shards[-1].tokens != given["tokens"]:
                raise UserError(
                    f"{shards[-1].path}: holds {shards[-1].tokens:,} tokens, {MANIFEST} says {given['tokens']:,}; "
                    "delete the folder and prepare it again"
                )
    return shards


def _only(mapping: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: mapping.get(key) for key in keys}


def _save_tokenizer(source: Path, folder: Path) -> dict[str, Any]:
    """Write the tokenizer that goes beside the shards; returns what the manifest says of it."""
    tokenizer = load_tokenizer(source)
    if tokenizer.eos_token_id is None and DOCUMENT_MARK in tokenizer.get_vocab():
        tokenizer.eos_token = DOCUMENT_MARK
    if tokenizer.eos_token_id is None or not tokenizer.is_fast:
        raise UserError(f"{source}: no tokenizer.json, or it names no end-of-text token; give GPT-2's or one like it")
    if len(tokenizer) > 1 << 16:
        raise UserError(f"{source}: {len(tokenizer)} tokens; shards hold 16 bits a token, so at most 65536 will do")
    tokenizer.save_pretrained(folder)
    return {
        "sha256": sha256_file(folder / TOKENIZER_FILE),
        "vocab_size": len(tokenizer),
        "end_of_text": tokenizer.eos_token_id,
        **({"split_special_tokens": True} if tokenizer.split_special_tokens else {}),
    }


@dataclass
class _Mark:
    """What belongs to a batch: each piece's source and whether its document ends with it, and where the batch ends."""

    owners: list[int]
    ends: list[bool]
    source: int = 0
    position: Any = None


def _batches(corpus: Sequence[Source], first: int, position: Any) -> Iterator[tuple[_Mark, list[bytes]]]:
    """The corpus from a position on, a batch at a time; a batch may hold many small sources."""
    mark, batch, size = _Mark([], []), [], 0
    for number, source in enumerate(corpus[first:], first):
        if number == first and position is not None:
            source.position = position
        for piece, ends in source.pieces():
            batch.append(piece)
            mark.owners.append(number)
            mark.ends.append(ends)
            size += len(piece) + 64  # empty ones take room, too
            if size >= BATCH_BYTES:
                mark.source, mark.position = number, source.position
                yield mark, batch
                mark, batch, size = _Mark([], []), [], 0
    if batch:
        mark.source, mark.position = number, source.position
        yield mark, batch


def _due(tokens: int, share: float | None) -> float:
    """How many of so many tokens are to be held out; without a share a tenth of the first, one in 200 of the rest."""
    if share is not None:
        return share * tokens
    return _SMALL_SHARE * min(tokens, _SMALL) + _LARGE_SHARE * max(0, tokens - _SMALL)


def _write(corpus: Sequence[Source], journal: Journal, out: Path, choices: dict[str, Any], workers: int) -> None:
    state, limit = journal.state, choices["shard_tokens"]
    writers = {split: ShardWriter(out, split, limit, tokens) for split, tokens in state.tokens.items()}
    progress = _Progress(len(corpus), state)
    if not state.complete:
        _read_all(corpus, journal, choices, workers, writers, progress, str(out / TOKENIZER / TOKENIZER_FILE))
        if not state.made:
            raise UserError(_nothing_left(choices, journal))
        _hold_out_the_end(state, writers, choices, out / TOKENIZER / TOKENIZER_FILE)
        state.complete = True
        journal.commit()
    for split, writer in writers.items():
        writer.finish(state.tokens[split])
    progress.show("all", last=True)


def _read_all(
    corpus: Sequence[Source],
    journal: Journal,
    choices: dict[str, Any],
    workers: int,
    writers: dict[str, ShardWriter],
    progress: "_Progress",
    tokenizer: str,
) -> None:
    state, share = journal.state, choices["validation_share"]
    end, before = np.array([choices["tokenizer"]["end_of_text"]], np.uint16), choices["end_of_text"] == "before"
    how = How(tokenizer, "split_special_tokens" in choices["tokenizer"], choices["style"])

    def add(split: str, ids: np.ndarray) -> None:
        writers[split].add(ids)
        state.tokens[split] += len(ids)

    with contextlib.closing(encoded(_batches(corpus, state.source, state.position), how, workers)) as batches:
        for mark, pieces in batches:
            for number, ends, (digest, ids) in zip(mark.owners, mark.ends, pieces, strict=True):
                split = "train"
                if choices["inputs"][number]["sha256"] is None:
                    journal.chain(number, digest)
                if state.inside:  # a piece repeats another only where all before it does
                    digest = hashlib.sha256(bytes.fromhex(state.inside) + digest).digest()
                if isinstance(ids, str):
                    journal.count(number, ids)
                elif not journal.is_new(digest):
                    journal.count(number, DUPLICATE)
                else:
                    journal.count(number, KEPT)
                    whole = ends and not state.inside
                    if whole and _is_held_out(state, len(ids) + 1, share, choices["shard_tokens"]):
                        split = "val"
                    if before and not state.begun:
                        add(split, end)
                    add(split, ids)
                    state.kept += 1
                    state.begun = True
                if ends and state.begun and not before:
                    add(split, end)
                state.inside, state.begun = "" if ends else digest.hex(), state.begun and not ends
            for writer in writers.values():
                writer.sync()
            state.source, state.position = mark.source, mark.position
            journal.commit()
            progress.show(corpus[state.source].name)


def _is_held_out(state: State, tokens: int, share: float | None, limit: int) -> bool:
    """Whether the next document is: as soon as some are due, whatever its length, if it is not much of all there is."""
    then = state.tokens["val"] + tokens
    return (
        state.tokens["val"] < _due(state.made, share)
        and then <= _OVER * _due(state.made + tokens, share)
        and then <= limit
    )


def _hold_out_the_end(state: State, writers: dict[str, ShardWriter], choices: dict[str, Any], tokenizer: Path) -> None:
    """Where documents were too few or too long to hold out half of what is due, hold out the end of the text, too.

    It begins with a line or document, if one begins in the first half of it. Only what `state` says changes; the
    tokens are cut off where they were once that is on the disk.
    """
    train, val = writers["train"], writers["val"]
    due = min(_due(state.made, choices["validation_share"]), choices["shard_tokens"])
    missing = int(due) - val.tokens
    if missing < 1 or 2 * val.tokens >= due:
        return
    start, middle = train.tokens - missing, train.tokens - missing // 2
    end, before = choices["tokenizer"]["end_of_text"], choices["end_of_text"] == "before"
    ends = [*line_ends(tokenizer), *([] if before else [end])]
    at = start
    for part in train.read(start, middle):
        found = np.isin(part, ends)
        found[:-1] |= before & (part[1:] == end)
        if found.any():
            start = at + int(found.argmax()) + 1
            break
        at += len(part)
    for part in train.read(start, train.tokens):
        val.add(part)
    val.sync()
    state.tokens |= {"train": start, "val": val.tokens}


def _nothing_left(choices: dict[str, Any], journal: Journal) -> str:
    """Why no document was kept."""
    fates = [counts for _, counts in journal.outcome()]
    empty, bad = (sum(counts[fate] for counts in fates) for fate in (EMPTY, BAD_ENCODING))
    names = ", ".join(given["name"] for given in choices["inputs"][:3])
    advice = "--style plain takes prose as it is" if choices["style"] == "wikitext" and empty else "give text"
    return f"{names}: no document is left ({empty:,} empty, {bad:,} not UTF-8 text); {advice}"


class _Progress:
    """A line on stderr every few seconds."""

    def __init__(self, sources: int, state: State):
        self.sources, self.state = sources, state
        self.begun = self.shown = time.monotonic()
        self.before = state.made
        if self.before:
            print(f"data: going on after {self.before:,} tokens", file=sys.stderr)

    def show(self, name: str, *, last: bool = False) -> None:
        now, tokens = time.monotonic(), self.state.made
        if last or now - self.shown >= _REPORT_SECONDS:
            self.shown = now
            print(
                f"data: input {self.state.source + 1}/{self.sources} ({name})  {self.state.kept:,} documents  "
                f"{tokens:,} tokens  {(tokens - self.before) / (now - self.begun):,.0f} tokens/s",
                file=sys.stderr,
                flush=True,
            )


def _manifest(choices: dict[str, Any], journal: Journal, out: Path) -> dict[str, Any]:
    state, inputs = journal.state, []
    shards = {split: find_shards(out, split) for split in SPLITS}
    if {split: sum(shard.tokens for shard in found) for split, found in shards.items()} != state.tokens:
        raise UserError(f"{out}: its shards are not those that were written; delete the folder and prepare it again")
    for given, (chain, fates) in zip(choices["inputs"], journal.outcome(), strict=True):
        content = {} if given["sha256"] else {"documents_sha256": chain}
        inputs.append(given | content | {"documents": sum(fates.values())} | fates)
    return {
        **choices,
        "inputs": inputs,
        **{key: sum(given[key] for given in inputs) for key in ("documents", *FATES)},
        "tokens": state.made,
        "shards": [
            {"file": shard.path.name, "split": split, "tokens": shard.tokens, "sha256": sha256_file(shard.path)}
            for split in SPLITS
            for shard in shards[split]
        ],
    }


def tokens_held_out(manifest: dict[str, Any]) -> int:
    """How many tokens are there to judge by."""
    return sum(shard["tokens"] for shard in manifest["shards"] if shard["split"] == "val")


def summary(manifest: dict[str, Any]) -> str:
    """What a person wants to know of a preparation, in a few lines."""
    held_out, shortest = tokens_held_out(manifest), min(shard["tokens"] for shard in manifest["shards"])
    lines = [
        f"{manifest['tokens']:,} tokens of {manifest['kept']:,} documents in {len(manifest['shards'])} shards; "
        f"{held_out:,} tokens held out",
        f"left out: {manifest['duplicates']:,} duplicates, {manifest[EMPTY]:,} empty, "
        f"{manifest[BAD_ENCODING]:,} not UTF-8 text",
        f"shortest shard: {shortest:,} tokens (llm.c's loader takes one of B x T x processes + 1 or more)",
    ]
    if not held_out and manifest["validation_share"] != 0:
        lines.append("too little text to hold any out: a training needs another text to be judged by")
    lines += [
        f"not UTF-8 text: {given['name']} ({given[BAD_ENCODING]:,} of {given['documents']:,} documents)"
        for given in manifest["inputs"]
        if given[BAD_ENCODING]
    ]
    return "\n".join(lines)
