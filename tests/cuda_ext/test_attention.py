"""Attention and the KV cache on the CPU, against FP64 softmax over the keys a query may see.

`readers` says how many query heads, one after another, read each key/value head; `window` how many keys a query sees,
0: all; `dims` how many numbers of a head turn with the position.
"""

from typing import Any

import pytest
import torch
from heads import angles_of, kv_head_of, turned

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
    ops.kv_append(
        qkv, 3 * width, heads, k, v, heads, capacity, head_dim, None, 0, 0, start, lengths, batch, length
    )  # fmt: skip
    for part, cache in ((1, k), (2, v)):
        wanted = torch.full_like(cache, NAN)
        for b, t in ((0, 0), (0, 1), (1, 0), (1, 1)):
            wanted[b, :, int(start[b]) + t] = qkv[b, t, part * width : (part + 1) * width].view(heads, head_dim)
        assert torch.equal(cache.view(torch.int16), wanted.view(torch.int16))


def prefill(
    ops: Any, starts: list[int], counts: list[int], readers: list[int], head_dim: int, window: int = 0, dims: int = 0
) -> None:
    """Queries of one chunk behind a past of `starts` keys; sequence b has counts[b] of them, the rest is padding."""
    heads, kv_heads = sum(readers), len(readers)
    kv_head = kv_head_of(readers)
    batch, length, width = len(starts), max(counts), heads * head_dim
    capacity = max(s + c for s, c in zip(starts, counts, strict=True)) + 3
    angles = angles_of(capacity, dims)
    k, v = cache_of(batch, kv_heads, capacity, head_dim)
    for b, start in enumerate(starts):
        # What no query sees any more may be anything.
        seen = max(0, start + 1 - window) if window else 0
        k[b, :, seen:start], v[b, :, seen:start] = torch.randn(2, kv_heads, start - seen, head_dim).half()
    ld_qkv, ld_out = width + 2 * kv_heads * head_dim + 8, width + 8
    qkv = torch.randn(batch, length, ld_qkv).half()
    projected = qkv.clone()
    start, lengths = (torch.tensor(x, dtype=torch.int32) for x in (starts, counts))
    past = k.clone()
    ops.kv_append(
        qkv, ld_qkv, heads, k, v, kv_heads, capacity, head_dim, angles, dims, capacity, start, lengths, batch, length
    )
    out = torch.full((batch * length * ld_out + 64,), NAN, dtype=torch.float16)
    ops.attention_prefill(
        qkv, ld_qkv, heads, kv_head, window, k, v, kv_heads, capacity, head_dim, start, lengths, out, ld_out, batch,
        length,
    )  # fmt: skip
    assert torch.isnan(out[batch * length * ld_out :]).all()
    rows = out[: batch * length * ld_out].view(batch, length, ld_out)
    assert torch.isnan(rows[..., width:]).all() and torch.isfinite(rows[..., :width]).all()
    ours = eager = 0.0
    for b, (first, count) in enumerate(zip(starts, counts, strict=True)):
        assert torch.equal(k[b, :, :first].nan_to_num(), past[b, :, :first].nan_to_num())
        assert torch.isnan(k[b, :, first + count :]).all() and torch.isnan(v[b, :, first + count :]).all()
        for t in range(count):
            new = projected[b, t, : width + 2 * kv_heads * head_dim].view(-1, head_dim)
            q, keys, values = new[:heads], new[heads:-kv_heads], new[-kv_heads:]
            assert torch.equal(v[b, :, first + t], values)
            for got, wanted in ((k[b, :, first + t], keys), (qkv[b, t, :width].view(heads, head_dim), q)):
                exact = turned(wanted, angles, first + t)  # rounded once: half a unit in the last of 11 bits
                assert ((got.double() - exact).abs() <= exact.abs() * 2**-10.9 + 1e-6).all()
        for head in range(heads):
            of = head if kv_head is None else int(kv_head[head])
            for t in range(count):
                got = rows[b, t, head * head_dim : (head + 1) * head_dim]
                q = qkv[b, t, head * head_dim : (head + 1) * head_dim]
                end = first + t + 1
                begin = max(0, end - window) if window else 0
                errors = close(got, q, k[b, of, begin:end], v[b, of, begin:end])
                ours, eager = max(ours, errors[0]), max(eager, errors[1])
    assert ours <= 2 * eager


