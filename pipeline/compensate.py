"""Fold what removed heads and neurons contributed into the projection that stays, by least squares."""

import copy
from collections.abc import Sequence

import torch
from torch import nn

from eval.errors import UserError
from pipeline.data import IGNORE, TokenBlocks
from pipeline.importance import calibration_batches, frozen_copy, kept_heads_of, watched_inputs
from pipeline.model import CompactGPT2LMHeadModel


def compensate(
    dense: CompactGPT2LMHeadModel,
    pruned: CompactGPT2LMHeadModel,
    blocks: TokenBlocks,
    *,
    neurons: Sequence[Sequence[int]] | None = None,
    ridge: float = 1e-3,
    batch_size: int = 4,
    progress: bool = True,
) -> CompactGPT2LMHeadModel:
    """A new model: `pruned` with each `c_proj` adjusted to stand in for the inputs it lost: heads, and in the MLPs
    hidden neurons, of which `neurons[layer]` were kept (None: all).

    For each of them, with X what the kept inputs hold (`tokens x kept width`) and R what the removed
    ones added to the residual stream (`tokens x n_embd`), it solves

        min over A, b of  |X A + b - R|^2 / tokens + ridge * s * |A|^2,   s = mean variance of X's columns

    and adds A^T to `c_proj.weight` and b to `c_proj.bias`. X and R come from the dense model's stream:
    it is the stream that all later, unchanged weights were trained on, and the fits stay
    independent, so one pass over the text serves all and no fit chases the errors of another.
    Only each projection's first and second moments are kept, in FP64. `dense` and `pruned` are not changed;
    dtype and device are `pruned`'s. Raises `ValueError` where `pruned` has a head that `dense` lacks,
    `UserError` where the activations are not finite.
    """
    kept = _kept_inputs(dense, pruned, neurons)
    means, covariances = _moments(dense, list(kept), blocks, batch_size, "compensation" if progress else None)
    result = copy.deepcopy(pruned)
    for (name, is_kept), mean, covariance in zip(kept.items(), means, covariances, strict=True):
        removed = _linear(dense, name).weight.detach().double()[:, ~is_kept]
        within, across = covariance[is_kept][:, is_kept], covariance[is_kept][:, ~is_kept]
        # Constant inputs have no variance to fit on: the tiny term keeps the system solvable.
        within.diagonal().add_(ridge * within.diagonal().mean() + torch.finfo(torch.float64).tiny)
        fit = torch.linalg.solve(within, across @ removed.T)
        projection = _linear(result, name)
        with torch.no_grad():
            projection.weight.copy_(projection.weight.double() + fit.T)
            projection.bias.copy_(projection.bias.double() + removed @ mean[~is_kept] - fit.T @ mean[is_kept])
    return result


def _kept_inputs(
    dense: CompactGPT2LMHeadModel, pruned: CompactGPT2LMHeadModel, neurons: Sequence[Sequence[int]] | None
) -> dict[str, torch.Tensor]:
    """The projections that lost inputs, by name: which of the dense ones they kept, bool `[width]`."""
    found = {}
    for layer, (had, keeps) in enumerate(zip(kept_heads_of(dense), kept_heads_of(pruned), strict=True)):
        if not set(keeps) <= set(had):
            raise ValueError(f"layer {layer} of the pruned model has heads {keeps}, the dense one {had}")
        heads = torch.tensor([head in keeps for head in had], device=dense.device)
        found[f"transformer.h.{layer}.attn.c_proj"] = heads.repeat_interleave(dense.config.head_dim)
        if neurons is not None:
            hidden = torch.zeros(dense.config.n_inner, dtype=torch.bool, device=dense.device)
            hidden[neurons[layer]] = True
            found[f"transformer.h.{layer}.mlp.c_proj"] = hidden
    return {name: is_kept for name, is_kept in found.items() if not is_kept.all()}


def _linear(model: nn.Module, name: str) -> nn.Linear:
    module = model.get_submodule(name)
    assert isinstance(module, nn.Linear)
    return module


def _moments(
    model: CompactGPT2LMHeadModel, names: Sequence[str], blocks: TokenBlocks, batch_size: int, label: str | None
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Of what enters each projection, over the text: the mean `[width]` and the covariance `[width, width]`."""
    model = frozen_copy(model)
    projections = [_linear(model, name) for name in names]
    widths = [projection.in_features for projection in projections]
    sums = [torch.zeros(width, dtype=torch.float64, device=model.device) for width in widths]
    squares = [torch.zeros(width, width, dtype=torch.float64, device=model.device) for width in widths]
    text = torch.empty(0)
    tokens = 0

    def accumulate(index: int, inputs: torch.Tensor) -> None:
        rows = inputs[text].double()
        sums[index] += rows.sum(dim=0)
        squares[index].addmm_(rows.T, rows)

    with watched_inputs(projections, accumulate), torch.no_grad():
        for batch in calibration_batches(model, blocks, batch_size, label):
            text = batch["labels"] != IGNORE
            tokens += int(text.sum())
            model.transformer(batch["input_ids"], attention_mask=batch.get("attention_mask"), use_cache=False)
    if not tokens or not all(torch.isfinite(square).all() for square in squares):
        raise UserError("compensation found no finite activations: check the checkpoint and the calibration text")
    means = [total / tokens for total in sums]
    return means, [square / tokens - mean.outer(mean) for square, mean in zip(squares, means, strict=True)]
