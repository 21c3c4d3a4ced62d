"""An engine of `pipeline.engines` as a subject."""

import numpy as np
import torch

from benchmarks.cpu_peers.runner import Stepwise
from eval.engine import Engine


class EngineRunner(Stepwise):
    """See `benchmarks.cpu_peers.runner.Runner`."""

    def __init__(self, engine: Engine, weight_bytes: float, kv_bytes: float):
        self.engine, self.compute = engine, engine.compute
        self.weight_bytes, self.kv_bytes = weight_bytes, kv_bytes

    def prefill(self, ids: np.ndarray) -> np.ndarray:
        """See `Stepwise`."""
        return self.engine.prefill(torch.from_numpy(ids)).numpy()

    def decode(self, tokens: np.ndarray) -> np.ndarray:
        """See `Stepwise`."""
        return self.engine.decode(torch.from_numpy(tokens)).numpy()

    def logits(self, ids: np.ndarray) -> np.ndarray:
        """See `Runner`."""
        return self.engine.logits(torch.from_numpy(ids)).numpy()
