"""A checkpoint folder as one FP16 buffer, and the table of addresses that csrc/api.cpp reads."""

import struct
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from cuda_ext.checkpoint import read_checkpoint
from cuda_ext.errors import CheckpointError

HEAD_DIMS = (32, 64, 128)
LAYOUT = 2
"""Of the table: csrc/api.cpp's kLayout. Both go up by one with every change of what the table holds."""
_ACTIVATIONS = ("gelu_new", "gelu_pytorch_tanh")  # one function under two names
_ALIGN = 128  # elements: 256 bytes


@dataclass(frozen=True)
class Shape:
    """The sizes of a CompactGPT2.

    Of layer i: `heads[i]` query heads; `groups[i]` says how many of them, one after another, read each key/value head;
    `windows[i]` is how many tokens one sees, 0: all. `rotary` is how many numbers of a head rotary positions turn, 0:
    positions are learned; `rope_base` is their base. `activation`: of the MLPs.
    """

    width: int
    inner: int
    vocabulary: int
    context: int
    head_dim: int
    heads: tuple[int, ...]
    groups: tuple[tuple[int, ...], ...]
    windows: tuple[int, ...]
    rotary: int
    rope_base: float
    epsilon: float
    activation: str

    @property
    def ld_width(self) -> int:
        """`width`, padded to a multiple of 8: rows of weights begin at 16-byte addresses."""
        return (self.width + 7) // 8 * 8

    @property
    def ld_inner(self) -> int:
        return (self.inner + 7) // 8 * 8

    @property
    def kv_heads(self) -> tuple[int, ...]:
        """Key/value heads of each layer."""
        return tuple(map(len, self.groups))

    @property
    def position_rows(self) -> int:
        """Of the position table: one of zeros where positions are rotary."""
        return 1 if self.rotary else self.context

    def qkv_rows(self, layer: int) -> int:
        """Outputs of a layer's product for queries, keys and values."""
        return (self.heads[layer] + 2 * self.kv_heads[layer]) * self.head_dim


@dataclass(frozen=True)
class Packed:
    """`weights`: FP16 [elements]; `offsets`: the element at which each named tensor begins.

    Besides the checkpoint's own there are, as they lie in memory, `rotary.angles` FP32 [context, rotary / 2, 2] and
    `h.N.attn.kv_head` int32 [heads].
    """

    shape: Shape
    weights: torch.Tensor
    offsets: dict[str, int]


def read_shape(folder: Path) -> Shape:
    """The sizes of a `compact_gpt2` or a stock `gpt2`, whose tensors are of these sizes. Raises CheckpointError."""
    return _shape(read_checkpoint(folder).fields)


def unsupported(shape: Shape) -> str | None:
    """Why the kernels cannot run a model of these sizes, in one phrase; None where they can."""
    if shape.activation not in _ACTIVATIONS:
        return f"the model has the activation {shape.activation}, which the kernels do not know; the engine torch does"
    if shape.head_dim not in HEAD_DIMS:
        return f"head_dim is {shape.head_dim}; the kernels know {', '.join(map(str, HEAD_DIMS))}"
    return None


def pack(folder: Path) -> Packed:
    """Read a folder of safetensors into one buffer, in FP16, with every key and shape checked.

    Linear weights are [out, in] with rows padded by zeros to `ld`; stock GPT-2's [in, out] are turned. The MLPs get
    hidden neurons of zeros up to a multiple of 8, so that no column of activations is there that nobody writes.
    Queries, keys and values are one matrix, whatever the checkpoint has; where positions are rotary, the two numbers
    that turn together lie side by side in each head of queries and keys, which leaves their products as they are.
    Raises CheckpointError.
    """
    checkpoint = read_checkpoint(folder)
    shape = _shape(checkpoint.fields)
    if unsupported(shape):
        raise CheckpointError(f"{folder / 'config.json'}: {unsupported(shape)}")
    parts = {name: _padded(name, tensor, shape) for name, tensor in checkpoint.tensors(torch.float16)}
    for layer, module in enumerate(f"h.{layer}.attn.c_attn" for layer in range(len(shape.heads))):
        for kind in ("weight", "bias"):
            sources = [
                name for name in (f"{module}.{kind}", *(f"{module}.{of}.{kind}" for of in "qkv")) if name in parts
            ]
            parts[f"{module}.{kind}"] = _paired(torch.cat([parts.pop(name) for name in sources]), shape, layer)
    if shape.rotary:
        parts["wpe.weight"] = torch.zeros(1, shape.ld_width)
        parts["rotary.angles"] = _angles(shape).view(torch.float16)
    return lay_out(shape, parts)


def lay_out(shape: Shape, parts: dict[str, torch.Tensor]) -> Packed:
    """A model's tensors in one buffer, each padded already, and who reads which key/value head."""
    readers = {f"h.{layer}.attn.kv_head": _readers(groups) for layer, groups in enumerate(shape.groups)}
    parts = parts | readers
    offsets, end = {}, 0
    for name, part in parts.items():
        offsets[name] = end
        end += (part.numel() + _ALIGN - 1) // _ALIGN * _ALIGN
    weights = torch.zeros(end, dtype=torch.float16)
    for name, part in parts.items():
        weights[offsets[name] : offsets[name] + part.numel()] = part.flatten()
    return Packed(replace(shape, inner=shape.ld_inner), weights, offsets)


