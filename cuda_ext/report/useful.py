"""What each launch of a forward pass is for: bytes that it must move and operations that it must do.

Counted as benchmarks/roofline.py counts (a test holds the sums against it): FP16 weights and cached keys and values
once, a multiplication and an addition apart, the causal half of attention, the LM head of last positions alone.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from cuda_ext import ops
from cuda_ext.memory import chunk
from cuda_ext.packing import Shape

_HALF, _FLOAT = 2, 4


@dataclass(frozen=True)
class Operation:
    """`fixed`: bytes of weights, keys, values; `activations`: bytes read and written besides; `layer`: None outside."""

    name: str
    layer: int | None
    fixed: int
    activations: int
    operations: int

    @property
    def bytes(self) -> int:
        return self.fixed + self.activations


def decode(shape: Shape, batch: int, context: int) -> list[Operation]:
    """The launches of one token a sequence behind `context` others, in their order (csrc/model.cpp: decode)."""
    fused = batch <= ops.MATVEC_ROWS
    found = [_embedding(shape, batch, 1)]
    for layer in range(len(shape.heads)):
        found += _layer(shape, layer, batch, 1, context, fused=fused)
    found += _head(shape, batch, fused=fused)
    logits = _FLOAT * batch * shape.vocabulary
    return [*found, Operation("draw", None, 0, logits, 0), Operation("next token's state", None, 0, 48 * batch, 0)]


def prefill(shape: Shape, batch: int, length: int) -> list[Operation]:
    """The launches of `length` new tokens a sequence, in the engine's chunks (csrc/model.cpp: prefill)."""
    found = []
    together = chunk(batch, length)
    for begin in range(0, length, together):
        count = min(together, length - begin)
        found.append(_embedding(shape, batch, count))
        for layer in range(len(shape.heads)):
            found += _layer(shape, layer, batch, count, begin, fused=False)
    return [*found, *_head(shape, batch, fused=False)]


def _embedding(shape: Shape, batch: int, length: int) -> Operation:
    """With the positions: rows of the table, or the angles by which later launches turn queries and keys."""
    rows, width = batch * length, shape.width
    positions = _FLOAT * shape.rotary if shape.rotary else _HALF * width
    return Operation("embedding", None, positions * length, (_HALF + _FLOAT) * width * rows, 0)


def _norm(shape: Shape, layer: int | None, rows: int) -> Operation:
    return Operation("LayerNorm", layer, 2 * _HALF * shape.width, (_FLOAT + _HALF) * shape.width * rows, 0)


def _product(
    name: str, layer: int | None, rows: int, n: int, k: int, out_bytes: int, *, bias: bool = True
) -> Operation:
    weights = _HALF * (n * k + (n if bias else 0))
    return Operation(name, layer, weights, rows * (_HALF * k + out_bytes * n), 2 * rows * n * k)


def _normalised(product: Operation, shape: Shape, rows: int, *, fused: bool) -> list[Operation]:
    """The product behind its LayerNorm: a launch of its own, or within it, which reads the residual stream as FP32."""
    norm = _norm(shape, product.layer, rows)
    if not fused:
        return [norm, product]
    activations = product.activations + (_FLOAT - _HALF) * shape.width * rows
    fixed = product.fixed + norm.fixed
    return [Operation(f"LayerNorm, {product.name}", product.layer, fixed, activations, product.operations)]


def _attention(shape: Shape, layer: int, batch: int, length: int, past: int) -> Operation:
    queries, kv = shape.heads[layer] * shape.head_dim, shape.kv_heads[layer] * shape.head_dim
    window = shape.windows[layer] or past + length

    def pairs(count: int) -> int:
        """Of each of the first queries and a key that it sees; some see only keys from their window's begin on."""
        hidden = max(0, count - window)
        return count * (count + 1) // 2 - hidden * (hidden + 1) // 2

    fixed = 2 * _HALF * batch * min(past, window) * kv
    fresh = kv if length > 1 else 0  # a single query's own key and value are not worth counting
    activations = _HALF * batch * length * 2 * (queries + fresh)
    work = 4 * batch * queries * (pairs(past + length) - pairs(past))
    return Operation("attention", layer, fixed, activations, work)


def _layer(shape: Shape, layer: int, batch: int, length: int, past: int, *, fused: bool) -> Iterator[Operation]:
    rows, width, inner = batch * length, shape.width, shape.inner
    qkv = _product("q, k, v", layer, rows, shape.qkv_rows(layer), width, _HALF)
    yield from _normalised(qkv, shape, rows, fused=fused)
    if not fused:
        yield Operation("KV append", layer, 0, 2 * 2 * _HALF * rows * shape.kv_heads[layer] * shape.head_dim, 0)
    yield _attention(shape, layer, batch, length, past)
    queries = shape.heads[layer] * shape.head_dim
    yield _product("output projection, residual", layer, rows, width, queries, 2 * _FLOAT)
    yield from _normalised(_product("fc, GELU", layer, rows, inner, width, _HALF), shape, rows, fused=fused)
    yield _product("fc projection, residual", layer, rows, width, inner, 2 * _FLOAT)


def _head(shape: Shape, batch: int, *, fused: bool) -> list[Operation]:
    product = _product("LM head", None, batch, shape.vocabulary, shape.width, _FLOAT, bias=False)
    return _normalised(product, shape, batch, fused=fused)
