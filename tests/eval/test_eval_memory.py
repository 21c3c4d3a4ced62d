"""Memory read in real child processes, and children that go wrong."""

import dataclasses
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest
import torch

from eval.errors import WorkError
from eval.memory import exercise, in_fresh_process, memory_in_fresh_process, snapshot
from eval.results import Memory

MIB = 2**20
ROOT = Path(__file__).parents[2]


def script(body: str) -> list[str]:
    """A child's command; it imports from this repository."""
    return [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n" + textwrap.dedent(body)]


PROBE = """
    import dataclasses, json
    import numpy as np, torch
    from eval.memory import exercise

    class Engine:
        device = "cpu"
        def __init__(self):
            passing = np.ones({passing} * 2**20, dtype=np.uint8)
            self.weights = np.ones({weights} * 2**20, dtype=np.uint8)
        def prefill(self, ids):
            return torch.zeros(len(ids), 3)
        decode = prefill
        def synchronize(self):
            pass

    print("noise on stdout")
    memory = exercise(Engine, torch.zeros(1, 4, dtype=torch.int64), 3)
    print(json.dumps(dataclasses.asdict(memory)))
"""


def test_what_a_child_allocates_shows() -> None:
    empty, full = (
        memory_in_fresh_process(script(PROBE.format(passing=passing, weights=weights)), timeout=120)
        for passing, weights in ((1, 1), (300, 200))
    )
    for name in ("rss", "uss"):
        assert 190 * MIB < getattr(full, name) - getattr(empty, name) < 230 * MIB
    assert full.peak_rss - empty.peak_rss > 450 * MIB  # what was freed again counts in the peak
    assert full.rss - full.baseline_rss > 190 * MIB
    assert empty.rss - empty.baseline_rss < 40 * MIB
    assert full.gpu_allocator_peak is None and full.gpu_process is None


def test_the_parents_size_does_not_show_in_the_childs_peak() -> None:
    ballast = bytearray(os.urandom(MIB)) * 700
    child = memory_in_fresh_process(script(PROBE.format(passing=1, weights=1)), timeout=120)
    assert len(ballast) == 700 * MIB and child.peak_rss < 700 * MIB


def test_snapshot_of_this_process() -> None:
    memory = snapshot(123, "cpu")
    assert memory.baseline_rss == 123
    assert 0 < memory.uss <= memory.rss <= memory.peak_rss
    if sys.platform == "linux":
        assert memory.pss is not None and memory.uss <= memory.pss <= memory.rss


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of another process is read from /proc")
def test_snapshot_of_another_process() -> None:
    body = "held = b'x' * (90 << 20); held = b'x' * (30 << 20); print(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", body], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None and child.stdout.readline()
        memory = snapshot(0, "cpu", child.pid)
        child.kill()
    assert 30 * MIB < memory.uss < 90 * MIB < memory.peak_rss < 250 * MIB


def test_exercise_reads_and_writes(engine) -> None:
    prompt = torch.arange(14).reshape(2, 7)
    memory = exercise(lambda: engine, prompt, 4)
    assert [what for _, what, _ in engine.calls] == ["prefill", "decode", "decode", "decode"]
    assert torch.equal(engine.calls[0][2], prompt)
    assert Memory(**dataclasses.asdict(memory)) == memory


@pytest.mark.gpu
def test_exercise_on_a_gpu(engine) -> None:
    engine.device = "cuda:0"
    kept = []

    def load():
        kept.append(torch.ones(100 * MIB, dtype=torch.uint8, device="cuda:0"))
        return engine

    memory = exercise(load, torch.arange(7)[None], 2)
    assert memory.gpu_allocator_peak is not None and memory.gpu_allocator_peak >= 100 * MIB
    assert memory.gpu_process is None or memory.gpu_process > memory.gpu_allocator_peak


def test_the_last_line_counts() -> None:
    assert in_fresh_process(script("print('{\"no\": 1}'); print('{\"yes\": 2}\\n\\n')"), timeout=60) == {"yes": 2}


def test_much_output_does_not_block() -> None:
    body = "sys.stderr.write('x' * 10**6); print('y' * 10**6); print('{}')"
    assert in_fresh_process(script(body), timeout=60) == {}


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ("raise ValueError('no such model')", r"failed \(exit code 1\): ValueError: no such model$"),
        ("sys.exit(3)", r"failed \(exit code 3\): $"),
        ("import os; os.kill(os.getpid(), 9)", r"killed by signal 9"),
        ("print('{}'); sys.exit('late')", r"exit code 1\): late"),
        ("print('all went well')", "line of JSON, not 'all went well'"),
        ("print('[1, 2]')", r"line of JSON, not '\[1, 2\]'"),
        ("print('{\"cut')", "line of JSON"),
        ("sys.stdout.buffer.write(bytes(range(128, 256)))", "line of JSON"),
        ("pass", "line of JSON, not ''"),
    ],
)
def test_children_that_go_wrong(body: str, told: str) -> None:
    with pytest.raises(WorkError, match=told) as caught:
        in_fresh_process(script(body), timeout=60)
    assert len(str(caught.value)) < 500


def test_a_record_of_something_else() -> None:
    with pytest.raises(WorkError, match="no memory record"):
        memory_in_fresh_process(script("print('{\"rss\": 1}')"), timeout=60)


def test_a_command_that_does_not_exist() -> None:
    with pytest.raises(WorkError, match="cannot be started: No such file"):
        in_fresh_process(["/no/such/program", "--help"], timeout=5)


HANGS = """
    import subprocess, time
    from pathlib import Path
    grandchild = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    Path({path!r}).write_text(str(grandchild.pid))
    time.sleep(600)
"""


def gone(pid: int) -> bool:
    """Whether the process has ended, or does so soon."""
    try:
        psutil.Process(pid).wait(30)
    except psutil.NoSuchProcess:
        return True
    except psutil.TimeoutExpired:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    return True


def test_a_child_that_hangs_is_stopped_with_its_children(tmp_path: Path) -> None:
    path = tmp_path / "pid"
    with pytest.raises(WorkError, match="was stopped after 10 s"):
        in_fresh_process(script(HANGS.format(path=str(path))), timeout=10)
    assert gone(int(path.read_text()))


def test_an_interrupt_stops_the_child(tmp_path: Path) -> None:
    path = tmp_path / "pid"
    inner = script(HANGS.format(path=str(path)))
    parent = subprocess.Popen(
        script(f"from eval.memory import in_fresh_process\nin_fresh_process({inner!r}, 600)"), stderr=subprocess.PIPE
    )
    try:
        while not (path.exists() and path.read_text()):
            assert parent.poll() is None
            time.sleep(0.05)
        parent.send_signal(signal.SIGINT)
        _, stderr = parent.communicate(timeout=60)
    finally:
        parent.kill()
    assert stderr.rstrip().endswith(b"KeyboardInterrupt")
    assert gone(int(path.read_text()))
