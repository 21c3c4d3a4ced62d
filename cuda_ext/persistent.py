"""Decoding in one launch (csrc/decode_persistent.h): what it needs besides the engine's own buffers."""

import torch
from torch import Tensor

from cuda_ext import ops

_THREADS = {"cuda": 384, "cpu": 64}  # of a block; csrc/persistent/block.h bounds the first, patience the second
_CPU_BLOCKS = 3


class Persistent:
    """The launch geometry for each batch that fits, and the kernel's own buffers."""

    def __init__(
        self, table: Tensor, max_batch: int, device: torch.device, geometry: tuple[int, int] | None = None
    ) -> None:
        """`geometry`: blocks and threads of each; None: what the device holds at once."""
        self._table, kind = table, device.type
        self._threads = _THREADS[kind] if geometry is None else geometry[1]
        self._blocks = {}
        for batch in range(1, min(max_batch, ops.PERSISTENT_BATCH) + 1):
            blocks = ops.persistent_blocks(table, batch, self._threads, kind)
            if blocks and geometry is not None:
                self._blocks[batch] = geometry[0]
            elif blocks:
                self._blocks[batch] = blocks if kind == "cuda" else min(blocks, _CPU_BLOCKS)
        most = max(self._blocks.values(), default=1)
        self._layers = ops.layers(table, kind).to(device)
        size = ops.persistent_bytes(table, most, self._threads, kind)
        self._workspace = torch.zeros(size, dtype=torch.uint8, device=device)

    def fits(self, batch: int) -> bool:
        """Whether a batch of this size can be decoded so."""
        return batch in self._blocks

    def decode(
        self, cache: Tensor, state: tuple[Tensor, ...], stop: Tensor, logits: Tensor, *, steps: int, greedy: bool
    ) -> None:
        """`state`: tokens, position, lengths, step, finished, history, as in ops.decode_persistent."""
        ops.decode_persistent(
            self._table, self._layers, self._workspace, cache, *state, stop, logits, 0, greedy, steps,
            self._blocks[logits.shape[0]], self._threads,
        )  # fmt: skip
