"""`make gpu` with parts that fail, hang, are killed or find no time left: real children, short limits."""

import contextlib
import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu_all
from benchmarks.parts import ABSENT, FAILED, PASSED, SKIPPED, TIMED_OUT, Part, run_parts
from pipeline import hardware


def part(name: str, body: str, seconds: float = 20, kind: str = "correctness", **more: Any) -> Part:
    return Part(name, kind, [sys.executable, "-c", f"import os, sys, time\n{body}"], seconds, **more)


def test_a_part_that_fails_hangs_or_is_killed_does_not_stop_the_next(tmp_path: Path) -> None:
    forks = (
        "import subprocess; child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "print(child.pid, flush=True); time.sleep(60)"
    )
    parts = [
        part("bad", "print('before'); print('why', file=sys.stderr); sys.exit(3)"),
        part("hangs", forks, 1.5),
        part("killed", "os.kill(os.getpid(), 9)"),
        part("dead", "pass", needs="bad"),
        Part("nowhere", "traces", ["/no/such/program"], 5),
        Part("ncu", "traces", [""], 5),
        part("refused", "print('3 skipped in 2 s')", proof=r"\d+ passed"),
        part("good", "print('12 passed')", proof=r"\d+ passed"),
    ]
    heard: list[int] = []
    results = run_parts(parts, 100, tmp_path / "logs", done=lambda found: heard.append(len(found)))
    verdicts = {result.name: (result.verdict, result.says) for result in results}
    assert verdicts["bad"] == (FAILED, "exit code 3: why")
    verdict, says = verdicts["hangs"]
    assert verdict == TIMED_OUT and says.startswith("no end within 2 s: ")
    assert verdicts["killed"] == (FAILED, "killed by signal 9: no output")
    assert verdicts["dead"] == (SKIPPED, "bad: failed")
    assert verdicts["nowhere"] == (FAILED, "/no/such/program: No such file or directory")
    assert verdicts["ncu"] == (ABSENT, "ncu is not installed")
    assert verdicts["good"] == (PASSED, "12 passed")
    assert verdicts["refused"] == (ABSENT, "3 skipped in 2 s")
    assert heard == list(range(1, 9))
    assert "before" in (tmp_path / "logs" / "bad.log").read_text()
    assert gone(int(says.split()[-1]))  # with its group


def test_the_budget_shrinks_parts_and_skips_what_no_longer_fits(tmp_path: Path) -> None:
    parts = [
        part("long", "time.sleep(60)", 2.0),
        part("shrunk", "print(sys.argv[1]); time.sleep(60)", 4.0),
        part("late", "pass", 30.0),
    ]
    parts[1] = Part("shrunk", "timings", [*parts[1].command, "{seconds}"], 4.0)
    began = time.monotonic()
    results = run_parts(parts, 4.0, tmp_path)
    assert [result.verdict for result in results] == [TIMED_OUT, TIMED_OUT, SKIPPED]
    assert results[1].says.startswith("no end within 2 s")
    assert results[2].says.endswith("s of the budget left, of its 30")
    assert time.monotonic() - began < 20  # two graces at most


def test_a_kind_ends_at_its_share(tmp_path: Path) -> None:
    parts = [part("first", "time.sleep(60)", 8), part("second", "pass", 8), part("timings", "pass", 8, "timings")]
    results = run_parts(parts, 10, tmp_path, shares={"correctness": 0.15})
    assert [result.verdict for result in results] == [SKIPPED, SKIPPED, PASSED]


def test_failed_tests_are_run_again_without_dependent_launch(tmp_path: Path) -> None:
    again = ("no dependent launch", {"HEADROOM_CUDA_DEPENDENT": "0"})
    parts = [
        part("race", "sys.exit(os.environ.get('HEADROOM_CUDA_DEPENDENT') != '0')", again=again),
        part("wrong", "sys.exit(1)", again=again),
        part("right", "pass", again=again),
    ]
    results = run_parts(parts, 60, tmp_path)
    assert [(result.name, result.verdict) for result in results] == [
        ("race", FAILED),
        ("race, no dependent launch", PASSED),
        ("wrong", FAILED),
        ("wrong, no dependent launch", FAILED),
        ("right", PASSED),
    ]


ABOUT = {
    "machine": {"cpu": {"model": "CPU", "cores": 16}, "cuda": "13.0", "driver": "580"},
    "gpus": [{"name": "NVIDIA H200", "memory": 141 * 2**30, "capability": "9.0"}] * 2,
    "used": "cuda:0",
    "versions": {"torch": "2.11"},
    "git_commit": None,
    "command": "python -m benchmarks.gpu_all",
    "date": "2026-01-01T00:00:00+00:00",
}
CASE = {"kind": "decode", "batch": 1, "length": 480, "tokens": 64}


