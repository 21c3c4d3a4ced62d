"""The slow imports of a run, made once by the process that a sweep's others are forked from."""

import contextlib
import importlib

from eval.errors import UserError
from pipeline.openvino_export import quiet
from pipeline.openvino_runtime import import_openvino

with quiet(), contextlib.suppress(ImportError, UserError):  # a run says what is not installed, if it needs it
    importlib.import_module("pipeline.runner")
    import_openvino()
    for module in ("neural_compressor.torch.quantization", "optimum.exporters.openvino.convert", "matplotlib.figure"):
        importlib.import_module(module)
