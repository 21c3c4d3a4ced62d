"""Which way each of the model's matrix products takes: our tiles or cuBLASLt's kernels, by measurement."""

from collections.abc import Callable, Iterator
from itertools import cycle
from typing import NamedTuple

import torch
from torch import Tensor

from cuda_ext import ops
from cuda_ext.packing import Packed
from cuda_ext.tuning import Tuner

Choice = tuple[int, ...]
"""csrc/model.h: rows, n, k, epilogue, variant, and the words of cuBLASLt's algorithm."""

_HALF, _GELU, _RESIDUAL, _FLOAT = range(4)  # csrc/ops.h: Epilogue
_ALIGN = 256
_NO_ALGORITHM = (0,) * ops.ALGORITHM_WORDS


class _Product(NamedTuple):
    """Those of one shape: the modules that have it, outputs, inputs, and what becomes of the sums."""

    modules: list[str]
    n: int
    k: int
    epilogue: int


class _Way(NamedTuple):
    variant: int
    algorithm: tuple[int, ...] = _NO_ALGORITHM


def bucket(rows: int) -> int:
    """The power of two that stands for products of so many rows; 0 for so few that none is measured.

    Up to MATVEC_ROWS rows decode by other kernels; only short prompts meet products of that size.
    """
    return 1 << (rows - 1).bit_length() if rows > ops.MATVEC_ROWS else 0


def choose(packed: Packed, weights: Tensor, rows: int, head_rows: int, tuner: Tuner, room: Tensor) -> list[Choice]:
    """The ways to take instead of the fixed ones in a pass of `rows` rows, `head_rows` of which go to the LM head.

    Both are buckets: a choice is for half as many rows + 1 up to as many. `weights`: `packed.weights` on the device.
    `room`, uint8, is overwritten: where it is too small for operands and results, memory is allocated for a while.
    """
    chosen = []
    for product in _products(packed):
        m = head_rows if product.epilogue == _FLOAT else rows
        if m:
            chosen += _choose(product, packed, weights, m, tuner, room)
    return chosen


def _choose(product: _Product, packed: Packed, weights: Tensor, m: int, tuner: Tuner, room: Tensor) -> list[Choice]:
    modules, n, k, epilogue = product
    ld, needed = _round_up(k), _needed(product, m, weights.device.type)
    if room.numel() < needed:
        room = torch.empty(needed, dtype=torch.uint8, device=weights.device)
    # The engine's own distances between rows: what a kernel of cuBLASLt's can do depends on them.
    kind = torch.float16 if epilogue in (_HALF, _GELU) else torch.float32
    ld_out = logits_width(n) if epilogue == _FLOAT else _round_up(n)
    a, out, scratch = _carve(room, 2 * m * ld, m * ld_out * kind.itemsize)
    a = a.view(torch.float16).view(m, ld).zero_()[:, :k].normal_()
    out = out.view(kind).view(m, ld_out).zero_()[:, :n]

    def operands(module: str) -> tuple[Tensor, Tensor | None]:
        weight = weights[packed.offsets[f"{module}.weight"] :].as_strided((n, k), (ld, 1))
        return weight, None if epilogue == _FLOAT else weights[packed.offsets[f"{module}.bias"] :][:n]

    layers = [operands(module) for module in modules]

    def run(way: _Way) -> Callable[[], None]:
        turns = cycle(layers)  # so that weights come from memory, as in a model, and not from the caches
        algorithm = list(way.algorithm) if way.variant == ops.BY_CUBLASLT else None

        def launch() -> None:
            weight, bias = next(turns)
            ops.product(a, weight, bias, out, scratch, epilogue, way.variant, algorithm)

        return launch

    ways = _ways(a, *layers[0], out, epilogue)
    fixed = next(iter(ways))
    name = f"product {m} x {n} x {k}, epilogue {epilogue}"
    fastest = tuner.fastest(name, {name: run(way) for name, way in ways.items()})
    return [] if fastest == fixed else [(m, n, k, epilogue, ways[fastest].variant, *ways[fastest].algorithm)]


def measuring_bytes(packed: Packed, rows: int, head_rows: int, device: str) -> int:
    """How much room `choose` wants at most for a pass of so many rows."""
    passes = [(product, bucket(head_rows if product.epilogue == _FLOAT else rows)) for product in _products(packed)]
    return max(_needed(product, m, device) for product, m in passes)


def _needed(product: _Product, m: int, device: str) -> int:
    out = 2 * _round_up(product.n) if product.epilogue in (_HALF, _GELU) else 4 * _round_up(product.n)
    return m * (2 * _round_up(product.k) + out) + 2 * _ALIGN + ops.product_scratch_bytes(device)


def _carve(room: Tensor, *sizes: int) -> list[Tensor]:
    """Parts of so many bytes, each 256-byte aligned as the engine's own are; and the rest."""
    parts, at = [], 0
    for size in sizes:
        parts.append(room[at : at + size])
        at += (size + _ALIGN - 1) // _ALIGN * _ALIGN
    return [*parts, room[at:]]


def _round_up(count: int) -> int:
    """To a multiple of 8: where rows of activations begin."""
    return (count + 7) // 8 * 8


def _ways(a: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, epilogue: int) -> dict[str, _Way]:
    """By names that mean the same in another process: the fixed tile, the others, cuBLASLt's algorithms."""
    device, (m, n) = out.device.type, out.shape
    tiles = {name: _Way(variant) for variant, name in enumerate(ops.product_variants(device))}
    fixed = list(tiles)[ops.product_variant_for(m, n, device)]
    ways = {fixed: tiles[fixed]} | tiles
    for algorithm in ops.cublaslt_algorithms(a, weight, bias, out, epilogue, m // 2 + 1):
        words = " ".join(f"{word % 2**64:x}" for word in algorithm)
        ways[f"cuBLASLt {ops.cublaslt_version(device)}: {words}"] = _Way(ops.BY_CUBLASLT, algorithm)
    return ways


def logits_width(vocabulary: int) -> int:
    """How far rows of logits are apart: the sampler reads four at once."""
    return (vocabulary + 3) // 4 * 4


def _products(packed: Packed) -> Iterator[_Product]:
    """Each shape once."""
    shape = packed.shape
    everywhere = range(len(shape.heads))
    for rows in sorted({shape.qkv_rows(i) for i in everywhere}):
        modules = [f"h.{i}.attn.c_attn" for i in everywhere if shape.qkv_rows(i) == rows]
        yield _Product(modules, rows, shape.width, _HALF)
    for heads in sorted(set(shape.heads)):
        modules = [f"h.{i}.attn.c_proj" for i in everywhere if shape.heads[i] == heads]
        yield _Product(modules, shape.width, heads * shape.head_dim, _RESIDUAL)
    yield _Product([f"h.{i}.mlp.c_fc" for i in everywhere], shape.inner, shape.width, _GELU)
    yield _Product([f"h.{i}.mlp.c_proj" for i in everywhere], shape.width, shape.inner, _RESIDUAL)
    yield _Product(["wte"], shape.vocabulary, shape.width, _FLOAT)