def test_one_json_and_one_page_come_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever the timings had written when they were killed is in both; an earlier run's is not."""
    figures = {"cuda graph": {"microseconds": 190.0, "interval": [189, 191], "percent_of_ceiling": 45.0}}
    entry = {"case": CASE, "subjects": {"cuda graph": {}}, "figures": {"peer": None, "subjects": figures}}
    said = {"ceilings": {"bandwidth": 3e12, "fp16_rate": 7e14}, "cases": [entry]}
    path = tmp_path / "timings" / "gpu.json"
    path.parent.mkdir()
    path.write_text("{}")
    body = f"open({str(path)!r}, 'w').write({json.dumps(said)!r}); os.kill(os.getpid(), 9)"
    price = {"prices": {"all": 150, "copies": 90, "barriers": 61}, "phases": {"attention": 12.3}, "barriers": 61}
    trace = f"open({str(tmp_path / 'traces' / 'phases.json')!r}, 'w').write({json.dumps({'otherData': price})!r})"
    parts = [part("a", f"{trace}; print('x | y')"), part("timings", body, kind="timings")]
    code = gpu_all.drive(parts, 60, tmp_path, dict(ABOUT))
    assert code == 1 and "timings: failed" in capsys.readouterr().out
    record = json.loads((tmp_path / "gpu.json").read_text())
    assert record["timings"] == said and [each["verdict"] for each in record["parts"]] == [PASSED, FAILED]
    page = (tmp_path / "gpu.md").read_text()
    assert "2 GPUs: NVIDIA H200" in page and "| a | passed | 0 | x \\| y |" in page
    assert "| decode 5 | decode 1 x 480 | cuda graph | 95 | 190.0 | missed: 2.0 times slower |" in page
    assert "3.00 TB/s, 700 TFLOP/s" in page and "190.0 [189.0, 191.0]" in page
    assert "attention                   12.30 us a token" in page and "barriers alone 61.0, 1.00 each" in page
    assert gpu_all.drive([part("a", "pass")], 60, tmp_path, dict(ABOUT)) == 0
    assert json.loads((tmp_path / "gpu.json").read_text())["timings"] is None


def test_a_driver_that_is_ended_ends_its_part(tmp_path: Path) -> None:
    body = f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    code = (
        "import sys; from benchmarks import gpu_all; from benchmarks.parts import Part\n"
        "gpu_all.hardware.why_no_gpu = lambda: None; gpu_all.torch.cuda.device_count = lambda: 1\n"
        f"gpu_all.about = lambda device: {ABOUT!r}\n"
        f"gpu_all.all_parts = lambda out: [Part('long', 'build', {part('long', body).command!r}, 60)]\n"
        f"sys.exit(gpu_all.main(['--out', {str(tmp_path)!r}]))"
    )
    driver = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[2])
    pid = until(lambda: (tmp_path / "pid").read_text())
    driver.terminate()
    assert driver.wait(timeout=30) == 143
    assert gone(int(pid))


def until(text: Callable[[], str], seconds: float = 60) -> str:
    """What `text` says as soon as it says something."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with contextlib.suppress(OSError):
            if said := text():
                return said
        time.sleep(0.05)
    raise AssertionError("it said nothing")


def gone(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return not stat.exists() or stat.read_text().split()[2] == "Z"


def test_order_and_choice_of_parts(tmp_path: Path) -> None:
    parts = gpu_all.all_parts(tmp_path)
    order = [gpu_all.KINDS.index(each.kind) for each in parts]
    assert order == sorted(order) and len({each.name for each in parts}) == len(parts)
    files = {Path(each.command[-1]).name for each in parts if "pytest" in each.command}
    assert files == {path.name for path in (Path(__file__).parents[1] / "gpu").glob("test_*.py")}
    picked = gpu_all.chosen(parts, ["build", "timings"], ["build shims"])
    assert [each.name for each in picked] == ["build engine", "timings"]
    with pytest.raises(ValueError, match="no part is called 'speed'"):
        gpu_all.chosen(parts, [], ["speed"])


def test_the_chosen_gpu_comes_first() -> None:
    assert gpu_all.environment("cuda", 1, None) == gpu_all.environment("cuda:0", 4, "3") == {}
    assert gpu_all.environment("cuda:2", 3, None) == {"CUDA_VISIBLE_DEVICES": "2,0,1"}
    assert gpu_all.environment("cuda:1", 2, "7,5") == {"CUDA_VISIBLE_DEVICES": "5,7"}
    for wrong in ("cuda:3", "cpu", "cuda:x", "cuda:-1"):
        with pytest.raises(ValueError, match="give cuda:N, N from 0 to 2"):
            gpu_all.environment(wrong, 3, None)


def test_a_sanitizer_that_hangs_shows_what_it_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path(__file__).parents[1] / "gpu" / "test_compute_sanitizer.py"
    spec = importlib.util.spec_from_file_location("sanitizer_tests", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    tool = tmp_path / "tool"
    tool.write_text("#!/bin/sh\necho loading; echo '1 kernel so far' >&2; exec sleep 60\n")
    tool.chmod(0o755)
    monkeypatch.setattr(module, "TOOL", str(tool))
    with pytest.raises(pytest.fail.Exception, match="no end within 1 s: loading\n1 kernel so far"):
        module.under("memcheck", "script.py", timeout=1)


def test_without_a_gpu_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(hardware, "why_no_gpu", lambda: "torch sees no GPU")
    assert gpu_all.main(["--seconds", "5"]) == 2
    assert capsys.readouterr().err == "error: torch sees no GPU; run this on a machine with a GPU\n"


def test_wrong_options_are_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(hardware, "why_no_gpu", lambda: None)
    assert gpu_all.main(["--only", "speed"]) == 2
    assert capsys.readouterr().err.startswith("error: no part is called 'speed'")
