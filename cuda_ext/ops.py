"""csrc/api.h as torch operations, `torch.ops.headroom.*`: on a GPU, or on the CPU through the host build.

They launch on the current stream of their tensors' device, never synchronise and never allocate on the device, so a
CUDA graph can capture them; each has a fake, so `torch.compile` can trace them. They are for inference: autograd does
not see what they write.
"""

import ctypes
import functools
import re
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from cuda_ext import build, host_build, sampling
from cuda_ext.errors import CudaExtError

MATVEC_ROWS = 8
"""Batches up to this size decode by matrix-vector products (csrc/ops.h)."""
PERSISTENT_BATCH = 4
"""Batches up to this size can decode in one launch (csrc/decode_persistent.h)."""
BY_CUBLASLT = -1
"""The `variant` of a product that goes by an `algorithm` of cuBLASLt's (csrc/product.h)."""
ALGORITHM_WORDS = 8
_ALGORITHMS = 4  # that cuBLASLt's heuristic is asked for


@functools.cache
def library(device: str) -> ctypes.CDLL:
    """The compiled kernels for `device`'s type, "cuda" or "cpu". Raises CudaExtError."""
    if device == "cuda":
        return ctypes.CDLL(str(build.library()))
    try:
        return host_build.host_library(build.SOURCES)
    except host_build.HostBuildError as error:
        raise CudaExtError(str(error)) from error


@functools.cache
def _signatures() -> dict[str, tuple[Any, list[type]]]:
    """Of each function in csrc/api.h: what it returns, and its arguments."""
    text = re.sub(r"//.*", "", (build.CSRC / "api.h").read_text(encoding="utf-8"))
    found = re.findall(r"([\w *]+)\b(hr_\w+)\(([^)]*)\);", text)
    return {
        name: (_c_type(result), [_c_type(one) for one in arguments.split(",") if one.strip()])
        for result, name, arguments in found
    }


def _c_type(declared: str) -> type:
    if "*" in declared:
        return ctypes.c_char_p if "char" in declared else ctypes.c_void_p
    return ctypes.c_int64 if "int64_t" in declared else ctypes.c_int


@functools.cache
def _function(device: str, name: str) -> Callable[..., int]:
    function = library(device)[name]
    function.restype, function.argtypes = _signatures()[name]
    return function


def forget_libraries() -> None:
    """Load them anew when they are next used: another back end of host_build may give others."""
    library.cache_clear()
    _function.cache_clear()


def workspace_bytes(table: Tensor, batch: int, length: int, device: str) -> int:
    """Of the buffer that prefill and decode work in. `table`: packing.table's. Raises CudaExtError for another."""
    return _size(device, "hr_workspace_bytes", table, batch, length)


def counters(table: Tensor, batch: int, device: str) -> int:
    """How many int32 of zeros decode wants beside the buffer that it works in; it leaves them zero."""
    return _size(device, "hr_counters", table, batch)


def layers(table: Tensor, device: str) -> Tensor:
    """The table's layers as decode_persistent reads them, uint8 on the CPU."""
    held = torch.zeros(_size(device, "hr_layers", table, None), dtype=torch.uint8)
    _size(device, "hr_layers", table, held.data_ptr())
    return held


def persistent_blocks(table: Tensor, batch: int, threads: int, device: torch.device) -> int:
    """How many blocks decode_persistent can have; 0 where the model does not fit the device."""
    return _size(device.type, "hr_persistent_blocks", table, batch, threads, _place(device)[0])


def persistent_bytes(table: Tensor, blocks: int, threads: int, device: str) -> int:
    """Of the buffer that decode_persistent works in; it must be zeros before the first launch."""
    return _size(device, "hr_persistent_bytes", table, blocks, threads)


def product_variants(device: str) -> list[str]:
    """The names of our own tiles for `product`."""
    name = _function(device, "hr_product_variant_name")
    return [name(i).decode() for i in range(_function(device, "hr_product_variants")())]  # type: ignore[attr-defined]


def product_variant_for(m: int, n: int, device: str) -> int:
    """The tile that is taken where nothing was measured."""
    return _function(device, "hr_product_variant_for")(m, n)


