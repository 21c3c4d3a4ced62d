"""Sliding-window attention: a token sees the last `window` tokens, itself among them, and the cache keeps no more."""

import torch
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer, StaticCache

from .configuration import CompactGPT2Config


def rolling(cache: Cache | None, config: CompactGPT2Config) -> None:
    """Let an empty dynamic cache keep `window - 1` tokens in each windowed layer: a new token's own is the last.

    Raises `ValueError` for a static cache, whose keys lie in another order.
    """
    if cache is None or not any(config.windows):
        return
    if isinstance(cache, StaticCache):
        raise ValueError("a static cache does not fit sliding windows: leave cache_implementation out")
    if isinstance(cache, DynamicCache) and not cache.get_seq_length():
        cache.layers = [
            DynamicLayer() if window is None else DynamicSlidingWindowLayer(window) for window in config.windows
        ]


def windowed(
    mask: torch.Tensor | None, window: int, length: int, keys: int, device: torch.device
) -> torch.Tensor | None:
    """The mask of `length` queries, the last of `keys` tokens, that see no further back than `window`:
    `[..., length, keys]`, boolean or, where `mask` is of floats, added to scores (Beltagy et al. 2020,
    arXiv 2004.05150, section 3.1, causal).

    `mask` `[batch, 1, length, at least keys]` says what else is hidden, and ends where `keys` end; None: nothing, or,
    of several queries, what is not causal.
    """
    if mask is not None:
        mask = mask[..., -keys:]
    if keys <= window and not torch.jit.is_tracing():  # a trace must mask whatever the length it was made at
        return mask
    distance = torch.arange(length, device=device)[:, None] + keys - length - torch.arange(keys, device=device)
    visible = (distance >= 0) & (distance < window)
    if mask is None:
        return visible
    return mask.masked_fill(~visible, False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min)


class Whole(DynamicCache):
    """What a rolling cache is to the mask that all layers share: one that has kept all `seen` tokens."""

    def __init__(self, seen: int):
        super().__init__()
        self.seen = seen

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.seen + query_length, 0


def whole(cache: Cache | None, config: CompactGPT2Config) -> Cache | None:
    """The cache by whose length the mask of all layers is made."""
    return Whole(cache.get_seq_length()) if cache is not None and any(config.windows) else cache
