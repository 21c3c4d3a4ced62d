"""Which way each of the model's matrix products takes: our tiles or cuBLASLt's kernels, by measurement."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from cuda_ext import ops
from cuda_ext.packing import Packed
from cuda_ext.tuning import Tuner

Choice = tuple[int, int, int, int, int]
"""csrc/model.h: rows, n, k, epilogue, way."""

_HALF, _GELU, _RESIDUAL, _FLOAT = range(4)  # csrc/ops.h: Epilogue


def bucket(rows: int) -> int:
    """The power of two that stands for products of so many rows."""
    return max(16, 1 << (rows - 1).bit_length())


def choose(packed: Packed, weights: Tensor, rows: int, head_rows: int, tuner: Tuner) -> list[Choice]:
    """The fastest ways for a pass of `rows` rows, of which `head_rows` go to the LM head; both are buckets.

    `weights`: `packed.weights` on the device.
    """
    device = weights.device
    scratch = torch.empty(ops.product_scratch_bytes(device.type), dtype=torch.uint8, device=device)
    names = ops.product_ways(device.type)
    chosen = []
    for module, n, k, epilogue in _products(packed):
        m, ld = head_rows if epilogue == _FLOAT else rows, (k + 7) // 8 * 8
        a = torch.zeros(m, ld, dtype=torch.float16, device=device)[:, :k].normal_()
        weight = weights[packed.offsets[f"{module}.weight"] :].as_strided((n, k), (ld, 1))
        bias = None if epilogue == _FLOAT else weights[packed.offsets[f"{module}.bias"] :][:n]
        kind = torch.float16 if epilogue in (_HALF, _GELU) else torch.float32
        out = torch.zeros(m, (n + 7) // 8 * 8, dtype=kind, device=device)[:, :n]
        ways = {
            name: partial(ops.product, a, weight, bias, out, scratch, epilogue, way) for way, name in enumerate(names)
        }
        fastest = tuner.fastest(f"product {m} x {n} x {k}, epilogue {epilogue}", ways)
        chosen.append((m, n, k, epilogue, names.index(fastest)))
    return chosen


def _products(packed: Packed) -> Iterator[tuple[str, int, int, int]]:
    """Of each shape once: a module that has it, its outputs, its inputs, its epilogue."""
    shape = packed.shape
    qkv = {shape.qkv_rows(layer): layer for layer in range(len(shape.heads))}
    for rows, layer in sorted(qkv.items()):
        yield f"h.{layer}.attn.c_attn", rows, shape.width, _HALF
    for heads in sorted(set(shape.heads)):
        yield f"h.{shape.heads.index(heads)}.attn.c_proj", shape.width, heads * shape.head_dim, _RESIDUAL
    yield "h.0.mlp.c_fc", shape.inner, shape.width, _GELU
    yield "h.0.mlp.c_proj", shape.width, shape.inner, _RESIDUAL
    yield "wte", shape.vocabulary, shape.width, _FLOAT
