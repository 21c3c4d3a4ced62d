"""Layers over INT8, INT4 and FP16 weights, computing in FP32: what INCQuantizer puts in the place of a model's."""

import torch
from torch import nn
from torch.nn import functional as F


class QuantizedLinear(nn.Module):
    """`nn.Linear` over integer codes: `weight` int8 `[out, in]`, whatever their `bits`; `scale` FP32 `[out, groups]`,
    one for each `in / groups` columns of a row; `bias` FP32 `[out]` or None.
    """

    weight: torch.Tensor
    scale: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None, bits: int = 8):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.bits = bits
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., in]` FP32 -> `[..., out]` FP32."""
        return F.linear(x, dequantized(self.weight, self.scale), self.bias)


def dequantized(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The FP32 weights `[out, in]` that int8 `codes` `[out, in]` and FP32 `scale` `[out, groups]` stand for."""
    grouped = codes.view(*scale.shape, -1).float()
    return grouped.mul_(scale.unsqueeze(-1)).view(codes.shape)


class QuantizedEmbedding(nn.Module):
    """`nn.Embedding` that shares the INT8 rows and the scales `[rows, 1]` of a tied `QuantizedLinear`."""

    weight: torch.Tensor
    scale: torch.Tensor

    def __init__(self, head: QuantizedLinear):
        super().__init__()
        self.register_buffer("weight", head.weight)
        self.register_buffer("scale", head.scale)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """`[...]` int64 -> `[..., in]` FP32."""
        return self.weight[ids].float() * self.scale[ids]


class HalfEmbedding(nn.Module):
    """`nn.Embedding` over FP16 rows: half the bytes of the one table that no matrix product reads."""

    weight: torch.Tensor

    def __init__(self, weight: torch.Tensor):
        super().__init__()
        self.register_buffer("weight", weight.half())

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """`[...]` int64 -> `[..., width]` FP32."""
        return self.weight[ids].float()
