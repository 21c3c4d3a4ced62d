"""Sliding-window attention: a token sees the last `window` tokens, itself among them, and the cache keeps no more."""

import torch
from transformers.cache_utils import Cache, DynamicSlidingWindowLayer

from .configuration import CompactGPT2Config


def rolling(cache: Cache | None, config: CompactGPT2Config) -> None:
    """Let each windowed layer of a cache that rolls keep `window - 1` tokens: a new token's own is the last.

    transformers makes such a cache of the config, with one window, the widest, for all layers; what it makes to be
    cropped, for assisted decoding, holds all tokens, and stays so.
    """
    layers = cache.layers if cache is not None else []
    for index, (layer, window) in enumerate(zip(layers, config.windows, strict=False)):
        if type(layer) is DynamicSlidingWindowLayer and not layer.is_initialized and layer.sliding_window != window:
            fitted = DynamicSlidingWindowLayer(window)
            fitted.record_past = getattr(layer, "record_past", False)  # transformers 5.17 crops rolling layers too
            layers[index] = fitted


def windowed(
    mask: torch.Tensor | None, window: int, length: int, cache: Cache | None, layer: int, device: torch.device
) -> torch.Tensor | None:
    """The mask of `length` queries that see no further back than `window`: `[..., length, keys]`, boolean or, where
    `mask` is of floats, added to scores (Beltagy et al. 2020, arXiv 2004.05150, section 3.1, causal). The keys are
    those that `cache` will give to `layer` in this step.

    `mask` `[batch, 1, length, all tokens]` says what else is hidden; None: nothing, or, of several queries, what is not
    causal.
    """
    past = cache.get_seq_length(layer) if cache is not None else 0
    keys, first = cache.get_mask_sizes(length, layer) if cache is not None else (length, 0)
    if mask is not None:
        mask = mask[..., first : first + keys]
    if keys <= window and not torch.jit.is_tracing():  # a trace must mask whatever the length it was made at
        return mask
    queries = torch.arange(length, device=device) + past
    distance = queries[:, None] - (torch.arange(keys, device=device) + first)
    visible = (distance >= 0) & (distance < window)
    if mask is None:
        return visible
    return mask.masked_fill(~visible, False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min)


class Whole(Cache):
    """What the mask that all layers share sees of a cache whose layers keep unequally many tokens: the longest."""

    def __init__(self, cache: Cache, layers: int):
        super().__init__(layers=[])
        self.cache, self.count = cache, layers

    @property
    def is_compileable(self) -> bool:
        return self.cache.is_compileable

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.cache.get_seq_length()

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        sizes = (self.cache.get_mask_sizes(query_length, layer) for layer in range(self.count))
        return max(keys + first for keys, first in sizes), 0


def whole(cache: Cache | None, config: CompactGPT2Config) -> Cache | None:
    """The cache by whose length the mask of all layers is made."""
    return Whole(cache, config.n_layer) if cache is not None and any(config.windows) else cache
