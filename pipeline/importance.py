"""Which heads, hidden neurons and layers matter: a score for each, and the choice of those that stay."""

import copy
import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, cast

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from tqdm import tqdm

from eval.errors import UserError
from pipeline.data import IGNORE, TokenBlocks
from pipeline.model import CompactGPT2LMHeadModel
from pipeline.model.modeling import Block

Method = Literal["taylor", "magnitude", "activation", "random"]
Scope = Literal["layer", "global"]
Rounding = Literal["floor", "nearest", "ceil"]

NEURONS = 32
"""Hidden neurons stay in multiples of this: INT8 vectors and the tiles of tensor cores are so wide, and a narrower rest
costs as much as a full one."""


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
    return _scores(model, "head", method, blocks, seed, batch_size, progress)


def neuron_scores(
    model: CompactGPT2LMHeadModel,
    method: Method,
    blocks: TokenBlocks,
    *,
    seed: int = 0,
    batch_size: int = 4,
    progress: bool = True,
) -> list[list[float]]:
    """`scores[layer][i]` of the i-th hidden neuron of the layer's MLP, as `head_scores` has it for heads.

    A gate multiplies the neuron after the activation (as in Molchanov et al. 2019, arXiv 1906.10771, but with the
    absolute value of each sequence); its weights are its row of `c_fc` and its column of `c_proj`.
    """
    return _scores(model, "neuron", method, blocks, seed, batch_size, progress)


