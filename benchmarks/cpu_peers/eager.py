"""PyTorch eager."""

from pathlib import Path

import torch

from benchmarks.cpu_peers.engines import EngineRunner
from pipeline.checkpoint import load_model
from pipeline.engines.torch import TorchEngine


def convert(source: Path, out: Path, variant: str) -> None:
    """The checkpoint in the precision that runs."""
    load_model(source, torch.bfloat16 if variant == "bf16" else torch.float32).save_pretrained(out)


def load(folder: Path, variant: str, *, threads: int, batch: int, capacity: int) -> EngineRunner:
    """The engine on a converted folder."""
    torch.set_num_threads(threads)
    size = 2 if variant == "bf16" else 4
    return EngineRunner(TorchEngine.from_folder(folder, device="cpu", precision=variant), size, size)
