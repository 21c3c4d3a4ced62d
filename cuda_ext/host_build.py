"""The CUDA kernels' own sources as a shared library for the CPU, on top of `csrc/host/`.

`host_library` compiles with g++ (or `$CXX`) and loads. Objects and libraries are kept in a cache folder under
the hash of all that went into them, so a second call costs milliseconds. `run_sanitized` runs any Python
program in a process of its own in which every `host_library` is an AddressSanitizer or UBSan build. `use` puts
another back end in g++'s place: ptx_build.py's, which runs what nvcc makes of the same sources.
"""

import ctypes
import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from cuda_ext import folders

CSRC = Path(__file__).parent / "csrc"
RUNTIME = ("host/fiber.cpp", "host/runtime.cpp")
SANITIZE = "HEADROOM_SANITIZE"  # what a library is built with where the call does not say
KEPT_DAYS = 14

# Kernels read floats as vectors, as nvcc lets them; and sums must not depend on the machine's having FMA.
FLAGS = ["-std=c++20", "-fPIC", "-fno-strict-aliasing", "-ffp-contract=off", "-fno-gnu-unique", "-DHEADROOM_HOST"]
FLAGS += ["-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Wno-missing-field-initializers", "-Wno-unused-parameter"]
SANITIZERS = {
    None: ["-O1", "-g1"],
    "address": ["-O1", "-g1", "-fsanitize=address", "-fno-omit-frame-pointer"],
    "undefined": ["-O1", "-g1", "-fsanitize=undefined", "-fno-sanitize-recover=all"],
}


Backend = Callable[[Sequence[str | Path], Mapping[str, object]], ctypes.CDLL]
"""Gives a library with host_library's own surface for (sources, defines)."""
_backend: Backend | None = None


class HostBuildError(RuntimeError):
    """There is no C++ compiler, or it refused the sources."""


def compiler() -> str:
    """The path of `$CXX` or g++. Raises HostBuildError where there is none."""
    name = os.environ.get("CXX") or "g++"
    path = shutil.which(name)
    if path is None:
        raise HostBuildError(f"no C++ compiler: `{name}` was not found; install g++ 12 or later, or set CXX")
    return path


def use(backend: Backend | None) -> None:
    """Every later `host_library` of this process comes from `backend`; None: from g++ again."""
    global _backend
    _backend = backend


def host_library(
    sources: Sequence[str | Path], sanitize: str | None = None, defines: Mapping[str, object] | None = None
) -> ctypes.CDLL:
    """The host runtime and `sources` as a loaded library.

    `sources` are paths, or names within `csrc/` such as "kernels/layer_norm.cu". `sanitize` is None, "address"
    or "undefined"; an AddressSanitizer build can only be loaded under `run_sanitized`, within which its
    sanitizer is the default. `defines` become -D flags. `hr_host_seed` and `hr_host_error` have their types set.
    Raises HostBuildError with the compiler's words, FileNotFoundError, ValueError.
    """
    if _backend is not None:
        return _backend(sources, defines or {})
    sanitize = sanitize or os.environ.get(SANITIZE) or None
    if sanitize not in SANITIZERS:
        raise ValueError(f"sanitize is {sanitize!r}, not one of {list(SANITIZERS)}")
    flags = [*FLAGS, *SANITIZERS[sanitize], *_half_conversions()]
    defined = [*flags, *(f"-D{name}={value}" for name, value in (defines or {}).items())]
    with lock(cache_folder()):
        objects = [_object(Path(name), flags) for name in RUNTIME]
        objects += [_object(find(name), defined) for name in sources]
        library = _link(objects, SANITIZERS[sanitize])
    return typed(ctypes.CDLL(str(library), mode=ctypes.RTLD_LOCAL))


def typed(library: ctypes.CDLL) -> ctypes.CDLL:
    """`library`, with the types of the two functions that every back end has."""
    library.hr_host_seed.argtypes = [ctypes.c_uint64]
    library.hr_host_seed.restype = None
    library.hr_host_error.argtypes = []
    library.hr_host_error.restype = ctypes.c_char_p
    return library


