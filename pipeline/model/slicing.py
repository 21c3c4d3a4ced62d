"""Remove attention heads for good: smaller matrices, not masks."""

import copy
from collections.abc import Sequence

import torch

from pipeline.model.configuration import CompactGPT2Config
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
    fields = old.to_dict() | {"kept_heads": [sorted(heads) for heads in kept_heads]}
    pruned = CompactGPT2LMHeadModel(CompactGPT2Config.from_dict(fields)).to(model.device, model.dtype)
    state = dict(model.state_dict())
    del state["lm_head.weight"]
    for layer, (had, keeps) in enumerate(zip(old.kept_heads, pruned.config.kept_heads, strict=True)):
        missing = sorted(set(keeps) - set(had))
        if missing:
            raise ValueError(f"layer {layer} has heads {had}; it cannot keep {missing}")
        inner = _numbers(had, keeps, old.head_dim).to(model.device)
        shared = _numbers(list(old.groups(layer)), list(pruned.config.groups(layer)), old.head_dim).to(model.device)
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
    pruned.load_state_dict({key: value.detach().clone().contiguous() for key, value in state.items()}, strict=False)
    pruned.tie_weights()
    pruned.generation_config = copy.deepcopy(model.generation_config)
    return pruned.train(model.training)


def _numbers(had: Sequence[int], keeps: Sequence[int], head_dim: int) -> torch.Tensor:
    """Where the numbers of the heads that stay lie among those of all that were there."""
    return torch.tensor([had.index(head) * head_dim + i for head in keeps for i in range(head_dim)])
