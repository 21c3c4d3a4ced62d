"""What each launch of a forward pass is for: bytes that it must move and operations that it must do.

Counted as benchmarks/roofline.py counts (a test holds the sums against it): FP16 weights and cached keys and values
once, a multiplication and an addition apart, the causal half of attention, the LM head of last positions alone.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from cuda_ext import ops
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
    found = [_embedding(shape, batch, 1)]
    for layer, heads in enumerate(shape.heads):
        found += _layer(shape, layer, heads, batch, 1, context, fused=batch <= ops.MATVEC_ROWS)
    found += _head(shape, batch, fused=batch <= ops.MATVEC_ROWS)
    logits = _FLOAT * batch * shape.vocabulary
    return [*found, Operation("draw", None, 0, logits, 0), Operation("next token's state", None, 0, 48 * batch, 0)]


def prefill(shape: Shape, batch: int, length: int) -> list[Operation]:
    """The launches of `length` new tokens a sequence (csrc/model.cpp: prefill)."""
    found = [_embedding(shape, batch, length)]
    for layer, heads in enumerate(shape.heads):
        found += _layer(shape, layer, heads, batch, length, 0, fused=False)
    return [*found, *_head(shape, batch, fused=False)]


def _embedding(shape: Shape, batch: int, length: int) -> Operation:
    rows, width = batch * length, shape.width
    return Operation("embedding", None, _HALF * width * length, (_HALF + _FLOAT) * width * rows, 0)


def _norm(shape: Shape, layer: int | None, rows: int) -> Operation:
    return Operation("LayerNorm", layer, 2 * _HALF * shape.width, (_FLOAT + _HALF) * shape.width * rows, 0)


def _product(
    name: str, layer: int | None, rows: int, n: int, k: int, out_bytes: int, *, bias: bool = True
) -> Operation:
    weights = _HALF * (n * k + (n if bias else 0))
    return Operation(name, layer, weights, rows * (_HALF * k + out_bytes * n), 2 * rows * n * k)


def _with_norm(product: Operation, shape: Shape, rows: int) -> list[Operation]:
    """Its LayerNorm within it: the residual stream is read as FP32."""
    more = (_FLOAT - _HALF) * shape.width * rows
    return [
        Operation(
            f"LayerNorm, {product.name}", product.layer, product.fixed + 2 * _HALF * shape.width,
            product.activations + more, product.operations,
        )
    ]  # fmt: skip


def _attention(shape: Shape, layer: int, heads: int, batch: int, length: int, past: int) -> Operation:
    width = heads * shape.head_dim
    pairs = batch * (length * past + length * (length + 1) // 2)  # of a query and a key that it sees
    return Operation(
        "attention", layer, 2 * _HALF * batch * past * width, (2 + 2 * (length > 1)) * _HALF * batch * length * width,
        2 * 2 * width * pairs,
    )  # fmt: skip


def _layer(
    shape: Shape, layer: int, heads: int, batch: int, length: int, past: int, *, fused: bool
) -> Iterator[Operation]:
    rows, all_heads, width, inner = batch * length, heads * shape.head_dim, shape.width, shape.inner
    qkv = _product("q, k, v", layer, rows, 3 * all_heads, width, _HALF)
    fc = _product("fc, GELU", layer, rows, inner, width, _HALF)

    def normalised(product: Operation) -> list[Operation]:
        return _with_norm(product, shape, rows) if fused else [_norm(shape, layer, rows), product]

    yield from normalised(qkv)
    if not fused:
        yield Operation("KV append", layer, 0, 2 * 2 * _HALF * rows * all_heads, 0)
    yield _attention(shape, layer, heads, batch, length, past)
    yield _product("output projection, residual", layer, rows, width, all_heads, 2 * _FLOAT)
    yield from normalised(fc)
    yield _product("fc projection, residual", layer, rows, width, inner, 2 * _FLOAT)


def _head(shape: Shape, batch: int, *, fused: bool) -> list[Operation]:
    product = _product("LM head", None, batch, shape.vocabulary, shape.width, _FLOAT, bias=False)
    return _with_norm(product, shape, batch) if fused else [_norm(shape, None, batch), product]
