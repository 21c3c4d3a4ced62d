"""`pytest --ptx 90a`: the tests' kernels are nvcc's for that architecture, run by csrc/ptx/, in place of g++'s.

Global accesses must then lie within tensors: whatever `Tensor.data_ptr` was asked for. Seeds take the interpreter's
schedules. See docs/cuda.md, "nvcc's PTX on the CPU".
"""

import ctypes
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch

from cuda_ext import host_build, ptx_build

BULK_COPY = "HEADROOM_BULK_COPY"  # a define of the host build; nvcc's architecture decides it


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("headroom")
    group.addoption("--ptx", metavar="ARCH", help="run what nvcc makes of the kernels for ARCH (75, 80, 90a)")
    group.addoption("--ptx-report", metavar="FILE", help="with --ptx: counts of each instruction, as lines of JSON")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--ptx"):
        use(config.getoption("--ptx"))


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.config.getoption("--ptx"):
        if item.get_closest_marker("host_runtime"):
            pytest.skip("judges g++'s build and the host runtime themselves")
        ptx_build.interpreter().hr_ptx_forget_named_memory()


def pytest_unconfigure(config: pytest.Config) -> None:
    if not config.getoption("--ptx"):
        return
    interpreter = ptx_build.interpreter()
    if config.getoption("--ptx-report"):
        unknown = interpreter.hr_ptx_unknown()
        if unknown:
            print(f"\nPTX that the interpreter does not know:\n{unknown.decode()}")
        interpreter.hr_ptx_report(str(config.getoption("--ptx-report")).encode())


def use(architecture: str) -> None:
    """Every later `host_library` is nvcc's for `architecture`."""

    def library(sources: Sequence[str | Path], defines: Mapping[str, object]) -> ctypes.CDLL:
        has_bulk_copy = architecture.startswith(("9", "1"))
        if bool(defines.get(BULK_COPY, has_bulk_copy)) != has_bulk_copy:
            pytest.skip(f"sm_{architecture} has one way of fetching weights")
        return ptx_build.library(sources, architecture)

    host_build.use(library)
    ptx_build.interpreter().hr_ptx_set(b"named_memory", 1)
    name_tensors()


def name_tensors() -> None:
    """Whoever asks for a tensor's address names its memory to the interpreter."""
    name_memory, plain = ptx_build.interpreter().hr_ptx_name_memory, torch.Tensor.data_ptr

    def data_ptr(self: torch.Tensor) -> int:
        storage = self.untyped_storage()
        name_memory(storage.data_ptr(), storage.nbytes())
        return plain(self)

    torch.Tensor.data_ptr = data_ptr  # type: ignore[method-assign]
