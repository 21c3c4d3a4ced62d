"""Remove attention heads, hidden neurons and layers for good: smaller matrices and fewer of them, not masks."""

from collections.abc import Sequence

import torch

from pipeline.model.configuration import CompactGPT2Config
from pipeline.model.convert import rebuilt
from pipeline.model.modeling import CompactGPT2LMHeadModel


def slice_heads(model: CompactGPT2LMHeadModel, kept_heads: Sequence[Sequence[int]]) -> CompactGPT2LMHeadModel:
    """A new model that has only `kept_heads[layer]` (original indices) in each layer.

    It computes what the given model computes with the other heads gated to zero: a head enters the
    output only through its own columns of `c_proj`. With grouped queries, `kept_heads` are query heads;
    a key/value head is cut out with the last query head of its group, so that a layer's groups may come
    to differ in size. Dtype and device stay; `model` is not changed.
    Raises `ValueError` if a head to keep is no longer there.
    """
    old = model.config
    config = CompactGPT2Config.from_dict(old.to_dict() | {"kept_heads": [sorted(heads) for heads in kept_heads]})
    state = dict(model.state_dict())
    for layer, (had, keeps) in enumerate(zip(old.kept_heads, config.kept_heads, strict=True)):
        missing = sorted(set(keeps) - set(had))
        if missing:
            raise ValueError(f"layer {layer} has heads {had}; it cannot keep {missing}")
        inner = _numbers(had, keeps, old.head_dim).to(model.device)
        shared = _numbers(list(old.groups(layer)), list(config.groups(layer)), old.head_dim).to(model.device)
        width = len(had) * old.head_dim
        prefix = f"transformer.h.{layer}.attn."
        rows = (
            {"c_attn.q": inner, "c_attn.k": shared, "c_attn.v": shared}
            if old.grouped
            else {"c_attn": torch.cat([inner, inner + width, inner + 2 * width])}
        )
        for name, index in rows.items():
            for part in ("weight", "bias"):
                state[f"{prefix}{name}.{part}"] = state[f"{prefix}{name}.{part}"][index]
        state[prefix + "c_proj.weight"] = state[prefix + "c_proj.weight"][:, inner]
    return rebuilt(model, config, state)


def slice_neurons(model: CompactGPT2LMHeadModel, kept: Sequence[Sequence[int]]) -> CompactGPT2LMHeadModel:
    """A new model whose MLPs have only the hidden neurons `kept[layer]`, ascending, equally many in each layer.

    It computes what the given model computes with the others gated to zero after the activation.
    Dtype and device stay; `model` is not changed.
    """
    config = CompactGPT2Config.from_dict(model.config.to_dict() | {"n_inner": len(kept[0])})
    state = dict(model.state_dict())
    for layer, neurons in enumerate(kept):
        index = torch.tensor(neurons, device=model.device)
        prefix = f"transformer.h.{layer}.mlp."
        for part in ("c_fc.weight", "c_fc.bias"):
            state[prefix + part] = state[prefix + part][index]
        state[prefix + "c_proj.weight"] = state[prefix + "c_proj.weight"][:, index]
    return rebuilt(model, config, state)


def keep_layers(model: CompactGPT2LMHeadModel, kept: Sequence[int]) -> CompactGPT2LMHeadModel:
    """A new model that has only the layers `kept`, ascending: the residual stream passes the others by.

    Dtype and device stay; `model` is not changed.
    """
    old = model.config
    fields = {"n_layer": len(kept), "kept_heads": [old.kept_heads[layer] for layer in kept]}
    if isinstance(old.window, list):
        fields["window"] = [old.window[layer] for layer in kept]
    state = {}
    for key, value in model.state_dict().items():
        if key.startswith("transformer.h."):
            layer, _, rest = key.removeprefix("transformer.h.").partition(".")
            if int(layer) not in kept:
                continue
            key = f"transformer.h.{kept.index(int(layer))}.{rest}"
        state[key] = value
    return rebuilt(model, CompactGPT2Config.from_dict(old.to_dict() | fields), state)


def _numbers(had: Sequence[int], keeps: Sequence[int], head_dim: int) -> torch.Tensor:
    """Where the numbers of the heads that stay lie among those of all that were there."""
    return torch.tensor([had.index(head) * head_dim + i for head in keeps for i in range(head_dim)])
