"""Import from and export to Hugging Face's GPT-2; every key and shape is checked."""

import copy
from collections.abc import Mapping
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
    attention scaled by layer), whether the configuration says so or the weights do.
    """
    config = model.config
    for field, wanted in {
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "reorder_and_upcast_attn": False,
        "add_cross_attention": False,
        "is_causal": True,
    }.items():
        if getattr(config, field, wanted) != wanted:
            raise ValueError(f"this GPT-2 has {field}={getattr(config, field)}; only {wanted} is supported")
    check_tied(model)
    compact = CompactGPT2Config(**{field: getattr(config, field) for field in _SHARED_FIELDS})
    return _transfer(model, CompactGPT2LMHeadModel(compact))


def to_gpt2(model: CompactGPT2LMHeadModel) -> GPT2LMHeadModel:
    """Hugging Face's GPT-2 with the same weights and function, a head of its own where `model` has one.

    Raises `ValueError` for a pruned model or a variant, which stock GPT-2 cannot express.
    """
    config = model.config
    if config.variants:
        raise ValueError(f"a CompactGPT2 with {' and '.join(config.variants)} has no stock GPT-2 form")
    if config.pruned or config.head_dim * config.n_head != config.n_embd:
        raise ValueError("a pruned CompactGPT2 has no stock GPT-2 form: save it with save_pretrained instead")
    fields = {field: getattr(config, field) for field in _SHARED_FIELDS} | {"tie_word_embeddings": _tied(model)}
    return _transfer(model, GPT2LMHeadModel(GPT2Config(**fields)))


def to_grouped(model: CompactGPT2LMHeadModel, n_kv_head: int) -> CompactGPT2LMHeadModel:
    """A new model whose query heads share `n_kv_head` key/value heads, each the mean of those that its query heads
    had (Ainslie et al. 2023, arXiv 2305.13245, section 2.1). It wants some training after that: the paper gives 5 %
    of the steps that the model was trained for. Dtype and device stay; `model` is not changed.

    Raises `ValueError` where `n_kv_head` does not divide `n_head`, or heads are shared already.
    """
    old = model.config
    if old.grouped:
        raise ValueError(f"the model has {old.n_kv_head} key/value heads for {old.n_head} heads already")
    state = dict(model.state_dict())
    config = CompactGPT2Config.from_dict(old.to_dict() | {"n_kv_head": n_kv_head})
    for layer in range(old.n_layer if config.grouped else 0):
        sizes = list(config.groups(layer).values())
        prefix = f"transformer.h.{layer}.attn.c_attn."
        for part in ("weight", "bias"):
            state[f"{prefix}q.{part}"], *kv = state.pop(prefix + part).chunk(3)
            for name, rows in zip("kv", kv, strict=True):
                groups = rows.unflatten(0, (-1, old.head_dim)).split(sizes)
                state[f"{prefix}{name}.{part}"] = torch.cat([group.mean(dim=0) for group in groups])
    return rebuilt(model, config, state)


def to_windowed(model: CompactGPT2LMHeadModel, window: int | list[int | None]) -> CompactGPT2LMHeadModel:
    """A new model with the same weights whose layers see `window` tokens, one number or one (or None: all) for each
    layer. It wants some training after that. Dtype and device stay; `model` is not changed.

    Raises `ValueError` where `window` does not fit the layers.
    """
    config = CompactGPT2Config.from_dict(model.config.to_dict() | {"window": window})
    return rebuilt(model, config, model.state_dict())


def rebuilt(
    model: CompactGPT2LMHeadModel, config: CompactGPT2Config, state: Mapping[str, torch.Tensor]
) -> CompactGPT2LMHeadModel:
    """A model of `config` with `state`, and all else as `model` has it."""
    config.tie_word_embeddings = config.tie_word_embeddings and _tied(model)
    result = CompactGPT2LMHeadModel(config).to(model.device, model.dtype)
    result.load_state_dict(state)
    result.generation_config = copy.deepcopy(model.generation_config)
    result.set_attn_implementation(model.config._attn_implementation)
    return result.train(model.training)


def check_tied(model: GPT2LMHeadModel | CompactGPT2LMHeadModel) -> None:
    """Raise `ValueError` if a model's head is another matrix than its token embedding, whatever its config says."""
    if not _tied(model):
        raise ValueError("lm_head.weight differs from transformer.wte.weight: an untied head is not supported")


def in_fp32(model: CompactGPT2LMHeadModel) -> CompactGPT2LMHeadModel:
    """The same model in FP32 and evaluation mode. What is FP32 already shares its memory with `model`: an array
    may be put in another's place, but not written into."""
    memo: dict[int, Any] = {id(p): nn.Parameter(p.detach().float(), requires_grad=False) for p in model.parameters()}
    memo |= {id(b): b for b in model.buffers()}
    return copy.deepcopy(model, memo).eval()


def _tied(model: GPT2LMHeadModel | CompactGPT2LMHeadModel) -> bool:
    """Whether the head is the embedding, whatever the configuration says."""
    head, embedding = model.lm_head.weight, model.transformer.wte.weight
    return head is embedding or torch.equal(head, embedding)


def _transfer(source, target):
    """Copy all weights of `source` into `target`, transposing where the two layouts differ."""
    tied = target.config.tie_word_embeddings
    state, wanted = (
        {key: value for key, value in model.state_dict().items() if not (tied and key == "lm_head.weight")}
        for model in (source, target)
    )
    if state.keys() != wanted.keys():
        raise ValueError(f"keys differ: {sorted(state.keys() ^ wanted.keys())[:4]}")
    converted: dict[str, torch.Tensor] = {}
    for key, value in state.items():
        value = value.t() if key.endswith(_TRANSPOSED) else value
        if value.shape != wanted[key].shape:
            raise ValueError(f"{key} has shape {tuple(value.shape)}, expected {tuple(wanted[key].shape)}")
        converted[key] = value.detach().clone().contiguous()
    target.load_state_dict(converted, strict=False, assign=True)
    target.tie_weights()
    target.generation_config = source.generation_config
    target.set_attn_implementation(source.config._attn_implementation)
    return target.train(source.training)
