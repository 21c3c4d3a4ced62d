"""Compile the kernels: `python -m cuda_ext.build`, `pip install ./cuda_ext`, or on first use.

One list of sources, one list of flags. The library has a plain C surface (csrc/api.h), so it depends on no
version of torch or Python: only on its sources, the compiler and the architectures, which name its place in
the cache. A library that was installed with the package is taken where it was built from the same sources, for
the GPUs that are here. `--check` compiles every kernel for every supported architecture without a GPU, and fails where
registers spill to memory.
"""

import argparse
import fcntl
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cuda_ext.errors import CudaExtError

CSRC = Path(__file__).parent / "csrc"
KERNELS = [
    *("embed", "layer_norm", "kv_append", "gemm", "attention_prefill", "attention_decode", "decode_persistent"),
    *("matvec", "add_bias", "sample", "advance"),
]
SOURCES = [*(f"kernels/{name}.cu" for name in KERNELS), "cublaslt.cpp", "model.cpp", "api.cpp"]
FLAGS = ["-std=c++17", "-O3", "-lineinfo", "-x", "cu", "-Xcompiler", "-fPIC"]
CHECKED = ("75", "80", "90a", "120")
INSTALLED = ("75", "80", "86", "89", "90a", "100", "120")  # by pip, unless the environment names others
LIBRARY = "libheadroom_cuda.so"
ARCHITECTURES = "HEADROOM_CUDA_ARCHS"
_SHIPPED = "compiled"


def library() -> Path:
    """The shared library for this machine's GPUs, compiled if it is not there yet. Raises CudaExtError."""
    architectures = wanted_architectures()
    shipped = _installed(architectures)
    if shipped is not None:
        return shipped
    nvcc = find_nvcc()
    folder = cache_folder() / key(architectures, _version(nvcc))
    path = folder / LIBRARY
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the system lets go of it when its holder dies
        if not path.exists():
            _compile(nvcc, architectures, folder, path)
    return path


def install(folder: Path) -> None:
    """Compile into an installation's copy of this package, for INSTALLED or those named in the environment."""
    architectures = wanted_architectures() if os.environ.get(ARCHITECTURES) else INSTALLED
    place = folder / _SHIPPED
    place.mkdir(parents=True, exist_ok=True)
    _compile(find_nvcc(), architectures, place, place / LIBRARY)
    told = {"sources": key(architectures, ""), "architectures": architectures}
    (place / "build.json").write_text(json.dumps(told), encoding="utf-8")


