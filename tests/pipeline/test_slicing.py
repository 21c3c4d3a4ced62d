"""Smaller matrices compute what the dense model computes with the missing heads gated to zero."""

import copy

import pytest
import torch

from pipeline.model import slice_heads

CUTS = {
    "uniform": [[0, 1, 2, 4]] * 3,
    "uneven": [[0, 2, 3], [4], [0, 1, 2, 3, 4]],
    "all but one": [[3], [0], [4]],
    "none": [[0, 1, 2, 3, 4]] * 3,
}


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(1, 269, (3, 29), generator=torch.Generator().manual_seed(6))


def _gated_logits(gpt2, kept_heads, ids: torch.Tensor) -> torch.Tensor:
    """Hugging Face's dense model with every other head's context set to zero before `c_proj`."""

    def hook_of(keeps):
        gate = torch.zeros(gpt2.config.n_head)
        gate[keeps] = 1
        return lambda _, args: ((args[0].unflatten(-1, (len(gate), -1)) * gate[:, None]).flatten(-2),)

    handles = [
        block.attn.c_proj.register_forward_pre_hook(hook_of(keeps))
        for block, keeps in zip(gpt2.transformer.h, kept_heads, strict=True)
    ]
    with torch.no_grad():
        logits = gpt2(ids).logits
    for handle in handles:
        handle.remove()
    return logits


@pytest.mark.parametrize("heads", CUTS.values(), ids=CUTS)
@torch.no_grad()
def test_slicing_equals_gating(tiny_gpt2, tiny_model, ids, heads):
    sliced = slice_heads(tiny_model, heads)
    wanted = _gated_logits(tiny_gpt2, heads, ids)
    torch.testing.assert_close(sliced(ids).logits, wanted, atol=1e-5, rtol=0)
    if sliced.config.pruned:
        assert (wanted - tiny_model(ids).logits).abs().max() > 0.1
    # Cached, in chunks.
    first = sliced(ids[:, :11], use_cache=True)
    rest = sliced(ids[:, 11:], past_key_values=first.past_key_values)
    torch.testing.assert_close(rest.logits, wanted[:, 11:], atol=1e-5, rtol=0)


@pytest.mark.parametrize("heads", CUTS.values(), ids=CUTS)
def test_the_matrices_are_smaller(tiny_model, heads):
    sliced = slice_heads(tiny_model, heads)
    for block, keeps in zip(sliced.transformer.h, heads, strict=True):
        assert block.attn.c_attn.weight.shape == (3 * 8 * len(keeps), 40)
        assert block.attn.c_attn.bias.shape == (3 * 8 * len(keeps),)
        assert block.attn.c_proj.weight.shape == (40, 8 * len(keeps))
    gone = sum(5 - len(keeps) for keeps in heads)
    one_head = 3 * 8 * (40 + 1) + 8 * 40
    assert sliced.num_parameters() == tiny_model.num_parameters() - gone * one_head
    assert sliced.lm_head.weight is sliced.transformer.wte.weight


def test_slicing_twice_equals_slicing_once(tiny_model):
    final = [[2], [4], [0, 3]]
    twice = slice_heads(slice_heads(tiny_model, [[0, 2, 3], [1, 4], [0, 1, 3, 4]]), final)
    once = slice_heads(tiny_model, final)
    assert twice.config.kept_heads == once.config.kept_heads == final
    assert all(torch.equal(value, once.state_dict()[key]) for key, value in twice.state_dict().items())


def test_a_head_that_is_gone_cannot_be_kept(tiny_model):
    sliced = slice_heads(tiny_model, CUTS["uneven"])
    with pytest.raises(ValueError, match=r"layer 0 has heads \[0, 2, 3\]; it cannot keep \[1, 4\]"):
        slice_heads(sliced, [[1, 2, 4], [4], [0]])
    for bad in ([[0], [0]], [[0], [], [0]], [[0], [5], [0]]):
        with pytest.raises(ValueError, match="kept_heads"):
            slice_heads(tiny_model, bad)


def test_the_order_of_the_request_does_not_matter(tiny_model):
    assert slice_heads(tiny_model, [[4, 0], [1], [3, 2, 1]]).config.kept_heads == [[0, 4], [1], [1, 2, 3]]


def test_the_original_is_untouched(tiny_model, ids):
    before = copy.deepcopy(tiny_model)
    sliced = slice_heads(tiny_model, CUTS["uneven"])
    with torch.no_grad():
        for parameter in sliced.parameters():
            parameter.zero_()
    sliced.config.eos_token_id = 3
    sliced.generation_config.max_length = 3
    assert tiny_model.config.to_dict() == before.config.to_dict()
    assert tiny_model.generation_config.to_dict() == before.generation_config.to_dict()
    assert all(torch.equal(value, before.state_dict()[key]) for key, value in tiny_model.state_dict().items())


def test_dtype_and_mode_stay(tiny_model):
    sliced = slice_heads(tiny_model.half().train(), CUTS["uneven"])
    assert sliced.dtype == torch.float16 and sliced.training
    columns = tiny_model.transformer.h[1].attn.c_proj.weight[:, 32:]
    assert torch.equal(sliced.transformer.h[1].attn.c_proj.weight, columns)


@pytest.mark.parametrize("heads", CUTS.values(), ids=CUTS)
def test_generation_with_a_cache(tiny_gpt2, tiny_model, ids, heads):
    """Each greedy token is the one that the gated dense model, without a cache, finds likeliest."""
    text = slice_heads(tiny_model, heads).generate(
        ids[:, :4], attention_mask=torch.ones(3, 4), max_new_tokens=9, min_new_tokens=9, do_sample=False, pad_token_id=0
    )
    assert text.shape == (3, 13)
    logits = _gated_logits(tiny_gpt2, heads, text)
    logits[..., 0] = -torch.inf  # end of text may not come before `min_new_tokens`
    assert torch.equal(logits[:, 3:-1].argmax(-1), text[:, 4:])
