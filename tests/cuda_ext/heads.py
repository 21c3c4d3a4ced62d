"""What the references of attention share: heads that turn with their position, and groups that share keys."""

import torch


def angles_of(positions: int, dims: int) -> torch.Tensor | None:
    """Cosines and sines, FP32 [positions, dims / 2, 2]."""
    angles = torch.arange(positions)[:, None] * 100.0 ** -(torch.arange(0, dims, 2) / max(dims, 1))
    return torch.stack([angles.cos(), angles.sin()], -1) if dims else None


def turned(x: torch.Tensor, angles: torch.Tensor | None, position: int) -> torch.Tensor:
    """Heads [.., head_dim] in FP64, their first numbers turned in pairs (2i, 2i + 1), as complex numbers are."""
    x = x.double().clone()
    if angles is not None:
        pairs = x[..., : 2 * angles.shape[1]].unflatten(-1, (-1, 2)).contiguous()
        at = torch.view_as_complex(angles[min(position, len(angles) - 1)].double())
        x[..., : 2 * angles.shape[1]] = torch.view_as_real(torch.view_as_complex(pairs) * at).flatten(-2)
    return x


def kv_head_of(readers: list[int]) -> torch.Tensor | None:
    """None, where each query head has a key/value head of its own."""
    if max(readers) == 1:
        return None
    return torch.tensor([head for head, count in enumerate(readers) for _ in range(count)], dtype=torch.int32)
