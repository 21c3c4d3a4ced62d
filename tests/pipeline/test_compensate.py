"""Compensation against numpy's least squares, on linear copies it must recover, and by its effect."""

import copy

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from eval.errors import UserError
from pipeline.compensate import compensate
from pipeline.data import TokenBlocks
from pipeline.model import slice_heads

UNEVEN = [[0, 1, 3, 4], [0, 1, 2, 3, 4], [1, 2]]


def _contexts(model, ids: torch.Tensor) -> list[np.ndarray]:
    """What enters each layer's `c_proj`, `[tokens, width]` in FP64."""
    seen: list[np.ndarray] = []
    handles = [
        block.attn.c_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1).double().numpy()))
        for block in model.transformer.h
    ]
    with torch.no_grad():
        model(ids)
    for handle in handles:
        handle.remove()
    return seen


def _divergence(dense, other, ids: torch.Tensor) -> float:
    """Mean KL(dense || other) of the next-token distributions, nats."""
    with torch.no_grad():
        p, q = (model(ids).logits.log_softmax(-1).flatten(0, 1) for model in (dense, other))
    return F.kl_div(q, p, log_target=True, reduction="batchmean").item()


@pytest.mark.parametrize("ridge", [0.0, 1e-4, 0.3])
def test_it_solves_the_ridge_regression(tiny_model, tiny_blocks, ridge):
    ids = torch.from_numpy(tiny_blocks.tokens)
    pruned = slice_heads(tiny_model, UNEVEN)
    result = compensate(tiny_model, pruned, tiny_blocks, ridge=ridge, batch_size=3, progress=False)
    size = tiny_model.config.head_dim
    for layer, (context, keeps) in enumerate(zip(_contexts(tiny_model, ids), UNEVEN, strict=True)):
        old, new = pruned.transformer.h[layer].attn.c_proj, result.transformer.h[layer].attn.c_proj
        kept = np.isin(np.arange(context.shape[1]) // size, keeps)
        if kept.all():
            assert torch.equal(old.weight, new.weight) and torch.equal(old.bias, new.bias)
            continue
        weight = tiny_model.transformer.h[layer].attn.c_proj.weight.detach().double().numpy()
        x, r = context[:, kept], context[:, ~kept] @ weight[:, ~kept].T
        centred = x - x.mean(0)
        penalty = np.sqrt(len(x) * ridge * centred.var(0).mean()) * np.eye(x.shape[1])
        rows = np.vstack([centred, penalty])
        a = np.linalg.lstsq(rows, np.vstack([r - r.mean(0), np.zeros((x.shape[1], r.shape[1]))]), rcond=None)[0]
        np.testing.assert_allclose((new.weight - old.weight).detach(), a.T, atol=2e-5)
        np.testing.assert_allclose((new.bias - old.bias).detach(), r.mean(0) - x.mean(0) @ a, atol=2e-5)


@pytest.mark.parametrize("linear", [False, True])
def test_a_copied_head_is_recovered(tiny_model, tiny_blocks, linear):
    """Head 3 attends as head 1 does; its values are those of head 1, or a linear map of them."""
    size = tiny_model.config.head_dim
    mix = torch.randn(size, size, generator=torch.Generator().manual_seed(3)) if linear else torch.eye(size)
    for block in tiny_model.transformer.h:
        fused = block.attn.c_attn
        for parameter in (fused.weight.data, fused.bias.data):
            q, k, v = parameter.unflatten(0, (3, 5, size))
            q[3], k[3], v[3] = q[1], k[1], mix @ v[1]
    pruned = slice_heads(tiny_model, [[0, 1, 2, 4]] * 3)
    unseen = torch.from_numpy(np.random.default_rng(9).integers(1, 269, (4, 60)))
    with torch.no_grad():
        wanted = tiny_model(unseen).logits
        assert (pruned(unseen).logits - wanted).abs().max() > 0.1
        result = compensate(tiny_model, pruned, tiny_blocks, ridge=1e-9, progress=False)
        assert (result(unseen).logits - wanted).abs().max() < 1e-4


@pytest.mark.parametrize("heads", [[[0, 1, 2, 3]] * 3, UNEVEN, [[2]] * 3])
def test_the_output_comes_closer_to_the_dense_model(tiny_model, heads):
    blocks = TokenBlocks(np.random.default_rng(5).integers(1, 269, (24, 33)))
    ids = torch.from_numpy(blocks.tokens)
    pruned = slice_heads(tiny_model, heads)
    result = compensate(tiny_model, pruned, blocks, progress=False)
    assert _divergence(tiny_model, result, ids) < 0.9 * _divergence(tiny_model, pruned, ids)


def test_padding_and_batch_size_do_not_matter(tiny_model, tiny_blocks):
    pruned = slice_heads(tiny_model, UNEVEN)
    plain = compensate(tiny_model, pruned, tiny_blocks, batch_size=7, progress=False)
    tokens = np.pad(tiny_blocks.tokens, ((0, 0), (0, 9)))
    padded = compensate(tiny_model, pruned, TokenBlocks(tokens, [33] * 7), batch_size=2, progress=False)
    for (key, a), b in zip(plain.state_dict().items(), padded.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4, msg=key)


def test_nothing_given_is_changed_and_dtype_stays(tiny_model, tiny_blocks):
    dense = tiny_model.half().train()
    pruned = slice_heads(dense, UNEVEN)
    before = [{k: v.clone() for k, v in model.state_dict().items()} for model in (dense, pruned)]
    result = compensate(dense, pruned, tiny_blocks, progress=False)
    for model, state in zip((dense, pruned), before, strict=True):
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert result.dtype == torch.float16 and result.training and result.config.kept_heads == UNEVEN
    changed = {key for key, value in result.state_dict().items() if not torch.equal(value, before[1][key])}
    assert changed == {f"transformer.h.{layer}.attn.c_proj.{part}" for layer in (0, 2) for part in ("weight", "bias")}


def test_one_token_of_text_still_solves(tiny_model):
    """No variance to fit on: only the bias takes over, and on that text the model is recovered."""
    blocks = TokenBlocks(np.array([[17]]))
    result = compensate(tiny_model, slice_heads(tiny_model, UNEVEN), blocks, progress=False)
    ids = torch.tensor([[17]])
    with torch.no_grad():
        torch.testing.assert_close(result(ids).logits, tiny_model(ids).logits, atol=1e-4, rtol=0)


def test_what_does_not_fit_is_an_error(tiny_model, tiny_blocks):
    pruned = slice_heads(tiny_model, UNEVEN)
    with pytest.raises(ValueError, match="layer 0 of the pruned model has heads"):
        compensate(pruned, tiny_model, tiny_blocks, progress=False)
    broken = copy.deepcopy(tiny_model)
    broken.transformer.h[0].mlp.c_fc.weight.data[1, 1] = float("inf")
    with pytest.raises(UserError, match="no finite activations"):
        compensate(broken, pruned, tiny_blocks, progress=False)


@pytest.mark.gpu
def test_a_gpu_compensates_as_the_cpu_does(tiny_model, tiny_blocks):
    pruned = slice_heads(tiny_model, UNEVEN)
    on_cpu = compensate(tiny_model, pruned, tiny_blocks, progress=False)
    on_gpu = compensate(tiny_model.cuda(), pruned.cuda(), tiny_blocks, progress=False)
    for (key, a), b in zip(on_cpu.state_dict().items(), on_gpu.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b.cpu(), atol=1e-3, rtol=1e-3, msg=key)
