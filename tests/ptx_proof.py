"""`make test-ptx`: the kernels' and the engine's tests on nvcc's PTX, for each architecture, and what they reached.

Prints for each architecture: tests, kernels executed of those there, PTX instructions executed at least once, opcodes,
warp instructions, wall time, and which of device_gpu.h's inline PTX was not executed; then the interpreter's own tests
and the mutations. `--arch 90a` takes one architecture, `--list` names each instruction that no test reached. The exit
code is 1 where a test failed, or where an opcode is not known or inline PTX not reached.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from cuda_ext import ptx_build  # noqa: E402
from cuda_ext.host_build import CSRC  # noqa: E402

FOLDER = "tests/cuda_ext"
WRAPPERS = ("host_runtime",)
"""device_gpu.h's, one by one; its kernels are not ours to count."""
ROUGH = ("gemm", "attention", "matvec")
"""Again with tensor cores that truncate and functions that are 2 ulp off: the tests' bounds hold of these too."""
KERNELS = ("norm_and_embedding", "gemm", "attention", "matvec", "sample", "persistent")
ENGINE = ("80", "90a")
"""sm_75 runs the same host code on the kernels that its own tests have shown."""
INLINE = re.compile(r"\b(?:ld|red|mma|ldmatrix|cp|mbarrier|fence|griddepcontrol)\.[\w.:]+")
"""What device_gpu.h writes in PTX itself."""
PYTEST = ("-m", "pytest", "-q", "-m", "not gpu", "-p", "no:cacheprovider")  # the slow ones too


@dataclass
class Reached:
    """Of all kernels in a report: each instruction by kernel and line, and how many warps executed it."""

    launches: Counter[str] = field(default_factory=Counter)
    executions: dict[tuple[str, int], int] = field(default_factory=dict)
    places: dict[tuple[str, int], str] = field(default_factory=dict)
    opcodes: Counter[str] = field(default_factory=Counter)
    notes: set[str] = field(default_factory=set)
    unknown: set[str] = field(default_factory=set)

    def add(self, report: Path) -> None:
        """A kernel that lies in several libraries is one."""
        for line in report.read_text().splitlines():
            told = json.loads(line)
            if "kernel" not in told:
                self.notes.update(re.sub(r", block .*", "", note) for note in told["notes"])
                self.unknown.update(filter(None, [told["unknown"]]))
                continue
            self.launches[told["kernel"]] += told["launches"]
            for number, (at, place, opcode, count, text) in enumerate(told["instructions"]):
                where = told["kernel"], number
                self.executions[where] = self.executions.get(where, 0) + count
                self.places[where] = f"{place} PTX line {at}: {text}"
                self.opcodes[opcode] += count

    def inline(self) -> set[str]:
        """device_gpu.h's own opcodes that this architecture's kernels hold."""
        return set(INLINE.findall((CSRC / "device_gpu.h").read_text())) & set(self.opcodes)

    def missed(self, opcodes: Iterable[str]) -> list[str]:
        return sorted(opcode for opcode in opcodes if self.opcodes[opcode] == 0)

    def summary(self) -> str:
        kernels = sum(count > 0 for count in self.launches.values())
        reached = sum(count > 0 for count in self.executions.values())
        opcodes = sum(count > 0 for count in self.opcodes.values())
        return (
            f"{kernels} of {len(self.launches)} kernels, {sum(self.launches.values()):,} launches, "
            f"{reached:,} of {len(self.executions):,} PTX instructions, {opcodes} of {len(self.opcodes)} opcodes, "
            f"{sum(self.executions.values()) / 1e6:,.0f} M warp instructions"
        )


def run(*arguments: str) -> tuple[bool, str]:
    """One pytest: whether all passed, and its last line; what failed is shown."""
    done = subprocess.run([sys.executable, *PYTEST, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        print(done.stdout[-6000:], done.stderr[-2000:], flush=True)
    lines = done.stdout.strip().splitlines() or [""]
    return done.returncode == 0, re.sub(r"^=+ | =+$", "", lines[-1])


def prove(architecture: str, show_missed: bool) -> bool:
    began, well, reached = time.monotonic(), True, Reached()
    parts = {"wrappers": WRAPPERS, "kernels": KERNELS, "rough": ROUGH}
    if architecture in ENGINE:
        parts |= {"engine": ("engine",), "geometry": ("geometry",)}
    with tempfile.TemporaryDirectory() as folder:
        for part, names in parts.items():
            report = Path(folder) / part
            files = [f"{FOLDER}/test_{name}.py" for name in names]
            more = ["--ptx-set", "rough=1"] if part == "rough" else ["--ptx-report", str(report)]
            if part == "geometry":
                more += ["-m", "not slow and not gpu"]  # its hundreds of other shapes are make test-slow's
            passed, said = run("--ptx", architecture, *more, *files)
            print(f"sm_{architecture:4} {part}: {said}", flush=True)
            well = well and passed
            if part != "wrappers" and report.exists():
                reached.add(report)
    print(f"sm_{architecture:4} {reached.summary()}, {time.monotonic() - began:.0f} s", flush=True)
    unproven = reached.missed(reached.inline())
    print(
        f"sm_{architecture:4} inline PTX: {len(reached.inline())} opcodes, not executed: {unproven or 'none'}; ", end=""
    )
    print(f"of all: {', '.join(reached.missed(reached.opcodes)) or 'none'}", flush=True)
    for text in sorted(reached.unknown):
        print(f"sm_{architecture:4} NOT KNOWN to the interpreter (csrc/ptx/): {text}", flush=True)
    if show_missed:
        for where, count in reached.executions.items():
            if count == 0:
                print(f"sm_{architecture:4} never executed: {reached.places[where]}")
    return well and not reached.unknown and not unproven


def main() -> int:
    parser = argparse.ArgumentParser(prog="python tests/ptx_proof.py", description=__doc__.splitlines()[0])
    parser.add_argument("--arch", choices=ptx_build.ARCHITECTURES, help="one architecture; otherwise all")
    parser.add_argument("--list", action="store_true", help="name each instruction that no test reached")
    choices = parser.parse_args()
    reason = ptx_build.why_not()
    if reason is not None:
        print(f"error: {reason}", file=sys.stderr)
        return 2
    well = [
        prove(architecture, choices.list)
        for architecture in ([choices.arch] if choices.arch else ptx_build.ARCHITECTURES)
    ]
    for name in ("ptx", "ptx_mutations"):
        began = time.monotonic()
        narrow = ["-k", choices.arch] if choices.arch and name == "ptx_mutations" else []
        passed, said = run(f"{FOLDER}/test_{name}.py", *narrow)
        print(f"test_{name}.py: {said}, {time.monotonic() - began:.0f} s", flush=True)
        well.append(passed)
    return 0 if all(well) else 1


if __name__ == "__main__":
    sys.exit(main())
