"""Which attention heads matter: a score for each head, and the choice of those that stay."""

import copy
import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from typing import Literal, cast

import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader
from tqdm import tqdm

from eval.errors import UserError
from pipeline.data import IGNORE, TokenBlocks
from pipeline.model import CompactGPT2LMHeadModel
from pipeline.model.modeling import Attention, Block

Method = Literal["taylor", "magnitude", "activation", "random"]
Scope = Literal["layer", "global"]
Rounding = Literal["floor", "nearest", "ceil"]


def head_scores(
    model: CompactGPT2LMHeadModel,
    method: Method,
    blocks: TokenBlocks,
    *,
    seed: int = 0,
    batch_size: int = 4,
    progress: bool = True,
) -> list[list[float]]:
    """`scores[layer][i]` of the layer's i-th kept head; higher means more important.

    - `taylor`: what the loss would feel (Michel et al. 2019, arXiv 1905.10650, section 4.1): the mean
      over sequences of `|dL/d gate|`, where a gate of one multiplies each head's context.
    - `magnitude`: the L2 norm of the head's weights, its q, k and v rows and its output columns; rows that
      a group shares count for each of its heads.
    - `activation`: the mean L2 norm over tokens of what the head adds to the residual stream.
    - `random`: uniform in [0, 1) from `seed`; the control.

    All but `random` are divided by their L2 norm in the layer, as the paper does: layers differ in
    scale, and `scope="global"` compares across them. Computed in FP32, in eval mode, on a copy, on the
    model's device: `model` is not touched. Raises `UserError` where the calibration text has no token
    to predict, or the scores come out as NaN, infinite or all zero.
    """
    if method == "random":
        rng = random.Random(seed)
        return [[rng.random() for _ in heads] for heads in kept_heads_of(model)]
    model = frozen_copy(model)
    if method == "magnitude":
        raw = _magnitude(model)
    else:
        measure = {"taylor": _taylor, "activation": _activation}[method]
        raw = measure(model, calibration_batches(model, blocks, batch_size, f"{method} scores" if progress else None))
    if not all(torch.isfinite(layer).all() for layer in raw):
        raise UserError(f"the {method} head scores are not finite: check the weights of the checkpoint")
    if not any(layer.any() for layer in raw):
        raise UserError(f"the {method} head scores are all zero: the heads of this checkpoint do nothing")
    return [F.normalize(layer.double(), dim=0).tolist() for layer in raw]


def choose_heads(
    scores: Sequence[Sequence[float]],
    kept_heads: Sequence[Sequence[int]],
    n_head: int,
    *,
    ratio: float,
    scope: Scope,
    rounding: Rounding,
) -> list[list[int]]:
    """The heads that stay, `[layer][...]`, ascending original indices; at least one in each layer.

    `scores[layer][i]` belongs to head `kept_heads[layer][i]` of `range(n_head)`. `scope="layer"` removes
    the share `ratio` of each layer's present heads, `"global"` that of all present heads wherever they
    are. The count is exact decimal arithmetic (0.2 of 5 is 1); `nearest` rounds halves up. Of equal
    scores the first in (layer, head) order goes first. Heads are query heads: with grouped queries they
    go one by one, and a key/value head goes with the last that reads it.
    Raises `ValueError` where the arguments do not fit together.
    """
    if not 0 <= ratio < 1:
        raise ValueError(f"ratio is {ratio}; give at least 0 and less than 1")
    if [len(layer) for layer in scores] != [len(layer) for layer in kept_heads]:
        raise ValueError("scores and kept_heads differ in shape")
    flat = [score for layer in scores for score in layer]
    if not all(map(math.isfinite, flat)) or any(head not in range(n_head) for heads in kept_heads for head in heads):
        raise ValueError(f"each score must be finite and each head in 0..{n_head - 1}")
    layers = range(len(kept_heads))
    left = [set(heads) for heads in kept_heads]
    for group in [layers] if scope == "global" else [[layer] for layer in layers]:
        ranked = sorted(
            (score, layer, head)
            for layer in group
            for score, head in zip(scores[layer], kept_heads[layer], strict=True)
        )
        spare = _count(ratio, len(ranked), rounding)
        for _, layer, head in ranked:
            if spare and len(left[layer]) > 1:
                left[layer].remove(head)
                spare -= 1
    return [sorted(heads) for heads in left]


def _count(ratio: float, total: int, rounding: Rounding) -> int:
    """How many of `total` heads `ratio` is, from the ratio's decimal digits: no float noise."""
    share = Fraction(str(ratio)) * total
    return math.ceil(share) if rounding == "ceil" else math.floor(share + Fraction(rounding == "nearest", 2))


