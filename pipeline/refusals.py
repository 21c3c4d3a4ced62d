"""What a tokenizer raises, in one line. Imports little: each worker pays for it."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from eval.errors import UserError, reason


@contextlib.contextmanager
def refusals(what: str, remedy: str = "give another tokenizer or text") -> Iterator[None]:
    """Whatever a tokenizer raises, panics too, as one `UserError`, without the stack that Rust prints of them."""
    try:
        with _silent_stderr():
            yield
    except BaseException as error:
        # tokenizers raises bare Exception for a damaged file, and panics are no Exception at all.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise UserError(f"{what} ({reason(error)}); {remedy}") from error


@contextlib.contextmanager
def _silent_stderr() -> Iterator[None]:
    """Let what is written to the process's stderr, past Python, vanish."""
    try:
        kept = os.dup(2)
    except OSError:  # closed
        yield
        return
    try:
        with Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
