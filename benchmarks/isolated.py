"""Child processes that talk in JSON lines, so that a crash or a hang costs one step alone."""

import contextlib
import json
import queue
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

_TAIL = 2000


class Child:
    """A process that takes and gives one JSON object a line; what else it prints on stdout is passed over."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str] | None = None):
        """`environment` replaces this process's own. stderr passes through a pipe, its end is kept."""
        self.process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            errors="replace",
        )
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._errors: list[str] = []
        self._readers = [
            threading.Thread(target=_forward, args=(self.process.stdout, self._lines), daemon=True),
            threading.Thread(target=_keep_tail, args=(self.process.stderr, self._errors), daemon=True),
        ]
        for reader in self._readers:
            reader.start()

    def send(self, said: Mapping[str, Any]) -> None:
        """Raises `OSError` where the child has ended."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(said) + "\n")
        self.process.stdin.flush()

    def receive(self, seconds: float) -> dict[str, Any] | None:
        """The next object, `None` at the end. Raises `TimeoutError` where neither comes within `seconds`."""
        end = time.monotonic() + seconds
        while True:
            try:
                line = self._lines.get(timeout=max(0.0, end - time.monotonic()))
            except queue.Empty:
                raise TimeoutError(f"no answer within {max(seconds, 0):.0f} s") from None
            if line is None:
                return None
            said = _object(line)
            if said is not None:
                return said

    def failure(self) -> str | None:
        """Waits for the end; says why, unless the exit code is 0."""
        code = self.process.wait(timeout=30)
        self._readers[1].join(5)
        return f"exit code {code}: {_last_line(self._errors)}" if code else None

    def kill(self) -> None:
        """No harm where it has ended."""
        if self.process.poll() is None:
            self.process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=30)


@dataclass
class Outcome:
    """What the child said, and where and why it ended, if not by itself and with code 0."""

    said: list[dict[str, Any]] = field(default_factory=list)
    failed_in: str | None = None
    reason: str | None = None


def run(command: Sequence[str], *, first_seconds: float, total_seconds: float) -> Outcome:
    """Start `command` and listen until it ends, takes longer in a step than it announced, or longer in all.

    `first_seconds` is the limit until its first object. `{"start": name, "seconds": limit}` begins a step, which
    ends with the next object; any other object is something to keep.
    """
    child = Child(command)
    assert child.process.stdin is not None
    child.process.stdin.close()
    outcome, step, limit = Outcome(), "start", first_seconds
    end = time.monotonic() + total_seconds
    try:
        while (said := child.receive(min(limit, end - time.monotonic()))) is not None:
            if "start" in said:
                step, limit = said["start"], said["seconds"]
            else:
                outcome.said.append(said)
                limit = total_seconds
        reason = child.failure()
        if reason is not None:
            outcome.failed_in, outcome.reason = step, reason
    except TimeoutError as error:
        outcome.failed_in, outcome.reason = step, str(error)
    finally:
        child.kill()
    return outcome


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
