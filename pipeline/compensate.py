"""Fold what removed heads contributed into the projection that stays, by least squares."""

import copy

import torch

from eval.errors import UserError
from pipeline.data import IGNORE, TokenBlocks
from pipeline.importance import attentions, calibration_batches, frozen_copy, kept_heads_of, watched_contexts
from pipeline.model import CompactGPT2LMHeadModel


def compensate(
    dense: CompactGPT2LMHeadModel,
    pruned: CompactGPT2LMHeadModel,
    blocks: TokenBlocks,
    *,
    ridge: float = 1e-3,
    batch_size: int = 4,
    progress: bool = True,
) -> CompactGPT2LMHeadModel:
    """A new model: `pruned` with each `c_proj` adjusted to stand in for the heads it lost.

    For each layer, with X the context of the kept heads (`tokens x kept width`) and R what the removed
    heads added to the residual stream (`tokens x n_embd`), it solves

        min over A, b of  |X A + b - R|^2 / tokens + ridge * s * |A|^2,   s = mean variance of X's columns

    and adds A^T to `c_proj.weight` and b to `c_proj.bias`. X and R come from the dense model's stream:
    it is the stream that all later, unchanged weights were trained on, and the layers' fits stay
    independent, so one pass over the text serves all and no fit chases the errors of another.
    Only each layer's first and second moments are kept, in FP64. `dense` and `pruned` are not changed;
    dtype and device are `pruned`'s. Raises `ValueError` where `pruned` has a head that `dense` lacks,
    `UserError` where the activations are not finite.
    """
    dense_heads, pruned_heads = kept_heads_of(dense), kept_heads_of(pruned)
    for layer, (had, keeps) in enumerate(zip(dense_heads, pruned_heads, strict=True)):
        if not set(keeps) <= set(had):
            raise ValueError(f"layer {layer} of the pruned model has heads {keeps}, the dense one {had}")
    means, covariances = _moments(dense, blocks, batch_size, "compensation" if progress else None)
    result = copy.deepcopy(pruned)
    for layer, (mean, covariance) in enumerate(zip(means, covariances, strict=True)):
        had, keeps = dense_heads[layer], pruned_heads[layer]
        if len(keeps) == len(had):
            continue
        is_kept = torch.tensor([head in keeps for head in had], device=mean.device)
        is_kept = is_kept.repeat_interleave(len(mean) // len(had))
        removed = attentions(dense)[layer].c_proj.weight.detach().double()[:, ~is_kept]
        within, across = covariance[is_kept][:, is_kept], covariance[is_kept][:, ~is_kept]
        # A constant context has no variance to fit on: the tiny term keeps the system solvable.
        within.diagonal().add_(ridge * within.diagonal().mean() + torch.finfo(torch.float64).tiny)
        fit = torch.linalg.solve(within, across @ removed.T)
        projection = attentions(result)[layer].c_proj
        with torch.no_grad():
            projection.weight.copy_(projection.weight.double() + fit.T)
            projection.bias.copy_(projection.bias.double() + removed @ mean[~is_kept] - fit.T @ mean[is_kept])
    return result


def _moments(
    model: CompactGPT2LMHeadModel, blocks: TokenBlocks, batch_size: int, label: str | None
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Per layer the mean `[width]` and the covariance `[width, width]` of its heads' context over the text."""
    model = frozen_copy(model)
    widths = [attn.c_proj.in_features for attn in attentions(model)]
    sums = [torch.zeros(width, dtype=torch.float64, device=model.device) for width in widths]
    squares = [torch.zeros(width, width, dtype=torch.float64, device=model.device) for width in widths]
    text = torch.empty(0)
    tokens = 0

    def accumulate(layer: int, context: torch.Tensor) -> None:
        rows = context[text].double()
        sums[layer] += rows.sum(dim=0)
        squares[layer].addmm_(rows.T, rows)

    with watched_contexts(model, accumulate), torch.no_grad():
        for batch in calibration_batches(model, blocks, batch_size, label):
            text = batch["labels"] != IGNORE
            tokens += int(text.sum())
            model.transformer(batch["input_ids"], batch.get("attention_mask"), use_cache=False)
    if not tokens or not all(torch.isfinite(square).all() for square in squares):
        raise UserError("compensation found no finite activations: check the checkpoint and the calibration text")
    means = [total / tokens for total in sums]
    return means, [square / tokens - mean.outer(mean) for square, mean in zip(squares, means, strict=True)]
