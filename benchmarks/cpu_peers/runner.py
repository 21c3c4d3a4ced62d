"""What a loaded subject can do; a peer's process imports nothing heavier than this and its own library."""

import time
from abc import ABC, abstractmethod
from typing import NamedTuple, Protocol

import numpy as np


class Generated(NamedTuple):
    """`count` greedy tokens, `[batch, count]`; seconds until the first is known, and of all later ones together."""

    tokens: np.ndarray
    first: float
    later: float


class Runner(Protocol):
    """One way to run the model. Token ids are int64."""

    compute: str
    """How it computes, in words: threads, precisions, instruction sets."""
    weight_bytes: float
    """Bytes of a stored weight."""
    kv_bytes: float
    """Bytes of a cached number."""

    def generate(self, ids: np.ndarray, count: int) -> Generated:
        """Forget the past, read `[batch, length]`, write `count` tokens greedily."""
        ...

    def logits(self, ids: np.ndarray) -> np.ndarray:
        """Logits of all positions: `[batch, length]` -> `[batch, length, vocab]` FP32. Need not be fast."""
        ...


class Stepwise(ABC):
    """`generate` for engines that are asked token by token."""

    @abstractmethod
    def prefill(self, ids: np.ndarray) -> np.ndarray:
        """Forget the past, read `[batch, length]`; the last position's logits, `[batch, vocab]`."""

    @abstractmethod
    def decode(self, tokens: np.ndarray) -> np.ndarray:
        """Append `[batch]` tokens; the next ones' logits, `[batch, vocab]`."""

    def generate(self, ids: np.ndarray, count: int) -> Generated:
        """See `Runner`."""
        start = time.perf_counter()
        tokens = [self.prefill(ids).argmax(-1)]
        first = time.perf_counter()
        for _ in range(count - 1):
            tokens.append(self.decode(tokens[-1]).argmax(-1))
        return Generated(np.stack(tokens, 1), first - start, time.perf_counter() - first)
