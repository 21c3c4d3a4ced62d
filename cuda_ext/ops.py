"""csrc/api.h as torch operations, `torch.ops.headroom.*`: on a GPU, or on the CPU through the host build.

They launch on torch's current stream, never synchronise and never allocate on the device, so a CUDA graph can
capture them; each has a fake, so `torch.compile` can trace them.
"""

import ctypes
import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from cuda_ext import build, host_build
from cuda_ext.errors import CudaExtError

MATVEC_ROWS = 8
"""Batches up to this size decode by matrix-vector products (csrc/ops.h)."""
PERSISTENT_BATCH = 4
"""Batches up to this size can decode in one launch (csrc/decode_persistent.h)."""


@functools.cache
def library(device: str) -> ctypes.CDLL:
    """The compiled kernels for `device`'s type, "cuda" or "cpu". Raises CudaExtError."""
    if device == "cuda":
        loaded = ctypes.CDLL(str(build.library()))
    else:
        try:
            loaded = host_build.host_library(build.SOURCES)
        except host_build.HostBuildError as error:
            raise CudaExtError(str(error)) from error
    for name in ("hr_workspace_bytes", "hr_counters", "hr_layers", "hr_persistent_bytes", "hr_product_scratch_bytes"):
        getattr(loaded, name).restype = ctypes.c_int64
    for name in ("hr_error_text", "hr_product_way_name"):
        getattr(loaded, name).restype = ctypes.c_char_p
    return loaded


def workspace_bytes(table: Tensor, batch: int, length: int, device: str) -> int:
    """Of the buffer that prefill and decode work in. `table`: packing.table's."""
    return int(library(device).hr_workspace_bytes(_pointer(table), batch, length))


def counters(table: Tensor, batch: int, device: str) -> int:
    """How many int32 of zeros decode wants beside the buffer that it works in; it leaves them zero."""
    return int(library(device).hr_counters(_pointer(table), batch))


def layers(table: Tensor, device: str) -> Tensor:
    """The table's layers as decode_persistent reads them, uint8 on the CPU."""
    kernels = library(device)
    held = torch.zeros(kernels.hr_layers(_pointer(table), None), dtype=torch.uint8)
    kernels.hr_layers(_pointer(table), _pointer(held))
    return held


def persistent_blocks(table: Tensor, batch: int, threads: int, device: str) -> int:
    """How many blocks decode_persistent can have; 0 where the model does not fit the device."""
    return int(library(device).hr_persistent_blocks(_pointer(table), batch, threads))


def persistent_bytes(table: Tensor, blocks: int, threads: int, device: str) -> int:
    """Of the buffer that decode_persistent works in; it must be zeros before the first launch."""
    return int(library(device).hr_persistent_bytes(_pointer(table), blocks, threads))


def product_ways(device: str) -> list[str]:
    """The names of the ways that `product` knows here."""
    kernels = library(device)
    return [kernels.hr_product_way_name(way).decode() for way in range(kernels.hr_product_ways())]


def product_scratch_bytes(device: str) -> int:
    """Of the buffer that `product` works in."""
    return int(library(device).hr_product_scratch_bytes())


@torch.library.custom_op("headroom::prefill", mutates_args=("workspace", "cache", "logits"))
def prefill(
    table: Tensor, workspace: Tensor, cache: Tensor, tokens: Tensor, start: Tensor, lengths: Tensor,
    rows: Tensor | None, logits: Tensor,
) -> None:  # fmt: skip
    """Run new tokens behind the cached ones.

    `tokens` int32 [batch, length]; `start`, `lengths` int32 [batch]; `rows` int32 [count], those of the
    batch * length rows whose logits are wanted, or None for all; `logits` FP32 [count, vocabulary].
    """
    batch, length = tokens.shape
    _check([tokens, start, lengths], [logits])
    count = rows.numel() if rows is not None else batch * length
    _run(
        tokens.device, "hr_prefill", table, workspace, tokens, start, lengths, rows, count, batch, length, logits,
        logits.stride(0),
    )  # fmt: skip


@torch.library.custom_op("headroom::decode", mutates_args=("workspace", "counters", "cache", "logits"))
def decode(
    table: Tensor, workspace: Tensor, counters: Tensor, cache: Tensor, tokens: Tensor, position: Tensor,
    lengths: Tensor, logits: Tensor, splits: int, dependent: bool,
) -> None:  # fmt: skip
    """Run one token a sequence.

    `tokens`, `position`, `lengths` int32 [batch]; `logits` FP32 [batch, vocabulary]; `counters` int32, zeros.
    """
    _check([tokens, position, lengths, counters], [logits])
    _run(
        tokens.device, "hr_decode", table, workspace, counters, tokens, position, lengths, tokens.shape[0], splits,
        logits, logits.stride(0), int(dependent),
    )  # fmt: skip


