"""The protocol that every way of running a checkpoint follows."""

from typing import Protocol, runtime_checkable

import torch


@runtime_checkable
class Engine(Protocol):
    """A loaded checkpoint that can be judged: `eval` knows nothing else about it.

    Token ids are int64 tensors on the CPU; logits are FP32 tensors on the engine's own device,
    so that a GPU's logits need not cross the bus to be scored.
    """

    name: str
    """`torch`, `openvino` or `cuda`."""
    device: str
    """`cpu`, or `cuda:0` and the like."""
    precision: str
    """A short label: `fp32`, `fp16`, `bf16`, `int8`."""
    compute: str
    """How the numbers were computed, in words: precision hints, KV-cache precision, threads."""
    context: int
    """The longest sequence in tokens."""
    vocab_size: int

    def logits(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Logits of all positions. `[batch, length]` int64 -> `[batch, length, vocab]` FP32."""
        ...

    def prefill(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Forget the past, read a prompt, return the next token's logits.

        `[batch, length]` int64 -> `[batch, vocab]` FP32.
        """
        ...

    def decode(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Append one token a sequence to the past. `[batch]` int64 -> `[batch, vocab]` FP32."""
        ...

    def synchronize(self) -> None:
        """Wait until all work issued so far is done."""
        ...
