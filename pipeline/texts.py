"""Where texts come from: the ones that ship, files, and datasets of the Hub."""

from pathlib import Path
from typing import Any

from eval.errors import UserError, reason
from pipeline.data import read_text
from pipeline.wikitext import join_rows

ASSETS = Path(__file__).parent / "assets"
SPLITS = ("train", "valid", "test")


def load_text(source: str) -> str:
    """The text that a recipe names, as one string with rows joined WikiText's way.

    `embedded:SPLIT` ships with Headroom; `hub:DATASET[@CONFIG]:SPLIT` is a dataset of the Hub (or a
    local folder in its format) with a `text` column; anything else is a file.
    Raises `UserError` for an unknown split, a dataset that cannot be had, or an unusable file.
    """
    kind, _, rest = source.partition(":")
    if kind == "embedded":
        if rest not in SPLITS:
            raise UserError(f"text {source}: no such split; give embedded:{'|'.join(SPLITS)}")
        return join_rows(read_text(ASSETS / "wikitext-2" / f"{rest}.txt").splitlines())
    if kind == "hub":
        return _hub_text(source)
    return join_rows(read_text(source).splitlines())


def raw_bytes(source: str) -> int | None:
    """Bytes of a text before its rows are joined: the base of bits per byte; `None` for a Hub dataset."""
    kind, _, rest = source.partition(":")
    if kind == "hub":
        return None
    path = ASSETS / "wikitext-2" / f"{rest}.txt" if kind == "embedded" else Path(source)
    return len(read_text(path).encode())


def hub_rows(source: str, *, streaming: bool = False) -> Any:
    """The rows of `hub:DATASET[@CONFIG]:SPLIT`, streamed or whole. Raises `UserError` if they cannot be had."""
    name, _, split = source.removeprefix("hub:").rpartition(":")
    dataset, _, config = name.partition("@")
    if not dataset or not split:
        raise UserError(
            f"text {source}: give hub:DATASET[@CONFIG]:SPLIT, as in hub:Salesforce/wikitext@wikitext-2-raw-v1:test"
        )
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise UserError(f"text {source}: needs the datasets package; pip install datasets, or give a file") from error
    try:
        return load_dataset(dataset, config or None, split=split, streaming=streaming)
    except Exception as error:  # datasets raises many kinds; each means that the text is not to be had
        raise UserError(
            f"text {source}: cannot be loaded ({reason(error)}); give a file or embedded:SPLIT instead"
        ) from error


def _hub_text(source: str) -> str:
    rows = hub_rows(source)
    if "text" not in rows.column_names:
        raise UserError(f"text {source}: has columns {rows.column_names}; one named 'text' is needed")
    text = "\n\n".join(rows["text"])
    if not text.strip():
        raise UserError(f"text {source}: empty; give a split with text")
    return text


def refuse_overlap(name: str, text: str, evaluation: str) -> None:
    """Raise `UserError` if a paragraph of `text` stands in the evaluation text as well."""
    held_out = {line for line in evaluation.splitlines() if len(line) >= 100}
    for line in text.splitlines():
        if line in held_out:
            raise UserError(
                f"the {name} text shares a paragraph with the evaluation text ({line.strip()[:40]}...): keep them apart"
            )
