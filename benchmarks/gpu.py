"""Headroom's CUDA engine beside what torch offers, on GPT-2 124M's shape: python -m benchmarks.gpu --out DIR

Two of twelve heads pruned in each layer; random weights, which time as real ones do. Each case runs in a
process of its own; in it every subject is first compared with FP32 and then timed in turns with the others. A
subject that is wrong, breaks or hangs is left out with its reason, and the rest goes on. DIR/gpu.json holds raw
samples, machine, versions, command and date, written after each case. Ends within `--seconds`, of which most goes to
torch.compile's tuning. `--ncu` profiles the engine's kernels instead, to DIR/ncu-*.csv and DIR/kernels.md; `--nsys`
traces them, to DIR/nsys-*.
"""

import argparse
import dataclasses
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from transformers import GPT2Config

from benchmarks import kernel_table
from benchmarks.checkpoints import write_checkpoints
from benchmarks.isolated import Outcome, run
from benchmarks.roofline import bytes_per_token, prefill_operations
from benchmarks.subjects import EAGER, NO_DEPENDENT, PEER, PEER_PLAIN, Case, kinds
from eval.latency import ratio, timing
from eval.results import Timing, save_json
from pipeline import hardware
from pipeline.artifacts import git_commit, versions
from pipeline.model import CompactGPT2Config