def kept_heads_of(model: CompactGPT2LMHeadModel) -> list[list[int]]:
    """The original indices of each layer's heads."""
    assert model.config.kept_heads is not None
    return model.config.kept_heads


def attentions(model: CompactGPT2LMHeadModel) -> list[Attention]:
    """The attention module of each layer."""
    return [cast(Block, block).attn for block in model.transformer.h]


def frozen_copy(model: CompactGPT2LMHeadModel) -> CompactGPT2LMHeadModel:
    """The model in FP32 and eval mode, its parameters without gradients, on the same device."""
    return copy.deepcopy(model).float().eval().requires_grad_(False)


@contextmanager
def watched_contexts(
    model: CompactGPT2LMHeadModel, watch: Callable[[int, torch.Tensor], torch.Tensor | None]
) -> Iterator[None]:
    """Call `watch(layer, context)` on each forward pass; what it returns takes the context's place.

    A context is what enters a layer's `c_proj`: its heads' outputs side by side, `[batch, length, width]`.
    """

    def hook_of(layer: int) -> Callable[..., torch.Tensor | None]:
        return lambda module, inputs: watch(layer, inputs[0])

    handles = [attn.c_proj.register_forward_pre_hook(hook_of(layer)) for layer, attn in enumerate(attentions(model))]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def calibration_batches(
    model: CompactGPT2LMHeadModel, blocks: TokenBlocks, batch_size: int, label: str | None
) -> Iterator[dict[str, torch.Tensor]]:
    """`blocks` in order, in batches on the model's device; a progress bar on stderr if there is a label."""
    batches = DataLoader(blocks, batch_size=batch_size)
    for batch in tqdm(batches, desc=label, unit="batch", disable=label is None):
        yield {key: value.to(model.device) for key, value in batch.items()}


def _taylor(model: CompactGPT2LMHeadModel, batches: Iterator[dict[str, torch.Tensor]]) -> list[torch.Tensor]:
    """Per head the sum over sequences of `|dL/d gate|`, L a sequence's mean loss."""
    totals = [torch.zeros(attn.n_head, device=model.device) for attn in attentions(model)]
    gates: list[torch.Tensor] = []

    def gate(layer: int, context: torch.Tensor) -> torch.Tensor:
        return (context.unflatten(-1, (len(totals[layer]), -1)) * gates[layer]).flatten(-2)

    scored = 0
    with watched_contexts(model, gate), torch.enable_grad():
        for batch in batches:
            labels = batch.pop("labels")[:, 1:]
            # A gate for each sequence, [batch, 1, heads, 1], so that the absolute value is taken of each.
            gates[:] = [torch.ones(len(labels), 1, len(t), 1, device=t.device, requires_grad=True) for t in totals]
            logits = model(**batch, use_cache=False).logits[:, :-1]
            losses = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORE, reduction="none")
            targets = (labels != IGNORE).sum(dim=1)
            scored += int(targets.sum())
            loss = (losses.sum(dim=1) / targets.clamp(min=1)).sum()
            for total, gradient in zip(totals, torch.autograd.grad(loss, gates), strict=True):
                total += gradient.abs().sum(dim=(0, 1, 3))
    if not scored:
        raise UserError("the calibration text has no token to predict: give blocks of at least two tokens")
    return totals


def _magnitude(model: CompactGPT2LMHeadModel) -> list[torch.Tensor]:
    """Per head the L2 norm of its rows of `c_attn` and its columns of `c_proj.weight`."""
    norms = []
    for attn in attentions(model):
        rows = attn.qkv_weights()
        columns = attn.c_proj.weight.unflatten(1, (attn.n_head, -1))
        norms.append((rows.square().sum(dim=(0, 2, 3)) + columns.square().sum(dim=(0, 2))).sqrt())
    return norms


def _activation(model: CompactGPT2LMHeadModel, batches: Iterator[dict[str, torch.Tensor]]) -> list[torch.Tensor]:
    """Per head the sum over text tokens of the L2 norm of its contribution to the residual stream."""
    totals = [torch.zeros(attn.n_head, device=model.device) for attn in attentions(model)]
    projections = [attn.c_proj for attn in attentions(model)]
    text = torch.empty(0)

    def measure(layer: int, context: torch.Tensor) -> None:
        heads = context.unflatten(-1, (len(totals[layer]), -1))
        columns = projections[layer].weight.unflatten(1, (len(totals[layer]), -1))
        norms = torch.einsum("blhd,ehd->blhe", heads, columns).norm(dim=-1)
        totals[layer] += norms[text].sum(dim=0)

    with watched_contexts(model, measure), torch.no_grad():
        for batch in batches:
            text = batch["labels"] != IGNORE
            model.transformer(batch["input_ids"], batch.get("attention_mask"), use_cache=False)
    return totals
