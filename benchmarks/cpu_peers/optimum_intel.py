"""Stock optimum-intel: NNCF's weight-only INT8 with default settings, OpenVINO's default properties.

Its prefill computes logits of all positions, as that model does for whoever calls it.
"""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.cpu_peers.runner import Stepwise
from pipeline.openvino_export import quiet
from pipeline.openvino_runtime import import_openvino


def convert(source: Path, out: Path, variant: str) -> None:
    """Compress the FP32 IR, which for a pruned model is the one that we export: optimum knows no such model."""
    import_openvino()
    from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig

    from pipeline.checkpoint import load_model
    from pipeline.openvino_export import export_openvino

    with tempfile.TemporaryDirectory() as scratch, quiet():
        export_openvino(load_model(source), scratch)
        model = OVModelForCausalLM.from_pretrained(
            scratch, quantization_config=OVWeightQuantizationConfig(bits=8), compile=False
        )
        model.save_pretrained(out)
        del model  # it maps the scratch files


def load(folder: Path, variant: str, *, threads: int, batch: int, capacity: int) -> "OptimumRunner":
    """The model on a converted folder."""
    import_openvino()
    from optimum.intel import OVModelForCausalLM

    with quiet():
        options = {"INFERENCE_NUM_THREADS": str(threads)}
        return OptimumRunner(OVModelForCausalLM.from_pretrained(folder, ov_config=options))


class OptimumRunner(Stepwise):
    """See `benchmarks.cpu_peers.runner.Runner`."""

    def __init__(self, model: Any):
        self.model, self.past, self.length = model, None, 0
        compiled = model.request.get_compiled_model()
        names = ("INFERENCE_PRECISION_HINT", "KV_CACHE_PRECISION", "INFERENCE_NUM_THREADS")
        found = {
            name: getattr(value := compiled.get_property(name), "to_string", lambda v=value: v)() for name in names
        }
        self.compute = ", ".join(f"{name}={value}" for name, value in found.items())
        self.weight_bytes, self.kv_bytes = 1.0, 1.0

    def prefill(self, ids: np.ndarray) -> np.ndarray:
        """See `Stepwise`."""
        self.past, self.length = None, 0
        return self._step(ids)[:, -1]

    def decode(self, tokens: np.ndarray) -> np.ndarray:
        """See `Stepwise`."""
        return self._step(tokens[:, None])[:, -1]

    def logits(self, ids: np.ndarray) -> np.ndarray:
        """See `Runner`."""
        self.past, self.length = None, 0
        return self._step(ids)

    @torch.inference_mode()
    def _step(self, ids: np.ndarray) -> np.ndarray:
        batch, length = ids.shape
        positions = torch.arange(self.length, self.length + length).expand(batch, length)
        self.length += length
        out = self.model(
            input_ids=torch.from_numpy(ids),
            attention_mask=torch.ones(batch, self.length, dtype=torch.int64),
            position_ids=positions,
            past_key_values=self.past,
        )
        self.past = out.past_key_values
        return out.logits.numpy()
