"""A checkpoint folder as one FP16 buffer, and the table of addresses that csrc/api.cpp reads."""

import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from cuda_ext.checkpoint import read_checkpoint
from cuda_ext.errors import CheckpointError

HEAD_DIMS = (32, 64, 128)
_ALIGN = 128  # elements: 256 bytes


@dataclass(frozen=True)
class Shape:
    """The sizes of a CompactGPT2. `heads[i]` is layer i's head count; `variant`: what it has that GPT-2 has not."""

    width: int
    inner: int
    vocabulary: int
    context: int
    head_dim: int
    heads: tuple[int, ...]
    epsilon: float
    variant: str | None = None

    @property
    def ld_width(self) -> int:
        """`width`, padded to a multiple of 8: rows of weights begin at 16-byte addresses."""
        return (self.width + 7) // 8 * 8

    @property
    def ld_inner(self) -> int:
        return (self.inner + 7) // 8 * 8


@dataclass(frozen=True)
class Packed:
    """`weights`: FP16 [elements]; `offsets`: the element at which each named tensor begins."""

    shape: Shape
    weights: torch.Tensor
    offsets: dict[str, int]


def read_shape(folder: Path) -> Shape:
    """The sizes of a `compact_gpt2` or a stock `gpt2`, whose tensors are of these sizes. Raises CheckpointError."""
    return _shape(read_checkpoint(folder).fields)


def unsupported(shape: Shape) -> str | None:
    """Why the kernels cannot run a model of these sizes, in one phrase; None where they can."""
    if shape.variant is not None:
        return f"the model has {shape.variant}, which the kernels do not know; the engine torch does"
    if shape.head_dim not in HEAD_DIMS:
        return f"head_dim is {shape.head_dim}; the kernels know {', '.join(map(str, HEAD_DIMS))}"
    return None


def pack(folder: Path) -> Packed:
    """Read a folder of safetensors into one buffer, in FP16, with every key and shape checked.

    Linear weights are [out, in] with rows padded by zeros to `ld`; stock GPT-2's [in, out] are turned. The MLPs get
    hidden neurons of zeros up to a multiple of 8, so that no column of activations is there that nobody writes.
    Raises CheckpointError.
    """
    checkpoint = read_checkpoint(folder)
    shape = _shape(checkpoint.fields)
    if unsupported(shape):
        raise CheckpointError(f"{folder / 'config.json'}: {unsupported(shape)}")
    parts = {name: _padded(name, tensor, shape) for name, tensor in checkpoint.tensors(torch.float16)}
    offsets, end = {}, 0
    for name, part in parts.items():
        offsets[name] = end
        end += (part.numel() + _ALIGN - 1) // _ALIGN * _ALIGN
    weights = torch.zeros(end, dtype=torch.float16)
    for name, part in parts.items():
        weights[offsets[name] : offsets[name] + part.numel()] = part.flatten()
    return Packed(replace(shape, inner=shape.ld_inner), weights, offsets)


def _padded(name: str, tensor: torch.Tensor, shape: Shape) -> torch.Tensor:
    more_rows = shape.ld_inner - shape.inner if ".mlp.c_fc." in name else 0
    more_columns = (0, -tensor.shape[1] % 8) if tensor.dim() == 2 else ()
    return torch.nn.functional.pad(tensor, (*more_columns, 0, more_rows))


def _shape(fields: dict[str, Any]) -> Shape:
    heads, layers, kept = fields["n_head"], fields["n_layer"], fields.get("kept_heads")
    return Shape(
        width=fields["n_embd"],
        inner=fields["n_inner"] or 4 * fields["n_embd"],
        vocabulary=fields["vocab_size"],
        context=fields["n_positions"],
        head_dim=fields.get("head_dim") or fields["n_embd"] // heads,
        heads=(heads,) * layers if kept is None else tuple(map(len, kept)),
        epsilon=fields["layer_norm_epsilon"],
        variant=_variant(fields),
    )


def _variant(fields: dict[str, Any]) -> str | None:
    """In words, the field of a CompactGPT2 that makes it compute something else than GPT-2."""
    found = {
        f"the activation {fields['activation_function']}": fields["activation_function"]
        not in ("gelu_new", "gelu_pytorch_tanh"),
        "rotary positions": fields.get("position", "learned") != "learned",
        "grouped-query attention": fields.get("n_kv_head") not in (None, fields["n_head"]),
        "sliding windows": fields.get("window") not in (None, [None] * fields["n_layer"]),
    }
    return " and ".join(words for words, has in found.items() if has) or None


def table(
    packed: Packed,
    weights: torch.Tensor,
    cache: torch.Tensor,
    max_batch: int,
    capacity: int,
    choices: Sequence[tuple[int, int, int, int, int]] = (),
) -> torch.Tensor:
    """What csrc/api.cpp reads: sizes, addresses and choices, int64 on the CPU.

    `weights` is `packed.weights` on the device; `cache` FP16 [cache_elements(...)]; `choices`: csrc/model.h's.
    """
    shape = packed.shape

    def address(name: str) -> int:
        return weights.data_ptr() + 2 * packed.offsets[name]

    (epsilon,) = struct.unpack("i", struct.pack("f", shape.epsilon))
    numbers = [len(shape.heads), shape.width, shape.inner, shape.vocabulary, shape.context, shape.head_dim]
    numbers += [shape.ld_width, shape.ld_inner, epsilon, capacity]
    numbers += [address(name) for name in ("wte.weight", "wpe.weight", "ln_f.weight", "ln_f.bias")]
    at = cache.data_ptr()
    for layer, heads in enumerate(shape.heads):
        numbers += [heads, *(address(f"h.{layer}.{part}") for part in _LAYER)]
        each = 2 * max_batch * heads * capacity * shape.head_dim  # bytes of K, and of V
        numbers += [at, at + each]
        at += 2 * each
    numbers += [len(choices), *(number for choice in choices for number in choice)]
    return torch.tensor(numbers, dtype=torch.int64)


def cache_elements(shape: Shape, max_batch: int, capacity: int) -> int:
    """FP16 numbers in the keys and values of all layers."""
    return 2 * max_batch * sum(shape.heads) * capacity * shape.head_dim


_LAYER = [
    f"{module}.{part}"
    for module in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
    for part in ("weight", "bias")
]
