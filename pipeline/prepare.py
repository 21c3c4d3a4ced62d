"""A corpus to token shards: tokenised by many processes, each document once, resumed wherever it was cut off.

Batches come back in the order they were read, so that the number of processes decides nothing. After each, what was
written is forced onto the disk, and then one transaction of `state.db` says how far it reaches.
"""

import contextlib
import json
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.errors import UserError
from eval.results import save_json
from pipeline.artifacts import RunFolder, disk_errors, refuse_strangers, replace_folder, sha256_file
from pipeline.corpus import Source, sources
from pipeline.journal import DUPLICATE, FATES, KEPT, SPLITS, STATE, Journal, State, begun_here, check_same, damaged
from pipeline.shards import MOST_TOKENS, Shard, ShardWriter, find_shards, open_shard
from pipeline.tokenizer import load_tokenizer
from pipeline.tokenizing import BAD_ENCODING, EMPTY, Style, encoded
from pipeline.wikitext import DOCUMENT_MARK

MANIFEST = "manifest.json"
TOKENIZER, TOKENIZER_FILE = "tokenizer", "tokenizer.json"
BATCH_BYTES = 1 << 20
"""Text a process is given at a time, and at most lost by a kill for each that works or waits."""
_REPORT_SECONDS = 5.0


def prepare(
    inputs: Sequence[str],
    out: Path,
    tokenizer: Path,
    *,
    workers: int,
    shard_tokens: int,
    validation_every: int,
    style: Style = "plain",
) -> dict[str, Any]:
    """Write `train_*.bin`, `val_000000.bin`, `tokenizer/` and `manifest.json` to `out`; returns the manifest.

    Documents already seen (by the sha256 of their text), empty ones, and those that are not UTF-8 text are counted and
    left out. The first document of every `validation_every` kept ones is held out, as long as one shard has room for it
    (0: none is). Cut off, the same call goes on and ends with the same bytes, with any number of `workers`.
    Raises `UserError` for unusable inputs or tokenizer, or a folder that holds something else.
    """
    if not 1 <= shard_tokens <= MOST_TOKENS:
        raise UserError(f"--shard-tokens {shard_tokens}: a shard can hold 1 to {MOST_TOKENS} tokens")
    partial = out / f".{TOKENIZER}.partial"
    if not (begun_here(out / STATE) or ((out / MANIFEST).is_file() and find_shards(out, "train"))):
        refuse_strangers(out, (TOKENIZER, STATE, MANIFEST), "preparation")
    with RunFolder(out).locked(), disk_errors(out), contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, partial, ignore_errors=True)
        corpus = sources(inputs)
        choices = {
            "inputs": [{"name": source.name, "sha256": source.sha256()} for source in corpus],
            "tokenizer": _save_tokenizer(tokenizer, partial),
            "style": style,
            "shard_tokens": shard_tokens,
            "validation_every": validation_every,
        }
        manifest = read_manifest(out)
        if manifest is not None:
            (out / STATE).unlink(missing_ok=True)  # a kill may have come before it went
            begun = manifest | {"inputs": [_only(given, "name", "sha256") for given in manifest["inputs"]]}
            check_same(choices, begun, out)
            for split in SPLITS:
                prepared_shards(out, split)  # which says so if one was damaged since
        else:
            with contextlib.closing(Journal(out, choices)) as journal:
                replace_folder(partial, out / TOKENIZER)
                _write(corpus, journal, out, choices, workers)
                manifest = _manifest(choices, journal, out)
            save_json(manifest, out / MANIFEST)
            (out / STATE).unlink()
    return manifest


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a finished preparation; `None` if there is none. Raises `UserError` if it is damaged."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        return manifest if {"inputs", "tokenizer", "style", "shards"} <= manifest.keys() else damaged(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, AttributeError):
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
    return [open_shard(folder / shard["file"]) for shard in manifest["shards"] if shard["split"] == split]


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
    }


@dataclass
class _Mark:
    """What belongs to a batch: each document's source, and where in the corpus the batch ends."""

    owners: list[int]
    source: int = 0
    position: Any = None


