"""`pytest --ptx 90a`: the tests' kernels are nvcc's for that architecture, run by csrc/ptx/, in place of g++'s.

Global accesses must then lie within tensors: whatever `Tensor.data_ptr` was asked for. Seeds take the interpreter's
schedules. See docs/cuda.md, "nvcc's PTX on the CPU".
"""

import ctypes
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
import torch

from cuda_ext import host_build, ptx_build

BULK_COPY = "HEADROOM_BULK_COPY"  # a define of the host build; nvcc's architecture decides it
rewrite: Callable[[str], str] | None = None
"""What libraries that are loaded from now on go through: test_ptx_mutations.py puts faults in."""
_plain_data_ptr = torch.Tensor.data_ptr


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("headroom")
    group.addoption("--ptx", metavar="ARCH", help="run what nvcc makes of the kernels for ARCH (75, 80, 90a)")
    group.addoption(
        "--ptx-set",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        help="with --ptx: a setting of csrc/ptx/settings.h",
    )
    group.addoption("--ptx-report", metavar="FILE", help="with --ptx: counts of each instruction, as lines of JSON")


def pytest_configure(config: pytest.Config) -> None:
    architecture = config.getoption("--ptx")
    if architecture is None:
        return
    if architecture not in ptx_build.ARCHITECTURES:
        raise pytest.UsageError(f"--ptx {architecture}: give one of {', '.join(ptx_build.ARCHITECTURES)}")
    reason = ptx_build.why_not()
    if reason is not None:
        raise pytest.UsageError(f"--ptx {architecture}: {reason}")
    use(architecture)
    for setting in config.getoption("--ptx-set"):
        name, _, value = setting.partition("=")
        if ptx_build.interpreter().hr_ptx_set(name.encode(), int(value)) != 0:
            raise pytest.UsageError(f"--ptx-set {setting}: no such setting (csrc/ptx/settings.h)")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.config.getoption("--ptx") is None:
        return
    if item.get_closest_marker("host_runtime"):
        pytest.skip("judges g++'s build and the host runtime themselves")
    ptx_build.interpreter().hr_ptx_forget_named_memory()


def pytest_unconfigure(config: pytest.Config) -> None:
    if config.getoption("--ptx") is None:
        return
    host_build.use(None)
    torch.Tensor.data_ptr = _plain_data_ptr  # type: ignore[method-assign]
    interpreter = ptx_build.interpreter()
    for setting in ("named_memory=0", *config.getoption("--ptx-set")):
        interpreter.hr_ptx_set(setting.partition("=")[0].encode(), 0)
    if config.getoption("--ptx-report"):
        interpreter.hr_ptx_report(str(config.getoption("--ptx-report")).encode())


def use(architecture: str) -> None:
    """Every later `host_library` is nvcc's for `architecture`; whoever asks for a tensor's address names its memory."""

    def library(sources: Sequence[str | Path], defines: Mapping[str, object]) -> ctypes.CDLL:
        has_bulk_copy = architecture.startswith("9")
        if bool(defines.get(BULK_COPY, has_bulk_copy)) != has_bulk_copy:
            pytest.skip(f"sm_{architecture} has one way of fetching weights")
        return ptx_build.library(sources, architecture, rewrite)

    name_memory = ptx_build.interpreter().hr_ptx_name_memory

    def data_ptr(self: torch.Tensor) -> int:
        storage = self.untyped_storage()
        name_memory(storage.data_ptr(), storage.nbytes())
        return _plain_data_ptr(self)

    host_build.use(library)
    ptx_build.interpreter().hr_ptx_set(b"named_memory", 1)
    torch.Tensor.data_ptr = data_ptr  # type: ignore[method-assign]
