"""GPT-2 on an NVIDIA GPU by kernels of our own: `Engine.from_checkpoint(folder)`.

Imports nothing of Headroom's other packages; needs torch and safetensors, and nvcc for the first use.
"""

from cuda_ext.engine import Engine, is_available, why_not
from cuda_ext.errors import CheckpointError, CudaExtError

__all__ = ["CheckpointError", "CudaExtError", "Engine", "is_available", "why_not"]
