"""Import from and export to Hugging Face's GPT-2; every key and shape is checked."""

import copy
from typing import Any

import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from pipeline.model.configuration import CompactGPT2Config
from pipeline.model.modeling import CompactGPT2LMHeadModel

# Hugging Face's GPT-2 keeps these as Conv1D, [in, out]; nn.Linear is [out, in].
_TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
_SHARED_FIELDS = (
    "vocab_size",
    "n_positions",
    "n_embd",
    "n_layer",
    "n_head",
    "n_inner",
    "activation_function",
    "resid_pdrop",
    "embd_pdrop",
    "attn_pdrop",
    "layer_norm_epsilon",
    "initializer_range",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)


def from_gpt2(model: GPT2LMHeadModel) -> CompactGPT2LMHeadModel:
    """A CompactGPT2 with the same weights, dtype, device and function as Hugging Face's model.

    Raises `ValueError` for GPT-2 variants that compute something else (untied head, cross-attention,
    attention scaled by layer).
    """
    config = model.config
    for field, wanted in {
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
        "tie_word_embeddings": True,
    }.items():
        if getattr(config, field, wanted) != wanted:
            raise ValueError(f"this GPT-2 has {field}={getattr(config, field)}; only {wanted} is supported")
    compact = CompactGPT2Config(**{field: getattr(config, field) for field in _SHARED_FIELDS})
    return _transfer(model, CompactGPT2LMHeadModel(compact))


def to_gpt2(model: CompactGPT2LMHeadModel) -> GPT2LMHeadModel:
    """Hugging Face's GPT-2 with the same weights and function.

    Raises `ValueError` for a pruned model or a variant, which stock GPT-2 cannot express.
    """
    config = model.config
    if config.variants:
        raise ValueError(f"a CompactGPT2 with {' and '.join(config.variants)} has no stock GPT-2 form")
    if config.pruned or config.head_dim * config.n_head != config.n_embd:
        raise ValueError("a pruned CompactGPT2 has no stock GPT-2 form: save it with save_pretrained instead")
    return _transfer(model, GPT2LMHeadModel(GPT2Config(**{field: getattr(config, field) for field in _SHARED_FIELDS})))


def in_fp32(model: CompactGPT2LMHeadModel) -> CompactGPT2LMHeadModel:
    """The same model in FP32 and evaluation mode. What is FP32 already shares its memory with `model`: an array
    may be put in another's place, but not written into."""
    memo: dict[int, Any] = {id(p): nn.Parameter(p.detach().float(), requires_grad=False) for p in model.parameters()}
    memo |= {id(b): b for b in model.buffers()}
    return copy.deepcopy(model, memo).eval()


def _transfer(source, target):
    """Copy all weights of `source` into `target`, transposing where the two layouts differ."""
    state = {key: value for key, value in source.state_dict().items() if key != "lm_head.weight"}
    wanted = {key: value.shape for key, value in target.state_dict().items() if key != "lm_head.weight"}
    if state.keys() != wanted.keys():
        raise ValueError(f"keys differ: {sorted(state.keys() ^ wanted.keys())[:4]}")
    converted: dict[str, torch.Tensor] = {}
    for key, value in state.items():
        value = value.t() if key.endswith(_TRANSPOSED) else value
        if value.shape != wanted[key]:
            raise ValueError(f"{key} has shape {tuple(value.shape)}, expected {tuple(wanted[key])}")
        converted[key] = value.detach().clone().contiguous()
    target.load_state_dict(converted, strict=False, assign=True)
    target.tie_weights()
    target.generation_config = source.generation_config
    return target.train(source.training)