def product_scratch_bytes(device: str) -> int:
    """Of the buffer that `product` works in."""
    return _function(device, "hr_product_scratch_bytes")()


def cublaslt_version(device: str) -> int:
    """Of the library that is opened, such as 130101; 0 where there is none."""
    return _function(device, "hr_cublaslt_version")()


def cublaslt_algorithms(
    a: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, epilogue: int, fewest: int
) -> list[tuple[int, ...]]:
    """ALGORITHM_WORDS int64 each: cuBLASLt's likeliest algorithms for `product`, the first the likeliest.

    Those that can do any number of rows from `fewest` to `out`'s.
    """
    m, n = out.shape
    found = (ctypes.c_int64 * (ALGORITHM_WORDS * _ALGORITHMS))()
    count = _function(out.device.type, "hr_cublaslt_algorithms")(
        m, n, a.shape[1], a.stride(0), weight.stride(0), out.stride(0), epilogue, _address(bias), fewest,
        ctypes.addressof(found), _ALGORITHMS, _place(out.device)[0],
    )  # fmt: skip
    return [tuple(found[ALGORITHM_WORDS * i : ALGORITHM_WORDS * (i + 1)]) for i in range(count)]


_LIBRARY = torch.library.Library("headroom", "DEF")
_Op = TypeVar("_Op", bound=Callable[..., None])


def _operation(*mutated: str) -> Callable[[_Op], _Op]:
    """Register a function as `torch.ops.headroom`'s; `mutated`: the arguments that it writes.

    `torch.library.custom_op` would do the same for ten times the time of a call: it serves autograd.
    """

    def register(function: _Op) -> _Op:
        name = function.__name__
        _LIBRARY.define(name + torch.library.infer_schema(function, mutates_args=mutated))
        for key in ("CPU", "CUDA"):
            _LIBRARY.impl(name, function, key)
        torch.library.register_fake(f"headroom::{name}", lambda *arguments, **named: None, lib=_LIBRARY)
        dispatch = getattr(torch.ops.headroom, name).default

        @functools.wraps(function)
        def call(*arguments: object, **named: object) -> None:
            dispatch(*arguments, **named)

        return call  # type: ignore[return-value]

    return register


@_operation("workspace", "cache", "logits")
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


@_operation("workspace", "counters", "cache", "logits")
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


@_operation("workspace", "cache", "tokens", "position", "lengths", "step", "finished", "history", "logits", "stamps")
def decode_persistent(
    table: Tensor, layers: Tensor, workspace: Tensor, cache: Tensor, tokens: Tensor, position: Tensor, lengths: Tensor,
    step: Tensor, finished: Tensor, history: Tensor, how: Tensor, logits: Tensor, greedy: bool, steps: int, blocks: int,
    threads: int, work: int = 0, stamps: Tensor | None = None,
) -> None:  # fmt: skip
    """`steps` times `decode`, and if `greedy` the likeliest tokens and `advance` after each, in one launch.

    `work`: persistent.WORK's number; `stamps` int64: persistent.Persistent.room_for_stamps.
    """
    _check([tokens, position, lengths, step, finished, history, how], [logits])
    _check_sampling(how)
    if stamps is not None:
        _check_stamps(stamps, blocks, tokens.device)
    _run(
        tokens.device, "hr_decode_persistent", table, layers, workspace, tokens, position, lengths, step, finished,
        history, history.shape[1], how, tokens.shape[0], int(greedy), steps, logits, logits.stride(0), blocks, threads,
        work, stamps, 0 if stamps is None else stamps.shape[1],
    )  # fmt: skip


@_operation("out", "scratch")
def product(
    a: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, scratch: Tensor, epilogue: int, variant: int,
    algorithm: list[int] | None = None,
) -> None:  # fmt: skip
    """out = epilogue(a weight^T + bias), by number as in csrc/ops.h; FP16 [m, k] and [n, k], rows 16-byte aligned.

    `variant`: one of our tiles; or BY_CUBLASLT for `algorithm`, one of cublaslt_algorithms, which raises CudaExtError
    and leaves `out` as it was where cuBLASLt refuses.
    """
    m, n = out.shape
    words = None if algorithm is None else (ctypes.c_int64 * ALGORITHM_WORDS)(*algorithm)
    _run(
        out.device, "hr_product", a, a.stride(0), weight, weight.stride(0), bias, out, out.stride(0), m, n, a.shape[1],
        epilogue, variant, words, scratch,
    )  # fmt: skip