@torch.library.custom_op(
    "headroom::decode_persistent",
    mutates_args=(
        "workspace", "cache", "tokens", "position", "lengths", "step", "finished", "history", "logits", "stamps",
    ),
)  # fmt: skip
def decode_persistent(
    table: Tensor, layers: Tensor, workspace: Tensor, cache: Tensor, tokens: Tensor, position: Tensor, lengths: Tensor,
    step: Tensor, finished: Tensor, history: Tensor, stop: Tensor, logits: Tensor, pad: int, greedy: bool, steps: int,
    blocks: int, threads: int, work: int = 0, stamps: Tensor | None = None,
) -> None:  # fmt: skip
    """`steps` times `decode`, and if `greedy` the likeliest tokens and `advance` after each, in one launch.

    `work`: persistent.WORK's number; `stamps` int64: persistent.Persistent.room_for_stamps.
    """
    _check([tokens, position, lengths, step, finished, history, stop], [logits])
    if stamps is not None:
        _check_stamps(stamps, blocks, tokens.device)
    _run(
        tokens.device, "hr_decode_persistent", table, layers, workspace, tokens, position, lengths, step, finished,
        history, history.shape[1], stop, stop.numel(), pad, tokens.shape[0], int(greedy), steps, logits,
        logits.stride(0), blocks, threads, work, stamps, 0 if stamps is None else stamps.shape[1],
    )  # fmt: skip


@torch.library.custom_op("headroom::product", mutates_args=("out", "scratch"))
def product(
    a: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, scratch: Tensor, epilogue: int, way: int
) -> None:
    """out = epilogue(a weight^T + bias), by number as in csrc/ops.h; FP16 [m, k] and [n, k], rows 16-byte aligned."""
    m, n = out.shape
    _run(
        out.device, "hr_product", a, a.stride(0), weight, weight.stride(0), bias, out, out.stride(0), m, n, a.shape[1],
        epilogue, way, scratch,
    )  # fmt: skip


@torch.library.custom_op("headroom::sample", mutates_args=("step", "tokens"))
def sample(
    logits: Tensor, step: Tensor, tokens: Tensor, temperature: float, top_k: int, top_p: float, seed: int
) -> None:
    """Draw tokens int32 [batch] from logits FP32 [batch, vocabulary]; step int32 [batch] goes up by one."""
    _check([step, tokens], [logits])
    batch, vocabulary = logits.shape
    _run(
        logits.device, "hr_sample", logits, logits.stride(0), vocabulary, batch, ctypes.c_float(temperature), top_k,
        ctypes.c_float(top_p), ctypes.c_uint64(seed % 2**64), step, tokens,
    )  # fmt: skip


@torch.library.custom_op(
    "headroom::advance", mutates_args=("tokens", "position", "lengths", "step", "finished", "history")
)
def advance(
    tokens: Tensor, position: Tensor, lengths: Tensor, step: Tensor, finished: Tensor, history: Tensor, stop: Tensor,
    pad: int, capacity: int,
) -> None:  # fmt: skip
    """Note sampled tokens and move on: all int32 [batch], `history` [batch, room], `stop` [any]."""
    _check([tokens, position, lengths, step, finished, history, stop])
    _run(
        tokens.device, "hr_advance", tokens, position, lengths, step, finished, history, stop, stop.numel(), pad,
        tokens.shape[0], history.shape[1], capacity,
    )  # fmt: skip


for _operation in (prefill, decode, decode_persistent, product, sample, advance):
    _operation.register_fake(lambda *arguments, **named: None)


def _check(ints: Sequence[Tensor], floats: Sequence[Tensor] = ()) -> None:
    """`ints` must be int32, `floats` FP32, all with contiguous rows and on one device."""
    for tensors, kind in ((ints, torch.int32), (floats, torch.float32)):
        for tensor in tensors:
            if tensor.dtype != kind or (tensor.numel() and tensor.stride(-1) != 1):
                raise CudaExtError(f"expected {kind} in contiguous rows, not {tensor.dtype}, strides {tensor.stride()}")
            if tensor.device != ints[0].device:
                raise CudaExtError(f"tensors lie on {tensor.device} and {ints[0].device}")


def _check_stamps(stamps: Tensor, blocks: int, device: torch.device) -> None:
    """How many there must be of each block, the launcher knows and checks."""
    if stamps.dtype != torch.int64 or not stamps.is_contiguous() or stamps.dim() != 2 or stamps.shape[0] < blocks:
        raise CudaExtError(f"stamps are {stamps.dtype} {list(stamps.shape)}; give contiguous int64 [{blocks}, count]")
    if stamps.device != device:
        raise CudaExtError(f"stamps lie on {stamps.device}, the rest on {device}")


def _pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def _run(device: torch.device, name: str, *arguments: object) -> None:
    kernels = library(device.type)
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else None
    plain = [_pointer(a) if a is None or isinstance(a, Tensor) else a for a in arguments]
    with torch.cuda.device(device if device.type == "cuda" else -1):
        code = kernels[name](*plain, ctypes.c_void_p(stream))
    if code:
        text = kernels.hr_error_text(code).decode()
        if device.type == "cpu":
            text = kernels.hr_host_error().decode()
        raise CudaExtError(f"{name.removeprefix('hr_')}: {text}")