def layer_scores(
    model: CompactGPT2LMHeadModel,
    method: Method,
    blocks: TokenBlocks,
    *,
    seed: int = 0,
    batch_size: int = 4,
    progress: bool = True,
) -> list[float]:
    """How much each layer changes the residual stream: the mean over text tokens of `1 - cos(in, out)`, the block
    influence of Men et al. 2024 (ShortGPT, arXiv 2403.03853), whatever the `method`; uniform in [0, 1) if `random`.

    Raises `UserError` where the influence is not finite.
    """
    if method == "random":
        rng = random.Random(seed)
        return [rng.random() for _ in model.transformer.h]
    model = frozen_copy(model)
    totals = torch.zeros(len(model.transformer.h), dtype=torch.float64, device=model.device)
    text, tokens = torch.empty(0), 0

    def measure(layer: int, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        cosine = F.cosine_similarity(inputs[0][text].double(), output[text].double(), dim=-1)
        totals[layer] += (1 - cosine).sum()

    def hook_of(layer: int) -> Callable[..., None]:
        return lambda module, inputs, output: measure(layer, inputs, output)

    for layer, block in enumerate(model.transformer.h):
        block.register_forward_hook(hook_of(layer))
    with torch.no_grad():
        for batch in calibration_batches(model, blocks, batch_size, "layer influence" if progress else None):
            text = batch["labels"] != IGNORE
            tokens += int(text.sum())
            model.transformer(batch["input_ids"], attention_mask=batch.get("attention_mask"), use_cache=False)
    if not tokens or not torch.isfinite(totals).all():
        raise UserError("the influence of the layers is not finite: check the checkpoint and the calibration text")
    return (totals / tokens).tolist()


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


def choose_neurons(scores: Sequence[Sequence[float]], share: float) -> list[list[int]]:
    """The hidden neurons that stay, `[layer][...]`, ascending: of each layer equally many, all but `share` of them to
    the nearest multiple of `NEURONS`, and at least one such; all if `share` is 0. Of equal scores the first goes first.
    """
    total = len(scores[0])
    wanted = math.floor((1 - Fraction(str(share))) * total / NEURONS + Fraction(1, 2)) * NEURONS
    stay = min(total, max(wanted, NEURONS)) if share else total
    return [sorted(sorted(range(total), key=lambda i: (layer[i], i))[total - stay :]) for layer in scores]


def choose_layers(scores: Sequence[float], count: int) -> list[int]:
    """The layers that stay, ascending: all but the `count` with the lowest scores; of equal ones the first goes first.

    Raises `UserError` where none would stay.
    """
    total = len(scores)
    if count >= total:
        raise UserError(f"prune.layers is {count}, and this model has {total}; give at most {total - 1}: one must stay")
    return sorted(sorted(range(total), key=lambda i: (scores[i], i))[count:])


def _count(ratio: float, total: int, rounding: Rounding) -> int:
    """How many of `total` heads `ratio` is, from the ratio's decimal digits: no float noise."""
    share = Fraction(str(ratio)) * total
    return math.ceil(share) if rounding == "ceil" else math.floor(share + Fraction(rounding == "nearest", 2))


def kept_heads_of(model: CompactGPT2LMHeadModel) -> list[list[int]]:
    """The original indices of each layer's heads."""
    assert model.config.kept_heads is not None
    return model.config.kept_heads


def frozen_copy(model: CompactGPT2LMHeadModel) -> CompactGPT2LMHeadModel:
    """The model in FP32 and eval mode, its parameters without gradients, on the same device."""
    return copy.deepcopy(model).float().eval().requires_grad_(False)


@contextmanager
def watched_inputs(
    projections: Sequence[nn.Linear], watch: Callable[[int, torch.Tensor], torch.Tensor | None]
) -> Iterator[None]:
    """Call `watch(index, inputs)` with what enters each projection, `[batch, length, width]`, on each forward pass;
    what it returns takes the inputs' place.

    Into an attention's `c_proj` go its heads' outputs side by side, into an MLP's its hidden neurons.
    """

    def hook_of(index: int) -> Callable[..., torch.Tensor | None]:
        return lambda module, inputs: watch(index, inputs[0])

    handles = [each.register_forward_pre_hook(hook_of(index)) for index, each in enumerate(projections)]
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


@dataclass(frozen=True)
class _Site:
    """A projection, and the units that it reads side by side: heads, or hidden neurons."""

    projection: nn.Linear
    units: int
    incoming: torch.Tensor
    """The weights that make them, `[parts, units, size, n_embd]`."""


def _sites(model: CompactGPT2LMHeadModel, kind: Literal["head", "neuron"]) -> list[_Site]:
    blocks = [cast(Block, block) for block in model.transformer.h]
    if kind == "head":
        return [_Site(block.attn.c_proj, block.attn.n_head, block.attn.qkv_weights()) for block in blocks]
    mlps = [block.mlp for block in blocks]
    return [_Site(mlp.c_proj, mlp.c_proj.in_features, mlp.c_fc.weight[None, :, None]) for mlp in mlps]


def _scores(
    model: CompactGPT2LMHeadModel,
    kind: Literal["head", "neuron"],
    method: Method,
    blocks: TokenBlocks,
    seed: int,
    batch_size: int,
    progress: bool,
) -> list[list[float]]:
    if method == "random":
        rng = random.Random(seed)
        return [[rng.random() for _ in range(site.units)] for site in _sites(model, kind)]
    model = frozen_copy(model)
    sites = _sites(model, kind)
    if method == "magnitude":
        raw = [_magnitude(site) for site in sites]
    else:
        measure = {"taylor": _taylor, "activation": _activation}[method]
        label = f"{method} scores of {kind}s" if progress else None
        raw = measure(model, sites, calibration_batches(model, blocks, batch_size, label))
    if not all(torch.isfinite(layer).all() for layer in raw):
        raise UserError(f"the {method} {kind} scores are not finite: check the weights of the checkpoint")
    if not any(layer.any() for layer in raw):
        raise UserError(f"the {method} {kind} scores are all zero: the {kind}s of this checkpoint do nothing")
    return [F.normalize(layer.double(), dim=0).tolist() for layer in raw]


def _taylor(
    model: CompactGPT2LMHeadModel, sites: Sequence[_Site], batches: Iterator[dict[str, torch.Tensor]]
) -> list[torch.Tensor]:
    """Per unit the sum over sequences of `|dL/d gate|`, L a sequence's mean loss."""
    totals = [torch.zeros(site.units, device=model.device) for site in sites]
    gates: list[torch.Tensor] = []

    def gate(index: int, inputs: torch.Tensor) -> torch.Tensor:
        return (inputs.unflatten(-1, (sites[index].units, -1)) * gates[index]).flatten(-2)

    scored = 0
    with watched_inputs([site.projection for site in sites], gate), torch.enable_grad():
        for batch in batches:
            labels = batch.pop("labels")[:, 1:]
            # A gate for each sequence, [batch, 1, units, 1], so that the absolute value is taken of each.
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


def _magnitude(site: _Site) -> torch.Tensor:
    """Per unit the L2 norm of the weights that make it and of its columns of the projection."""
    columns = site.projection.weight.unflatten(1, (site.units, -1))
    return (site.incoming.square().sum(dim=(0, 2, 3)) + columns.square().sum(dim=(0, 2))).sqrt()


def _activation(
    model: CompactGPT2LMHeadModel, sites: Sequence[_Site], batches: Iterator[dict[str, torch.Tensor]]
) -> list[torch.Tensor]:
    """Per unit the sum over text tokens of the L2 norm of its contribution to the residual stream."""
    totals = [torch.zeros(site.units, device=model.device) for site in sites]
    # R of a unit's columns, [units, size, size]: |columns x| is |R x|, which is no wider than x.
    columns = [site.projection.weight.unflatten(1, (site.units, -1)).transpose(0, 1) for site in sites]
    factors = [torch.linalg.qr(each).R for each in columns]
    text = torch.empty(0)

    def measure(index: int, inputs: torch.Tensor) -> None:
        units = inputs[text].unflatten(-1, (sites[index].units, -1))
        totals[index] += torch.einsum("tud,ued->tue", units, factors[index]).norm(dim=-1).sum(dim=0)

    with watched_inputs([site.projection for site in sites], measure), torch.no_grad():
        for batch in batches:
            text = batch["labels"] != IGNORE
            model.transformer(batch["input_ids"], attention_mask=batch.get("attention_mask"), use_cache=False)
    return totals