@_operation("step", "tokens")
def sample(logits: Tensor, how: Tensor, step: Tensor, tokens: Tensor) -> None:
    """Draw tokens int32 [batch] from logits FP32 [batch, vocabulary]; step int32 [batch] goes up by one.

    `how`: sampling.Sampling's numbers, int32 [sampling.WORDS], on the device.
    """
    _check([step, tokens, how], [logits])
    _check_sampling(how)
    batch, vocabulary = logits.shape
    _run(logits.device, "hr_sample", logits, logits.stride(0), vocabulary, batch, how, step, tokens)


@_operation("tokens", "position", "lengths", "step", "finished", "history")
def advance(
    tokens: Tensor, position: Tensor, lengths: Tensor, step: Tensor, finished: Tensor, history: Tensor, how: Tensor,
    capacity: int,
) -> None:  # fmt: skip
    """Note sampled tokens and move on: all int32 [batch], `history` [batch, room]; `how` as in `sample`."""
    _check([tokens, position, lengths, step, finished, history, how])
    _check_sampling(how)
    _run(
        tokens.device, "hr_advance", tokens, position, lengths, step, finished, history, how, tokens.shape[0],
        history.shape[1], capacity,
    )  # fmt: skip


def _check(ints: Sequence[Tensor], floats: Sequence[Tensor] = ()) -> None:
    """`ints` must be int32, `floats` FP32, all with contiguous rows and on one device."""
    device = ints[0].device
    for tensors, kind in ((ints, torch.int32), (floats, torch.float32)):
        for tensor in tensors:
            if tensor.dtype != kind or (tensor.numel() and tensor.stride(-1) != 1):
                raise CudaExtError(f"expected {kind} in contiguous rows, not {tensor.dtype}, strides {tensor.stride()}")
            if tensor.device != device:
                raise CudaExtError(f"tensors lie on {tensor.device} and {device}")


def _check_sampling(how: Tensor) -> None:
    if how.shape != (sampling.WORDS,) or how.data_ptr() % 8:
        raise CudaExtError(f"sampling parameters are int32 [{sampling.WORDS}] at an 8-byte address: Sampling.packed()")


def _check_stamps(stamps: Tensor, blocks: int, device: torch.device) -> None:
    """How many there must be of each block, the launcher knows and checks."""
    if stamps.dtype != torch.int64 or not stamps.is_contiguous() or stamps.dim() != 2 or stamps.shape[0] < blocks:
        raise CudaExtError(f"stamps are {stamps.dtype} {list(stamps.shape)}; give contiguous int64 [{blocks}, count]")
    if stamps.device != device:
        raise CudaExtError(f"stamps lie on {stamps.device}, the rest on {device}")


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _place(device: torch.device) -> tuple[int, int | None]:
    """A device's number and its current stream."""
    if device.type != "cuda":
        return 0, None
    index = torch.cuda.current_device() if device.index is None else device.index
    return index, torch.cuda.current_stream(index).cuda_stream


def _size(device: str, name: str, table: Tensor, *arguments: int | None) -> int:
    size = _function(device, name)(table.data_ptr(), *arguments)
    if size < 0:
        raise CudaExtError(f"{name.removeprefix('hr_')}: {_error_text(device, size)}")
    return size


def _run(device: torch.device, name: str, *arguments: object) -> None:
    plain = [argument.data_ptr() if isinstance(argument, Tensor) else argument for argument in arguments]
    code = _function(device.type, name)(*plain, *_place(device))
    if code:
        raise CudaExtError(f"{name.removeprefix('hr_')}: {_error_text(device.type, code)}")


def _error_text(device: str, code: int) -> str:
    found = library(device).hr_host_error() if device == "cpu" and code > 0 else b""
    text: bytes = found or _function(device, "hr_error_text")(code)  # type: ignore[assignment]
    return text.decode()
