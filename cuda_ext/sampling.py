"""How tokens are drawn and where a sequence ends, as the kernels read it from device memory (csrc/ops.h: Sampling)."""

import struct
from dataclasses import dataclass

import torch
from torch import Tensor

from cuda_ext.errors import CudaExtError

STOP_TOKENS = 64
"""How many stop tokens there can be."""
_LAYOUT = struct.Struct(f"<Qfifii{STOP_TOKENS}i4x")
WORDS = _LAYOUT.size // 4
_LEAST = 2.0**-126  # FP32's smallest normal number: its reciprocal is still finite


@dataclass(frozen=True)
class Sampling:
    """One request's parameters; raises CudaExtError for those that cannot be.

    `temperature` 0 takes the likeliest token; `top_k` 0 and `top_p` 1 keep all. Any integer is a `seed`, modulo 2^64.
    A sequence ends at a token of `stop`, and repeats `pad` from then on.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[int, ...] = ()
    pad: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < 2**127:
            raise CudaExtError(f"temperature is {self.temperature}; give 0 (the likeliest token) or more")
        if self.top_k < 0:
            raise CudaExtError(f"top_k is {self.top_k}; give 0 (all tokens) or more")
        if not 0 < self.top_p <= 1:
            raise CudaExtError(f"top_p is {self.top_p}; give more than 0 and at most 1 (all tokens)")
        if len(self.stop) > STOP_TOKENS:
            raise CudaExtError(f"{len(self.stop)} stop tokens; {STOP_TOKENS} are the most")
        odd = [token for token in self.stop if not isinstance(token, int) or not -(2**31) <= token < 2**31]
        if odd:
            raise CudaExtError(f"stop holds {odd[0]!r}, which is no token")

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken: at 0, and where nothing else has any probability left in FP32."""
        return self.temperature < _LEAST

    def packed(self) -> Tensor:
        """int32 [WORDS] on the CPU."""
        stops = [*self.stop, *[0] * (STOP_TOKENS - len(self.stop))]
        temperature = 0.0 if self.greedy else self.temperature
        top_p = max(self.top_p, _LEAST)
        top_k = min(self.top_k, 2**31 - 1)  # all tokens of any vocabulary
        head = (self.seed % 2**64, temperature, top_k, top_p, self.pad, len(self.stop))
        return torch.frombuffer(bytearray(_LAYOUT.pack(*head, *stops)), dtype=torch.int32)
