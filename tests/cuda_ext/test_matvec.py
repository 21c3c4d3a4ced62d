"""Products of 1 to 8 rows on the CPU, against FP64: LayerNorm on the way in, every way out, odd sizes."""

from typing import Any

import pytest
import torch
from heads import angles_of, turned

QKV, GELU, RESIDUAL, FLOAT = range(4)
NAN = float("nan")


def weight_of(n: int, k: int) -> torch.Tensor:
    ld = (k + 7) // 8 * 8
    weight = torch.full((n, ld + 8), NAN, dtype=torch.float16)
    weight[:, k:ld] = 0
    weight[:, :k] = torch.randn(n, k) / k**0.5
    return weight


def check(got: torch.Tensor, wanted: torch.Tensor, eager: torch.Tensor, k: int) -> None:
    """At most twice the error of the same steps in FP32 with FP16 between them, and the sums' own rounding.

    A tensor core adds 8 products at once and may cut each such sum to 24 bits where IEEE's rounds.
    """
    cut = k / 8 * 2**-24 * wanted.abs().max()
    assert (got.double() - wanted).abs().max() <= 2 * (eager.double() - wanted).abs().max() + cut + 1e-6


def product(
    ops: Any, rows: int, n: int, k: int, out_kind: int, *, heads: int = 0, kv_heads: int = 0, head_dim: int = 0,
    dims: int = 0,
) -> None:  # fmt: skip
    ld_x, ld_out = (k + 7) // 8 * 8 + 8, n + 5
    weight, bias = weight_of(n, k), torch.randn(n).half()
    gain, shift = torch.randn(k).half(), torch.randn(k).half()
    x = torch.randn(rows, ld_x) * 2 + 1
    if out_kind == RESIDUAL:
        x = x.half()
        x[:, k:] = 0
        exact, eager = x[:, :k].double(), x[:, :k].float()
    else:
        x[:, k:] = NAN
        exact = torch.nn.functional.layer_norm(x[:, :k].double(), (k,), gain.double(), shift.double(), 1e-5)
        eager = exact.half().float()
    exact = exact @ weight[:, :k].double().T + bias.double()
    eager = eager @ weight[:, :k].float().T + bias.float()
    capacity = 6
    position = torch.arange(rows, dtype=torch.int32) * 2 % capacity
    angles = angles_of(capacity, dims)
    if dims:  # queries and keys alone
        turning = (heads + kv_heads) * head_dim
        for y in (exact, eager):
            for row, place in enumerate(position.tolist()):
                y[row, :turning] = turned(y[row, :turning].view(-1, head_dim), angles, place).flatten()
    half_out = out_kind in (QKV, GELU)
    if out_kind == GELU:
        exact, eager = (torch.nn.functional.gelu(y, approximate="tanh") for y in (exact, eager))
    if half_out:
        eager = eager.half()
    out = torch.full((rows * ld_out + 8,), NAN, dtype=torch.float16 if half_out else torch.float32)
    before = torch.randn(rows, n)
    if out_kind == RESIDUAL:
        out[: rows * ld_out].view(rows, ld_out)[:, :n] = before
        exact, eager = exact + before, eager + before
    cache = torch.full((2, rows, max(kv_heads, 1), capacity, max(head_dim, 1)), NAN, dtype=torch.float16)
    ops.matvec(
        x, ld_x, gain, shift, 1e-5, weight, bias, rows, n, k, weight.shape[1], out_kind, out, ld_out,
        heads, cache[0], cache[1], kv_heads, capacity, head_dim, angles, dims, capacity, position,
    )  # fmt: skip
    assert torch.isnan(out[rows * ld_out :]).all()
    got = out[: rows * ld_out].view(rows, ld_out)
    if out_kind != QKV:
        assert torch.isnan(got[:, n:]).all()
        check(got[:, :n], exact, eager, k)
        return
    width = heads * head_dim
    assert torch.isnan(got[:, width:]).all()
    written = torch.stack([cache[:, row, :, place] for row, place in enumerate(position.tolist())])
    for row, place in enumerate(position.tolist()):
        cache[:, row, :, place] = NAN
    assert torch.isnan(cache).all()  # nowhere else
    check(torch.cat([got[:, :width], written.flatten(1)], 1), exact, eager, k)


@pytest.mark.parametrize("rows", range(1, 9))
@pytest.mark.parametrize("out_kind", [GELU, RESIDUAL, FLOAT])
def test_rows_and_ways_out(ops: Any, rows: int, out_kind: int) -> None:
    product(ops, rows, 37, 111, out_kind)


@pytest.mark.parametrize(("heads", "head_dim"), [(1, 32), (3, 64), (2, 128)])
@pytest.mark.parametrize("rows", [1, 2, 3, 8])
def test_queries_keys_and_values(ops: Any, rows: int, heads: int, head_dim: int) -> None:
    product(ops, rows, 3 * heads * head_dim, 72, QKV, heads=heads, kv_heads=heads, head_dim=head_dim)


@pytest.mark.parametrize(("head_dim", "dims"), [(32, 32), (32, 6), (64, 64), (128, 50)])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (3, 1)])
def test_rotary_and_grouped_heads(
    ops: Any, each_seed: Any, heads: int, kv_heads: int, head_dim: int, dims: int
) -> None:
    rows = iter((1, 2, 3, 4, 5, 6, 7, 8, 5))
    for _ in each_seed(ops.library):
        n = (heads + 2 * kv_heads) * head_dim
        product(ops, next(rows), n, 40, QKV, heads=heads, kv_heads=kv_heads, head_dim=head_dim, dims=dims)


@pytest.mark.parametrize(("n", "k"), [(1, 8), (2, 640), (9, 1600)])
def test_odd_sizes(ops: Any, n: int, k: int) -> None:
    product(ops, 1, n, k, FLOAT)
    product(ops, 5, n, k, RESIDUAL)


@pytest.mark.parametrize(("n", "k", "out_kind"), [(50, 768, FLOAT), (64, 768, GELU), (31, 3001, RESIDUAL)])
def test_gpt2s_widths(ops: Any, n: int, k: int, out_kind: int) -> None:
    for rows in (1, 8):
        product(ops, rows, n, k, out_kind)


def test_the_longest_rows(ops: Any) -> None:
    """Of GPT-2: here sums that are truncated are farthest from those that are rounded."""
    for seed in range(5):
        torch.manual_seed(seed)
        product(ops, 8, 40, 3072, RESIDUAL)


def test_any_order_of_threads(ops: Any, each_seed: Any) -> None:
    for seed in each_seed(ops.library):
        torch.manual_seed(seed)
        product(ops, 3, 21, 300, GELU)
