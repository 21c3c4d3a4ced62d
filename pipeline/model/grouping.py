"""Grouped-query attention: several query heads read one key/value head, which makes the KV cache smaller."""

import torch
from torch import nn


class GroupedProjection(nn.Module):
    """Queries, keys and values of grouped heads (GQA: Ainslie et al. 2023, arXiv 2305.13245), each by its own matrix:
    `q` `[heads * head_dim, n_embd]`, `k` and `v` `[key/value heads * head_dim, n_embd]`."""

    def __init__(self, n_embd: int, q_width: int, kv_width: int):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(n_embd, width) for width in (q_width, kv_width, kv_width))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`[batch, length, n_embd]` -> three of `[batch, length, width]`."""
        return self.q(x), self.k(x), self.v(x)


def shared(kv: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """`[batch, key/value heads, length, head_dim]` -> `[batch, heads, ...]`: head i, `sizes[i]` times."""
    batch, heads, length, head_dim = kv.shape
    if max(sizes) == 1:
        return kv
    if min(sizes) == max(sizes):
        return kv[:, :, None].expand(-1, -1, sizes[0], -1, -1).reshape(batch, heads * sizes[0], length, head_dim)
    readers = [head for head, size in enumerate(sizes) for _ in range(size)]
    return kv.index_select(1, torch.tensor(readers, device=kv.device))
