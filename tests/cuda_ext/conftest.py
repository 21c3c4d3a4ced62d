"""What the tests of kernels on the CPU share. See docs/cuda.md, "Kernels on the CPU"."""

import ctypes
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from cuda_ext import ptx_build
from cuda_ext.host_build import HostBuildError, compiler, host_library

SHIMS = Path(__file__).parent / "shims"
SEEDS = range(9)  # all tempers of the schedule once, see hr_host_seed in csrc/host/runtime.h


@pytest.fixture(scope="session", autouse=True)
def _needs_a_compiler() -> None:
    try:
        path = compiler()
    except HostBuildError as error:
        pytest.skip(str(error))
    assert shutil.which(path)


@pytest.fixture(scope="session")
def ptx_architecture(pytestconfig: pytest.Config) -> str | None:
    """Of --ptx (ptx_backend.py): "90a"; None where the kernels run on the host runtime."""
    return pytestconfig.getoption("--ptx")


@pytest.fixture
def needs_nvcc(ptx_architecture: str | None) -> None:
    """For tests that bring the PTX back end of their own."""
    if ptx_architecture is not None:
        pytest.skip("brings the PTX back end of its own")
    reason = ptx_build.why_not()
    if reason is not None:
        pytest.skip(reason)


@pytest.fixture(scope="session")
def each_seed() -> Callable[[ctypes.CDLL], Iterator[int]]:
    """`for seed in each_seed(library):` runs the body under every temper, and checks the runtime's word after it."""

    def seeds(library: ctypes.CDLL) -> Iterator[int]:
        for seed in SEEDS:
            library.hr_host_seed(seed)
            yield seed
            assert library.hr_host_error() == b"", f"seed {seed}"

    return seeds


class Ops:
    """ops.h's launchers on CPU tensors: `ops.gemm(a, weight, ...)` calls shims/ops.cpp's `hr_gemm`.

    Tensors go as pointers, None as a null pointer. A launch that fails, or that the runtime finds fault
    with, is an AssertionError.
    """

    KERNELS: tuple[str, ...] = (
        "embed", "layer_norm", "add_bias", "gemm", "kv_append", "attention_prefill", "attention_decode", "matvec",
        "sample", "advance",
    )  # fmt: skip

    def __init__(self) -> None:
        sources = [f"kernels/{name}.cu" for name in self.KERNELS]
        self.library = host_library([*sources, SHIMS / "ops.cpp"])

    def __getattr__(self, name: str) -> Callable[..., None]:
        def call(*arguments: Any) -> None:
            code = self.library[f"hr_{name}"](*(_plain(argument) for argument in arguments))
            assert code == 0, self.library.hr_host_error().decode() or f"error {code}"

        return call


def _plain(argument: Any) -> Any:
    if argument is None:
        return ctypes.c_void_p(None)
    if isinstance(argument, torch.Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    return ctypes.c_float(argument) if isinstance(argument, float) else argument


@pytest.fixture(scope="session")
def _built_ops() -> Ops:
    return Ops()


@pytest.fixture
def ops(_built_ops: Ops) -> Ops:
    """The kernels, without what an earlier test may have left: no error, and the first seed."""
    _built_ops.library.hr_host_seed(0)
    return _built_ops


@pytest.fixture(autouse=True)
def _same_numbers() -> None:
    torch.manual_seed(0)
