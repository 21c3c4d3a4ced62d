"""GPT-2 on an NVIDIA GPU by kernels of our own: `Engine.from_checkpoint(folder)`.

Imports nothing of Headroom's other packages; needs torch and safetensors, and nvcc for the first use.
"""

from typing import TYPE_CHECKING, Any

from cuda_ext.errors import CheckpointError, CudaExtError

if TYPE_CHECKING:
    from cuda_ext.engine import Engine, is_available, why_not

__all__ = ["CheckpointError", "CudaExtError", "Engine", "is_available", "why_not"]


def __getattr__(name: str) -> Any:
    """The engine, imported where it is used: torch takes seconds, and a folder can be judged without it."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from cuda_ext import engine

    return getattr(engine, name)
