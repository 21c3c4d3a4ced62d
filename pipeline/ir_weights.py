"""The weights of an OpenVINO IR, replaced by a quantised model's codes."""

from typing import Any

import numpy as np
import torch

from pipeline.model import CompactGPT2LMHeadModel
from pipeline.model.quantized import HalfEmbedding, QuantizedEmbedding, QuantizedLinear


def compress_weights(ir: Any, model: CompactGPT2LMHeadModel) -> None:
    """Put `model`'s codes and scales into `ir`, an FP32 IR of the model that it was quantised from.

    A matrix becomes INT8 or INT4 constant -> Convert -> Multiply by its scales, which the CPU plugin computes with
    as it is; an embedding looks up codes and scales first. INT8 constants share `model`'s memory, so it must
    outlive `ir`.
    """
    constants = {node.get_friendly_name(): node for node in ir.get_ops() if node.get_type_name() == "Constant"}
    for name, module in model.named_modules():
        if isinstance(module, HalfEmbedding):
            _replace(constants[f"self.{name}.weight"], module.weight, None)
        elif isinstance(module, QuantizedLinear):
            # The tied table goes by the embedding's name.
            tied = module is model.lm_head and isinstance(model.transformer.wte, QuantizedEmbedding)
            old = constants["self.transformer.wte.weight" if tied else f"self.{name}.weight"]
            _replace(old, module.weight, module.scale, module.bits)
    ir.validate_nodes_and_infer_types()


def _replace(old: Any, weight: torch.Tensor, scale: torch.Tensor | None, bits: int = 8) -> None:
    from openvino import opset13 as ops

    name = old.get_friendly_name()
    grouped = scale is not None and scale.shape[1] > 1
    if grouped:
        assert scale is not None
        weight, scale = weight.view(*scale.shape, -1), scale.unsqueeze(-1)
    codes = _constant(weight, name, bits)
    scales = None if scale is None else _constant(scale, name.removesuffix("weight") + "scale")

    def in_fp32(codes: Any, scales: Any) -> Any:
        values = ops.convert(codes, "f32")
        if scales is not None:
            values = ops.multiply(values, scales)
        return ops.reshape(values, list(old.get_output_shape(0)), special_zero=False) if grouped else values

    for target in old.output(0).get_target_inputs():
        node = target.get_node()
        if node.get_type_name() == "Gather":
            rows = [node.input_value(1), node.input_value(2)]
            looked_up = [None if table is None else ops.gather(table, *rows) for table in (codes, scales)]
            node.output(0).replace(in_fp32(*looked_up).output(0))
        else:
            target.replace_source_output(in_fp32(codes, scales).output(0))


def _constant(tensor: torch.Tensor, name: str, bits: int = 8) -> Any:
    """A constant that shares the tensor's memory, or, of 4 bits, holds its int8 codes two in a byte."""
    from openvino import Tensor, Type, op

    values = tensor.numpy()
    if bits == 4:
        pairs = values.reshape(-1, 2).view(np.uint8) & 15
        values = Tensor(pairs[:, 0] | pairs[:, 1] << 4, values.shape, Type.i4)
    made = op.Constant(values, shared_memory=bits != 4)
    made.set_friendly_name(name)
    return made
