"""What nvcc makes of the kernels, run on the CPU: PTX for one architecture on top of `csrc/ptx/`.

`library` gives what host_build's `host_library` gives, from the same sources: nvcc compiles kernels, host code and
the tests' shims to objects that carry PTX, and `csrc/ptx/cudart.cpp` stands in for libcudart. `interpreter` is the
interpreter alone, for PTX as text; it needs no nvcc. Both are kept in host_build's cache folder under the hash of
all that went into them.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from cuda_ext import build, host_build
from cuda_ext.errors import CudaExtError
from cuda_ext.host_build import CSRC, HostBuildError

ARCHITECTURES = ("75", "80", "90a")
"""Those whose PTX differs in what it can do: without cp.async, with it, and with bulk copies."""
STAND_IN, STAND_IN_FLAGS = Path("ptx/cudart.cpp"), ("-x", "c++", "-std=c++17", "-Xcompiler", "-fPIC")
# Rounding is set where an instruction asks for another than the nearest; registers change their types.
FLAGS = ["-std=c++20", "-O2", "-g1", "-fPIC", "-fno-strict-aliasing", "-ffp-contract=off", "-frounding-math"]
FLAGS += ["-Wall", "-Wextra"]
_FUNCTIONS: dict[str, tuple[list[Any], Any]] = {  # of csrc/ptx/api.h
    "load": ([ctypes.c_char_p], ctypes.c_void_p),
    "kernel": ([ctypes.c_void_p, ctypes.c_char_p], ctypes.c_void_p),
    "launch": (
        [*[ctypes.c_void_p] * 3, ctypes.c_uint32, ctypes.c_int, ctypes.c_int, ctypes.c_void_p], ctypes.c_int,
    ),
    "finish": ([], ctypes.c_int),
    "set": ([ctypes.c_char_p, ctypes.c_int64], ctypes.c_int),
    "name_memory": ([ctypes.c_void_p, ctypes.c_uint64], None),
    "forget_named_memory": ([], None),
    "rewrite": ([ctypes.c_void_p], None),
    "launches": ([], ctypes.c_uint64),
    "unknown": ([], ctypes.c_char_p),
    "report": ([ctypes.c_char_p], ctypes.c_int),
    "profile_begin": ([ctypes.c_uint32] * 3, None),
    "profile_end": ([ctypes.c_char_p], ctypes.c_int),
}  # fmt: skip


def why_not() -> str | None:
    """What keeps `library` from building here, in one sentence; None where it can."""
    try:
        host_build.compiler()
        nvcc = build.find_nvcc()
    except (HostBuildError, CudaExtError) as error:
        return str(error)
    try:
        _nvcc_object(nvcc, STAND_IN, STAND_IN_FLAGS)
    except HostBuildError as error:
        if "cuda_runtime_api.h" in str(error):
            return f"{nvcc} finds no cuda_runtime_api.h; install the toolkit's cudart headers (cuda-cudart-dev)"
        raise
    return None


@functools.cache
def interpreter() -> ctypes.CDLL:
    """The interpreter, built where it is not there yet, once a process. Raises HostBuildError."""
    sources = sorted(path for path in (CSRC / "ptx").glob("*.cpp") if path.name != STAND_IN.name)
    flags = [*FLAGS, *_processor()]
    text = b"".join(path.read_bytes() for path in sorted((CSRC / "ptx").glob("*.h")))
    with host_build.lock(host_build.cache_folder()), ThreadPoolExecutor(os.cpu_count()) as pool:
        path = _link(pool.map(lambda path: _object(path, flags, text), sources))
    loaded = host_build.typed(ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL))
    for name, (arguments, result) in _FUNCTIONS.items():
        function = getattr(loaded, f"hr_ptx_{name}")
        function.argtypes, function.restype = arguments, result
    return loaded


class Library(ctypes.CDLL):
    """A library whose functions return when all that they launched has run.

    So the launches of one call stand in a queue together, and dependent ones can overlap.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(str(path), mode=ctypes.RTLD_LOCAL)
        finish = interpreter().hr_ptx_finish

        class Function(self._FuncPtr):  # type: ignore[name-defined]
            _flags_, _restype_ = self._FuncPtr._flags_, ctypes.c_int

            def __call__(self, *arguments: Any) -> Any:
                result = super().__call__(*arguments)
                return finish() or result

        self._FuncPtr = Function


