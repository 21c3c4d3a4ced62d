"""A child's crash, hang or noise costs no more than the step it happened in."""

import sys
import time

import pytest

from benchmarks.isolated import Outcome, run


def child(body: str, **limits: float) -> Outcome:
    code = f"import json, os, sys, time\ndef say(**what): print(json.dumps(what), flush=True)\n{body}"
    return run([sys.executable, "-c", code], **({"first_seconds": 20.0, "total_seconds": 20.0} | limits))


def test_what_is_said_is_kept_and_noise_is_not() -> None:
    outcome = child('say(start="a", seconds=9); print("[warning] noise"); print(7); say(result=1); say(result=2)')
    assert outcome == Outcome([{"result": 1}, {"result": 2}])


@pytest.mark.parametrize(
    ("ending", "reason"),
    [
        ('print("why", file=sys.stderr); sys.exit(3)', "exit code 3: why"),
        ("os.kill(os.getpid(), 11)", "exit code -11: no words on stderr"),
        ('raise ValueError("bad")', "exit code 1: ValueError: bad"),
    ],
)
def test_a_crash_is_the_steps_in_which_it_was(ending: str, reason: str) -> None:
    outcome = child(f'say(start="a", seconds=9); say(done=1); say(start="b", seconds=9); {ending}')
    assert outcome == Outcome([{"done": 1}], "b", reason)


def test_a_hang_ends_at_the_limit_of_its_step() -> None:
    began = time.monotonic()
    outcome = child('say(start="a", seconds=9); say(start="b", seconds=0.3); time.sleep(60)')
    assert outcome.failed_in == "b" and outcome.reason == "no answer within 0 s"
    assert time.monotonic() - began < 15


@pytest.mark.parametrize("limits", [{"first_seconds": 0.5}, {"total_seconds": 0.5}])
def test_silence_from_the_start(limits: dict[str, float]) -> None:
    assert child("time.sleep(60)", **limits).failed_in == "start"


def test_much_on_stderr_does_not_block() -> None:
    outcome = child('say(start="a", seconds=9)\nfor i in range(20000): print("x" * 100, file=sys.stderr)\nsay(end=1)')
    assert outcome == Outcome([{"end": 1}])
