"""Rotary position embedding: queries and keys are turned by their positions, and no table of positions is learned."""

import torch
from torch import nn

from .configuration import CompactGPT2Config


class Rotary(nn.Module):
    """The angles of RoPE (Su et al. 2021, arXiv 2104.09864): number i of `rotary_dim / 2` pairs turns by
    `position * rope_base^(-2 i / rotary_dim)`. It holds no weights."""

    def __init__(self, config: CompactGPT2Config):
        super().__init__()
        self.dim, self.base = config.rotary_dim, config.rope_base

    def forward(self, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`[batch, length]` int64 -> cosines and sines, FP32 `[batch, 1, length, rotary_dim]`, both halves alike."""
        # In FP32 whatever the model's dtype: FP16 cannot tell late positions apart.
        exponents = torch.arange(0, self.dim, 2, device=position_ids.device, dtype=torch.float32) / self.dim
        angles = position_ids[:, None, :, None].float() * self.base**-exponents
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos(), angles.sin()


def rotate(x: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """`x` `[batch, heads, length, head_dim]` with the first `rotary_dim` numbers of each head turned. A pair is i and
    `i + rotary_dim / 2`, as in GPT-NeoX and Llama; what lies beyond `rotary_dim` stays as it is."""
    cos, sin = (part.to(x.dtype) for part in rotation)
    dim = cos.shape[-1]
    turning = x[..., :dim]
    first, second = turning.chunk(2, dim=-1)
    turned = turning * cos + torch.cat([-second, first], dim=-1) * sin
    return turned if dim == x.shape[-1] else torch.cat([turned, x[..., dim:]], dim=-1)
