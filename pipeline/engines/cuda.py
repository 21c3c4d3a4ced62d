"""Run a checkpoint by Headroom's own CUDA kernels (`cuda_ext`)."""

from pathlib import Path
from typing import Self

import torch

import cuda_ext
from cuda_ext import CudaExtError, Engine, ops
from cuda_ext.packing import Packed, pack, read_shape, unsupported
from eval.errors import UserError, reason
from pipeline import hardware
from pipeline.engines.inputs import check_step, check_tokens


def why_not() -> str | None:
    """Why the engine cannot run on this machine's GPU, in one phrase; None where it can. Compiles it if need be."""
    missing = hardware.why_no_gpu() or cuda_ext.why_not()
    if missing is None:
        try:
            ops.library("cuda")
        except CudaExtError as error:
            missing = reason(error)
    return missing


def why_not_model(folder: Path) -> str | None:
    """Why the kernels cannot run the model of a folder on any machine, in one phrase; None where they can.

    Raises `UserError` for an unusable folder.
    """
    try:
        return unsupported(read_shape(folder))
    except CudaExtError as error:
        raise UserError(str(error)) from error


class CudaEngine:
    """`cuda_ext.Engine` as an `eval.engine.Engine`; it plans itself anew for the largest batch it meets."""

    name = "cuda"
    precision = "fp16"

    def __init__(self, packed: Packed, device: str):
        self._packed = packed
        self.device = device
        self.context = packed.shape.context
        self.vocab_size = packed.shape.vocabulary
        self._engine = Engine(packed, device=device)
        self._batch = self._past = 0
        self.compute = "FP16 weights and activations, FP32 sums and residual stream, own kernels"
        self.compute += ", CUDA graph" if device != "cpu" else ", on the CPU (to test them: slow)"

    @classmethod
    def from_folder(cls, folder: Path, *, device: str | None = None, precision: str | None = None) -> Self:
        """The engine on a model folder. `device` "cpu" runs the kernels' source on the CPU, as the tests do.

        Raises `UserError` for another precision than fp16, no usable GPU, or an unusable folder.
        """
        if precision not in (None, "fp16"):
            raise UserError(f"engine cuda: precision {precision!r}; it runs fp16 alone")
        # What no machine mends comes first.
        why = None if device == "cpu" else why_not_model(folder) or why_not()
        if why is not None:
            raise UserError(f"engine cuda: {why}; give --engine torch")
        try:
            return cls(pack(folder), device or "cuda:0")
        except CudaExtError as error:
            raise UserError(str(error)) from error

    def logits(self, input_ids: torch.Tensor) -> torch.Tensor:
        """See `eval.engine.Engine`. It forgets the past, whose place in memory it takes."""
        return self._for(input_ids).forward(input_ids)

    def prefill(self, input_ids: torch.Tensor) -> torch.Tensor:
        """See `eval.engine.Engine`."""
        logits = self._for(input_ids).prefill(input_ids)
        self._batch, self._past = input_ids.shape
        return logits

    def decode(self, token_ids: torch.Tensor) -> torch.Tensor:
        """See `eval.engine.Engine`."""
        check_step(token_ids, batch=self._batch)
        self._check(token_ids[:, None], self._past)
        self._past += 1
        return self._engine.decode(token_ids).clone()

    def synchronize(self) -> None:
        """See `eval.engine.Engine`."""
        if self.device != "cpu":
            torch.cuda.synchronize(self.device)

    def _for(self, input_ids: torch.Tensor) -> Engine:
        """The engine for so large a batch, with no past."""
        self._batch = self._past = 0
        self._check(input_ids, 0)
        batch = input_ids.shape[0]
        if batch > self._engine.max_batch:
            self._engine = Engine(self._packed, device=self.device, max_batch=batch)
        return self._engine

    def _check(self, input_ids: torch.Tensor, past: int) -> None:
        check_tokens(input_ids, past=past, context=self.context, vocab_size=self.vocab_size)
