"""Embedding and LayerNorm on the CPU, against torch."""

from typing import Any

import pytest
import torch

NAN = float("nan")


@pytest.mark.parametrize(("width", "ld"), [(64, 64), (111, 112), (1600, 1600)])
def test_embedding_of_ragged_sequences(ops: Any, width: int, ld: int) -> None:
    batch, length, context = 3, 5, 9
    wte, wpe = torch.zeros(31, ld).half(), torch.zeros(context, ld).half()
    wte[:, :width], wpe[:, :width] = torch.randn(31, width).half(), torch.randn(context, width).half()
    tokens = torch.randint(0, 31, (batch, length), dtype=torch.int32)
    start = torch.tensor([0, 3, 7], dtype=torch.int32)  # the last one's padding lies past the context
    x = torch.full((batch * length * ld + 8,), NAN)
    ops.embed(tokens, start, wte, wpe, x, batch, length, context, ld)
    assert torch.isnan(x[batch * length * ld :]).all()
    positions = (start[:, None] + torch.arange(length)).clamp(max=context - 1)
    wanted = wte[tokens.long()].float() + wpe[positions].float()
    assert torch.equal(x[: batch * length * ld].view(batch, length, ld), wanted)


@pytest.mark.parametrize(("width", "ld"), [(8, 8), (72, 72), (111, 112), (1600, 1608)])
@pytest.mark.parametrize("chosen", [False, True])
def test_layer_norm(ops: Any, width: int, ld: int, chosen: bool) -> None:
    x = torch.randn(7, ld) * 3 + 50  # a mean that a sum of squares would drown in
    x[:, width:] = NAN
    gain, bias = torch.randn(width).half(), torch.randn(width).half()
    rows = torch.tensor([6, 0, 3, 3, 5], dtype=torch.int32) if chosen else None
    count = 5 if chosen else 7
    out = torch.full((count * ld + 8,), NAN, dtype=torch.float16)
    ops.layer_norm(x, rows, gain, bias, out, count, width, ld, ld, 1e-5)
    assert torch.isnan(out[count * ld :]).all()
    got = out[: count * ld].view(count, ld)
    assert (got[:, width:] == 0).all()
    taken = x[rows.long() if rows is not None else slice(None), :width]
    wanted = torch.nn.functional.layer_norm(taken.double(), (width,), gain.double(), bias.double(), 1e-5)
    # FP16's own rounding of the result, and FP32's of values near 50.
    assert torch.allclose(got[:, :width].double(), wanted, rtol=2**-11, atol=2e-5)


def test_bias_of_rows(ops: Any) -> None:
    bias, x = torch.randn(301).half(), torch.full((5, 310), NAN)
    x[:, :301] = torch.randn(5, 301)
    wanted = x[:, :301] + bias.float()
    ops.add_bias(bias, x, 5, 301, 310)
    assert torch.equal(x[:, :301], wanted) and torch.isnan(x[:, 301:]).all()