CONTEXT, TOKENS = 512, 64
# A burst's contexts average CONTEXT.
DECODES = [Case("decode", batch, CONTEXT - TOKENS // 2, TOKENS) for batch in (1, 8, 32)]
SAMPLED = [
    Case("decode", batch, CONTEXT - TOKENS // 2, TOKENS, how)
    for batch, how in ((1, "top-p 0.95"), (8, "top-p 0.95"), (1, "top-k 40"))
]
PREFILLS = [Case("prefill", batch, length, 0) for batch, length in ((1, 512), (1, 1024), (8, 1024))]
_START_SECONDS = 60
_LEAST_SECONDS = 30
_LATER_SECONDS, _SAMPLED_SECONDS = 45, 15


class Benchmark:
    """Runs children one after the other, and keeps what they say in `record`."""

    def __init__(self, folder: Path, config: CompactGPT2Config, device: str, seconds: float, min_count: int):
        self.folder, self.config, self.device, self.min_count = folder, config, device, min_count
        self.end = time.monotonic() + seconds
        self.broken: dict[str, str] = {}
        self.record: dict[str, Any] = {"ceilings": None, "cases": [], "memory": []}

    @property
    def left(self) -> float:
        return self.end - time.monotonic()

    def child(self, seconds: float, **request: Any) -> Outcome:
        """One child; `seconds` for all of it."""
        request |= {"folder": str(self.folder), "device": self.device, "seconds": seconds - 15}
        command = [sys.executable, "-m", "benchmarks.gpu_case", json.dumps(request)]
        return run(command, first_seconds=_START_SECONDS, total_seconds=seconds)

    def ceilings(self) -> None:
        outcome = self.child(120, do="ceilings")
        found = [said["ceilings"] for said in outcome.said if "ceilings" in said]
        self.record["ceilings"] = found[0] if found else {"skipped": outcome.reason}

    def case(self, case: Case, share: float) -> None:
        """Measure one case, again without the subject that brought the child down, while time lasts."""
        entry: dict[str, Any] = {"case": dataclasses.asdict(case), "subjects": {}}
        entry["subjects"] |= {name: {"skipped": reason} for name, reason in self.broken.items() if name in kinds(case)}
        self.record["cases"].append(entry)
        end = time.monotonic() + share
        timings: dict[str, Any] = {}
        while end - time.monotonic() > (_SAMPLED_SECONDS if case.sampling else _LEAST_SECONDS) - 1:
            without = [name for name, found in entry["subjects"].items() if found.get("skipped")]
            outcome = self.child(
                end - time.monotonic(),
                do="case",
                case=entry["case"],
                without=without,
                min_count=self.min_count,
                min_seconds=0.5,
            )
            for said in outcome.said:
                if "subject" in said:
                    entry["subjects"][said.pop("subject")] = said
                timings = said.get("timings", timings)
            if outcome.failed_in is None:
                break
            reason = f"in case {case.name}: {outcome.reason}"
            if outcome.failed_in not in kinds(case):  # not one subject's fault
                entry["skipped"] = f"{outcome.failed_in}, {reason}"
                break
            entry["subjects"][outcome.failed_in] = {"skipped": reason}
            if outcome.failed_in.startswith("cuda"):  # others are only slow to compile
                self.broken[outcome.failed_in] = reason
        for name, samples in timings.items():
            entry["subjects"][name]["timing"] = samples
        entry["figures"] = figures(self.config, case, entry["subjects"], self.record["ceilings"] or {})

    def memory(self, case: Case, name: str) -> None:
        outcome = self.child(min(self.left, 150), do="memory", case=dataclasses.asdict(case), subject=name)
        found = [said for said in outcome.said if "memory" in said]
        entry = found[0] if found else {"skipped": outcome.reason or "no answer"}
        self.record["memory"].append({"case": case.name, "subject": name} | entry)


def figures(
    config: CompactGPT2Config, case: Case, subjects: Mapping[str, Any], ceilings: Mapping[str, float]
) -> dict[str, Any]:
    """Of each timed subject: microseconds, ratios over eager and the faster compiled peer, percent of the ceiling."""
    timed = {name: _timing(found["timing"]) for name, found in subjects.items() if "timing" in found}
    peer = min((name for name in (PEER, PEER_PLAIN) if name in timed), key=lambda name: timed[name].p50, default=None)
    floor = None
    if case.kind == "decode" and "bandwidth" in ceilings:
        floor = bytes_per_token(config, case.batch, case.length + case.tokens // 2) / ceilings["bandwidth"]
    elif case.kind == "prefill" and "fp16_rate" in ceilings:
        floor = prefill_operations(config, case.batch, case.length) / ceilings["fp16_rate"]
    found: dict[str, Any] = {}
    for name, mine in timed.items():
        found[name] = {"microseconds": 1e6 * mine.p50, "interval": [1e6 * bound for bound in mine.ci95]}
        for other, label in ((EAGER, "over_eager"), (peer, "over_peer")):
            if other in timed:
                found[name][label] = ratio(timed[other], mine)._asdict()
        if floor is not None:
            found[name]["percent_of_ceiling"] = 100 * floor / mine.p50
    return {"peer": peer, "floor_microseconds": None if floor is None else 1e6 * floor, "subjects": found}


def _timing(raw: Mapping[str, Any]) -> Timing:
    return timing(raw["samples"])


def report(entry: Mapping[str, Any]) -> str:
    """A case as lines of text."""
    case, found = Case(**entry["case"]), entry["figures"]["subjects"]
    lines = [f"\n{case.name}, microseconds a {'token' if case.kind == 'decode' else 'prefill'} (95 % interval)"]
    for name, subject in entry["subjects"].items():
        if name not in found:
            lines.append(f"  {name:<32} not measured: {subject.get('skipped', 'its process ended early')}")
            continue
        mine = found[name]
        low, high = mine["interval"]
        line = f"  {name:<32} {mine['microseconds']:9.1f} [{low:.1f}, {high:.1f}]"
        for label in ("over_eager", "over_peer"):
            if label in mine:
                line += f"  {label.replace('_', ' ')} {mine[label]['value']:.2f}"
        if "percent_of_ceiling" in mine:
            line += f"  {mine['percent_of_ceiling']:.0f} % of the ceiling"
        lines.append(line)
    if "skipped" in entry:
        lines.append(f"  stopped: {entry['skipped']}")
    return "\n".join(lines)


def profile(bench: Benchmark, out: Path, subject: str) -> int:
    """Each case's kernels under ncu, as CSV and as a table. Returns an exit code."""
    command = ["ncu", "--csv", "--print-units", "base", "--clock-control", "none", "--cache-control", "none"]
    command += ["--profile-from-start", "off", "--graph-profiling", "node", "--target-processes", "application-only"]
    command += ["--metrics", ",".join(kernel_table.METRICS)]
    parts, code = [], 0
    cases = [*DECODES[:2], *PREFILLS[:2]]
    for count, case in enumerate(cases):
        name = subject if case.kind == "decode" else "cuda"
        try:
            done = _traced(bench, command, case, name, bench.left / (len(cases) - count))
            (out / f"ncu-{case.name.replace(' ', '-')}.csv").write_text(done.stdout, encoding="utf-8")
            parts.append(f"## {case.name}, {name}\n\n{kernel_table.table(kernel_table.read(done.stdout))}")
        except (OSError, ValueError, subprocess.TimeoutExpired) as error:
            code = 1
            parts.append(f"## {case.name}, {name}\n\nnot profiled: {error}\n")
        (out / "kernels.md").write_text("\n".join(parts), encoding="utf-8")
    print("\n".join(parts))
    return code


def timeline(bench: Benchmark, out: Path) -> int:
    """One token in each decode mode and one prefill under nsys, to OUT/nsys-*.nsys-rep. Returns an exit code."""
    cases = [(DECODES[0], name) for name in kinds(DECODES[0]) if name.startswith("cuda")] + [(PREFILLS[1], "cuda")]
    code = 0
    for count, (case, name) in enumerate(cases):
        target = out / f"nsys-{case.name}-{name}".replace(",", "").replace(" ", "-")
        command = ["nsys", "profile", "--trace", "cuda,nvtx", "--cuda-graph-trace", "node", "--force-overwrite", "true"]
        command += ["--capture-range", "cudaProfilerApi", "--capture-range-end", "stop", "--output", str(target)]
        try:
            done = _traced(bench, command, case, name, bench.left / (len(cases) - count))
            print(
                f"{case.name}, {name}: exit code {done.returncode}\n{(done.stdout + done.stderr)[-1000:]}", flush=True
            )
            code = code or int(done.returncode != 0)
        except (OSError, subprocess.TimeoutExpired) as error:
            code = 1
            print(f"{case.name}, {name}: not traced: {error}", flush=True)
    return code


def _traced(
    bench: Benchmark, profiler: Sequence[str], case: Case, name: str, seconds: float
) -> subprocess.CompletedProcess[str]:
    """`benchmarks.gpu_case`'s trace of a case under a profiler, with NVTX ranges."""
    request = {"do": "trace", "case": dataclasses.asdict(case), "subject": name, "folder": str(bench.folder)}
    request |= {"device": bench.device}
    command = [*profiler, sys.executable, "-m", "benchmarks.gpu_case", json.dumps(request)]
    environment = {**os.environ, "HEADROOM_NVTX": "1"}
    return subprocess.run(
        command, capture_output=True, text=True, timeout=max(seconds, 1), check=False, env=environment
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all; the code is 0 where every case has a timing of the cuda engine and of the compiled peer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or "runs/gpu"))
    parser.add_argument("--seconds", type=float, default=480, help="for all of it; what does not fit is left out")
    parser.add_argument("--min-count", type=int, default=15, help="rounds a case at least")
    parser.add_argument("--ncu", action="store_true", help="profile kernels with Nsight Compute instead of timing")
    parser.add_argument("--nsys", action="store_true", help="trace a token and a prefill with Nsight Systems instead")
    parser.add_argument("--ncu-subject", default="cuda graph", help="which decode mode --ncu profiles")
    choices = parser.parse_args(arguments)
    reason = hardware.why_no_gpu()
    if reason is not None:
        print(f"error: {reason}; run this on a machine with a GPU", file=sys.stderr)
        return 2
    for tool, wanted, product in (("ncu", choices.ncu, "Compute"), ("nsys", choices.nsys, "Systems")):
        if wanted and shutil.which(tool) is None:
            print(f"error: {tool} was not found; install Nsight {product}", file=sys.stderr)
            return 2
    choices.out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + choices.seconds
    with tempfile.TemporaryDirectory() as scratch:
        config = write_checkpoints(GPT2Config(), Path(scratch))
        bench = Benchmark(Path(scratch), config, "cuda:0", end - time.monotonic(), choices.min_count)
        if choices.ncu:
            return profile(bench, choices.out, choices.ncu_subject)
        if choices.nsys:
            return timeline(bench, choices.out)
        return measure(bench, choices.out / "gpu.json")


def measure(bench: Benchmark, path: Path) -> int:
    """All cases and memories, the record saved after each."""
    bench.record |= {
        "machine": {"cpu": hardware.cpu(), "gpu": hardware.gpu()},
        "versions": versions(),
        "git_commit": git_commit(),
        "command": f"python -m benchmarks.gpu {shlex.join(sys.argv[1:])}",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    bench.ceilings()
    print(f"ceilings, measured: {bench.record['ceilings']}", flush=True)
    memories = [(DECODES[0], name) for name in kinds(DECODES[0]) if name not in (PEER, PEER_PLAIN, NO_DEPENDENT)]
    memories.append((DECODES[2], next(iter(kinds(DECODES[2])))))
    cases = [*DECODES, *PREFILLS, *SAMPLED]
    for position, case in enumerate(cases):
        # Later cases keep a little, memory too: the first ones fill torch.compile's caches.
        later = sum(_SAMPLED_SECONDS if each.sampling else _LATER_SECONDS for each in cases[position + 1 :])
        bench.case(case, bench.left - later - 15 * len(memories))
        save_json(bench.record, path)
        print(report(bench.record["cases"][-1]), flush=True)
    for case, name in memories:
        if bench.left > 20 and name not in bench.broken:
            bench.memory(case, name)
            save_json(bench.record, path)
            print(f"memory: {bench.record['memory'][-1]}", flush=True)
    print(f"\n{path}")
    return 0 if all(_whole(entry) for entry in bench.record["cases"]) else 1


def _whole(entry: Mapping[str, Any]) -> bool:
    """Whether a case has a timing of the engine, and one of the compiled peer where that takes part."""
    timed = entry["figures"]["subjects"]
    peer_is_there = entry["figures"]["peer"] or PEER not in kinds(Case(**entry["case"]))
    return bool(peer_is_there and any(name.startswith("cuda") for name in timed))


if __name__ == "__main__":
    sys.exit(main())
