"""What ptxas makes of the kernels for one architecture: registers, spills, static shared memory."""

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from cuda_ext import build, host_build


@dataclass(frozen=True)
class Resources:
    registers: int
    spilled_bytes: int
    shared_bytes: int


def resources(architecture: str, tell: Callable[[str], None] = lambda _: None) -> dict[str, Resources]:
    """By `plain(name)`, of every kernel; kept in the cache folder. `tell` hears of progress. Raises CudaExtError."""
    nvcc = build.find_nvcc()
    found: dict[str, Resources] = {}
    for name in build.KERNELS:
        found |= _of_source(nvcc, f"kernels/{name}.cu", architecture, tell)
    return found


def plain(mangled: str) -> str:
    """Without the hashes by which nvcc tells anonymous namespaces apart: they change from build to build."""
    return re.sub(r"\d+_GLOBAL__N__[0-9a-f]+_\d+_(\w+?)_cu_[0-9a-f]{8}", r"\1.", mangled)


def parse(text: str) -> dict[str, Resources]:
    """From the words of `ptxas -v`."""
    found = {}
    for part in text.split("Compiling entry function '")[1:]:
        used = re.search(r"Used (\d+) registers(.*)", part)
        if used is None:
            continue
        spilled = sum(int(number) for number in re.findall(r"(\d+) bytes spill (?:stores|loads)", part))
        shared = re.search(r"(\d+) bytes smem", used[2])
        found[plain(part[: part.index("'")])] = Resources(int(used[1]), spilled, int(shared[1]) if shared else 0)
    return found


def _of_source(nvcc: str, source: str, architecture: str, tell: Callable[[str], None]) -> dict[str, Resources]:
    content = (build.CSRC / source).read_bytes() + host_build.headers()
    name = host_build.key(source, build.FLAGS, architecture, build._version(nvcc), hashlib.sha256(content).hexdigest())
    path = host_build.cache_folder() / f"{name}.resources.json"
    if not path.exists():
        tell(f"ptxas: {source} for sm_{architecture}")
        target = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
        command = [nvcc, *build.FLAGS, target, "-Xptxas", "-v", "-cubin", source, "-o", "/dev/null"]
        _keep(path, parse(build._run([part for part in command if part != "-Xcompiler" and part != "-fPIC"])))
    return {kernel: Resources(**fields) for kernel, fields in json.loads(path.read_text(encoding="utf-8")).items()}


def _keep(path: Path, found: dict[str, Resources]) -> None:
    part = path.with_suffix(".part")
    part.write_text(json.dumps({kernel: asdict(fields) for kernel, fields in found.items()}), encoding="utf-8")
    part.replace(path)
