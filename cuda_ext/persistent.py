"""Decoding in one launch (csrc/decode_persistent.h): what it needs besides the engine's own buffers."""

import torch
from torch import Tensor

from cuda_ext import ops
from cuda_ext.packing import layer_count

_THREADS = {"cuda": 384, "cpu": 64}  # of a block; csrc/persistent/block.h bounds the first, patience the second
_CPU_BLOCKS = 3
WORK = ("all", "copies", "barriers")
"""What of the work a launch does (csrc/decode_persistent.h): copies are weights and barriers, without arithmetic."""
State = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
"""Tokens, position, lengths, step, finished, history, as in ops.decode_persistent."""


class Geometry:
    """Threads, blocks for each batch that fits, and the size of the workspace that serves all of them."""

    def __init__(
        self, table: Tensor, max_batch: int, device: torch.device, wanted: tuple[int, int] | None = None
    ) -> None:
        """`wanted`: blocks and threads; None: what the device holds at once."""
        kind = device.type
        self.threads = _THREADS[kind] if wanted is None else wanted[1]
        self.blocks = {}
        for batch in range(1, min(max_batch, ops.PERSISTENT_BATCH) + 1):
            blocks = ops.persistent_blocks(table, batch, self.threads, device)
            if blocks and wanted is not None:
                self.blocks[batch] = wanted[0]
            elif blocks:
                self.blocks[batch] = blocks if kind == "cuda" else min(blocks, _CPU_BLOCKS)
        most = max(self.blocks.values(), default=1)
        self.workspace_bytes = ops.persistent_bytes(table, most, self.threads, kind)


class Persistent:
    """The launch geometry and the kernel's own buffers.

    For measurements: `work`, one of WORK, is what launches do (without "all", tokens and logits mean nothing), and
    `stamps`, of `room_for_stamps`, is where launches of many tokens leave their phases' times.
    """

    work = "all"
    stamps: Tensor | None = None

    def __init__(
        self, table: Tensor, max_batch: int, device: torch.device, wanted: tuple[int, int] | None = None
    ) -> None:
        """`wanted`: as for Geometry."""
        self._table, self._geometry = table, Geometry(table, max_batch, device, wanted)
        self._layers = ops.layers(table, device.type).to(device)
        self._workspace = torch.zeros(self._geometry.workspace_bytes, dtype=torch.uint8, device=device)

    def reset(self) -> None:
        """Ready the barriers' counters, of which a launch that was broken off may have left some."""
        self._workspace.zero_()

    def fits(self, batch: int) -> bool:
        """Whether a batch of this size can be decoded so."""
        return batch in self._geometry.blocks

    def decode(self, cache: Tensor, state: State, how: Tensor, logits: Tensor, *, steps: int, greedy: bool) -> None:
        """`how`: as in ops.sample."""
        ops.decode_persistent(
            self._table, self._layers, self._workspace, cache, *state, how, logits, greedy, steps,
            self._geometry.blocks[logits.shape[0]], self._geometry.threads, WORK.index(self.work),
            self.stamps if greedy else None,
        )  # fmt: skip

    def room_for_stamps(self, batch: int, steps: int) -> Tensor:
        """Zeros for a launch of `steps` tokens a sequence: int64 [blocks, 2 x barriers + 2], nanoseconds.

        A block began, came to its first barrier, left it, came to the second, ..., ended.
        """
        barriers = steps * (5 * layer_count(self._table) + 1)
        return torch.zeros(
            self._geometry.blocks[batch], 2 * barriers + 2, dtype=torch.int64, device=self._workspace.device
        )
