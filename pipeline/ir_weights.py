"""The weights of an OpenVINO IR, replaced by a quantised model's codes."""

from typing import Any

import torch

from pipeline.model import CompactGPT2LMHeadModel
from pipeline.model.int8 import HalfEmbedding, Int8Embedding, Int8Linear


def compress_weights(ir: Any, model: CompactGPT2LMHeadModel) -> None:
    """Put `model`'s codes and scales into `ir`, an FP32 IR of the model that it was quantised from.

    A matrix becomes INT8 constant -> Convert -> Multiply by its scales, which the CPU plugin computes with as it
    is; an embedding looks up codes and scales first. The constants share `model`'s memory, so it must outlive `ir`.
    """
    constants = {node.get_friendly_name(): node for node in ir.get_ops() if node.get_type_name() == "Constant"}
    for name, module in model.named_modules():
        if isinstance(module, HalfEmbedding):
            _replace(constants[f"self.{name}.weight"], module.weight, None)
        elif isinstance(module, Int8Linear):
            # The tied table goes by the embedding's name.
            tied = module is model.lm_head and isinstance(model.transformer.wte, Int8Embedding)
            _replace(
                constants["self.transformer.wte.weight" if tied else f"self.{name}.weight"], module.weight, module.scale
            )
    ir.validate_nodes_and_infer_types()


def _replace(old: Any, weight: torch.Tensor, scale: torch.Tensor | None) -> None:
    from openvino import op
    from openvino import opset13 as ops

    def constant(tensor: torch.Tensor, name: str) -> Any:
        made = op.Constant(tensor.numpy(), shared_memory=True)
        made.set_friendly_name(name)
        return made

    def in_fp32(codes: Any, scales: Any) -> Any:
        converted = ops.convert(codes, "f32")
        return converted if scales is None else ops.multiply(converted, scales)

    name = old.get_friendly_name()
    codes = constant(weight, name)
    scales = None if scale is None else constant(scale, name.removesuffix("weight") + "scale")
    for target in old.output(0).get_target_inputs():
        node = target.get_node()
        if node.get_type_name() == "Gather":
            rows = [node.input_value(1), node.input_value(2)]
            looked_up = [None if table is None else ops.gather(table, *rows) for table in (codes, scales)]
            node.output(0).replace(in_fp32(*looked_up).output(0))
        else:
            target.replace_source_output(in_fp32(codes, scales).output(0))
