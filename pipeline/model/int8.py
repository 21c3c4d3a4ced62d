"""Layers over INT8 and FP16 weights, which compute in FP32: what INCQuantizer puts in the place of a model's own."""

import torch
from torch import nn
from torch.nn import functional as F


class Int8Linear(nn.Module):
    """`nn.Linear` over INT8: `weight` int8 `[out, in]`, `scale` FP32 `[out, 1]`, `bias` FP32 `[out]` or None."""

    weight: torch.Tensor
    scale: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., in]` FP32 -> `[..., out]` FP32."""
        return F.linear(x, self.weight.float() * self.scale, self.bias)


class Int8Embedding(nn.Module):
    """`nn.Embedding` that shares the INT8 rows and scales of a tied `Int8Linear`."""

    weight: torch.Tensor
    scale: torch.Tensor

    def __init__(self, head: Int8Linear):
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
