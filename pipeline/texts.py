"""Where texts come from: the ones that ship, files, and datasets of the Hub."""

from pathlib import Path
from typing import Any

from eval.errors import UserError, why_no_hub
from pipeline.reading import expanded, read_rows, read_text, row_text
from pipeline.wikitext import rows as wikitext_rows

ASSETS = Path(__file__).parent / "assets"
SPLITS = ("train", "valid", "test")
_PARAGRAPH = 100


def load_text(source: str) -> str:
    """The text that a recipe names, as one string: a file as it is, rows joined by a blank line.

    `embedded:SPLIT` ships with Headroom; `hub:DATASET[@CONFIG]:SPLIT` is a dataset of the Hub (or a
    local folder in its format) with a `text` column; `wikitext:FILE` is a file in WikiText's raw form, whose lines
    are the Hub's rows; anything else is a file as `reading` knows them.
    Raises `UserError` for an unknown split, a dataset that cannot be had, or an unusable file.
    """
    return "\n\n".join(load_rows(source))


def load_rows(source: str) -> list[str]:
    """The rows of which `load_text` is made: a plain file is one."""
    kind, _, rest = source.partition(":")
    if kind == "embedded":
        if rest not in SPLITS:
            raise UserError(f"text {source}: no such split; give embedded:{'|'.join(SPLITS)}")
        return _wikitext(ASSETS / "wikitext-2" / f"{rest}.txt")
    if kind == "wikitext":
        return _wikitext(rest)
    if kind == "hub":
        return _hub_texts(source)
    return read_rows(source)


def has_rows(source: str) -> bool:
    """Whether a text comes in rows of WikiText's kind, among them headings and empty ones."""
    return source.startswith(("embedded:", "hub:", "wikitext:"))


def _wikitext(path: str | Path) -> list[str]:
    return wikitext_rows(read_text(path).removesuffix("\n").split("\n"))


def hub_rows(source: str, *, streaming: bool = False) -> Any:
    """The rows of `hub:DATASET[@CONFIG]:SPLIT`, streamed or whole. Raises `UserError` if they cannot be had."""
    name, _, split = source.removeprefix("hub:").rpartition(":")
    dataset, _, config = name.partition("@")
    if not dataset or not split:
        raise UserError(
            f"text {source}: give hub:DATASET[@CONFIG]:SPLIT, as in hub:Salesforce/wikitext@wikitext-2-raw-v1:test"
        )
    try:
        import huggingface_hub
        from datasets import load_dataset
    except ImportError as error:
        raise UserError(f"text {source}: needs the datasets package; pip install datasets, or give a file") from error
    huggingface_hub.utils.logging.set_verbosity_error()  # it tells of each of its retries
    try:
        dataset = str(expanded(dataset)) if dataset.startswith("~") else dataset
        return load_dataset(dataset, config or None, split=split, streaming=streaming)
    except Exception as error:  # datasets raises many kinds; each means that the text is not to be had
        raise UserError(
            f"text {source}: cannot be loaded ({why_no_hub(error)}); give a file or embedded:SPLIT instead"
        ) from error


def _hub_texts(source: str) -> list[str]:
    rows = hub_rows(source)
    if "text" not in rows.column_names:
        raise UserError(f"text {source}: has columns {rows.column_names}; one named 'text' is needed")
    try:
        texts = [row_text({"text": text}) for text in rows["text"]]
    except ValueError as error:
        raise UserError(f"text {source}: a row {error}") from error
    if not any(text.strip() for text in texts):
        raise UserError(f"text {source}: empty; give a split with text")
    return texts


def refuse_overlap(name: str, text: str, evaluation: str) -> None:
    """Raise `UserError` if a paragraph of `text` stands in the evaluation text as well, or one is a part of the other.

    A paragraph is a line of 100 characters or more; lines that are broken earlier are known only as a whole.
    """
    held_out = {line.strip() for line in evaluation.split("\n") if len(line) >= _PARAGRAPH}
    shared = next((line for line in text.split("\n") if len(line) >= _PARAGRAPH and line.strip() in held_out), None)
    if shared is None:
        part, whole = sorted((" ".join(text.split()), " ".join(evaluation.split())), key=len)
        shared = part if len(part) >= _PARAGRAPH and part in whole else None
    if shared is not None:
        start = " ".join(shared[:200].split())[:40]
        raise UserError(f"the {name} text shares a paragraph with the evaluation text ({start}...): keep them apart")
