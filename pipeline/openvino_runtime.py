"""OpenVINO, imported where it is used."""

import functools
import sys
from typing import Any

from eval.errors import UserError

IR_NAME = "openvino_model.xml"
WINDOWS = ["headroom", "windows"]
"""Where an IR's own notes list each layer's sliding window, 0 for none: its paged form takes them from there."""


def import_openvino() -> Any:
    """The openvino module, without its telemetry, which would go to the network at import.

    Raises `UserError` where it is not installed.
    """
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    try:
        import openvino
    except ImportError as error:
        raise UserError(f"openvino cannot be imported ({error}); pip install openvino==2026.4.1") from error
    return openvino


@functools.cache
def computes_bf16() -> bool:
    """Whether OpenVINO computes in bf16 on this CPU: told to do so on another, it takes FP32 without a word."""
    return "BF16" in import_openvino().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
