"""What an engine allocates on its device beside weights and KV cache, before it does."""

import torch
from torch import Tensor

from cuda_ext import ops
from cuda_ext.packing import Packed, cache_elements, table
from cuda_ext.persistent import Geometry
from cuda_ext.products import logits_width, measuring_bytes
from cuda_ext.sampling import WORDS

CHUNK_ROWS = 2048
"""Tokens that one prefill launch works on: bounds the workspace."""


def chunk(max_batch: int, capacity: int) -> int:
    """How many tokens of each sequence a prefill takes at once."""
    return max(1, min(capacity, CHUNK_ROWS // max_batch))


def plan(
    packed: Packed, max_batch: int, capacity: int, device: torch.device, persistent: bool = True
) -> dict[str, int]:
    """Bytes of each kind of buffer that an engine keeps; `packed.weights` are not read, and may be on "meta".

    Besides, `prefill` returns a copy of its logits, `forward` has all logits, and see `measuring`.
    """
    cache = torch.empty(cache_elements(packed.shape, max_batch, capacity), dtype=torch.float16, device="meta")
    described = table(packed, packed.weights.to("meta"), cache, max_batch, capacity)
    kind = device.type
    sizes = {
        "workspace": ops.workspace_bytes(described, max_batch, chunk(max_batch, capacity), kind),
        "counters": 4 * ops.counters(described, max_batch, kind),
        "logits": 4 * max_batch * logits_width(packed.shape.vocabulary),
        "state": 4 * (5 * max_batch + max_batch * capacity + WORDS),
    }
    if persistent:
        geometry = Geometry(described, max_batch, device)
        sizes["persistent"] = geometry.workspace_bytes + ops.layers(described, kind).numel()
    return sizes


def measuring(packed: Packed, max_batch: int, capacity: int, device: torch.device) -> int:
    """Bytes that are allocated at most while the ways of a prefill's products are measured, and freed after it.

    They are measured in the workspace: 0 where it is as large.
    """
    rows = max_batch * chunk(max_batch, capacity)
    wanted = measuring_bytes(packed, rows, max_batch, device.type)
    return wanted if wanted > plan(packed, max_batch, capacity, device, False)["workspace"] else 0


def held(tensors: list[Tensor]) -> int:
    """Bytes of the storages that these tensors lie in, each counted once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())
