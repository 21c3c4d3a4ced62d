"""A checkpoint folder as one FP16 buffer, and the table of addresses that csrc/api.cpp reads."""

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

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
    """The sizes that `config.json` states, of a `compact_gpt2` or a stock `gpt2`. Raises CheckpointError."""
    path = folder / "config.json"
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}; give a model folder with config.json") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: no JSON ({error})") from error
    kind = config.get("model_type")
    if kind not in ("gpt2", "compact_gpt2"):
        raise CheckpointError(f"{path}: model_type is {kind!r}; the engine runs gpt2 and compact_gpt2")
    odd = [key for key in ("scale_attn_by_inverse_layer_idx", "add_cross_attention") if config.get(key)]
    if odd or config.get("activation_function", "gelu_new") not in ("gelu_new", "gelu_pytorch_tanh"):
        raise CheckpointError(
            f"{path}: {' '.join(odd) or 'this activation_function'} is not GPT-2's; use --engine torch"
        )
    try:
        width, layers, heads = (int(config[key]) for key in ("n_embd", "n_layer", "n_head"))
        head_dim = int(config.get("head_dim") or width // heads)
        kept = config.get("kept_heads")
        shape = Shape(
            width=width,
            inner=int(config.get("n_inner") or 4 * width),
            vocabulary=int(config["vocab_size"]),
            context=int(config["n_positions"]),
            head_dim=head_dim,
            heads=tuple(len(layer) for layer in kept) if kept is not None else (heads,) * layers,
            epsilon=float(config.get("layer_norm_epsilon", 1e-5)),
            variant=_variant(config),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: not a GPT-2 configuration ({type(error).__name__}: {error})") from error
    if len(shape.heads) != layers or min((*shape.heads, shape.width, shape.inner, shape.vocabulary)) < 1:
        raise CheckpointError(f"{path}: {layers} layers, but kept_heads names {len(shape.heads)}, or a size is 0")
    return shape


def unsupported(shape: Shape) -> str | None:
    """Why the kernels cannot run a model of these sizes, in one phrase; None where they can."""
    if shape.variant is not None:
        return f"the model has {shape.variant}, which the kernels do not know; the engine torch does"
    if shape.head_dim not in HEAD_DIMS:
        return f"head_dim is {shape.head_dim}; the kernels know {', '.join(map(str, HEAD_DIMS))}"
    return None


def _variant(config: dict[str, Any]) -> str | None:
    """In words, the field of a CompactGPT2 that makes it compute something else than GPT-2."""
    found = {
        "rotary positions": config.get("position", "learned") != "learned",
        "grouped-query attention": config.get("n_kv_head") not in (None, config.get("n_head")),
        "sliding windows": config.get("window") not in (None, [None] * int(config.get("n_layer") or 0)),
    }
    return " and ".join(words for words, has in found.items() if has) or None


def pack(folder: Path) -> Packed:
    """Read a folder of safetensors into one buffer, in FP16, with every key and shape checked.

    Linear weights are [out, in] with rows padded by zeros to `ld`; stock GPT-2's [in, out] are turned. The MLPs get
    hidden neurons of zeros up to a multiple of 8, so that no column of activations is there that nobody writes.
    Raises CheckpointError.
    """
    shape = read_shape(folder)
    if unsupported(shape):
        raise CheckpointError(f"{folder / 'config.json'}: {unsupported(shape)}")
    stock = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"] == "gpt2"
    tensors = _read(folder)
    parts: dict[str, torch.Tensor] = {}
    for name, (rows, columns, turned) in _expected(shape).items():
        tensor = tensors.pop(name, None)
        if tensor is None:
            raise CheckpointError(f"{folder}: the checkpoint has no {name}")
        if turned and stock:
            tensor = tensor.T
        wanted = (rows, columns) if columns else (rows,)
        if tuple(tensor.shape) != wanted:
            raise CheckpointError(
                f"{folder}: {name} has shape {list(tensor.shape)}, config.json asks for {list(wanted)}"
            )
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"{folder}: {name} holds NaN or infinity")
        more_rows = shape.ld_inner - rows if ".mlp.c_fc." in name else 0
        padding = (0, -columns % 8, 0, more_rows) if columns else (0, more_rows)
        parts[name] = torch.nn.functional.pad(tensor.to(torch.float16), padding)
    extra = [name for name in tensors if not name.endswith((".attn.bias", ".attn.masked_bias", "lm_head.weight"))]
    if extra:
        raise CheckpointError(f"{folder}: the checkpoint holds {extra[0]}, which GPT-2 has not")
    offsets, end = {}, 0
    for name, part in parts.items():
        offsets[name] = end
        end += (part.numel() + _ALIGN - 1) // _ALIGN * _ALIGN
    weights = torch.zeros(end, dtype=torch.float16)
    for name, part in parts.items():
        weights[offsets[name] : offsets[name] + part.numel()] = part.flatten()
    return Packed(replace(shape, inner=shape.ld_inner), weights, offsets)


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


def _expected(shape: Shape) -> dict[str, tuple[int, int, bool]]:
    """Of each tensor: rows, columns (0: a vector), and whether stock GPT-2 stores it the other way round."""
    width, inner = shape.width, shape.inner
    names = {"wte.weight": (shape.vocabulary, width, False), "wpe.weight": (shape.context, width, False)}
    for layer, heads in enumerate(shape.heads):
        all_heads = heads * shape.head_dim
        linear = {"attn.c_attn": (3 * all_heads, width), "attn.c_proj": (width, all_heads)}
        linear |= {"mlp.c_fc": (inner, width), "mlp.c_proj": (width, inner)}
        for norm in ("ln_1", "ln_2"):
            names |= {f"h.{layer}.{norm}.{part}": (width, 0, False) for part in ("weight", "bias")}
        for module, (rows, columns) in linear.items():
            names[f"h.{layer}.{module}.weight"] = (rows, columns, True)
            names[f"h.{layer}.{module}.bias"] = (rows, 0, False)
    return names | {f"ln_f.{part}": (width, 0, False) for part in ("weight", "bias")}


def _read(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of all safetensors files, without the `transformer.` that some names begin with."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder}: no .safetensors file; convert the checkpoint with save_pretrained")
    tensors = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - not a dict
                    tensors[name.removeprefix("transformer.")] = file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: damaged or cut off ({error}); copy it again") from error
    return tensors
