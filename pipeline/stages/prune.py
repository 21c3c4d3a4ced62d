"""Prune: score layers, heads and hidden neurons, drop the weakest, slice the matrices."""

from typing import Any

import torch

from pipeline.checkpoint import load_model, save_model
from pipeline.compensate import compensate
from pipeline.data import TokenBlocks, tokenize_dataset
from pipeline.importance import (
    choose_heads,
    choose_layers,
    choose_neurons,
    head_scores,
    layer_scores,
    neuron_scores,
)
from pipeline.model import CompactGPT2LMHeadModel, keep_layers, slice_heads, slice_neurons
from pipeline.recipe import Prune, Recipe
from pipeline.stages.job import Job
from pipeline.texts import load_text
from pipeline.tokenizer import load_tokenizer

VERSION = 1
_LATER = ("mlp", "layers")
"""Choices that came after others had made runs: left out where they change nothing, so that those stay up to date."""


def config(recipe: Recipe) -> dict[str, Any]:
    """The pruning choices and the seed."""
    unused = {key for key in _LATER if not getattr(recipe.prune, key)}
    return {**recipe.prune.model_dump(exclude=unused), "seed": recipe.seed}


def control_config(recipe: Recipe) -> dict[str, Any]:
    """The same for the control arm that drops the same amount at random."""
    return config(_random(recipe))


def build(job: Job) -> dict[str, Any]:
    """Write `model/`: FP16 with less in it. The details hold scores, and what was kept."""
    assert job.source is not None
    # Scores need gradients, so the FP16 weights are computed in FP32.
    dense = load_model(job.source / "model", torch.float32).to(job.device)
    tokenizer = load_tokenizer(job.source / "model")
    choices = job.recipe.prune
    length = min(choices.block_size, dense.config.n_positions)
    blocks = tokenize_dataset(load_text(job.recipe.data.calibration), tokenizer, length)
    blocks = TokenBlocks(blocks.tokens[: choices.calibration_blocks])
    pruned, details = pruned_model(dense, choices, blocks, job.recipe.seed)
    save_model(pruned.half().cpu(), tokenizer, job.out / "model")
    return {**details, "parameters": pruned.num_parameters()}


def build_control(job: Job) -> dict[str, Any]:
    """As `build`, with as much dropped at random."""
    return build(Job(_random(job.recipe), job.out, job.source, job.device))


def pruned_model(
    model: CompactGPT2LMHeadModel, choices: Prune, blocks: TokenBlocks, seed: int
) -> tuple[CompactGPT2LMHeadModel, dict[str, Any]]:
    """The pruned model, and what was decided, with the fields of `eval.results.Heads`.

    Layers go first. Heads and neurons are scored on what is left, for what they do there is what will be missed.
    """
    n_inner, influence, layers = model.config.n_inner, [], list(range(model.config.n_layer))
    if choices.layers:
        influence = layer_scores(model, choices.scores, blocks, seed=seed)
        layers = choose_layers(influence, choices.layers)
        model = keep_layers(model, layers)
    scores = head_scores(model, choices.scores, blocks, seed=seed)
    kept = choose_heads(
        scores,
        model.config.kept_heads,
        model.config.n_head,
        ratio=choices.ratio,
        scope=choices.scope,
        rounding=choices.rounding,
    )
    pruned, neurons = slice_heads(model, kept), None
    if choices.mlp:
        neurons = choose_neurons(neuron_scores(model, choices.scores, blocks, seed=seed), choices.mlp)
        pruned = slice_neurons(pruned, neurons)
    if choices.compensate:
        pruned = compensate(model, pruned, blocks, neurons=neurons)
    return pruned, {
        "method": choices.scores,
        "scope": choices.scope,
        "scores": scores,
        "kept": kept,
        "layers": layers,
        "influence": influence,
        "n_inner": [pruned.config.n_inner, n_inner],
    }


def _random(recipe: Recipe) -> Recipe:
    return recipe.model_copy(update={"prune": recipe.prune.model_copy(update={"scores": "random"})})
