"""Child processes one after the other, each with a limit and a log, all within one budget of time."""

import contextlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

PASSED, FAILED, TIMED_OUT, SKIPPED, ABSENT = "passed", "failed", "timed out", "skipped", "absent"
_GRACE = 5.0
"""Seconds between asking a process to end and killing it: for a profiler to write what it has."""
_TOLD = 0.9
"""A command hears of this share of its limit: the rest is for its start and its end."""
_WORTH = 0.25
"""A part is begun with as little as this share of its limit; with less it is skipped."""


@dataclass(frozen=True)
class Part:
    """One step: a command, the seconds that it may take, and what its environment has besides ours.

    `{seconds}` in the command becomes nine tenths of the seconds that it has, so that it can plan with fewer.
    `needs` names a part without which this one makes no sense. `again`: a suffix of the name, and variables under
    which it is run once more where it fails, as a part of its own. A command whose program is "" is absent,
    and so is a part that ends well without a match of `proof` in its last line: it could do nothing here.
    """

    name: str
    kind: str
    command: Sequence[str]
    seconds: float
    environment: Mapping[str, str] = field(default_factory=dict)
    needs: str | None = None
    again: tuple[str, Mapping[str, str]] | None = None
    proof: str = ""


@dataclass
class Result:
    """How a part ended: its verdict, and why, or the last line that it printed."""

    name: str
    kind: str
    verdict: str
    says: str = ""
    seconds: float = 0.0
    log: str | None = None


def run_parts(
    parts: Sequence[Part],
    budget: float,
    logs: Path,
    *,
    shares: Mapping[str, float] | None = None,
    done: Callable[[list[Result]], None] = lambda results: None,
) -> list[Result]:
    """Run `parts` in order within `budget` seconds; a part that fails, hangs or is killed does not stop the next.

    What is left bounds each part's limit, as does what its kind has left of its `shares` of the budget (0 to 1), so
    that tests which hang leave time for what comes after them. Where less than a quarter of its limit is left, a part
    is skipped and says so. Output goes to `logs/NAME.log`. `done` hears all results after each part.
    """
    end = time.monotonic() + budget
    results: list[Result] = []
    logs.mkdir(parents=True, exist_ok=True)
    for part in parts:
        for each in _tries(part):
            spent = sum(result.seconds for result in results if result.kind == part.kind)
            left = min(end - time.monotonic(), budget * (shares or {}).get(part.kind, 1.0) - spent)
            results.append(_one(each, left, results, logs))
            done(results)
            if results[-1].verdict not in (FAILED, TIMED_OUT):
                break
    return results


def _tries(part: Part) -> list[Part]:
    if part.again is None:
        return [part]
    suffix, environment = part.again
    return [part, replace(part, name=f"{part.name}, {suffix}", environment=environment, again=None)]


def _one(part: Part, left: float, results: Sequence[Result], logs: Path) -> Result:
    if not part.command[0]:
        return Result(part.name, part.kind, ABSENT, f"{part.name} is not installed")
    needed = next((result for result in results if result.name == part.needs), None)
    if needed is not None and needed.verdict != PASSED:
        return Result(part.name, part.kind, SKIPPED, f"{needed.name}: {needed.verdict}")
    if left < _WORTH * part.seconds:
        return Result(
            part.name, part.kind, SKIPPED, f"{max(left, 0):.0f} s of the budget left, of its {part.seconds:.0f}"
        )
    log = logs / f"{part.name.replace(', ', '-').replace(' ', '-')}.log"
    began = time.monotonic()
    verdict, says = run_logged(part.command, min(part.seconds, left), log, part.environment)
    if verdict == PASSED and re.search(part.proof, says) is None:
        verdict = ABSENT
    return Result(part.name, part.kind, verdict, says, round(time.monotonic() - began, 1), log.name)


def run_logged(
    command: Sequence[str], seconds: float, log: Path, environment: Mapping[str, str] | None = None
) -> tuple[str, str]:
    """Run a command with both its streams in `log`; at its limit, its whole process group is ended.

    Returns its verdict, and its last line, after exit code or signal where it did not pass.
    """
    filled = [word.replace("{seconds}", f"{_TOLD * seconds:.0f}") for word in command]
    with log.open("w", encoding="utf-8") as stream:
        try:
            process = subprocess.Popen(
                filled,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(environment or {})},
                start_new_session=True,
            )
        except OSError as error:
            return FAILED, f"{filled[0]}: {error.strerror}"
        try:
            code = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            return TIMED_OUT, f"no end within {seconds:.0f} s: {last_line(log)}"
        finally:
            _end_group(process)
    if code == 0:
        return PASSED, last_line(log)
    how = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
    return FAILED, f"{how}: {last_line(log)}"


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """A child's children too: nvcc's or pytest's must not run on beside the next part's timings."""
    with contextlib.suppress(ProcessLookupError):
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=_GRACE)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def last_line(log: Path) -> str:
    """What a log ends with, or that it is empty."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip()), "no output")[-300:]
