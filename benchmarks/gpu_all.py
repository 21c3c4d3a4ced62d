"""Everything that a GPU has to say about the CUDA engine, in one call: python -m benchmarks.gpu_all --out DIR

Builds, tests, measures, traces, and looks for stray accesses last, each part in a process of its own with a limit and
a log: one that fails, hangs or is killed does not stop the next, and all of it ends within `--seconds`. DIR/gpu.json
and the page DIR/gpu.md are written after each part, so that a run cut short leaves what it found. Exit code 0: every
part passed; 1: one did not, or time ran out; 2: there is no GPU, or an option is wrong.
"""

import argparse
import json
import os
import shlex
import shutil
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks import phases
from benchmarks.gpu import report
from benchmarks.parts import ABSENT, PASSED, Part, Result, run_parts
from benchmarks.predictions import PREDICTED_ON, goals_table, predictions_table
from benchmarks.subjects import DEPENDENT
from eval.results import save_json, save_text
from pipeline import hardware
from pipeline.artifacts import git_commit, versions

BUDGET = 1500.0
SHARES = {"build": 0.25, "correctness": 0.35, "timings": 0.4, "traces": 0.2}
KINDS = ("build", "correctness", "timings", "traces", "sanitizer")
ENGINE, SHIMS = "build engine", "build shims"
_TESTS = r"\d+ passed"
_MODEL = "pipeline/assets/gpt2-mini"


def all_parts(out: Path) -> list[Part]:
    """What is run, in order."""
    python = sys.executable
    module = [python, "-m"]

    def tests(name: str, seconds: float, needs: str | None, dependent: bool = True) -> Part:
        command = [*module, "pytest", "-q", "-rs", "-m", "gpu", f"tests/gpu/test_{name}.py"]
        again = ("no dependent launch", {DEPENDENT: "0"}) if dependent else None
        return Part(f"test {name}", "correctness", command, seconds, needs=needs, again=again, proof=_TESTS)

    def sanitizer(tool: str) -> Part:
        command = [*module, "pytest", "-q", "-rs", "-m", "gpu", "-k", tool, "tests/gpu/test_compute_sanitizer.py"]
        return Part(f"sanitizer {tool}", "sanitizer", command, 240, needs=ENGINE, proof=_TESTS)

    traces = out / "traces"

    def profiler(tool: str, seconds: float) -> Part:
        program = module if shutil.which(tool) else [""]
        command = [*program, "benchmarks.gpu", f"--{tool}", "--out", str(traces), "--seconds", "{seconds}"]
        return Part(tool, "traces", command, seconds, needs=ENGINE)

    def profile(engine: str, needs: str | None) -> Part:
        command = [*module, "pipeline", "profile", _MODEL, "--engine", engine, "--device", "cuda:0"]
        command += ["--precision", "fp16", "--out", str(traces / engine)]
        return Part(f"profile {engine}", "traces", command, 90, needs=needs)

    timings = [*module, "benchmarks.gpu", "--out", str(out / "timings"), "--seconds", "{seconds}"]
    return [
        Part(ENGINE, "build", [*module, "cuda_ext.build"], 300),
        Part(SHIMS, "build", [python, "tests/gpu/shims.py"], 300),
        tests("kernels", 240, SHIMS, dependent=False),
        tests("cuda_engine", 300, ENGINE),
        tests("long_contexts", 180, ENGINE),
        tests("graphs", 150, ENGINE),
        tests("gpu_engine", 120, None, dependent=False),
        Part("timings", "timings", timings, 600, needs=ENGINE),
        Part("phases", "traces", [*module, "benchmarks.phases", "--out", str(traces)], 90, needs=ENGINE),
        profile("cuda", ENGINE),
        profile("torch", None),
        profiler("ncu", 180),
        profiler("nsys", 90),
        *(sanitizer(tool) for tool in ("memcheck", "racecheck", "initcheck")),
    ]


def chosen(parts: Sequence[Part], only: Sequence[str], skip: Sequence[str]) -> list[Part]:
    """Those of `only`, or all, without those of `skip`: kinds or names. Raises ValueError for an unknown one."""
    known = {*KINDS, *(part.name for part in parts)}
    unknown = [name for name in (*only, *skip) if name not in known]
    if unknown:
        raise ValueError(f"no part is called {unknown[0]!r}; give some of {', '.join(sorted(known))}")
    return [
        part
        for part in parts
        if (not only or {part.kind, part.name} & {*only}) and not {part.kind, part.name} & {*skip}
    ]


def environment(device: str, count: int, visible: str | None) -> dict[str, str]:
    """What makes `device` every child's first GPU, the others behind it. Raises ValueError where it is not here."""
    kind, _, index = device.partition(":")
    number = int(index or 0) if (index or "0").isdigit() else -1
    if kind != "cuda" or not 0 <= number < count:
        raise ValueError(f"device is {device!r}; give cuda:N, N from 0 to {count - 1}")
    if number == 0:
        return {}
    names = visible.split(",") if visible else [str(each) for each in range(count)]
    return {"CUDA_VISIBLE_DEVICES": ",".join([names[number], *names[:number], *names[number + 1 :]])}


