"""What the kernels' PTX does, counted by the interpreter (csrc/ptx/profile.cpp) at a model's true launch geometry."""

import json
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from cuda_ext import host_build, ops, ptx_build
from cuda_ext.engine import Engine
from cuda_ext.packing import Packed, Shape, lay_out
from cuda_ext.persistent import Persistent
from cuda_ext.report.gpus import Gpu

DECODED = 2  # tokens behind the context: one that is counted, and one for what is drawn of it
_ROOM = 16  # positions behind the context, as the benchmarks leave
_THREADS = 384  # of a block of the persistent kernel, as on a GPU


@dataclass(frozen=True)
class Chain:
    """The longest chain of waits through a block: loads by the memory that answers, barriers, and all cycles."""

    cycles: int
    dram: int
    l2: int
    l1: int
    barriers: int

    @property
    def loads(self) -> int:
        return self.dram + self.l2 + self.l1


@dataclass(frozen=True)
class Launch:
    """One launch. `kinds`: instructions of warps and their issue slots; `memory` and `stalls` by line of the source."""

    kernel: str  # mangled
    grid: tuple[int, int, int]
    threads: int
    shared_bytes: int
    cooperative: bool
    bytes_read: int
    bytes_written: int
    bytes_cold: int
    l2_sectors: int
    path: Chain
    path_after_wait: Chain
    kinds: dict[str, tuple[int, int]]
    memory: tuple[dict[str, Any], ...]
    stalls: tuple[tuple[str, str, int], ...]

    @property
    def title(self) -> str:
        """ "gemm_kernel": without namespaces and template arguments."""
        found = re.search(r"\d([a-z_]+_kernel)", self.kernel)
        return found[1] if found else self.kernel

    @property
    def blocks(self) -> int:
        return self.grid[0] * self.grid[1] * self.grid[2]

    @property
    def slots(self) -> int:
        return sum(slots for _, slots in self.kinds.values())

    @property
    def instructions(self) -> int:
        """Of warps, without those that the compiler folds away."""
        return sum(count for kind, (count, _) in self.kinds.items() if kind != "free")

    def sectors(self) -> tuple[int, int]:
        """32-byte sectors of global memory: asked for, and needed if each instruction's bytes lay side by side."""
        rows = [row for row in self.memory if not row["shared"]]
        return sum(row["asked"] for row in rows), sum(row["needed"] for row in rows)

    def wavefronts(self) -> tuple[int, int]:
        """Passes through shared memory: taken, and needed without bank conflicts."""
        rows = [row for row in self.memory if row["shared"]]
        return sum(row["asked"] for row in rows), sum(row["needed"] for row in rows)

    def barriers(self) -> float:
        """Of a block, each warp's counted."""
        return self.kinds["barrier"][0] / (self.blocks * -(-self.threads // 32))


def profiled(run: Callable[[], None], gpu: Gpu) -> list[Launch]:
    """The launches of `run`, with the latencies of `gpu`. Raises CudaExtError where the interpreter finds a fault."""
    interpreter = ptx_build.interpreter()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "launches.json"
        interpreter.hr_ptx_profile_begin(*gpu.load_cycles)
        try:
            run()
        finally:
            interpreter.hr_ptx_profile_end(str(path).encode())
        return [_launch(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def _launch(fields: dict[str, Any]) -> Launch:
    block = fields["block"]
    return Launch(
        kernel=fields["kernel"],
        grid=tuple(fields["grid"]),
        threads=block[0] * block[1] * block[2],
        shared_bytes=fields["shared_bytes"],
        cooperative=bool(fields["cooperative"]),
        bytes_read=fields["bytes_read"],
        bytes_written=fields["bytes_written"],
        bytes_cold=fields["bytes_cold"],
        l2_sectors=fields["l2_sectors"],
        path=Chain(**fields["path"]),
        path_after_wait=Chain(**fields["path_after_wait"]),
        kinds={kind: tuple(pair) for kind, pair in fields["kinds"].items()},
        memory=tuple(fields["memory"]),
        stalls=tuple(tuple(row) for row in fields["stalls"]),
    )


@contextmanager
def kernels_of(architecture: str) -> Iterator[None]:
    """Every engine on the CPU runs the PTX that nvcc makes for `architecture`, as fast as the interpreter goes."""
    ptx_build.interpreter().hr_ptx_set(b"races", 0)
    ptx_build.interpreter().hr_host_seed(0)
    host_build.use(lambda sources, defines: ptx_build.library(sources, architecture))
    ops.forget_libraries()
    try:
        yield
    finally:
        host_build.use(None)
        ops.forget_libraries()
        ptx_build.interpreter().hr_ptx_set(b"races", 1)


def decode_launches(shape: Shape, batch: int, context: int, gpu: Gpu) -> list[Launch]:
    """One token a sequence behind `context` others, kernel by kernel: through the model, then the next one drawn."""
    engine = _engine(shape, batch, context)
    launches = profiled(lambda: _quiet(engine.extend(DECODED)), gpu)  # which begins with a draw
    begin = next(number for number, launch in enumerate(launches) if "embed" in launch.title)
    return launches[begin : begin + len(launches) // 2]


def persistent_launch(shape: Shape, batch: int, context: int, gpu: Gpu) -> Launch | None:
    """One token a sequence in one launch, a block a multiprocessor; None where the batch is over what it takes."""
    if batch > ops.PERSISTENT_BATCH:
        return None
    engine = _engine(shape, batch, context)
    geometry = (gpu.limits.multiprocessors, _THREADS)
    persistent = Persistent(engine.table, batch, engine.device, geometry)
    if not persistent.fits(batch):
        return None
    logits, state = torch.zeros(batch, shape.vocabulary), engine._state(batch)
    for place in state[1:3]:  # position and length of the token to come
        place += 1
    (launch,) = profiled(
        lambda: persistent.decode(engine.cache, state, engine._sampling, logits, steps=1, greedy=True), gpu
    )
    return launch


def prefill_launches(shape: Shape, batch: int, length: int, gpu: Gpu) -> list[Launch]:
    engine = _engine(shape, batch, length)
    tokens = torch.randint(0, shape.vocabulary, (batch, length))
    return profiled(lambda: _quiet(engine.prefill(tokens)), gpu)


def _quiet(_: object) -> None:
    """For calls whose result does not matter."""


def _engine(shape: Shape, batch: int, context: int) -> Engine:
    """Random weights and a cache of `context` random tokens a sequence."""
    torch.manual_seed(0)
    capacity = min(context + _ROOM, shape.context)
    engine = Engine(random_weights(shape), device="cpu", max_batch=batch, max_context=capacity, decode="eager")
    engine.cache.normal_()
    past = min(context, capacity - 1)
    engine._hold(batch, torch.full((batch,), past, dtype=torch.int32), past)
    engine._logits.normal_()
    return engine


def gpt2_shape(width: int, inner: int, vocabulary: int, head_dim: int, heads: tuple[int, ...]) -> Shape:
    """Of a GPT-2, with so many heads left in each layer."""
    return Shape(
        width=width, inner=inner, vocabulary=vocabulary, context=1024, head_dim=head_dim, heads=heads,
        groups=tuple((1,) * count for count in heads), windows=(0,) * len(heads), rotary=0, rope_base=1.0, epsilon=1e-5,
        activation="gelu_new",
    )  # fmt: skip


def random_weights(shape: Shape) -> Packed:
    """Small random numbers: kernels take as long as over trained ones."""
    numbers = {
        name: torch.empty(rows * columns, dtype=torch.float16).normal_(std=0.02)
        for name, rows, columns in _tensors(shape)
    }
    if shape.rotary:
        numbers["rotary.angles"] = torch.zeros(shape.context * shape.rotary).view(torch.float16)
    return lay_out(shape, numbers)


def _tensors(shape: Shape) -> Iterator[tuple[str, int, int]]:
    """Name, rows and columns, padded as packing pads them."""
    width, inner = shape.ld_width, shape.ld_inner
    yield "wte.weight", shape.vocabulary, width
    yield "wpe.weight", shape.position_rows, width
    for layer, heads in enumerate(shape.heads):
        for module, rows, columns in (
            ("attn.c_attn", shape.qkv_rows(layer), width), ("attn.c_proj", shape.width, heads * shape.head_dim),
            ("mlp.c_fc", inner, width), ("mlp.c_proj", shape.width, inner),
        ):  # fmt: skip
            yield f"h.{layer}.{module}.weight", rows, columns
            yield f"h.{layer}.{module}.bias", 1, rows
        for module in ("ln_1", "ln_2"):
            yield f"h.{layer}.{module}.weight", 1, width
            yield f"h.{layer}.{module}.bias", 1, width
    yield "ln_f.weight", 1, width
    yield "ln_f.bias", 1, width


def distinct(shape: Shape) -> Shape:
    """With one layer of each kind: layers of the same heads, groups and window launch the same."""
    kinds = list(dict.fromkeys(_kinds(shape)))
    heads, groups, windows = zip(*kinds, strict=True)
    return replace(shape, heads=heads, groups=groups, windows=windows)


def repeats(shape: Shape) -> list[int]:
    """How often each layer of `distinct` stands in the model."""
    return list(Counter(_kinds(shape)).values())


def _kinds(shape: Shape) -> list[tuple[int, tuple[int, ...], int]]:
    return list(zip(shape.heads, shape.groups, shape.windows, strict=True))
