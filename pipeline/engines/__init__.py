"""The ways to run a checkpoint, behind one protocol (`eval.engine.Engine`)."""

import importlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

from eval.errors import UserError
from pipeline.options import ENGINES

if TYPE_CHECKING:  # it imports torch
    from eval.engine import Engine


def load_engine(name: str, folder: Path, *, device: str | None = None, precision: str | None = None) -> "Engine":
    """The engine `name` on a model folder.

    `device` (not for openvino) defaults to the GPU where there is one; `precision` to what the folder
    holds. Raises `UserError` for an unknown engine, or a folder that the engine cannot run.
    """
    if name == "torch":
        from pipeline.engines.torch import TorchEngine

        return TorchEngine.from_folder(folder, device=device, precision=precision)
    if name == "cuda":
        from pipeline.engines.cuda import CudaEngine

        return CudaEngine.from_folder(folder, device=device, precision=precision)
    if name == "openvino":
        from pipeline.engines.openvino import OpenVINOEngine

        if device not in (None, "cpu"):
            raise UserError(f"engine openvino runs on the CPU here; leave out the device {device}")
        return OpenVINOEngine.from_folder(folder, precision=precision)
    raise UserError(f"engine {name!r}: unknown; give one of {', '.join(ENGINES)}")


def import_engine(name: str) -> None:
    """Import what an engine needs, so that its libraries are not charged to the first model it loads."""
    if name == "openvino":
        from pipeline.openvino_runtime import import_openvino

        import_openvino()
    importlib.import_module(f"pipeline.engines.{name}")


def default_engine(folder: Path) -> str:
    """The engine that fits a folder: OpenVINO for an IR, torch for safetensors."""
    return "openvino" if os.path.exists(folder / "openvino_model.xml") else "torch"  # noqa: PTH110 - it never raises
