"""The documents of tasks: from local files, or from the Hub."""

import bz2
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from eval.errors import UserError, why_no_hub


class Documents(NamedTuple):
    """A task's questions in order."""

    rows: list[dict[str, Any]]
    """`query` (text), `choices` (texts) and `gold` (the index of the right one)."""
    sha256: str
    """Of all of them."""


def load_documents(task: str, folder: Path | None = None) -> Documents:
    """All documents of `hellaswag` (validation) or `lambada` (test, OpenAI's variant).

    From anywhere below `folder`: HellaSwag as `hellaswag_val*.jsonl` (its authors' form) or `hellaswag_val*.txt`,
    perhaps `.bz2` (6 lines a document: `activity: context`, label, 4 endings), LAMBADA as `lambada_test*.jsonl`.
    Without a folder from the Hub. The activity is left out: completion style gives the context alone.
    Raises `UserError` for another task, no such file, a damaged one, or a Hub that cannot be reached.
    """
    if task not in _TASKS:
        raise UserError(f"task {task}: unknown; give one of {', '.join(_TASKS)}")
    rows = _from_hub(task) if folder is None else _from_folder(task, folder)
    return Documents(rows, hashlib.sha256(json.dumps(rows).encode()).hexdigest())


def _hellaswag(raw: dict[str, Any]) -> dict[str, Any]:
    query, endings, label = raw["ctx"], raw["endings"], int(str(raw["label"]))  # 1.7 and true are none
    whole = isinstance(endings, list) and len(endings) == 4 and label in range(4)
    if not whole or not all(map(_is_text, (query, *endings))):
        raise ValueError("4 endings and a label from 0 to 3 after a context are needed")
    return {"query": query, "choices": endings, "gold": label}


def _is_text(value: Any) -> bool:
    """Whether it can be tokenised. Raises `ValueError` for half a character, which JSON can hold and UTF-8 cannot."""
    return isinstance(value, str) and value.encode() != b""


def _lambada(raw: dict[str, Any]) -> dict[str, Any]:
    text = raw["text"]
    query, _, word = text.rpartition(" ") if isinstance(text, str) else ("", "", "")
    if not _is_text(query) or not _is_text(word):
        raise ValueError("a passage of two words or more is needed")
    return {"query": query, "choices": [word], "gold": 0}


class _Task(NamedTuple):
    patterns: tuple[str, ...]
    dataset: tuple[str, str | None, str]
    row: Callable[[dict[str, Any]], dict[str, Any]]


_TASKS = {
    "hellaswag": _Task(
        ("hellaswag_val*.jsonl", "hellaswag_val*.txt", "hellaswag_val*.txt.bz2"),
        ("Rowan/hellaswag", None, "validation"),
        _hellaswag,
    ),
    "lambada": _Task(("lambada_test*.jsonl",), ("EleutherAI/lambada_openai", "default", "test"), _lambada),
}
TASKS = tuple(_TASKS)


def _from_folder(task: str, folder: Path) -> list[dict[str, Any]]:
    patterns = _TASKS[task].patterns
    path = next((path for pattern in patterns for path in sorted(folder.rglob(pattern))), None)
    if path is None:
        raise UserError(f"task {task}: no {' or '.join(patterns)} below {folder}; give the folder that holds it")
    rows: list[dict[str, Any]] = []
    try:
        if not path.is_file():
            raise UserError(f"{path}: no regular file; give a readable file")
        packed = path.read_bytes()
        text = (bz2.decompress(packed) if path.suffix == ".bz2" else packed).decode("utf-8-sig")
        lines = text.replace("\r\n", "\n").rstrip().split("\n")
        for raw in map(json.loads, filter(str.strip, lines)) if path.suffix == ".jsonl" else _six_lines(lines):
            rows.append(_TASKS[task].row(raw))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}; give a readable file") from error
    except (ValueError, KeyError, TypeError, AttributeError, EOFError, RecursionError) as error:
        raise UserError(f"{path}: damaged at document {len(rows) + 1} ({error}); copy it again") from error
    if len(rows) < 2:
        raise UserError(f"{path}: {len(rows)} documents; a score needs at least 2")
    return rows


def _six_lines(lines: list[str]) -> Iterator[dict[str, Any]]:
    for begin in range(0, len(lines), 6):
        title, label, *endings = lines[begin : begin + 6]
        yield {"ctx": title.partition(": ")[2], "label": label, "endings": endings}


def _from_hub(task: str) -> list[dict[str, Any]]:
    import huggingface_hub
    from datasets import load_dataset

    name, config, split = _TASKS[task].dataset
    try:
        huggingface_hub.utils.logging.set_verbosity_error()  # it tells of each of its retries
        return [_TASKS[task].row(raw) for raw in load_dataset(name, config, split=split)]
    except Exception as error:  # datasets raises many kinds; each means that it is not to be had
        raise UserError(
            f"task {task}: {name} cannot be loaded ({why_no_hub(error)}); give --task-data FOLDER"
        ) from error
