"""The static-cache loop computes what CompactGPT2 computes; graphs and tuning are for a GPU."""

import pytest
import torch
from transformers import GPT2LMHeadModel

from benchmarks.compiled_peer import Attend, StaticGPT2, attend_plain, attend_sdpa
from pipeline.model import CompactGPT2LMHeadModel, slice_heads


@pytest.fixture
def pruned(tiny_model: CompactGPT2LMHeadModel) -> CompactGPT2LMHeadModel:
    return slice_heads(tiny_model, [[0, 3], [4], [0, 1, 2, 3, 4]])


@torch.no_grad()
@pytest.mark.parametrize("attend", [attend_sdpa, attend_plain])
@pytest.mark.parametrize("traced", [False, True])
def test_greedy_tokens_and_logits(pruned: CompactGPT2LMHeadModel, attend: Attend, traced: bool) -> None:
    ids = torch.randint(1, 269, (3, 11), generator=torch.Generator().manual_seed(2))
    static = StaticGPT2(pruned, batch=3, capacity=32, attend=attend)
    static.requires_grad_(False)
    for cache in static.cache:  # what was not written must not be seen; NaN would come through a weight of 0
        cache.normal_().mul_(100)
    step = torch.compile(static.step, backend="eager", fullgraph=True, dynamic=False) if traced else static.step
    logits = static(ids, torch.arange(11))
    torch.testing.assert_close(logits, pruned(ids).logits[:, -1], atol=1e-4, rtol=1e-4)
    token = logits.argmax(-1, keepdim=True)
    static.token.copy_(token)
    static.position.fill_(11)
    text = torch.cat([ids, token], 1)
    for _ in range(6):
        wanted = pruned(text).logits[:, -1]
        torch.testing.assert_close(step(), wanted, atol=1e-4, rtol=1e-4)
        text = torch.cat([text, wanted.argmax(-1, keepdim=True)], 1)
        assert torch.equal(static.token, text[:, -1:])
    assert torch.equal(static.history[:, 12:18], text[:, 12:])
    assert isinstance(pruned, CompactGPT2LMHeadModel) and not isinstance(pruned, GPT2LMHeadModel)