def _readers(groups: tuple[int, ...]) -> torch.Tensor:
    """The key/value head that each query head reads, int32 as it lies in memory."""
    heads = [group for group, size in enumerate(groups) for _ in range(size)]
    return torch.tensor(heads, dtype=torch.int32).view(torch.float16)


def _padded(name: str, tensor: torch.Tensor, shape: Shape) -> torch.Tensor:
    more_rows = shape.ld_inner - shape.inner if ".mlp.c_fc." in name else 0
    more_columns = (0, -tensor.shape[1] % 8) if tensor.dim() == 2 else ()
    return torch.nn.functional.pad(tensor, (*more_columns, 0, more_rows))


def _paired(matrix: torch.Tensor, shape: Shape, layer: int) -> torch.Tensor:
    """The rows (or biases) of q, k and v, with number i of a head of q or k followed by i + rotary / 2, its pair."""
    turning = (shape.heads[layer] + shape.kv_heads[layer]) * shape.head_dim
    pairs = torch.arange(shape.rotary).view(2, -1).T.flatten()
    order = torch.cat([pairs, torch.arange(shape.rotary, shape.head_dim)])
    heads = matrix[:turning].unflatten(0, (-1, shape.head_dim))[:, order]
    return torch.cat([heads.flatten(0, 1), matrix[turning:]])


def _angles(shape: Shape) -> torch.Tensor:
    """Cosines and sines of RoPE (Su et al. 2021, arXiv 2104.09864, section 3.2), FP32 [context, rotary / 2, 2]."""
    speeds = shape.rope_base ** -(torch.arange(0, shape.rotary, 2, dtype=torch.float64) / shape.rotary)
    angles = torch.arange(shape.context, dtype=torch.float64)[:, None] * speeds
    return torch.stack([angles.cos(), angles.sin()], -1).float()


def _shape(fields: dict[str, Any]) -> Shape:
    heads, layers, kept = fields["n_head"], fields["n_layer"], fields.get("kept_heads")
    head_dim = fields.get("head_dim") or fields["n_embd"] // heads
    kv_heads, windows = fields.get("n_kv_head") or heads, fields.get("window")
    rotary = fields.get("position", "learned") == "rope"
    kept = kept or [range(heads)] * layers
    return Shape(
        width=fields["n_embd"],
        inner=fields["n_inner"] or 4 * fields["n_embd"],
        vocabulary=fields["vocab_size"],
        context=fields["n_positions"],
        head_dim=head_dim,
        heads=tuple(map(len, kept)),
        groups=tuple(tuple(Counter(head * kv_heads // heads for head in some).values()) for some in kept),
        windows=tuple(window or 0 for window in (windows if isinstance(windows, list) else [windows] * layers)),
        rotary=int(fields["rope_share"] * head_dim) // 2 * 2 if rotary else 0,
        rope_base=fields.get("rope_base", 1.0),
        epsilon=fields["layer_norm_epsilon"],
        activation=fields["activation_function"],
    )


def table(
    packed: Packed,
    weights: torch.Tensor,
    cache: torch.Tensor,
    max_batch: int,
    capacity: int,
    choices: Sequence[Sequence[int]] = (),
) -> torch.Tensor:
    """What csrc/api.cpp reads: the layout's number, its own length, sizes, addresses and choices, int64 on the CPU.

    `weights` is `packed.weights` on the device; `cache` FP16 [cache_elements(...)]; `choices`: csrc/model.h's.
    """
    shape = packed.shape

    def address(name: str) -> int:
        return weights.data_ptr() + 2 * packed.offsets[name]

    (epsilon,) = struct.unpack("i", struct.pack("f", shape.epsilon))
    numbers = [len(shape.heads), shape.width, shape.inner, shape.vocabulary, shape.position_rows, shape.head_dim]
    numbers += [shape.rotary, shape.context, shape.ld_width, shape.ld_inner, epsilon, capacity]
    numbers += [address("rotary.angles") if shape.rotary else 0]
    numbers += [address(name) for name in ("wte.weight", "wpe.weight", "ln_f.weight", "ln_f.bias")]
    at = cache.data_ptr()
    for layer, heads in enumerate(shape.heads):
        kv_heads = shape.kv_heads[layer]
        numbers += [heads, kv_heads, shape.windows[layer]]
        numbers += [0 if kv_heads == heads else address(f"h.{layer}.attn.kv_head")]
        numbers += [address(f"h.{layer}.{part}") for part in _LAYER]
        each = 2 * max_batch * kv_heads * capacity * shape.head_dim  # bytes of K, and of V
        numbers += [at, at + each]
        at += 2 * each
    numbers += [len(choices), *(number for choice in choices for number in choice)]
    return torch.tensor([LAYOUT, 2 + len(numbers), *numbers], dtype=torch.int64)


def layer_count(table: torch.Tensor) -> int:
    """Of a table that `table` made."""
    return int(table[2])


def cache_elements(shape: Shape, max_batch: int, capacity: int) -> int:
    """FP16 numbers in the keys and values of all layers."""
    return 2 * max_batch * sum(shape.kv_heads) * capacity * shape.head_dim


_LAYER = [
    f"{module}.{part}"
    for module in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
    for part in ("weight", "bias")
]
