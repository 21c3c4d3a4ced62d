"""ONNX Runtime with dynamic int8: the graph has its past as inputs and outputs."""

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.cpu_peers.runner import Stepwise

_FILE = "model.onnx"


def convert(source: Path, out: Path, variant: str) -> None:
    """Export with past keys and values, then quantise with `quantize_dynamic`'s defaults."""
    import torch
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from torch import nn

    from pipeline.checkpoint import load_model
    from pipeline.openvino_export import quiet

    model = load_model(source).eval()
    config = model.config

    class WithPast(nn.Module):
        """The model's own modules; logits of the positions in `wanted` alone."""

        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(
            self, input_ids: torch.Tensor, position_ids: torch.Tensor, wanted: torch.Tensor, *past: torch.Tensor
        ) -> tuple[torch.Tensor, ...]:
            body = self.model.transformer
            x = body.wte(input_ids) + body.wpe(position_ids)
            places = torch.arange(past[0].shape[2] + input_ids.shape[1])
            hidden = torch.where(places <= position_ids[:, None, :, None], 0.0, -1e9)
            present = []
            for index, block in enumerate(body.h):
                part = block.attn
                heads = part.c_attn(block.ln_1(x)).view(*input_ids.shape, 3, part.n_head, part.head_dim)
                q, k, v = heads.permute(2, 0, 3, 1, 4).unbind(0)
                k, v = torch.cat([past[2 * index], k], 2), torch.cat([past[2 * index + 1], v], 2)
                present += [k, v]
                y = (q @ k.transpose(2, 3) * part.head_dim**-0.5 + hidden).softmax(-1) @ v
                x = x + part.c_proj(y.transpose(1, 2).reshape(*input_ids.shape, -1))
                x = x + block.mlp(block.ln_2(x))
            return (self.model.lm_head(body.ln_f(x.index_select(1, wanted))), *present)

    heads = [len(kept) for kept in config.kept_heads for _ in "kv"]
    past_names = [f"past_{index}" for index in range(len(heads))]
    present_names = [f"present_{index}" for index in range(len(heads))]
    axes = {name: {0: "batch", 1: "length"} for name in ("input_ids", "position_ids", "logits")} | {
        "wanted": {0: "kept"}
    }
    axes |= {name: {0: "batch", 2: "past"} for name in past_names}
    axes |= {name: {0: "batch", 2: "total"} for name in present_names}
    axes["logits"] = {0: "batch", 1: "kept"}
    example = (torch.zeros(2, 3, dtype=torch.int64), torch.arange(4, 7).expand(2, 3), torch.tensor([1, 2]))
    out.mkdir(parents=True, exist_ok=True)
    with quiet(), torch.no_grad():
        torch.onnx.export(
            WithPast(),
            (*example, *(torch.zeros(2, count, 4, config.head_dim) for count in heads)),
            out / "fp32.onnx",
            input_names=["input_ids", "position_ids", "wanted", *past_names],
            output_names=["logits", *present_names],
            dynamic_axes=axes,
            opset_version=17,
            dynamo=False,  # the other exporter needs onnxscript
        )
        quantize_dynamic(out / "fp32.onnx", out / _FILE, weight_type=QuantType.QInt8)
    (out / "fp32.onnx").unlink()


def load(folder: Path, variant: str, *, threads: int, batch: int, capacity: int) -> "OnnxRunner":
    """The model on a converted folder."""
    return OnnxRunner(folder / _FILE, threads)


class OnnxRunner(Stepwise):
    """See `benchmarks.cpu_peers.runner.Runner`. Keys and values stay in ONNX Runtime's own memory."""

    def __init__(self, path: Path, threads: int):
        import onnxruntime

        self.value = onnxruntime.OrtValue.ortvalue_from_numpy
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.outputs = [each.name for each in self.session.get_outputs()]
        self.shapes = {each.name: each.shape for each in self.session.get_inputs() if each.name.startswith("past")}
        self.compute = f"threads {threads}, all graph optimisations, FP32 KV cache"
        self.weight_bytes, self.kv_bytes = 1.0, 4.0
        self.past: dict[str, Any] = {}
        self.length = 0

    def prefill(self, ids: np.ndarray) -> np.ndarray:
        """See `Stepwise`."""
        self._forget(len(ids))
        return self._step(ids, np.array([ids.shape[1] - 1]))[:, 0]

    def decode(self, tokens: np.ndarray) -> np.ndarray:
        """See `Stepwise`."""
        return self._step(tokens[:, None], np.array([0]))[:, 0]

    def logits(self, ids: np.ndarray) -> np.ndarray:
        """See `Runner`."""
        self._forget(len(ids))
        return self._step(ids, np.arange(ids.shape[1]))

    def _forget(self, batch: int) -> None:
        self.length = 0
        self.past = {
            name: self.value(np.zeros((batch, heads, 0, width), np.float32))
            for name, (_, heads, _, width) in self.shapes.items()
        }

    def _step(self, ids: np.ndarray, wanted: np.ndarray) -> np.ndarray:
        batch, length = ids.shape
        positions = np.tile(np.arange(self.length, self.length + length), (batch, 1))
        asked = {"input_ids": self.value(ids), "position_ids": self.value(positions), "wanted": self.value(wanted)}
        logits, *present = self.session.run_with_ort_values(self.outputs, asked | self.past)
        self.past = dict(zip(self.shapes, present, strict=True))
        self.length += length
        return logits.numpy()