def about(device: str) -> dict[str, Any]:
    """The machine, its GPUs and which of them is used, versions, command, date."""
    properties = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    first = hardware.gpu() or {}
    return {
        "machine": {"cpu": hardware.cpu(), "cuda": first.get("cuda"), "driver": first.get("driver")},
        "gpus": [
            {"name": each.name, "memory": each.total_memory, "capability": f"{each.major}.{each.minor}"}
            for each in properties
        ],
        "used": device,
        "versions": versions(),
        "git_commit": git_commit(),
        "command": f"python -m benchmarks.gpu_all {shlex.join(sys.argv[1:])}".rstrip(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def page(record: Mapping[str, Any]) -> str:
    """gpu.json as Markdown."""
    gpus = record["gpus"]
    names = ", ".join(f"{gpu['name']} ({gpu['capability']}, {gpu['memory'] / 2**30:.0f} GiB)" for gpu in gpus)
    cpu = record["machine"]["cpu"]
    lines = ["# The CUDA engine on a GPU", ""]
    lines += [f"{record['date']}, `{record['command']}`, commit {record['git_commit'] or 'unknown'}.", ""]
    lines += [f"{len(gpus)} GPU{'' if len(gpus) == 1 else 's'}: {names}; used: {record['used']}. "]
    lines[-1] += f"{cpu['model']}, {cpu['cores']} cores; driver {record['machine']['driver']}, "
    lines[-1] += ", ".join(f"{name} {version}" for name, version in record["versions"].items()) + "."
    lines += ["", "## Parts", "", "| part | verdict | seconds | |", "|---|---|---:|---|"]
    for part in record["parts"]:
        says = part["says"].replace("|", "\\|")
        lines.append(f"| {part['name']} | {part['verdict']} | {part['seconds']:.0f} | {says} |")
    timings = record["timings"] or {}
    cases = timings.get("cases", [])
    lines += ["", "## Predictions", "", f"Of docs/cuda-log.md, for an {PREDICTED_ON}; held: within a fifth.", ""]
    lines += [predictions_table(cases), "## Goals", "", goals_table(cases)]
    if record["phases"]:
        lines += ["## Inside the persistent launch", "", "```", *phases.lines(record["phases"]), "```", ""]
    lines += ["## Timings", ""]
    if not timings:
        return "\n".join([*lines, "None.", ""])
    lines += [f"Ceilings of this card, measured: {_ceilings(timings.get('ceilings') or {})}", "", "```"]
    lines += [report(entry).strip() + "\n" for entry in cases if "figures" in entry]
    lines += ["```", ""]
    return "\n".join(lines)


def _ceilings(found: Mapping[str, Any]) -> str:
    if "bandwidth" not in found:
        return f"none ({found.get('skipped', 'not reached')})."
    return f"{found['bandwidth'] / 1e12:.2f} TB/s, {found['fp16_rate'] / 1e12:.0f} TFLOP/s."


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found


def write(record: dict[str, Any], results: Sequence[Result], out: Path) -> None:
    """gpu.json and gpu.md, with whatever the timings have left by now."""
    record |= {"parts": [asdict(result) for result in results], "timings": _read(out / "timings" / "gpu.json")}
    record["phases"] = (_read(out / "traces" / "phases.json") or {}).get("otherData")
    save_json(record, out / "gpu.json")
    save_text(page(record), out / "gpu.md")


def main(arguments: Sequence[str] | None = None) -> int:
    """See this module's first lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or "runs/gpu"))
    parser.add_argument("--seconds", type=float, default=BUDGET, help="for all of it; what does not fit is skipped")
    parser.add_argument("--only", action="append", default=[], metavar="PART", help=f"{', '.join(KINDS)}, or a name")
    parser.add_argument("--skip", action="append", default=[], metavar="PART", help="likewise; both may be repeated")
    parser.add_argument("--device", default="cuda:0", help="which GPU is measured; tests of several use the others too")
    choices = parser.parse_args(arguments)
    reason = hardware.why_no_gpu()
    if reason is not None:
        print(f"error: {reason}; run this on a machine with a GPU", file=sys.stderr)
        return 2
    try:
        parts = chosen(all_parts(choices.out), choices.only, choices.skip)
        visible = environment(choices.device, torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES"))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    record = about(choices.device)  # GPUs in the order in which the caller numbers them, so before it changes
    os.environ |= visible
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # the part that runs ends first
    return drive(parts, choices.seconds, choices.out, record)


def drive(parts: Sequence[Part], seconds: float, out: Path, record: dict[str, Any]) -> int:
    """Run the parts, tell of each, keep the record. Returns an exit code."""
    (out / "traces").mkdir(parents=True, exist_ok=True)
    for earlier in ("timings/gpu.json", "traces/phases.json"):
        (out / earlier).unlink(missing_ok=True)  # would pass for this run's

    def done(results: Sequence[Result]) -> None:
        last = results[-1]
        print(f"{last.name}: {last.verdict} in {last.seconds:.0f} s; {last.says}", flush=True)
        write(record, results, out)

    results = run_parts(parts, seconds, out / "logs", shares=SHARES, done=done)
    print(out / "gpu.md")
    return 0 if all(result.verdict in (PASSED, ABSENT) for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
