"""Run a child process that says what it is about to do, so that a crash or a hang costs that step alone.

The child writes one JSON object a line on stdout. `{"start": name, "seconds": limit}` begins a step, which
ends with the next line; any other object is something to keep.
"""

import contextlib
import json
import queue
import subprocess
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

_TAIL = 2000


@dataclass
class Outcome:
    """What the child said, and where and why it ended, if not by itself and with code 0."""

    said: list[dict[str, Any]] = field(default_factory=list)
    failed_in: str | None = None
    reason: str | None = None


def run(command: Sequence[str], *, first_seconds: float, total_seconds: float) -> Outcome:
    """Start `command` and listen until it ends, takes longer in a step than it announced, or longer in all.

    `first_seconds` is the limit until its first line. stderr passes through a pipe; its end is the reason of a failure.
    """
    import time

    child = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        errors="replace",
    )
    lines: queue.Queue[str | None] = queue.Queue()
    errors: list[str] = []
    readers = [
        threading.Thread(target=_forward, args=(child.stdout, lines), daemon=True),
        threading.Thread(target=_keep_tail, args=(child.stderr, errors), daemon=True),
    ]
    for reader in readers:
        reader.start()
    outcome, step, limit = Outcome(), "start", first_seconds
    end = time.monotonic() + total_seconds
    try:
        while True:
            left = end - time.monotonic()
            try:
                line = lines.get(timeout=max(0.0, min(limit, left)))
            except queue.Empty:
                outcome.failed_in = step
                outcome.reason = f"no answer within {min(limit, max(left, 0)):.0f} s"
                return outcome
            if line is None:
                break
            said = _object(line)
            if said is None:
                continue
            if "start" in said:
                step, limit = said["start"], said["seconds"]
            else:
                outcome.said.append(said)
                limit = total_seconds
        code = child.wait(timeout=30)
        readers[1].join(5)
        if code != 0:
            outcome.failed_in, outcome.reason = step, f"exit code {code}: {_last_line(errors)}"
        return outcome
    finally:
        if child.poll() is None:
            child.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(timeout=30)


def _forward(stream: Any, lines: "queue.Queue[str | None]") -> None:
    for line in stream:
        lines.put(line)
    lines.put(None)


def _keep_tail(stream: Any, errors: list[str]) -> None:
    for line in stream:
        errors.append(line.rstrip())
        del errors[:-50]


def _last_line(errors: list[str]) -> str:
    return next((line for line in reversed(errors) if line.strip()), "no words on stderr")[-_TAIL:]


def _object(line: str) -> dict[str, Any] | None:
    """Libraries print to stdout too: what is no JSON object is passed over."""
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
