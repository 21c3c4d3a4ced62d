"""The tensor-core matrix product on the CPU, against FP64: every tile, every epilogue, odd sizes."""

from typing import Any

import pytest
import torch

HALF, GELU, RESIDUAL, FLOAT = range(4)
POISON, GUARD = float("nan"), 40


def padded(rows: int, columns: int, ld: int, beyond: float = 0.0) -> torch.Tensor:
    """Random FP16 [rows, columns] in rows of `ld`, whose columns up to the next multiple of 8 hold zeros."""
    whole = torch.full((rows, ld), beyond, dtype=torch.float16)
    whole[:, : (columns + 7) // 8 * 8] = 0
    whole[:, :columns] = torch.randn(rows, columns) / columns**0.5
    return whole


def product(
    ops: Any, m: int, n: int, k: int, epilogue: int, variant: int, *, bias: bool = True, ld_out: int | None = None
) -> None:
    a, weight = padded(m, k, (k + 7) // 8 * 8 + 8, POISON), padded(n, k, (k + 7) // 8 * 8 + 16, POISON)
    offset = torch.randn(n).half() if bias else None
    ld_out = ld_out or n + 3
    kind = torch.float16 if epilogue in (HALF, GELU) else torch.float32
    out = torch.full((m * ld_out + GUARD,), POISON, dtype=kind)
    before = torch.randn(m, n)
    if epilogue == RESIDUAL:
        out[: m * ld_out].view(m, ld_out)[:, :n] = before
    ops.gemm(a, weight, offset, out, m, n, k, a.shape[1], weight.shape[1], ld_out, epilogue, variant)

    wanted = a[:, :k].double() @ weight[:, :k].double().T
    eager = a[:, :k].float() @ weight[:, :k].float().T
    if offset is not None:
        wanted, eager = wanted + offset.double(), eager + offset.float()
    if epilogue == GELU:
        wanted, eager = (torch.nn.functional.gelu(x, approximate="tanh") for x in (wanted, eager))
    if epilogue == RESIDUAL:
        wanted, eager = wanted + before.double(), eager + before
    got = out[: m * ld_out].view(m, ld_out)
    assert torch.isnan(got[:, n:]).all() and torch.isnan(out[m * ld_out :]).all()
    error = (got[:, :n].double() - wanted).abs().max()
    # Eager's, in the type of the output. FP32 sums in another order: 1e-6 of headroom.
    assert error <= 2 * (eager.to(kind).double() - wanted).abs().max() + 1e-6


@pytest.mark.parametrize("epilogue", [HALF, GELU, RESIDUAL, FLOAT])
@pytest.mark.parametrize("variant", range(6))
def test_each_tile_and_epilogue(ops: Any, variant: int, epilogue: int) -> None:
    assert ops.library.hr_gemm_variants() == 6
    product(ops, 19, 75, 136, epilogue, variant)


@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 8), (33, 17, 72), (16, 101, 111), (5, 130, 641), (130, 9, 40)])
@pytest.mark.parametrize("variant", [2, 4, 5])
def test_odd_sizes(ops: Any, variant: int, m: int, n: int, k: int) -> None:
    product(ops, m, n, k, FLOAT, variant, bias=False)


@pytest.mark.parametrize("epilogue", [HALF, GELU, RESIDUAL, FLOAT])
@pytest.mark.parametrize("variant", range(6))
def test_whole_tiles_into_even_rows(ops: Any, variant: int, epilogue: int) -> None:
    """Two columns go in one store where both lie in the matrix, and the address allows it."""
    product(ops, 131, 137, 24, epilogue, variant, ld_out=144)
    product(ops, 128, 128, 72, epilogue, variant, ld_out=128)


@pytest.mark.parametrize("epilogue", [HALF, GELU, RESIDUAL, FLOAT])
@pytest.mark.parametrize("variant", range(6))
def test_whole_tiles_into_odd_rows(ops: Any, variant: int, epilogue: int) -> None:
    """And more slices of k than there are stages: the ring turns."""
    product(ops, 130, 138, 1096, epilogue, variant)


@pytest.mark.parametrize("variant", [1, 4])
def test_any_order_of_threads(ops: Any, each_seed: Any, variant: int) -> None:
    for _ in each_seed(ops.library):
        product(ops, 17, 35, 520, HALF, variant)
