"""Decoding in one launch (csrc/decode_persistent.h): what it needs besides the engine's own buffers."""

import torch
from torch import Tensor

from cuda_ext import ops

_THREADS = {"cuda": 384, "cpu": 64}  # of a block; csrc/persistent/block.h bounds the first, patience the second
_CPU_BLOCKS = 3
WORK = ("all", "copies", "barriers")
"""What of the work a launch does (csrc/decode_persistent.h): copies are weights and barriers, without arithmetic."""


class Persistent:
    """The launch geometry for each batch that fits, and the kernel's own buffers.

    For measurements: `work`, one of WORK, is what launches do (without "all", tokens and logits mean nothing), and
    `stamps`, of `room_for_stamps`, is where launches of many tokens leave their phases' times.
    """

    work = "all"
    stamps: Tensor | None = None

    def __init__(self, table: Tensor, max_batch: int, device: torch.device) -> None:
        self._table, kind = table, device.type
        self._threads = _THREADS[kind]
        self._blocks = {}
        for batch in range(1, min(max_batch, ops.PERSISTENT_BATCH) + 1):
            blocks = ops.persistent_blocks(table, batch, self._threads, kind)
            if blocks:
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
            self._blocks[logits.shape[0]], self._threads, WORK.index(self.work), self.stamps if greedy else None,
        )  # fmt: skip

    def room_for_stamps(self, batch: int, steps: int) -> Tensor:
        """Zeros for a launch of `steps` tokens a sequence: int64 [blocks, 2 x barriers + 2], nanoseconds.

        A block began, came to its first barrier, left it, came to the second, ..., ended.
        """
        barriers = steps * (5 * int(self._table[0]) + 1)
        return torch.zeros(self._blocks[batch], 2 * barriers + 2, dtype=torch.int64, device=self._workspace.device)
