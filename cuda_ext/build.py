"""Compile the kernels: `python -m cuda_ext.build`, `pip install ./cuda_ext`, or on first use.

One list of sources, one list of flags. The library has a plain C surface (csrc/api.h), so it depends on no
version of torch or Python: only on its sources, the compiler and the architectures, which name its place in
the cache. It holds machine code for these architectures and PTX of the newest, from which the driver compiles for
newer GPUs. A library that was installed with the package is taken where it was built from the same sources and runs on
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
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from cuda_ext import folders
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
_CUBLASLT = "cublaslt.cpp"
_FIRST_NVCC = {90: (12, 4), 100: (12, 8), 103: (12, 9), 120: (12, 8), 110: (13, 0), 121: (12, 9)}
"""Of nvcc, the first version that compiles for an architecture; older ones are as old as the engine's own demands."""


def library() -> Path:
    """The shared library for this machine's GPUs, compiled if it is not there yet. Raises CudaExtError."""
    architectures = wanted_architectures()
    shipped = _installed(architectures)
    if shipped is not None:
        return shipped
    nvcc = find_nvcc()
    name = key(architectures, f"{_version(nvcc)} {_cublaslt_version()}")
    for folder in (folders.user_folder("cuda") / name, cache_folder() / name):  # the first may be read-only
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
    told = {"sources": key(architectures, ""), "architectures": architectures, "ptx": _newest(architectures)}
    (place / "build.json").write_text(json.dumps(told), encoding="utf-8")


