"""CompactGPT2: a GPT-2 whose layers may have different numbers of attention heads."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from pipeline.model.configuration import CompactGPT2Config
from pipeline.model.convert import from_gpt2, in_fp32, to_gpt2, to_grouped, to_windowed
from pipeline.model.modeling import CompactGPT2LMHeadModel, CompactGPT2Model
from pipeline.model.slicing import keep_layers, slice_heads, slice_neurons

__all__ = [
    "CompactGPT2Config",
    "CompactGPT2LMHeadModel",
    "CompactGPT2Model",
    "from_gpt2",
    "in_fp32",
    "keep_layers",
    "slice_heads",
    "slice_neurons",
    "to_gpt2",
    "to_grouped",
    "to_windowed",
]

AutoConfig.register(CompactGPT2Config.model_type, CompactGPT2Config)
AutoModel.register(CompactGPT2Config, CompactGPT2Model)
AutoModelForCausalLM.register(CompactGPT2Config, CompactGPT2LMHeadModel)
