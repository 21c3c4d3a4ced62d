"""Named NVTX ranges for Nsight Systems where HEADROOM_NVTX=1 and torch is built for CUDA; nothing otherwise."""

import functools
import os
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

NVTX = "HEADROOM_NVTX"
_P = ParamSpec("_P")
_R = TypeVar("_R")


def ranged(name: str) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """A decorator: calls lie in a range of this name. Read once, at import: without it a call costs nothing."""

    def decorate(function: Callable[_P, _R]) -> Callable[_P, _R]:
        if os.environ.get(NVTX) != "1" or torch.version.cuda is None:
            return function

        @functools.wraps(function)
        def call(*arguments: _P.args, **named: _P.kwargs) -> _R:
            with torch.cuda.nvtx.range(f"headroom: {name}"):
                return function(*arguments, **named)

        return call

    return decorate
