"""Full INT8 (W8A8) with NNCF: activations too, by scales found beforehand. A row to compare weight-only INT8 with."""

import shutil
from pathlib import Path

import numpy as np

from eval.errors import UserError
from pipeline.openvino_export import name_nodes, quiet
from pipeline.openvino_runtime import IR_NAME, import_openvino

_SMOOTH_QUANT_ALPHA = 0.5
"""How much of the activations' spread moves into the weights: the paper's default."""


def export_w8a8(traced: str | Path, save_directory: str | Path, tokens: np.ndarray) -> Path:
    """Write the FP32 IR in `traced`, a folder that `export_openvino` wrote, with weights and activations in INT8.

    SmoothQuant (Xiao et al. 2023, arXiv 2211.10438), then static scales an activation tensor from the `tokens` `[rows,
    length]` and bias correction, as NNCF does for transformers. The same IR and tokens give the same bytes.

    Raises `UserError` where nncf is not installed.
    """
    openvino = import_openvino()
    try:
        import nncf
        from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters, AdvancedSmoothQuantParameters
    except ImportError as error:
        raise UserError(f"nncf cannot be imported ({error}); pip install nncf==3.4.0") from error
    source, folder = Path(traced), Path(save_directory)

    def inputs(row: np.ndarray) -> dict[str, np.ndarray]:
        return {
            "input_ids": row[None],
            "attention_mask": np.ones((1, len(row)), dtype=np.int64),
            "position_ids": np.arange(len(row), dtype=np.int64)[None],
            "beam_idx": np.zeros(1, dtype=np.int32),
        }

    with quiet():
        quantized = nncf.quantize(
            openvino.Core().read_model(source / IR_NAME),
            nncf.Dataset(list(tokens.astype(np.int64)), inputs),
            model_type=nncf.ModelType.TRANSFORMER,
            preset=nncf.QuantizationPreset.MIXED,
            subset_size=len(tokens),
            advanced_parameters=AdvancedQuantizationParameters(
                smooth_quant_alphas=AdvancedSmoothQuantParameters(matmul=_SMOOTH_QUANT_ALPHA)
            ),
        )
    name_nodes(quantized)
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("openvino_model.*"), dirs_exist_ok=True)
    openvino.save_model(quantized, folder / IR_NAME, compress_to_fp16=False)
    return folder
