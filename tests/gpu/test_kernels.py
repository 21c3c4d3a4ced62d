"""Each kernel on the GPU: first the very tests that run on the CPU, then GPT-2's own sizes against FP32.

The rule for FP16 is the same: an error of at most twice eager FP16's.
"""

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from cuda_ext import ops as cuda_ops

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible to torch"),
]
ON_CPU = ("attention", "gemm", "matvec", "norm_and_embedding", "sample")
HALF, GELU, RESIDUAL, FLOAT = range(4)
QKV = 0  # of matvec, whose other ways out are numbered as gemm's
NAN = float("nan")

sys.path.append(str(Path(__file__).parents[1] / "cuda_ext"))
for _name in ON_CPU:
    _module = importlib.import_module(f"test_{_name}")
    globals().update(
        {f"test_{_name}__{key[5:]}": value for key, value in vars(_module).items() if key.startswith("test_")}
    )


def within_twice_eager(got: torch.Tensor, exact: torch.Tensor, eager: torch.Tensor) -> None:
    """`exact` in FP32 or better; a millionth of its size is FP32's own rounding in another order of sums."""
    allowed = 2 * (eager.double() - exact.double()).abs().max() + 1e-6 * exact.abs().max()
    assert (got.double() - exact.double()).abs().max() <= allowed


