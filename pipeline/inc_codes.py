"""Matrices to integer codes by neural-compressor 3, with repairs of what it gets wrong.

Round-to-nearest (RTN), or GPTQ (Frantar et al. 2023, arXiv 2210.17323) with calibration text.
"""

import contextlib
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from eval.errors import UserError
from pipeline.data import TokenBlocks
from pipeline.model import CompactGPT2LMHeadModel
from pipeline.openvino_export import quiet

_RTN_ROWS = 4096

Codes = tuple[torch.Tensor, torch.Tensor]
"""int8 codes `[out, in]` and FP32 scales `[out, groups]`."""


def gptq(
    model: CompactGPT2LMHeadModel, inc_config: Any, calibration: TokenBlocks | None, total: int
) -> Iterator[tuple[str, Codes]]:
    """Quantise `model` in place; codes and scales by layer name. Raises `UserError` without calibration text."""
    if not calibration:
        raise UserError("GPTQ needs calibration text: give calibration_dataset, or use method rtn")
    with _gptq_repaired(total):
        from neural_compressor.torch.algorithms.weight_only.modules import INCWeightOnlyLinear
        from neural_compressor.torch.quantization import convert, prepare

        prepared = prepare(model, inc_config)
        for index in range(len(calibration)):
            # Row by row and without padding, which would count in the Hessian.
            row = calibration[index]
            ids = row["input_ids"][row["attention_mask"].bool()] if "attention_mask" in row else row["input_ids"]
            prepared(ids.unsqueeze(0))
        converted = convert(prepared, use_optimum_format=False)
    for name, module in converted.named_modules():
        if isinstance(module, INCWeightOnlyLinear):
            yield name, _unpack(module)


@contextlib.contextmanager
def inc_quiet() -> Iterator[None]:
    """neural-compressor without its chatter, and its workspace in a temporary place, not the user's folder."""
    with quiet(), tempfile.TemporaryDirectory(prefix="headroom-inc-") as folder:
        from neural_compressor.common import set_workspace

        set_workspace(folder)
        yield


def rtn(linear: nn.Linear, config: Any = None) -> Codes:
    """One layer's codes and scales, a slice of its rows at a time, as each row has a scale of its own: the packing
    that neural-compressor does on the way takes several times a slice's memory. The layer stays as it is."""
    from neural_compressor.torch.quantization import RTNConfig, convert, prepare

    config = config or RTNConfig(bits=8, use_sym=True, group_size=-1, use_layer_wise=False, model_path=".")
    parts = []
    for rows in linear.weight.detach().split(_RTN_ROWS):
        # neural-compressor skips layers by the name lm_head, so this one goes under another.
        holder = nn.ModuleDict({"rows": nn.Linear(rows.shape[1], rows.shape[0], bias=False, device="meta")})
        holder["rows"].weight = nn.Parameter(rows.clone(), requires_grad=False)
        parts.append(_unpack(convert(prepare(holder, config), use_optimum_format=False).rows))
    weights, scales = zip(*parts, strict=True)
    return torch.cat(weights), torch.cat(scales)


def _unpack(module: Any) -> Codes:
    """Codes and scales from neural-compressor's packed layer."""
    parts = module.unpack()
    weight, scale = parts["int_weight"], parts["scales"]
    return weight.to(torch.int8).contiguous(), scale.float().reshape(len(weight), -1).contiguous()


def repair_one_sided(weight: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, bits: int) -> None:
    """Requantise, in place, rows (with several scales: their groups) without a negative weight, for which
    neural-compressor's symmetric GPTQ takes a scale half as large as needed and clips the upper half away."""
    groups, grouped_codes = weight.view(*scale.shape, -1), codes.view(*scale.shape, -1)
    wrong = (groups >= 0).all(dim=-1) & (groups > 0).any(dim=-1)
    scale[wrong] = groups[wrong].amax(dim=-1) / (2 ** (bits - 1) - 1)
    grouped_codes[wrong] = (groups[wrong] / scale[wrong].unsqueeze(-1)).round().to(torch.int8)


@contextlib.contextmanager
def _gptq_repaired(total: int) -> Iterator[None]:
    """GPTQ with two repairs, and a progress bar over `total` layers on stderr.

    neural-compressor 3.10 gives a layer that is excluded by name the first config it finds, so that the
    layer is quantised all the same; and it stores scales as FP16, though the codes were found for FP32 ones.
    """
    from neural_compressor.torch.algorithms.weight_only import gptq as theirs
    from tqdm import tqdm

    packed, lookup = theirs.INCWeightOnlyLinear, theirs.RAWGPTQuantizer.get_layer_config
    with tqdm(total=total, desc="gptq", unit="layer", file=sys.stderr, leave=False, delay=1) as bar:

        def pack(*args: Any, **kwargs: Any) -> Any:
            bar.update()
            return packed(*args, **kwargs, use_optimum_format=False)

        theirs.INCWeightOnlyLinear = pack
        theirs.RAWGPTQuantizer.get_layer_config = lambda self, name: self.weight_config.get(name)
        try:
            yield
        finally:
            theirs.INCWeightOnlyLinear, theirs.RAWGPTQuantizer.get_layer_config = packed, lookup
