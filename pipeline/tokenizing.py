"""Documents to tokens in several processes: answers in the order of the questions, few of them waiting.

Imports little: each worker pays for it.
"""

import hashlib
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Literal, TypeVar

import numpy as np
from tokenizers import Tokenizer

from eval.errors import WorkError
from pipeline.children import end_with_parent
from pipeline.refusals import refusals
from pipeline.wikitext import DOCUMENT_MARK, styled_documents

EMPTY, BAD_ENCODING = "empty", "bad_encodings"
Style = Literal["plain", "wikitext"]
Encoded = list[tuple[bytes, np.ndarray | str]]
"""Of each document the sha256, and its tokens (uint16) or why it has none: `EMPTY` or `BAD_ENCODING`."""
M = TypeVar("M")

_worker: tuple[Tokenizer, int, Style]


def encoded(
    batches: Iterable[tuple[M, list[bytes]]], tokenizer: str, end: int, style: Style, workers: int
) -> Iterator[tuple[M, Encoded]]:
    """Each batch's mark with its documents encoded, in order.

    `tokenizer` is the text of a tokenizer.json, `end` the token that closes each document.
    Raises `WorkError` if a worker process dies.
    """
    waiting: deque[tuple[M, Future[Encoded]]] = deque()
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, spawn, initializer=_start, initargs=(tokenizer, end, style))
    try:
        for mark, documents in batches:
            waiting.append((mark, pool.submit(encode_documents, documents)))
            if len(waiting) > 2 * workers:
                first, future = waiting.popleft()
                yield first, future.result()
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result()
    except BrokenProcessPool as error:
        raise WorkError(
            "a tokenising process was ended from outside (out of memory?); run the same command to go on, "
            "with fewer --workers"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _start(tokenizer: str, end: int, style: Style) -> None:
    global _worker
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the parent says so
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    loaded = Tokenizer.from_str(tokenizer)
    loaded.no_truncation()
    loaded.no_padding()
    _worker = loaded, end, style


def encode_documents(documents: list[bytes]) -> Encoded:
    """What a worker does with a batch."""
    tokenizer, end, style = _worker
    texts = [_text(raw) for raw in documents]
    digests = [
        hashlib.sha256(raw if text is None else text.encode()).digest()
        for raw, text in zip(documents, texts, strict=True)
    ]
    if style == "wikitext":
        texts = [text and DOCUMENT_MARK.join(styled_documents(text)) for text in texts]
    with refusals("the tokenizer gives up on a document"):
        encodings = iter(tokenizer.encode_batch_fast([text for text in texts if text], add_special_tokens=False))
    tokens: list[np.ndarray | str] = [
        np.array([*next(encodings).ids, end], np.uint16) if text else BAD_ENCODING if text is None else EMPTY
        for text in texts
    ]
    return list(zip(digests, tokens, strict=True))


def _text(raw: bytes) -> str | None:
    """A document's text without the space around it; `None` if it is no UTF-8 text."""
    try:
        return None if b"\x00" in raw else raw.decode("utf-8").strip()
    except UnicodeDecodeError:
        return None
