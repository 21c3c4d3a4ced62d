"""Headroom's IRs on its own OpenVINO engine."""

import re
from pathlib import Path

from benchmarks.cpu_peers.engines import EngineRunner
from pipeline.engines.openvino import OpenVINOEngine

_STORED = {"int8": 1, "fp32": 4, "bf16": 2, "fp16": 2}
_CACHED = {"u8": 1, "i8": 1, "f16": 2, "bf16": 2, "f32": 4}


def convert(source: Path, out: Path, variant: str) -> None:
    """The IR as the quantize stage makes it; bf16 computes an FP32 IR."""
    from pipeline.checkpoint import load_model
    from pipeline.inc import INCQuantizer, WeightOnlyConfig
    from pipeline.openvino_export import export_openvino

    model = load_model(source)
    if variant == "int8":
        # RTN: GPTQ's codes take the same time.
        INCQuantizer.from_pretrained(model).quantize(WeightOnlyConfig(method="rtn"), save_directory=out)
    else:
        export_openvino(model, out, compress_to_fp16=variant == "fp16")


def load(folder: Path, variant: str, *, threads: int, batch: int, capacity: int) -> EngineRunner:
    """The engine on a converted folder."""
    engine = OpenVINOEngine.from_folder(folder, precision=variant, threads=threads)
    cached = re.search(r"KV_CACHE_PRECISION=(\w+)", engine.compute)
    return EngineRunner(engine, _STORED[variant], _CACHED[cached[1]] if cached else 1)
