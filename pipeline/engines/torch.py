"""PyTorch eager: the reference engine, on CPU or GPU."""

from pathlib import Path
from typing import Self

import torch
from transformers import DynamicCache

from eval.errors import UserError
from pipeline import hardware
from pipeline.checkpoint import load_model
from pipeline.engines.inputs import check_step, check_tokens
from pipeline.model import CompactGPT2LMHeadModel

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class TorchEngine:
    """Runs a CompactGPT2 as it is.

    `precision` is that of the weights. On a GPU the arithmetic follows it; on a CPU FP16 weights are
    computed in FP32, since few CPUs multiply FP16, and `compute` says so.
    """

    name = "torch"

    def __init__(self, model: CompactGPT2LMHeadModel, *, device: str = "cpu", precision: str = "fp32"):
        weights = _DTYPES[precision]
        on_cpu = device == "cpu"
        arithmetic = torch.float32 if on_cpu and weights == torch.float16 else weights
        # Through the weights' own dtype first, so that their rounding is in the result.
        self.model = model.to(weights).to(device=device, dtype=arithmetic).eval()
        self.device, self.precision = device, precision
        label = {torch.float32: "FP32", torch.float16: "FP16", torch.bfloat16: "BF16"}
        self.compute = f"{label[weights]} weights, {label[arithmetic]} arithmetic, eager, SDPA"
        if on_cpu:
            self.compute += f", threads {torch.get_num_threads()}"
        self.context = model.config.n_positions
        self.vocab_size = model.config.vocab_size
        self.cache = DynamicCache(config=model.config)
        self._batch = 0

    @classmethod
    def from_folder(cls, folder: Path, *, device: str | None = None, precision: str | None = None) -> Self:
        """The engine on a model folder, by default on the GPU if there is one and at the folder's precision.

        Raises `UserError` for an unknown precision, a device that is not there, or an unusable folder.
        """
        device = device or hardware.default_device()
        if precision is not None and precision not in _DTYPES:
            raise UserError(f"engine torch: precision {precision!r}; give one of {', '.join(_DTYPES)}")
        there = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
        if device not in there and not (device == "cuda" and len(there) > 1):
            why = hardware.why_no_gpu() or "not on this machine"
            raise UserError(f"device {device}: {why}; give {' or '.join(there)}, or leave it out")
        if precision is None:
            stored = load_model(folder, "auto")  # in one of these types, whatever the file's
            precision = next(name for name, dtype in _DTYPES.items() if dtype == stored.dtype)
            return cls(stored, device=device, precision=precision)
        return cls(load_model(folder, _DTYPES[precision]), device=device, precision=precision)

    @torch.inference_mode()
    def logits(self, input_ids: torch.Tensor) -> torch.Tensor:
        """See `eval.engine.Engine`."""
        check_tokens(input_ids, past=0, context=self.context, vocab_size=self.vocab_size)
        return self.model(input_ids.to(self.device), use_cache=False).logits.float()

    @torch.inference_mode()
    def prefill(self, input_ids: torch.Tensor) -> torch.Tensor:
        """See `eval.engine.Engine`."""
        self.cache, self._batch = DynamicCache(config=self.model.config), 0
        return self._step(input_ids)

    @torch.inference_mode()
    def decode(self, token_ids: torch.Tensor) -> torch.Tensor:
        """See `eval.engine.Engine`."""
        check_step(token_ids, batch=self._batch)
        return self._step(token_ids[:, None])

    def _step(self, input_ids: torch.Tensor) -> torch.Tensor:
        past = self.cache.get_seq_length()
        check_tokens(input_ids, past=past, context=self.context, vocab_size=self.vocab_size)
        out = self.model(input_ids.to(self.device), past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self._batch = input_ids.shape[0]
        return out.logits[:, -1].float()

    def synchronize(self) -> None:
        """See `eval.engine.Engine`."""
        if self.device != "cpu":
            torch.cuda.synchronize(self.device)