def _installed(architectures: Sequence[str]) -> Path | None:
    place = Path(__file__).parent / _SHIPPED
    try:
        told = json.loads((place / "build.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    same = told["sources"] == key(told["architectures"], "")
    return place / LIBRARY if same and set(architectures) <= set(told["architectures"]) else None


def wanted_architectures() -> tuple[str, ...]:
    """From $HEADROOM_CUDA_ARCHS ("80;90a"), else those of the GPUs that are here. Raises CudaExtError."""
    named = re.split(r"[;, ]+", os.environ.get(ARCHITECTURES, "").strip())
    if named != [""]:
        bad = [name for name in named if not re.fullmatch(r"\d{2,3}[af]?", name) or int(name.rstrip("af")) < 75]
        if bad:
            raise CudaExtError(f"{ARCHITECTURES}: {bad[0]!r} is none; give numbers from 75 on, as in '80;90a'")
        return tuple(named)
    import torch

    if not torch.cuda.is_available():
        raise CudaExtError(f"no GPU to build for; name architectures in {ARCHITECTURES}, as in '80;90a'")
    found = {torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())}
    too_old = [f"{major}.{minor}" for major, minor in found if (major, minor) < (7, 5)]
    if too_old:
        raise CudaExtError(f"compute capability {too_old[0]} is too old; 7.5 (Turing) is the first supported")
    return tuple(sorted("90a" if found_ == (9, 0) else f"{found_[0]}{found_[1]}" for found_ in found))


def find_nvcc() -> str:
    """nvcc of $CUDA_HOME, $PATH or /usr/local/cuda. Raises CudaExtError."""
    home = os.environ.get("CUDA_HOME")
    for candidate in ([f"{home}/bin/nvcc"] if home else []) + ["nvcc", "/usr/local/cuda/bin/nvcc"]:
        path = shutil.which(candidate)
        if path:
            return path
    raise CudaExtError("nvcc was not found; install the CUDA toolkit (12.4 or later) or set CUDA_HOME")


def cache_folder() -> Path:
    """Below $XDG_CACHE_HOME or ~/.cache; the temporary folder where that cannot be written."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    folder = base / "headroom" / "cuda"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        folder = Path(tempfile.gettempdir()) / f"headroom-cuda-{os.getuid()}"
        folder.mkdir(exist_ok=True)
    return folder


def key(architectures: Sequence[str], compiler: str) -> str:
    """Names a build: sources, flags, architectures, compiler."""
    digest = hashlib.sha256()
    for path in sorted(CSRC.rglob("*")):
        if path.is_file() and path.parent.name not in ("host", "ptx"):  # those are for tests
            digest.update(str(path.relative_to(CSRC)).encode() + b"\0" + path.read_bytes())
    digest.update(repr((FLAGS, tuple(architectures), compiler)).encode())
    return digest.hexdigest()[:24]


def check(nvcc: str, architectures: Sequence[str]) -> list[str]:
    """Compile each kernel file for each architecture; returns one line for each kernel that spills.

    Prints a line for each file and architecture: the most registers of its kernels, and its spills.
    """
    bad = []
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = [(source, arch) for source in SOURCES for arch in architectures]

        def compile_one(job: tuple[str, str]) -> str:
            source, arch = job
            target = Path(scratch) / f"{Path(source).stem}-{arch}.o"
            return _run([nvcc, *FLAGS, *_targets([arch]), "-Xptxas", "-v", "-c", source, "-o", str(target)])

        for (source, arch), output in zip(jobs, pool.map(compile_one, jobs), strict=True):
            registers = [int(number) for number in re.findall(r"Used (\d+) registers", output)]
            spills = [int(number) for number in re.findall(r"(\d+) bytes spill (?:stores|loads)", output)]
            if registers:
                line = f"{source:<32} sm_{arch:<4} {len(registers):3d} kernels, at most {max(registers):3d} registers"
                print(line, "" if not any(spills) else f"SPILLS up to {max(spills)} bytes", flush=True)
            if any(spills):
                bad.append(f"{source} for sm_{arch}: {max(spills)} bytes spilled")
    return bad


def _compile(nvcc: str, architectures: Sequence[str], folder: Path, path: Path) -> None:
    print(
        f"compiling {len(SOURCES)} CUDA sources for sm_{', sm_'.join(architectures)} ...", file=sys.stderr, flush=True
    )
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        objects = [str(Path(scratch) / f"{Path(source).stem}.o") for source in SOURCES]

        def compile_one(job: tuple[str, str]) -> None:
            _run([nvcc, *FLAGS, *_includes(), *_targets(architectures), "-c", job[0], "-o", job[1]])

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(compile_one, zip(SOURCES, objects, strict=True)))
        part = Path(scratch) / path.name
        _run([nvcc, "-shared", "-cudart", "static", *objects, "-ldl", "-o", str(part)])
        part.rename(path)


def _targets(architectures: Sequence[str]) -> list[str]:
    return [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in architectures]


def _includes() -> list[str]:
    """Where cublasLt.h may lie besides the toolkit: torch's own wheels bring it."""
    spec = importlib.util.find_spec("nvidia")
    places = spec.submodule_search_locations if spec is not None else None
    found = [path.parent for place in places or () for path in Path(place).glob("*/include/cublasLt.h")]
    return [f"-I{folder}" for folder in found]


def _run(command: list[str]) -> str:
    result = subprocess.run(command, cwd=CSRC, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise CudaExtError(f"nvcc failed: {' '.join(command)}\n{result.stderr[-4000:]}")
    return result.stdout + result.stderr


def _version(nvcc: str) -> str:
    return _run([nvcc, "--version"]).splitlines()[-1]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m cuda_ext.build", description="Compile the CUDA kernels into the user's cache."
    )
    parser.add_argument(
        "--check", action="store_true", help=f"compile for sm_{', sm_'.join(CHECKED)}, no GPU needed; fail on spills"
    )
    choices = parser.parse_args(arguments)
    try:
        if choices.check:
            bad = check(find_nvcc(), CHECKED)
            print("\n".join(bad), file=sys.stderr)
            return 1 if bad else 0
        print(library())
    except CudaExtError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