def _batches(corpus: Sequence[Source], first: int, position: Any) -> Iterator[tuple[_Mark, list[bytes]]]:
    """The corpus from a position on, a batch at a time; a batch may hold many small sources."""
    mark, batch, size = _Mark([]), [], 0
    for number, source in enumerate(corpus[first:], first):
        if number == first and position is not None:
            source.position = position
        for document in source.documents():
            batch.append(document)
            mark.owners.append(number)
            size += len(document) + 64  # empty ones take room, too
            if size >= BATCH_BYTES:
                mark.source, mark.position = number, source.position
                yield mark, batch
                mark, batch, size = _Mark([]), [], 0
    if batch:
        mark.source, mark.position = number, source.position
        yield mark, batch


def _write(corpus: Sequence[Source], journal: Journal, out: Path, choices: dict[str, Any], workers: int) -> None:
    state, limit, every = journal.state, choices["shard_tokens"], choices["validation_every"]
    writers = {split: ShardWriter(out, split, limit, tokens) for split, tokens in state.tokens.items()}
    progress = _Progress(len(corpus), state)
    tokenizer = (out / TOKENIZER / TOKENIZER_FILE).read_text(encoding="utf-8")
    batches = _batches(corpus, state.source, state.position)
    for mark, documents in encoded(batches, tokenizer, choices["tokenizer"]["end_of_text"], choices["style"], workers):
        for number, (digest, ids) in zip(mark.owners, documents, strict=True):
            if choices["inputs"][number]["sha256"] is None:
                journal.chain(number, digest)
            if isinstance(ids, str):
                journal.count(number, ids)
            elif not journal.is_new(digest):
                journal.count(number, DUPLICATE)
            else:
                journal.count(number, KEPT)
                held_out = every and state.kept % every == 0 and state.tokens["val"] + len(ids) <= limit
                split = "val" if held_out else "train"
                writers[split].add(ids)
                state.tokens[split] += len(ids)
                state.kept += 1
        for writer in writers.values():
            writer.sync()
        state.source, state.position = mark.source, mark.position
        journal.commit()
        progress.show(corpus[state.source].name)
    for writer in writers.values():
        writer.finish()
    if not state.tokens["train"]:
        raise UserError(f"{out}: all documents were held out or left out; give more documents and another --out")
    progress.show("all", last=True)


class _Progress:
    """A line on stderr every few seconds."""

    def __init__(self, sources: int, state: State):
        self.sources, self.state = sources, state
        self.begun = self.shown = time.monotonic()
        self.before = sum(state.tokens.values())
        if self.before:
            print(f"data: going on after {self.before:,} tokens", file=sys.stderr)

    def show(self, name: str, *, last: bool = False) -> None:
        now, tokens = time.monotonic(), sum(self.state.tokens.values())
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
    for given, (chain, fates) in zip(choices["inputs"], journal.outcome(), strict=True):
        content = {} if given["sha256"] else {"documents_sha256": chain}
        inputs.append(given | content | {"documents": sum(fates.values())} | fates)
    return {
        **choices,
        "inputs": inputs,
        **{key: sum(given[key] for given in inputs) for key in ("documents", *FATES)},
        "tokens": sum(state.tokens.values()),
        "shards": [
            {"file": shard.path.name, "split": split, "tokens": shard.tokens, "sha256": sha256_file(shard.path)}
            for split in SPLITS
            for shard in find_shards(out, split)
        ],
    }


def tokens_held_out(manifest: dict[str, Any]) -> int:
    """How many tokens are there to judge by."""
    return sum(shard["tokens"] for shard in manifest["shards"] if shard["split"] == "val")


def summary(manifest: dict[str, Any]) -> str:
    """What a person wants to know of a preparation, in a few lines."""
    lines = [
        f"{manifest['tokens']:,} tokens of {manifest['kept']:,} documents in {len(manifest['shards'])} shards; "
        f"{tokens_held_out(manifest):,} tokens held out",
        f"left out: {manifest['duplicates']:,} duplicates, {manifest[EMPTY]:,} empty, "
        f"{manifest[BAD_ENCODING]:,} not UTF-8 text",
    ]
    lines += [
        f"not UTF-8 text: {given['name']} ({given[BAD_ENCODING]:,} of {given['documents']:,} documents)"
        for given in manifest["inputs"]
        if given[BAD_ENCODING]
    ]
    return "\n".join(lines)
