"""The two numbers behind every GPU figure: what must be moved and computed, and what the card reaches.

A decoded token reads every weight once and every cached key and value once; a prefill multiplies. Bytes over
the bandwidth of a large copy, or operations over the rate of a large matrix product, is the time that no
implementation runs much below.
"""

from dataclasses import dataclass

import torch

from benchmarks.timing import event_seconds
from pipeline.model import CompactGPT2Config

HALF = 2
"""Bytes of an FP16 number."""
_COPY_BYTES = 4 * 2**30
_PRODUCT = 8192


def weight_bytes_per_token(config: CompactGPT2Config) -> int:
    """FP16 bytes of the parameters that one decoded token needs: all but the positions it is not at.

    The token embedding counts once, as the LM head.
    """
    width, inner = config.n_embd, config.n_inner or 4 * config.n_embd
    numbers = width * config.vocab_size + 2 * width  # LM head, final LayerNorm
    numbers += width if config.position == "learned" else 2 * config.rotary_dim  # its position, or FP32 angles
    for layer, kept in enumerate(config.kept_heads):
        heads, kv_heads = len(kept) * config.head_dim, len(config.groups(layer)) * config.head_dim
        numbers += (width + 1) * (heads + 2 * kv_heads)  # q, k, v
        numbers += heads * width + width  # output projection
        numbers += 2 * width * inner + inner + width  # feed-forward
        numbers += 4 * width  # both LayerNorms
    return HALF * numbers


def kv_bytes(config: CompactGPT2Config, batch: int, context: int) -> int:
    """FP16 bytes of the keys and values that a token sees of `context` tokens in each of `batch` sequences."""
    seen = [min(context, window or context) for window in config.windows]
    heads = sum(len(config.groups(layer)) * tokens for layer, tokens in enumerate(seen))
    return HALF * 2 * batch * config.head_dim * heads


def bytes_per_token(config: CompactGPT2Config, batch: int, context: int) -> int:
    """The fewest bytes that one decode step of `batch` sequences reads, `context` tokens each in their past.

    Weights are read once for the whole batch; activations and the few bytes written do not count.
    """
    return weight_bytes_per_token(config) + kv_bytes(config, batch, context)


def prefill_operations(config: CompactGPT2Config, batch: int, length: int) -> int:
    """Floating-point operations of a prefill, a multiplication and an addition counted apart.

    Attention counts the keys alone that a query sees; the LM head counts the last position alone.
    """
    width, inner = config.n_embd, config.n_inner or 4 * config.n_embd
    each = 0
    for layer, (kept, window) in enumerate(zip(config.kept_heads, config.windows, strict=True)):
        heads, kv_heads = len(kept) * config.head_dim, len(config.groups(layer)) * config.head_dim
        hidden = max(0, length - (window or length))  # queries whose first keys are before the window
        each += 2 * (2 * (heads + kv_heads) * width + 2 * width * inner) * length
        each += 2 * 2 * heads * (length * (length + 1) // 2 - hidden * (hidden + 1) // 2)
    return batch * (each + 2 * width * config.vocab_size)


@dataclass(frozen=True)
class Ceilings:
    """What this card reaches."""

    bandwidth: float
    """Bytes read plus bytes written a second, by a large copy."""
    fp16_rate: float
    """Operations a second, by a large FP16 matrix product."""


def measure_ceilings(device: str) -> Ceilings:
    """Time a device-to-device copy of 4 GiB and an 8192-cubed FP16 product of random numbers; medians of 10."""
    return Ceilings(_copy_bandwidth(device), _product_rate(device))


def _copy_bandwidth(device: str) -> float:
    source = torch.randint(0, 256, (_COPY_BYTES,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * _COPY_BYTES / event_seconds(lambda: target.copy_(source), repeats=10)


def _product_rate(device: str) -> float:
    a, b = (torch.randn(_PRODUCT, _PRODUCT, dtype=torch.float16, device=device) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * _PRODUCT**3 / event_seconds(lambda: torch.mm(a, b, out=out), repeats=10)
