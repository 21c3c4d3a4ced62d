"""Prune: score the attention heads, drop the weakest, slice the matrices."""

from typing import Any

import torch

from pipeline.checkpoint import load_model, save_model
from pipeline.compensate import compensate
from pipeline.data import TokenBlocks, tokenize_dataset
from pipeline.importance import choose_heads, head_scores
from pipeline.model import CompactGPT2LMHeadModel, slice_heads
from pipeline.recipe import Prune, Recipe
from pipeline.stages.job import Job
from pipeline.texts import load_text
from pipeline.tokenizer import load_tokenizer

VERSION = 1


def config(recipe: Recipe) -> dict[str, Any]:
    """The pruning choices and the seed."""
    return {**recipe.prune.model_dump(), "seed": recipe.seed}


def control_config(recipe: Recipe) -> dict[str, Any]:
    """The same for the control arm that drops heads at random."""
    return config(_random(recipe))


def build(job: Job) -> dict[str, Any]:
    """Write `model/`: FP16 with fewer heads. The details hold scores and kept heads."""
    assert job.source is not None
    # Scores need gradients, so the FP16 weights are computed in FP32.
    dense = load_model(job.source / "model", torch.float32).to(job.device)
    tokenizer = load_tokenizer(job.source / "model")
    choices = job.recipe.prune
    length = min(choices.block_size, dense.config.n_positions)
    blocks = tokenize_dataset(load_text(job.recipe.data.calibration), tokenizer, length)
    blocks = TokenBlocks(blocks.tokens[: choices.calibration_blocks])
    pruned, details = prune_heads(dense, choices, blocks, job.recipe.seed)
    save_model(pruned.half().cpu(), tokenizer, job.out / "model")
    return {**details, "parameters": pruned.num_parameters()}


def build_control(job: Job) -> dict[str, Any]:
    """As `build`, with heads dropped at random."""
    return build(Job(_random(job.recipe), job.out, job.source, job.device))


def prune_heads(
    model: CompactGPT2LMHeadModel, choices: Prune, blocks: TokenBlocks, seed: int
) -> tuple[CompactGPT2LMHeadModel, dict[str, Any]]:
    """The pruned model, and what was decided: `{"method", "scope", "scores", "kept"}`."""
    scores = head_scores(model, choices.scores, blocks, seed=seed)
    kept = choose_heads(
        scores,
        model.config.kept_heads,
        model.config.n_head,
        ratio=choices.ratio,
        scope=choices.scope,
        rounding=choices.rounding,
    )
    pruned = slice_heads(model, kept)
    if choices.compensate:
        pruned = compensate(model, pruned, blocks)
    return pruned, {"method": choices.scores, "scope": choices.scope, "scores": scores, "kept": kept}


def _random(recipe: Recipe) -> Recipe:
    return recipe.model_copy(update={"prune": recipe.prune.model_copy(update={"scores": "random"})})