@pytest.mark.parametrize("head_dim", [32, 64, 128])
@pytest.mark.parametrize("length", [1, 7, 63, 64, 65, 130])
def test_prefill(ops: Any, head_dim: int, length: int) -> None:
    prefill(ops, [0], [length], [1] if length > 64 else [1, 1, 1], head_dim)


@pytest.mark.parametrize("head_dim", [32, 64, 128])
@pytest.mark.parametrize("window", [1, 2, 33, 64, 65, 500])
def test_prefill_by_windows(ops: Any, head_dim: int, window: int) -> None:
    """Windows beside a tile's size, and behind a past of which they see a part."""
    prefill(ops, [0, 100], [130, 70], [1], head_dim, window)


@pytest.mark.parametrize(("head_dim", "dims"), [(32, 2), (32, 32), (64, 26), (128, 100)])
@pytest.mark.parametrize("readers", [[1, 1], [3], [2, 1, 3]])
def test_prefill_of_rotary_and_grouped_heads(ops: Any, readers: list[int], head_dim: int, dims: int) -> None:
    prefill(ops, [0, 5], [19, 30], readers, head_dim, dims=dims)


def test_prefill_of_ragged_sequences_behind_a_past(ops: Any, each_seed: Any) -> None:
    for seed in each_seed(ops.library):
        torch.manual_seed(seed)
        # Up to four tiles of keys: stages are filled again.
        prefill(ops, [0, 61, 130], [9, 4, 70], [1], 64)


def test_all_at_once_in_any_order_of_threads(ops: Any, each_seed: Any) -> None:
    for seed in each_seed(ops.library):
        torch.manual_seed(seed)
        prefill(ops, [3, 130], [4, 70], [1, 2], 32, window=80, dims=24)


def decode(ops: Any, lengths: list[int], readers: list[int], head_dim: int, splits: int, window: int = 0) -> None:
    heads, kv_heads = sum(readers), len(readers)
    kv_head = kv_head_of(readers)
    batch, capacity, width = len(lengths), max(lengths) + 5, heads * head_dim
    k, v = cache_of(batch, kv_heads, capacity, head_dim)
    begins = [max(0, length - window) if window else 0 for length in lengths]
    for b, (begin, length) in enumerate(zip(begins, lengths, strict=True)):  # NaN before the window as behind the end
        k[b, :, begin:length], v[b, :, begin:length] = torch.randn(2, kv_heads, length - begin, head_dim).half()
    ld_q, ld_out = width + 8, width + 16
    q = torch.randn(batch, ld_q).half()
    out = torch.full((batch * ld_out + 64,), NAN, dtype=torch.float16)
    partial = torch.full((batch * heads * splits * (head_dim + 2),), NAN)
    counters = torch.zeros(batch * heads, dtype=torch.int32)
    ops.attention_decode(
        q, ld_q, heads, kv_head, window, k, v, kv_heads, capacity, head_dim, torch.tensor(lengths, dtype=torch.int32),
        out, ld_out, batch, splits, partial, counters,
    )  # fmt: skip
    assert not counters.any()
    rows = out[: batch * ld_out].view(batch, ld_out)
    assert torch.isnan(rows[:, width:]).all() and torch.isnan(out[batch * ld_out :]).all()
    ours = eager = 0.0
    for b, (begin, length) in enumerate(zip(begins, lengths, strict=True)):
        for head in range(heads):
            part = slice(head * head_dim, (head + 1) * head_dim)
            of = head if kv_head is None else int(kv_head[head])
            errors = close(rows[b, part], q[b, part], k[b, of, begin:length], v[b, of, begin:length])
            ours, eager = max(ours, errors[0]), max(eager, errors[1])
    assert ours <= 2 * eager


@pytest.mark.parametrize("head_dim", [32, 64, 128])
@pytest.mark.parametrize("splits", [1, 3, 8])
def test_decode(ops: Any, head_dim: int, splits: int) -> None:
    decode(ops, [1, 7, 64, 65, 130], [1, 1, 1], head_dim, splits)


@pytest.mark.parametrize("window", [1, 2, 63, 64, 65, 129, 500])
@pytest.mark.parametrize("readers", [[1], [2, 1, 3]])
def test_decode_by_windows_and_groups(ops: Any, readers: list[int], window: int) -> None:
    decode(ops, [1, 7, 64, 65, 130], readers, 64, 3, window)


def test_decode_in_any_order_of_threads(ops: Any, each_seed: Any) -> None:
    for seed in each_seed(ops.library):
        torch.manual_seed(seed)
        decode(ops, [2, 90], [1], 64, 3)