def linear(n: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    return (torch.randn(n, k, device="cuda") / k**0.5).half(), torch.randn(n, device="cuda").half()


def through(epilogue: int, y: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    if epilogue == GELU:
        return F.gelu(y, approximate="tanh")
    return y + before.to(y.dtype) if epilogue == RESIDUAL else y


@pytest.mark.parametrize("way", range(10))
@pytest.mark.parametrize(
    ("m", "n", "k", "epilogue"),
    [
        (1024, 1920, 768, HALF),
        (1000, 768, 640, RESIDUAL),
        (513, 3072, 768, GELU),
        (1024, 768, 3072, RESIDUAL),
        (32, 50257, 768, FLOAT),
        (7, 1600, 1600, HALF),
    ],
)
def test_products_of_gpt2(way: int, m: int, n: int, k: int, epilogue: int) -> None:
    """Our tiles, then cuBLASLt's likeliest algorithms."""
    a, (weight, bias) = torch.randn(m, k, device="cuda").half(), linear(n, k)
    before = torch.randn(m, n, device="cuda")
    kind = torch.float16 if epilogue in (HALF, GELU) else torch.float32
    out = before.clone() if epilogue == RESIDUAL else torch.full((m, n), NAN, device="cuda", dtype=kind)
    scratch = torch.empty(cuda_ops.product_scratch_bytes("cuda"), dtype=torch.uint8, device="cuda")
    given = None if epilogue == FLOAT else bias
    ways: list[tuple[int, list[int] | None]] = [(i, None) for i in range(len(cuda_ops.product_variants("cuda")))]
    for algorithm in cuda_ops.cublaslt_algorithms(a, weight, given, out, epilogue, m // 2 + 1):
        ways.append((cuda_ops.BY_CUBLASLT, list(algorithm)))
    if way >= len(ways):
        pytest.skip("cuBLASLt is not there, or has fewer algorithms for so many numbers of rows")
    cuda_ops.product(a, weight, given, out, scratch, epilogue, *ways[way])
    offset = torch.zeros_like(bias) if epilogue == FLOAT else bias
    exact = through(epilogue, a.double() @ weight.double().T + offset.double(), before)
    eager = through(epilogue, F.linear(a, weight, offset), before.half())
    within_twice_eager(out, exact, eager)


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8])
@pytest.mark.parametrize(
    ("n", "k", "out_kind"), [(3072, 768, GELU), (768, 3072, RESIDUAL), (768, 640, RESIDUAL), (50257, 768, FLOAT)]
)
def test_matvec_of_gpt2(ops: Any, rows: int, n: int, k: int, out_kind: int) -> None:
    weight, bias = linear(n, k)
    gain, shift = (torch.randn(k, device="cuda").half() for _ in range(2))
    x = torch.randn(rows, k, device="cuda") * 2 + 1
    x = x.half() if out_kind == RESIDUAL else x
    before = torch.randn(rows, n, device="cuda")
    kind = torch.float16 if out_kind == GELU else torch.float32
    out = before.clone() if out_kind == RESIDUAL else torch.full((rows, n), NAN, device="cuda", dtype=kind)
    ops.matvec(
        x, k, gain, shift, 1e-5, weight, bias, rows, n, k, k, out_kind, out, n, None, None, 0, 0, 0, None
    )  # fmt: skip
    exact, eager = x.double(), x.half()
    if out_kind != RESIDUAL:
        exact = F.layer_norm(exact, (k,), gain.double(), shift.double(), 1e-5)
        eager = F.layer_norm(eager, (k,), gain, shift, 1e-5)
    exact = through(out_kind, exact @ weight.double().T + bias.double(), before)
    eager = through(out_kind, F.linear(eager, weight, bias), before.half())
    within_twice_eager(out, exact, eager)


@pytest.mark.parametrize("heads", range(1, 13))
def test_prefill_attention_of_any_head_count(ops: Any, heads: int) -> None:
    batch, length, capacity, head_dim = 2, 300 + heads, 512, 64
    width = heads * head_dim
    qkv = torch.randn(batch, length, 3 * width, device="cuda").half()
    k, v = (torch.full((batch, heads, capacity, head_dim), NAN, device="cuda").half() for _ in range(2))
    start = torch.zeros(batch, dtype=torch.int32, device="cuda")
    lengths = torch.full_like(start, length)
    out = torch.full((batch, length, width), NAN, device="cuda").half()
    ops.kv_append(qkv, 3 * width, k, v, heads, capacity, head_dim, start, lengths, batch, length)
    ops.attention_prefill(
        qkv, 3 * width, k, v, heads, capacity, head_dim, start, lengths, out, width, batch, length
    )  # fmt: skip
    split = qkv.view(batch, length, 3, heads, head_dim).permute(2, 0, 3, 1, 4)
    assert torch.equal(k[:, :, :length], split[1]) and torch.equal(v[:, :, :length], split[2])
    assert torch.isnan(k[:, :, length:]).all() and torch.isnan(v[:, :, length:]).all()
    masked = torch.full((length, length), -torch.inf, device="cuda").triu(1)

    def attend(dtype: torch.dtype) -> torch.Tensor:
        q_, k_, v_ = split.to(dtype)
        return ((q_ @ k_.mT * head_dim**-0.5 + masked.to(dtype)).softmax(-1) @ v_).transpose(1, 2).flatten(2)

    within_twice_eager(out, attend(torch.float64), attend(torch.float16))


@pytest.mark.parametrize("heads", range(1, 13))
@pytest.mark.parametrize("splits", [1, 7, 16])
def test_decode_attention_of_any_head_count(ops: Any, heads: int, splits: int) -> None:
    batch, capacity, head_dim = 32, 1024, 64
    width = heads * head_dim
    counts = [1 + (37 * b) % capacity for b in range(batch)]
    q = torch.randn(batch, width, device="cuda").half()
    k, v = (torch.full((batch, heads, capacity, head_dim), NAN, device="cuda").half() for _ in range(2))
    for b, count in enumerate(counts):
        k[b, :, :count], v[b, :, :count] = torch.randn(2, heads, count, head_dim, device="cuda").half()
    out = torch.full((batch, width), NAN, device="cuda").half()
    partial = torch.full((batch * heads * splits * (head_dim + 2),), NAN, device="cuda")
    counters = torch.zeros(batch * heads, dtype=torch.int32, device="cuda")
    lengths = torch.tensor(counts, dtype=torch.int32, device="cuda")
    for _ in range(2):  # what the first launch leaves is what the second begins with
        out.fill_(NAN)
        ops.attention_decode(
            q, width, k, v, heads, capacity, head_dim, lengths, out, width, batch, splits, partial, counters
        )  # fmt: skip
        assert not counters.any()
        for b, count in enumerate(counts):
            here, seen = q[b].view(heads, 1, head_dim), (k[b, :, :count], v[b, :, :count])

            def attend(dtype: torch.dtype, q_: Any = here, kv: Any = seen) -> torch.Tensor:
                k_, v_ = (part.to(dtype) for part in kv)
                return ((q_.to(dtype) @ k_.mT * head_dim**-0.5).softmax(-1) @ v_).flatten()

            within_twice_eager(out[b], attend(torch.float64), attend(torch.float16))


def test_offsets_past_two_gigabytes(ops: Any) -> None:
    """Element offsets of a large batch of logits do not fit 32 bits."""
    rows, vocabulary = 45_000, 50_257
    if torch.cuda.mem_get_info()[0] < 24e9:
        pytest.skip("needs 24 GB of free memory")
    a, (weight, _) = torch.randn(rows, 64, device="cuda").half(), linear(vocabulary, 64)
    out = torch.full((rows, vocabulary), NAN, device="cuda")
    ops.gemm(a, weight, None, out, rows, vocabulary, 64, 64, 64, vocabulary, FLOAT, 0)
    for begin in (0, rows // 2, rows - 128):
        part = slice(begin, begin + 128)
        exact = a[part].double() @ weight.double().T
        within_twice_eager(out[part], exact, (a[part].float() @ weight.float().T).half())
