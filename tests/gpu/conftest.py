"""Kernels on the GPU, through the same shims as on the CPU (tests/cuda_ext/shims/ops.cpp), built by nvcc."""

import ctypes
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from shims import shim_library

GUARD = 4096


class Ops:
    """As the CPU tests' `ops`. What lies on the CPU is copied to the GPU, and back after the launch.

    Each copied storage stands between guard bytes, which must be the same afterwards; what lies on the GPU
    already is used as it is.
    """

    def __init__(self) -> None:
        self.library = ctypes.CDLL(str(shim_library()))

    def __getattr__(self, name: str) -> Callable[..., None]:
        def call(*arguments: Any) -> None:
            copies: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
            code = self.library[f"hr_{name}"](*(_plain(argument, copies) for argument in arguments))
            torch.cuda.synchronize()  # raises what the kernel did wrong
            assert code == 0, f"{name}: error {code}"
            for host, device in copies.values():
                size = host.numel()
                assert (device[:GUARD] == 0xFF).all() and (device[GUARD + size :] == 0xFF).all(), (
                    f"{name} wrote outside"
                )
                host.copy_(device[GUARD : GUARD + size])

        return call


def _plain(argument: Any, copies: dict[int, tuple[torch.Tensor, torch.Tensor]]) -> Any:
    if argument is None:
        return ctypes.c_void_p(None)
    if isinstance(argument, float):
        return ctypes.c_float(argument)
    if not isinstance(argument, torch.Tensor):
        return argument
    if argument.is_cuda:
        return ctypes.c_void_p(argument.data_ptr())
    storage = argument.untyped_storage()
    if storage.data_ptr() not in copies:
        host = torch.empty(0, dtype=torch.uint8).set_(storage)
        device = torch.full((host.numel() + 2 * GUARD,), 0xFF, dtype=torch.uint8, device="cuda")
        device[GUARD : GUARD + host.numel()] = host.cuda()
        copies[storage.data_ptr()] = host, device
    begin = copies[storage.data_ptr()][1].data_ptr() + GUARD
    return ctypes.c_void_p(begin + argument.storage_offset() * argument.element_size())


@pytest.fixture(scope="session")
def ops() -> Ops:
    return Ops()


@pytest.fixture(scope="session")
def each_seed() -> Callable[[ctypes.CDLL], Iterator[int]]:
    """A GPU orders threads as it likes; a few tries are a few orders."""
    return lambda library: iter(range(3))


@pytest.fixture(autouse=True)
def _same_numbers() -> None:
    torch.manual_seed(0)