def _installed(architectures: Sequence[str]) -> Path | None:
    place = Path(__file__).parent / _SHIPPED
    try:
        told = json.loads((place / "build.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    same = told.get("sources") == key(told.get("architectures", ()), "")
    runs = all(runs_on(told["architectures"], told.get("ptx"), wanted) for wanted in architectures) if same else False
    return place / LIBRARY if runs else None


def runs_on(architectures: Sequence[str], ptx: int | None, wanted: str) -> bool:
    """Whether code for `architectures`, and PTX of `ptx` if there is some, runs on a GPU of architecture `wanted`.

    Machine code runs on its own generation, from its own minor number on; that for "90a" on 9.0 alone. PTX runs on
    all that is newer (CUDA C++ Programming Guide, "Binary Compatibility", "PTX Compatibility").
    """
    gpu = _number(wanted)
    exact = any(_number(name) == gpu for name in architectures)
    same_generation = any(
        not name.endswith("a") and _number(name) // 10 == gpu // 10 and _number(name) <= gpu for name in architectures
    )
    return exact or same_generation or (ptx is not None and ptx <= gpu)


def _number(architecture: str) -> int:
    return int(architecture.rstrip("af"))


def _newest(architectures: Sequence[str]) -> int:
    return max(map(_number, architectures))


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
    raise CudaExtError(
        "nvcc was not found; install the CUDA toolkit (12.4 or later; 12.8 for Blackwell) or set CUDA_HOME"
    )


def cache_folder() -> Path:
    """Where builds and choices are kept: folders.cache_folder. Raises CudaExtError."""
    try:
        return folders.cache_folder("cuda")
    except OSError as error:
        raise CudaExtError(f"there is no place for compiled kernels: {error}") from error


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
    _check_version(nvcc, architectures)
    with (
        tempfile.TemporaryDirectory() as scratch,
        _cublaslt(nvcc) as with_cublaslt,
        ThreadPoolExecutor(os.cpu_count()) as pool,
    ):
        jobs = [(source, arch) for source in SOURCES for arch in architectures]

        def compile_one(job: tuple[str, str]) -> str:
            source, arch = job
            target = Path(scratch) / f"{Path(source).stem}-{arch}.o"
            more = with_cublaslt if source == _CUBLASLT else []
            return _run([nvcc, *FLAGS, *more, *_targets([arch]), "-Xptxas", "-v", "-c", source, "-o", str(target)])

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
    _check_version(nvcc, architectures)
    print(
        f"compiling {len(SOURCES)} CUDA sources for sm_{', sm_'.join(architectures)} ...", file=sys.stderr, flush=True
    )
    targets = [*_targets(architectures), _ptx_target(architectures)]
    with tempfile.TemporaryDirectory(dir=folder) as scratch, _cublaslt(nvcc) as with_cublaslt:
        objects = [str(Path(scratch) / f"{Path(source).stem}.o") for source in SOURCES]

        def compile_one(job: tuple[str, str]) -> None:
            more = with_cublaslt if job[0] == _CUBLASLT else []
            _run([nvcc, *FLAGS, *more, *targets, "-c", job[0], "-o", job[1]])

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(compile_one, zip(SOURCES, objects, strict=True)))
        part = Path(scratch) / path.name
        _run([nvcc, "-shared", "-cudart", "static", *objects, "-ldl", "-o", str(part)])
        part.rename(path)


def _targets(architectures: Sequence[str]) -> list[str]:
    return [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in architectures]


def _ptx_target(architectures: Sequence[str]) -> str:
    """PTX of the newest. That of "90a" would run on 9.0 alone, that of 90 runs on all that is newer."""
    newest = _newest(architectures)
    return f"-gencode=arch=compute_{newest},code=compute_{newest}"


def _check_version(nvcc: str, architectures: Sequence[str]) -> None:
    """Raises CudaExtError where this nvcc is known to be too old for one of them."""
    found = re.search(r"release (\d+)\.(\d+)", _run([nvcc, "--version"]))
    if found is None:
        return
    version = int(found[1]), int(found[2])
    for name in architectures:
        first = _FIRST_NVCC.get(_number(name))
        if first is not None and version < first:
            raise CudaExtError(
                f"nvcc {found[1]}.{found[2]} is too old for sm_{name}, which needs {first[0]}.{first[1]} or later; "
                f"install that, or set {ARCHITECTURES} to an older one, whose PTX newer GPUs run too"
            )


@contextmanager
def _cublaslt(nvcc: str) -> Iterator[list[str]]:
    """The flags that compile cublaslt.cpp with the library's header; none where no header works with this nvcc.

    torch's wheels bring it, beside all of CUDA's headers, perhaps of another version than nvcc's: so only cuBLAS's
    own are shown to nvcc, and the toolkit's are taken first.
    """
    define = "-DHEADROOM_CUBLASLT=<cublasLt.h>"
    if _CUBLASLT not in SOURCES:
        yield []
        return
    with tempfile.TemporaryDirectory() as folder:
        tries = [[define]]
        for place, header in enumerate(_wheel_headers()):
            links = Path(folder) / str(place)
            links.mkdir()
            for path in header.parent.glob("cublas*.h"):
                (links / path.name).symlink_to(path)
            tries.append([define, f"-I{links}"])
        working = next((flags for flags in tries if _compiles(nvcc, flags, Path(folder))), None)
        if working is None:
            print("cuBLASLt is left out: no header of it compiles with this nvcc", file=sys.stderr, flush=True)
        yield working or []


def _compiles(nvcc: str, flags: list[str], folder: Path) -> bool:
    try:
        _run([nvcc, *FLAGS, *flags, "-c", _CUBLASLT, "-o", str(folder / "probe.o")])
    except CudaExtError:
        return False
    return True


def _wheel_headers() -> list[Path]:
    """cublasLt.h in torch's wheels."""
    spec = importlib.util.find_spec("nvidia")
    places = spec.submodule_search_locations if spec is not None else None
    return sorted(path for place in places or () for path in Path(place).glob("*/include/cublasLt.h"))


def _cublaslt_version() -> str:
    """Names the wheels' headers; the toolkit's comes and goes with nvcc."""
    return hashlib.sha256(b"".join(path.read_bytes() for path in _wheel_headers())).hexdigest()


def _run(command: list[str]) -> str:
    result = subprocess.run(command, cwd=CSRC, capture_output=True, text=True, check=False)
    unknown = re.search(r"Unsupported gpu architecture '(?:compute|sm)_(\w+)'", result.stderr)
    if unknown is not None:
        raise CudaExtError(f"{command[0]} knows no sm_{unknown[1]}; `nvcc --list-gpu-code` tells which it does")
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
