"""Nsight Compute's CSV as a Markdown table, one line a kernel: python -m benchmarks.kernel_table FILE.csv

The file is what this prints (`python -m benchmarks.gpu --ncu` runs it):

    ncu --csv --print-units base --clock-control none --cache-control none --metrics METRICS PROGRAM

with METRICS the names of `METRICS` below, joined by commas. Both of ncu's layouts are read: a line a metric
(the default page) and a line a launch (`--page raw`, with its line of units). Launches of one kernel are
joined: times are summed, percentages are averaged over time.
"""

import argparse
import csv
import io
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

TIME = "gpu__time_duration.sum"
BYTES = "dram__bytes.sum"
ROOFS = {
    "DRAM": "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed",
    "tensor": "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed",
    "L2": "lts__throughput.avg.pct_of_peak_sustained_elapsed",
    "SM": "sm__throughput.avg.pct_of_peak_sustained_elapsed",
}
METRICS = (TIME, BYTES, *ROOFS.values())
NEAR = 60.0
"""Percent of a peak from which on a kernel is said to stand under that roof; below, latency holds it back."""
_UNITS = {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1.0}
_UNITS |= {"nsecond": 1e-9, "usecond": 1e-6, "msecond": 1e-3, "second": 1.0}
_UNITS |= {"byte": 1.0, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9, "%": 1.0}


@dataclass
class Kernel:
    """All launches of one kernel. `percent` of each peak in `ROOFS` that was read."""

    name: str
    launches: int
    seconds: float
    bytes: float
    percent: dict[str, float]

    @property
    def roof(self) -> str:
        """The peak it comes closest to, or "latency" where it is far from all."""
        if not self.percent:
            return "not read"
        name, value = max(self.percent.items(), key=lambda item: item[1])
        return name if value >= NEAR else "latency"


def read(text: str) -> list[Kernel]:
    """The kernels of ncu's output, longest total time first. Raises `ValueError` where it holds no table."""
    launches: dict[str, dict[str, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    for launch, name, metric, value in _values(text):
        launches[short(name)][launch][metric] = value
    kernels = []
    for name, by_launch in launches.items():
        rows = [row for row in by_launch.values() if TIME in row]
        total = sum(row[TIME] for row in rows)
        if not total:
            continue
        percent = {}
        for roof, metric in ROOFS.items():
            read_ = [row for row in rows if metric in row]
            if read_:
                percent[roof] = sum(row[metric] * row[TIME] for row in read_) / sum(row[TIME] for row in read_)
        kernels.append(Kernel(name, len(rows), total, sum(row.get(BYTES, 0.0) for row in rows), percent))
    if not kernels:
        raise ValueError(f"no kernel with {TIME} in it: give the output of ncu --csv --metrics {','.join(METRICS)}")
    return sorted(kernels, key=lambda kernel: -kernel.seconds)


def table(kernels: Iterable[Kernel]) -> str:
    """Markdown: time, share of it, bytes, percent of each peak, and which roof the kernel stands under."""
    rows = list(kernels)
    total = sum(kernel.seconds for kernel in rows)
    lines = [
        "| kernel | launches | time, us | share | DRAM, MB | "
        + " | ".join(f"{roof}, %" for roof in ROOFS)
        + " | roof |"
    ]
    lines += ["|---|" + "---:|" * (4 + len(ROOFS)) + "---|"]
    for kernel in rows:
        percents = [f"{kernel.percent[roof]:.0f}" if roof in kernel.percent else "" for roof in ROOFS]
        numbers = [f"{kernel.launches}", f"{1e6 * kernel.seconds:.1f}", f"{100 * kernel.seconds / total:.0f} %"]
        numbers += [f"{kernel.bytes / 1e6:.2f}", *percents]
        lines.append(f"| `{kernel.name}` | {' | '.join(numbers)} | {kernel.roof} |")
    lines.append(
        f"| **all** | {sum(kernel.launches for kernel in rows)} | {1e6 * total:.1f} |" + " |" * (3 + len(ROOFS))
    )
    return "\n".join(lines) + "\n"


def short(name: str) -> str:
    """A kernel's name without return type, namespaces and parameters; template arguments stay."""
    name = re.sub(r"\(anonymous namespace\)::|<unnamed>::|\bheadroom::", "", name).removeprefix("void ")
    name = re.sub(r"\((?:int|bool|unsigned int|headroom::\w+|\w+)\)(?=\d)", "", name)  # "(int)8" as a template argument
    depth = 0
    for place, letter in enumerate(name):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            return name[:place]
    return name


def _values(text: str) -> Iterator[tuple[str, str, str, float]]:
    """Launch, kernel, metric and value in seconds, bytes or percent."""
    lines = [line for line in text.splitlines() if line.startswith('"')]  # ncu's own words begin with ==PROF==
    rows = csv.DictReader(io.StringIO("\n".join(lines)))
    fields = rows.fieldnames or []
    if "Metric Name" in fields:
        for row in rows:
            value = _number(row["Metric Value"], row["Metric Unit"])
            if value is not None:
                yield row["ID"], row["Kernel Name"], row["Metric Name"], value
        return
    units = next(rows, {}) if "Kernel Name" in fields else {}
    for row in rows:
        for metric in METRICS:
            value = _number(row.get(metric) or "", units.get(metric) or "")
            if value is not None:
                yield row["ID"], row["Kernel Name"], metric, value


def _number(value: str, unit: str) -> float | None:
    """`None` for "n/a" and for units that this table does not use."""
    try:
        return float(value.replace(",", "")) * _UNITS[unit]
    except (ValueError, KeyError):
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    try:
        sys.stdout.write(table(read(parser.parse_args().file.read_text(encoding="utf-8"))))
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