def run_sanitized(
    arguments: Sequence[str], sanitize: str = "address", timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """Runs `python *arguments` with sanitized host libraries; a stray access ends it with a code other than 0.

    The report is in `stderr`. Tensors of torch end exactly where AddressSanitizer's redzone begins. Raises
    HostBuildError where the compiler has no such runtime.
    """
    environment = dict(os.environ, PYTHONMALLOC="malloc", **{SANITIZE: sanitize})
    environment["ASAN_OPTIONS"] = "detect_leaks=0:abort_on_error=0:exitcode=66"
    environment["UBSAN_OPTIONS"] = "halt_on_error=1:print_stacktrace=1:exitcode=66"
    if sanitize == "address":
        # Its allocator has to be the first library; libstdc++ lets it find __cxa_throw.
        environment["LD_PRELOAD"] = " ".join(_runtime_library(name) for name in ("libasan.so", "libstdc++.so"))
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout, check=False)


def cache_folder() -> Path:
    """Where builds are kept: folders.cache_folder. Raises HostBuildError."""
    try:
        return folders.cache_folder("host")
    except OSError as error:
        raise HostBuildError(f"there is no place for builds: {error}") from error


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """One build at a time. The system lets go of the lock when its holder dies, so it cannot go stale."""
    with (folder / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def find(source: str | Path) -> Path:
    """The path as seen from within csrc, where compilers run: a build does not depend on where csrc lies."""
    if (CSRC / source).is_file():
        return Path(source)
    if Path(source).is_file():
        return Path(source).absolute()
    raise FileNotFoundError(f"{source} is neither in {CSRC} nor a file")


def _half_conversions() -> list[str]:
    """x86's own FP16 conversions where the machine has them: the same rounding as without, 10 times faster."""
    cpu = Path("/proc/cpuinfo")
    has = platform.machine() == "x86_64" and cpu.is_file() and " f16c " in cpu.read_text()
    return ["-mf16c"] if has else []


def headers() -> bytes:
    """The content of all headers that kernels and their tests see: whichever changes, all is compiled anew."""
    return b"".join(path.read_bytes() for path in sorted(CSRC.rglob("*.h")) if path.parent.name != "ptx")


def key(*parts: object) -> str:
    """Names a build after all that goes into it."""
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()[:24]


def _object(source: Path, flags: list[str]) -> Path:
    # The optimiser earns its time in the runtime, which is compiled once, not in kernels.
    flags = [*flags, "-O2"] if source.parent.name == "host" else flags
    content = (CSRC / source).read_bytes() + headers()
    target = cache_folder() / f"{key(source, flags, version(), hashlib.sha256(content).hexdigest())}.o"
    return make(target, [compiler(), *flags, "-I.", "-x", "c++", "-c", str(source), "-o"])


def _link(objects: list[Path], flags: list[str]) -> Path:
    target = cache_folder() / f"{key(version(), *(path.name for path in objects), *flags)}.so"
    # An undefined name is an error of the build, not of the load; sanitizers leave theirs open.
    strict = [] if any("sanitize" in flag for flag in flags) else ["-Wl,-z,defs"]
    return make(target, [compiler(), "-shared", "-Wl,-Bsymbolic", *strict, *flags, *map(str, objects), "-lm", "-o"])


def make(target: Path, command: list[str]) -> Path:
    """Runs `command` with a temporary name at its end, which becomes `target` if all went well."""
    if target.exists():
        os.utime(target)
        return target
    _forget_old(target.parent)
    part = target.with_suffix(f".{os.getpid()}.part")
    result = subprocess.run([*command, str(part)], cwd=CSRC, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        part.unlink(missing_ok=True)
        raise HostBuildError(f"{' '.join(command)}\n{result.stderr}")
    part.rename(target)
    return target


def _forget_old(folder: Path) -> None:
    for path in folder.iterdir():
        if path.suffix in {".o", ".so", ".part"} and path.stat().st_mtime < time.time() - KEPT_DAYS * 86400:
            path.unlink(missing_ok=True)


def version() -> str:
    """Of the C++ compiler: its path and when it was installed."""
    path = compiler()
    return f"{path} {Path(path).resolve()} {Path(path).stat().st_mtime_ns}"


def _runtime_library(name: str) -> str:
    command = [compiler(), f"-print-file-name={name}"]
    path = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    if not Path(path).is_absolute():  # the compiler repeats the name of what it does not have
        raise HostBuildError(f"{compiler()} has no {name}: install its sanitizer runtime")
    return str(Path(path).resolve())