def library(
    sources: Sequence[str | Path], architecture: str, rewrite: Callable[[str], str] | None = None
) -> ctypes.CDLL:
    """`sources`, as host_library takes them, compiled by nvcc for `architecture` ("90a") and loaded.

    A call that launches returns the launches' error, as host_library's do; seeds and errors are those of the whole
    process. `rewrite` changes each module's PTX while it is loaded: tests put faults in. Raises HostBuildError with
    one sentence where a tool is missing, or with the compiler's words.
    """
    interpreter()
    with host_build.lock(host_build.cache_folder()):
        reason = why_not()
        if reason is not None:
            raise HostBuildError(reason)
        nvcc = build.find_nvcc()
        target = f"arch=compute_{architecture},code=compute_{architecture}"
        flags = [*build.FLAGS, "-no-compress", "-gencode", target]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(lambda source: _nvcc_object(nvcc, host_build.find(source), flags), sources))
        objects += [_nvcc_object(nvcc, STAND_IN, STAND_IN_FLAGS), Path(interpreter()._name)]
        path = _link(objects)
    return host_build.typed(Library(path) if rewrite is None else _rewritten(path, rewrite))


def _rewritten(path: Path, rewrite: Callable[[str], str]) -> Library:
    """A copy of a library, whose kernels are registered anew."""
    kept = []

    def rewritten(text: bytes) -> int:
        kept.append(ctypes.create_string_buffer(rewrite(text.decode()).encode()))
        return ctypes.addressof(kept[-1])

    callback = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_char_p)(rewritten)
    with tempfile.NamedTemporaryFile(suffix=".so") as copy:
        shutil.copyfile(path, copy.name)
        interpreter().hr_ptx_rewrite(callback)
        try:
            return Library(Path(copy.name))
        finally:
            interpreter().hr_ptx_rewrite(None)


def _object(source: Path, flags: list[str], headers: bytes) -> Path:
    name = source.relative_to(CSRC)
    content = hashlib.sha256(source.read_bytes() + headers).hexdigest()
    target = host_build.cache_folder() / f"{host_build.key(name, flags, host_build.version(), content)}.o"
    return host_build.make(target, [host_build.compiler(), *flags, "-c", str(name), "-o"])


def _link(objects: Iterable[Path]) -> Path:
    command = [host_build.compiler(), "-shared", "-Wl,-Bsymbolic,-z,defs", *map(str, objects), "-ldl"]
    target = host_build.cache_folder() / f"{host_build.key(*command, host_build.version())}.so"
    return host_build.make(target, [*command, "-o"])


def _nvcc_object(nvcc: str, source: Path, flags: Sequence[str]) -> Path:
    headers = (CSRC / "ptx" / "api.h").read_bytes() if source == STAND_IN else host_build.headers()
    content = hashlib.sha256((CSRC / source).read_bytes() + headers).hexdigest()
    name = host_build.key(source, [*flags], _nvcc_version(nvcc), host_build.version(), content)
    target = host_build.cache_folder() / f"{name}.o"
    return host_build.make(target, [nvcc, *flags, "-I.", "-c", str(source), "-o"])


@functools.cache
def _nvcc_version(nvcc: str) -> str:
    return build._version(nvcc)


def _processor() -> list[str]:
    """x86's own FP16 conversions and fused multiply-add where the machine has them: the same numbers, sooner."""
    cpu = Path("/proc/cpuinfo")
    if platform.machine() != "x86_64" or not cpu.is_file():
        return []
    words = set(cpu.read_text().split())
    return [f"-m{name}" for name in ("f16c", "fma", "avx2") if name in words]
