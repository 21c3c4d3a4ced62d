"""Documents to tokens in several processes: answers in the order of the questions, few of them waiting.

A worker is a plain child with a pipe in and a pipe out. Whatever ends it closes them, which wakes whoever waits for it;
and it ends when its input does. So nobody waits for ever, and nobody is left behind. Imports little: each worker pays.
"""

import contextlib
import hashlib
import os
import pickle
import queue
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

import numpy as np
from tokenizers import Tokenizer

from eval.errors import UserError, WorkError, reason
from pipeline.refusals import refusals
from pipeline.wikitext import DOCUMENT_MARK, styled_documents

EMPTY, BAD_ENCODING = "empty", "bad_encodings"
Style = Literal["plain", "wikitext"]
EndOfText = Literal["after", "before"]
Encoded = list[tuple[bytes, np.ndarray | str]]
"""Of each document the sha256, and its tokens (uint16) or why it has none: `EMPTY` or `BAD_ENCODING`."""
M = TypeVar("M")


class How(NamedTuple):
    """What a worker is told."""

    tokenizer: str
    """A tokenizer.json."""
    split_special_tokens: bool
    """Whether a special token that is written out in a text is text: transformers keeps that in another file."""
    style: Style


def encoded(
    batches: Iterable[tuple[M, list[bytes]]], how: How, workers: int
) -> Generator[tuple[M, Encoded], None, None]:
    """Each batch's mark with its documents encoded, in order; `close` it to end the workers early.

    Raises `WorkError` if a worker process dies, or cannot be started.
    """
    waiting: deque[tuple[M, Future[Encoded]]] = deque()
    started: list[_Worker] = []
    idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
    threads = ThreadPoolExecutor(workers)  # each waits for one worker

    def ask(documents: list[bytes]) -> Encoded:
        worker = idle.get()
        try:
            return worker.ask(documents)
        finally:
            idle.put(worker)  # a dead one fails the next as well, instead of letting it wait

    try:
        for mark, documents in batches:
            if len(started) < workers:
                started.append(_Worker(how))
                idle.put(started[-1])
            waiting.append((mark, threads.submit(ask, documents)))
            if len(waiting) > 2 * workers:
                first, future = waiting.popleft()
                yield first, future.result()
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result()
    finally:
        for worker in started:
            worker.end()
        threads.shutdown(cancel_futures=True)


class _Worker:
    """A child process that encodes documents."""

    def __init__(self, how: How):
        # Ctrl-C is the parent's: in a group of its own the child does not get it, not even while Python starts.
        program = (
            f"import signal, sys; signal.signal(signal.SIGINT, signal.SIG_IGN); sys.path[:] = {sys.path!a}; "
            f"from pipeline.tokenizing import serve; serve({tuple(how)!a})"
        )
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-c", program],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,  # what fails is answered
                process_group=0,
            )
        except OSError as error:
            raise WorkError(
                f"a tokenising process cannot be started ({error.strerror}); run the same command to go on, "
                "with fewer --workers"
            ) from error

    def ask(self, documents: list[bytes]) -> Encoded:
        """The documents encoded. Raises `WorkError` if the process has ended, or failed."""
        assert self.process.stdin and self.process.stdout
        try:
            pickle.dump(documents, self.process.stdin)
            self.process.stdin.flush()
            answer = pickle.load(self.process.stdout)
        except (OSError, EOFError, ValueError, pickle.UnpicklingError) as error:
            raise WorkError(
                "a tokenising process was ended from outside (out of memory?); run the same command to go on, "
                "with fewer --workers"
            ) from error
        if isinstance(answer, UserError | WorkError):
            raise answer
        return answer

    def end(self) -> None:
        """End the process, whatever it does; whoever waits for it is told so."""
        self.process.kill()
        self.process.wait()


def serve(how: tuple[str, bool, Style]) -> None:
    """What a worker does: answers pickled batches from its input on its output, an error for what fails."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    encode: Callable[[list[bytes]], Encoded] | None = None
    with contextlib.suppress(EOFError, OSError, pickle.UnpicklingError):  # the parent has ended
        while True:
            documents = pickle.load(sys.stdin.buffer)
            answer: Encoded | UserError | WorkError
            try:
                encode = encode or encoder(How(*how))
                answer = encode(documents)
            except UserError as error:
                answer = error
            except Exception as error:
                answer = WorkError(f"a text cannot be tokenised: {reason(error)}")
            pickle.dump(answer, sys.stdout.buffer)
            sys.stdout.flush()
    os._exit(0)  # without a last, failing flush of what nobody reads


def encoder(how: How) -> Callable[[list[bytes]], Encoded]:
    """What encodes a batch of documents."""
    tokenizer = Tokenizer.from_file(how.tokenizer)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = how.split_special_tokens

    def encode(documents: list[bytes]) -> Encoded:
        texts = [_text(raw) for raw in documents]
        digests = [
            hashlib.sha256(raw if text is None else text.encode()).digest()
            for raw, text in zip(documents, texts, strict=True)
        ]
        if how.style == "wikitext":
            texts = [text and DOCUMENT_MARK.join(styled_documents(text)) for text in texts]
        with refusals("the tokenizer gives up on a document"):
            encodings = iter(tokenizer.encode_batch_fast([text for text in texts if text], add_special_tokens=False))
        tokens: list[np.ndarray | str] = [
            np.array(next(encodings).ids, np.uint16) if text else BAD_ENCODING if text is None else EMPTY
            for text in texts
        ]
        return list(zip(digests, tokens, strict=True))

    return encode


def line_ends(tokenizer: Path) -> list[int]:
    """The tokens that end a line, of a byte-level tokenizer.json or another."""
    vocabulary = Tokenizer.from_file(str(tokenizer)).get_vocab()
    return [token for text, token in vocabulary.items() if text.endswith(("\n", "Ċ"))]  # as GPT-2 writes its bytes


def _text(raw: bytes) -> str | None:
    """A document's text, `""` if it is nothing but space; `None` if it is no UTF-8 text."""
    try:
        text = raw.decode("utf-8")
        return None if "\x00" in text else text if text.strip() else ""
    except UnicodeDecodeError:
        return None
