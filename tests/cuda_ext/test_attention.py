"""Attention and the KV cache on the CPU, against FP64 softmax over the keys a query may see."""

from typing import Any

import pytest
import torch

NAN = float("nan")


def cache_of(batch: int, heads: int, capacity: int, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Poisoned all over: only what was appended may be read."""
    return tuple(torch.full((batch, heads, capacity, head_dim), NAN, dtype=torch.float16) for _ in "kv")  # type: ignore[return-value]


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """One query [head_dim] over keys [count, head_dim], in `dtype` step by step; FP64 out."""
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    scores = (k @ q) * q.shape[0] ** -0.5
    return (scores.softmax(0) @ v).double()


def close(got: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[float, float]:
    """Our greatest error and eager FP16's."""
    assert torch.isfinite(got).all()  # max() in Python would pass over a NaN
    wanted = attend(q, k, v, torch.float64)
    return float((got.double() - wanted).abs().max()), float((attend(q, k, v, torch.float16) - wanted).abs().max())


@pytest.mark.parametrize(("heads", "head_dim"), [(20, 64), (40, 32), (9, 128)])
def test_append_of_wide_rows(ops: Any, heads: int, head_dim: int) -> None:
    """Rows of more vectors than a block has threads; what is past the capacity or a sequence's length is left out."""
    width, batch, length, capacity = heads * head_dim, 2, 3, 7
    qkv = torch.randn(batch, length, 3 * width).half()
    k, v = cache_of(batch, heads, capacity, head_dim)
    start, lengths = torch.tensor([1, 5], dtype=torch.int32), torch.tensor([2, 3], dtype=torch.int32)
    ops.kv_append(qkv, 3 * width, k, v, heads, capacity, head_dim, start, lengths, batch, length)
    for part, cache in ((1, k), (2, v)):
        wanted = torch.full_like(cache, NAN)
        for b, t in ((0, 0), (0, 1), (1, 0), (1, 1)):
            wanted[b, :, int(start[b]) + t] = qkv[b, t, part * width : (part + 1) * width].view(heads, head_dim)
        assert torch.equal(cache.view(torch.int16), wanted.view(torch.int16))


def prefill(ops: Any, starts: list[int], counts: list[int], heads: int, head_dim: int) -> None:
    """Queries of one chunk behind a past of `starts` keys; sequence b has counts[b] of them, the rest is padding."""
    batch, length, width = len(starts), max(counts), heads * head_dim
    capacity = max(s + c for s, c in zip(starts, counts, strict=True)) + 3
    k, v = cache_of(batch, heads, capacity, head_dim)
    for b, start in enumerate(starts):
        k[b, :, :start], v[b, :, :start] = torch.randn(2, heads, start, head_dim).half()
    ld_qkv, ld_out = 3 * width + 8, width + 8
    qkv = torch.randn(batch, length, ld_qkv).half()
    start, lengths = (torch.tensor(x, dtype=torch.int32) for x in (starts, counts))
    past = k.clone()
    ops.kv_append(qkv, ld_qkv, k, v, heads, capacity, head_dim, start, lengths, batch, length)
    out = torch.full((batch * length * ld_out + 64,), NAN, dtype=torch.float16)
    ops.attention_prefill(
        qkv, ld_qkv, k, v, heads, capacity, head_dim, start, lengths, out, ld_out, batch, length
    )  # fmt: skip
    assert torch.isnan(out[batch * length * ld_out :]).all()
    rows = out[: batch * length * ld_out].view(batch, length, ld_out)
    assert torch.isnan(rows[..., width:]).all() and torch.isfinite(rows[..., :width]).all()
    ours = eager = 0.0
    for b, (first, count) in enumerate(zip(starts, counts, strict=True)):
        assert torch.equal(k[b, :, :first], past[b, :, :first])
        assert torch.isnan(k[b, :, first + count :]).all() and torch.isnan(v[b, :, first + count :]).all()
        split = qkv[b, :count, : 3 * width].view(count, 3, heads, head_dim)
        assert torch.equal(k[b, :, first : first + count], split[:, 1].transpose(0, 1))
        assert torch.equal(v[b, :, first : first + count], split[:, 2].transpose(0, 1))
        for head in range(heads):
            for t in range(count):
                got = rows[b, t, head * head_dim : (head + 1) * head_dim]
                seen = first + t + 1
                errors = close(got, split[t, 0, head], k[b, head, :seen], v[b, head, :seen])
                ours, eager = max(ours, errors[0]), max(eager, errors[1])
    assert ours <= 2 * eager


@pytest.mark.parametrize("head_dim", [32, 64, 128])
@pytest.mark.parametrize("length", [1, 7, 63, 64, 65, 130])
def test_prefill(ops: Any, head_dim: int, length: int) -> None:
    prefill(ops, [0], [length], 1 if length > 64 else 3, head_dim)


def test_prefill_of_ragged_sequences_behind_a_past(ops: Any, each_seed: Any) -> None:
    for seed in each_seed(ops.library):
        torch.manual_seed(seed)
        prefill(ops, [0, 61, 130], [9, 4, 70], 1, 64)  # up to four tiles of keys: stages are filled again


def decode(ops: Any, lengths: list[int], heads: int, head_dim: int, splits: int) -> None:
    batch, capacity, width = len(lengths), max(lengths) + 5, heads * head_dim
    k, v = cache_of(batch, heads, capacity, head_dim)
    for b, length in enumerate(lengths):
        k[b, :, :length], v[b, :, :length] = torch.randn(2, heads, length, head_dim).half()
    ld_q, ld_out = width + 8, width + 16
    q = torch.randn(batch, ld_q).half()
    out = torch.full((batch * ld_out + 64,), NAN, dtype=torch.float16)
    partial = torch.full((batch * heads * splits * (head_dim + 2),), NAN)
    counters = torch.zeros(batch * heads, dtype=torch.int32)
    ops.attention_decode(
        q, ld_q, k, v, heads, capacity, head_dim, torch.tensor(lengths, dtype=torch.int32), out, ld_out, batch, splits,
        partial, counters,
    )  # fmt: skip
    assert not counters.any()
    rows = out[: batch * ld_out].view(batch, ld_out)
    assert torch.isnan(rows[:, width:]).all() and torch.isnan(out[batch * ld_out :]).all()
    ours = eager = 0.0
    for b, length in enumerate(lengths):
        for head in range(heads):
            part = slice(head * head_dim, (head + 1) * head_dim)
            errors = close(rows[b, part], q[b, part], k[b, head, :length], v[b, head, :length])
            ours, eager = max(ours, errors[0]), max(eager, errors[1])
    assert ours <= 2 * eager


@pytest.mark.parametrize("head_dim", [32, 64, 128])
@pytest.mark.parametrize("splits", [1, 3, 8])
def test_decode(ops: Any, head_dim: int, splits: int) -> None:
    decode(ops, [1, 7, 64, 65, 130], 3, head_dim, splits)


def test_decode_in_any_order_of_threads(ops: Any, each_seed: Any) -> None:
    for seed in each_seed(ops.library):
        torch.manual_seed(seed)
        decode(ops, [2, 90], 1, 64, 3)
