"""The PTX interpreter on PTX written by hand: right numbers, right fragments, and a fault for every kind of mistake.

References are numpy's and the PTX ISA's own formulas. These tests need g++ alone.
"""

import ctypes
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from cuda_ext.ptx_build import interpreter

HEADER = ".version 9.0\n.target sm_90a\n.address_size 64\n.extern .shared .align 128 .b8 block_memory[];\n"
FAULT = 719
ALL = 0xFFFFFFFF


class Ptx:
    """The interpreter, and launches of hand-written kernels with numpy's memory as the device's."""

    def __init__(self) -> None:
        self.lib = interpreter()

    def set(self, **settings: int) -> None:
        for name, value in settings.items():
            assert self.lib.hr_ptx_set(name.encode(), value) == 0

    @property
    def error(self) -> str:
        return self.lib.hr_host_error().decode()

    def kernel(self, body: str, parameters: int, name: str = "k") -> int:
        """`body` with the addresses of `parameters` arrays in %p0, %p1, ...; %x is the thread's index."""
        named = ", ".join(f".param .u64 a{n}" for n in range(parameters))
        loads = "".join(f"ld.param.u64 %p{n}, [a{n}];\n" for n in range(parameters))
        registers = (
            f".reg .b64 %p<{parameters + 1}>;\n.reg .b32 %x, %r<40>;\n.reg .b64 %q<10>;\n.reg .f32 %f<20>;\n"
            ".reg .b16 %h<10>;\n.reg .pred %t<10>;\n"
        )
        text = f"{HEADER}.visible .entry {name}({named}) {{\n{registers}{loads}mov.u32 %x, %tid.x;\n{body}\nret;\n}}\n"
        module = self.lib.hr_ptx_load(text.encode())
        assert module, self.error
        return self.lib.hr_ptx_kernel(module, name.encode())

    def launch(
        self, kernel: int, *arrays: NDArray, threads: int = 32, blocks: int = 1, shared: int = 1024,
        cooperative: bool = False, dependent: bool = False,
    ) -> int:  # fmt: skip
        grid, block = (ctypes.c_uint32 * 3)(blocks, 1, 1), (ctypes.c_uint32 * 3)(threads, 1, 1)
        for array in arrays:
            self.lib.hr_ptx_name_memory(array.ctypes.data, array.nbytes)
        pointers = [ctypes.c_uint64(array.ctypes.data) for array in arrays]
        arguments = (ctypes.c_void_p * max(1, len(arrays)))(*(ctypes.addressof(pointer) for pointer in pointers))
        return self.lib.hr_ptx_launch(kernel, grid, block, shared, cooperative, dependent, arguments)

    def run(self, body: str, *arrays: NDArray, **how: Any) -> int:
        return self.launch(self.kernel(body, len(arrays)), *arrays, **how) or self.lib.hr_ptx_finish()


@pytest.fixture
def ptx() -> Iterator[Ptx]:
    """With the first seed and strict about memory; and afterwards as it was."""
    machine = Ptx()
    machine.lib.hr_host_seed(0)
    machine.set(named_memory=1, budget=2_000_000)
    yield machine
    machine.set(named_memory=0, rough=0, races=1, always_weak=0, budget=300_000_000)
    machine.lib.hr_host_seed(0)


def aligned(*shape: int, dtype: Any = np.uint32, fill: int = 0) -> NDArray:
    """An array at a multiple of 128 bytes."""
    count = int(np.prod(shape)) * np.dtype(dtype).itemsize
    room = np.full(count + 128, fill, np.uint8)
    start = -room.ctypes.data % 128
    return room[start : start + count].view(dtype).reshape(shape)


# ---- numbers ----

S32, U32, S64, U64, F32, F16, S16 = np.int32, np.uint32, np.int64, np.uint64, np.float32, np.float16, np.int16
NAMES = {S32: "u32", U32: "u32", S64: "u64", U64: "u64", F32: "f32", F16: "u16", S16: "u16"}
REGISTERS = {"u32": ("%r1", "%r2", "%r3", "%r4"), "u64": ("%q1", "%q2", "%q3", "%q4")}
REGISTERS |= {"f32": ("%f1", "%f2", "%f3", "%f4"), "u16": ("%h1", "%h2", "%h3", "%h4")}


def below(exact: NDArray) -> NDArray:
    """The greatest FP32 numbers at or below `exact` ones."""
    rounded = exact.astype(F32)
    return np.where(rounded.astype(exact.dtype) > exact, np.nextafter(rounded, F32(-np.inf)), rounded)


def wide(x: NDArray) -> NDArray:
    return x.astype(np.longdouble) if x.dtype == F32 else x.astype(S64 if x.dtype == S32 else U64)


ARITHMETIC: dict[str, tuple[Sequence[Any], Any, Callable[..., NDArray]]] = {
    "add.s32": ([S32, S32], S32, lambda a, b: a + b),
    "sub.s64": ([S64, S64], S64, lambda a, b: a - b),
    "mul.lo.s32": ([S32, S32], S32, lambda a, b: a * b),
    "mul.hi.u32": ([U32, U32], U32, lambda a, b: wide(a) * wide(b) >> U64(32)),
    "mul.hi.s32": ([S32, S32], S32, lambda a, b: wide(a) * wide(b) >> 32),
    "mul.wide.s32": ([S32, S32], S64, lambda a, b: wide(a) * wide(b)),
    "mul.wide.u32": ([U32, U32], U64, lambda a, b: wide(a) * wide(b)),
    "mad.lo.s32": ([S32, S32, S32], S32, lambda a, b, c: a * b + c),
    "mad.wide.u32": ([U32, U32, U64], U64, lambda a, b, c: wide(a) * wide(b) + c),
    "div.s32": ([S32, S32], S32, lambda a, b: np.trunc(wide(a) / wide(b))),
    "rem.s32": ([S32, S32], S32, lambda a, b: np.fmod(wide(a), wide(b))),
    "div.u64": ([U64, U64], U64, lambda a, b: a // b),
    "min.s32": ([S32, S32], S32, np.minimum),
    "max.u32": ([U32, U32], U32, np.maximum),
    "abs.s32": ([S32], S32, np.abs),
    "and.b32": ([U32, U32], U32, np.bitwise_and),
    "xor.b64": ([U64, U64], U64, np.bitwise_xor),
    "not.b32": ([U32], U32, np.invert),
    "popc.b32": ([U32], U32, lambda a: np.array([int(x).bit_count() for x in a])),
    "clz.b32": ([U32], U32, lambda a: np.array([32 - int(x).bit_length() for x in a])),
    "brev.b32": ([U32], U32, lambda a: np.array([int(f"{int(x):032b}"[::-1], 2) for x in a])),
    "shl.b32": ([U32, U32], U32, lambda a, b: np.where(b > 31, 0, a << (b & U32(31)))),
    "shr.u32": ([U32, U32], U32, lambda a, b: np.where(b > 31, 0, a >> (b & U32(31)))),
    "shr.s32": ([S32, U32], S32, lambda a, b: a >> np.minimum(b, 31).astype(S32)),
    "shr.s64": ([S64, U32], S64, lambda a, b: a >> np.minimum(b, 63).astype(S64)),
    "add.f32": ([F32, F32], F32, lambda a, b: a + b),
    "mul.f32": ([F32, F32], F32, lambda a, b: a * b),
    "div.rn.f32": ([F32, F32], F32, lambda a, b: a / b),
    "fma.rn.f32": ([F32, F32, F32], F32, lambda a, b, c: wide(a) * wide(b) + wide(c)),
    "fma.rm.f32": ([F32, F32, F32], F32, lambda a, b, c: below(wide(a) * wide(b) + wide(c))),
    "max.f32": ([F32, F32], F32, np.fmax),
    "min.f32": ([F32, F32], F32, np.fmin),
    "copysign.f32": ([F32, F32], F32, lambda a, b: np.copysign(b, a)),
    "rcp.rn.f32": ([F32], F32, lambda a: F32(1) / a),
    "sqrt.rn.f32": ([F32], F32, np.sqrt),
    "cvt.rn.f16.f32": ([F32], F16, lambda a: a),
    "cvt.f32.f16": ([F16], F32, lambda a: a),
    "cvt.rn.f32.s32": ([S32], F32, lambda a: a),
    "cvt.rn.f32.u64": ([U64], F32, lambda a: a),
    "cvt.s64.s32": ([S32], S64, lambda a: a),
    "cvt.u64.u32": ([U32], U64, lambda a: a),
    "cvt.u32.u64": ([U64], U32, lambda a: a),
    "cvt.s32.s16": ([S16], S32, lambda a: a),
    "cvt.sat.f32.f32": ([F32], F32, lambda a: np.nan_to_num(np.clip(a, 0, 1), nan=0.0)),
}


def numbers(kind: Any, count: int, rng: np.random.Generator) -> NDArray:
    """Random ones over the whole range, and those at its edges."""
    if kind in (F32, F16):
        edges = np.array([0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan, 65504, 6e-8, 0.5], kind)
        x = (rng.standard_normal(count) * 2.0 ** rng.integers(-12, 12, count)).astype(kind)
    else:
        info = np.iinfo(kind)
        edges = np.array([0, 1, 2, 31, 32, 63, 64, info.max, info.min, info.max - 1], kind)
        x = rng.integers(info.min, info.max, count, kind, endpoint=True)
    return np.concatenate([rng.permutation(edges), x[edges.size :]])


@pytest.mark.parametrize("opcode", ARITHMETIC)
def test_arithmetic(ptx: Ptx, opcode: str) -> None:
    kinds, result, reference = ARITHMETIC[opcode]
    rng = np.random.default_rng(len(opcode))
    inputs = [numbers(kind, 256, rng) for kind in kinds]
    if opcode.startswith(("div", "rem")) and kinds[1] is not F32:
        inputs[1][inputs[1] == 0] = 3
        inputs[1][inputs[1] == -1 if kinds[1] in (S32, S64) else inputs[1] == 0] = 5
    if opcode.startswith("sh"):
        inputs[1] %= 80
    out, body, operands = np.zeros(256, result), "", []
    for n, kind in enumerate([*kinds, result]):
        register = REGISTERS[NAMES[kind]][n]
        body += f"mul.wide.u32 %q0, %x, {np.dtype(kind).itemsize};\nadd.s64 %p{n}, %p{n}, %q0;\n"
        if n < len(kinds):
            body += f"ld.global.{NAMES[kind]} {register}, [%p{n}];\n"
            operands.append(register)
    target = REGISTERS[NAMES[result]][len(kinds)]
    body += f"{opcode} {target}, {', '.join(operands)};\nst.global.{NAMES[result]} [%p{len(kinds)}], {target};"
    assert ptx.run(body, *inputs, out, threads=256) == 0, ptx.error
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(out, np.asarray(reference(*inputs)).astype(result))


@pytest.mark.parametrize("rough", [0, 1])
@pytest.mark.parametrize(
    ("opcode", "reference"),
    [
        ("ex2.approx.f32", np.exp2),
        ("rcp.approx.f32", lambda a: 1 / a),
        ("rsqrt.approx.f32", lambda a: 1 / np.sqrt(a)),
        ("lg2.approx.f32", np.log2),
        ("sin.approx.f32", np.sin),
        ("tanh.approx.f32", np.tanh),
    ],
)
def test_approximate_functions(ptx: Ptx, opcode: str, reference: Callable[[NDArray], NDArray], rough: int) -> None:
    """Correctly rounded; or, under `rough`, off by at most the 2 ulp that the manual allows, and somewhere off."""
    ptx.set(rough=rough)
    x, out = np.random.default_rng(0).uniform(0.1, 3, 256).astype(F32), np.zeros(256, F32)
    body = f"""mul.wide.u32 %q0, %x, 4; add.s64 %p0, %p0, %q0; add.s64 %p1, %p1, %q0;
        ld.global.f32 %f1, [%p0]; {opcode} %f2, %f1; st.global.f32 [%p1], %f2;"""
    assert ptx.run(body, x, out, threads=256) == 0, ptx.error
    exact = reference(x.astype(np.float64)).astype(F32)
    off = np.abs(out.view(S32) - exact.view(S32))
    assert off.max() <= (2 if rough else 0) and (off.max() > 0) == bool(rough)


@pytest.mark.parametrize("how", ["eq", "ne", "lt", "ge", "equ", "neu", "ltu", "geu", "num", "nan"])
def test_comparisons_with_nan(ptx: Ptx, how: str) -> None:
    values = np.array([1.0, 2.0, np.nan, -np.inf], F32)
    a, b = (x.ravel().copy() for x in np.meshgrid(values, values))
    unordered = np.isnan(a) | np.isnan(b)
    ordered = {"eq": a == b, "ne": a != b, "lt": a < b, "ge": a >= b}.get(
        how.removesuffix("u") if how != "neu" else "ne"
    )
    if how in ("num", "nan"):
        expected = unordered == (how == "nan")
    else:
        assert ordered is not None
        expected = np.where(unordered, how.endswith("u"), ordered)
    out = np.zeros(16, U32)
    body = f"""mul.wide.u32 %q0, %x, 4; add.s64 %p0, %p0, %q0; add.s64 %p1, %p1, %q0; add.s64 %p2, %p2, %q0;
        ld.global.f32 %f1, [%p0]; ld.global.f32 %f2, [%p1]; setp.{how}.f32 %t1, %f1, %f2;
        selp.b32 %r1, 1, 0, %t1; st.global.u32 [%p2], %r1;"""
    assert ptx.run(body, a, b, out, threads=16) == 0, ptx.error
    np.testing.assert_array_equal(out, expected)


def test_vectors_packing_and_parameters(ptx: Ptx) -> None:
    x, out = aligned(4 * 32), aligned(4 * 32)
    x[:] = np.arange(128) * 0x01010101
    body = """mul.wide.u32 %q0, %x, 16; add.s64 %p0, %p0, %q0; add.s64 %p1, %p1, %q0;
        ld.global.v4.u32 {%r1, %r2, %r3, %r4}, [%p0];
        mov.b64 %q1, {%r1, %r2}; mov.b64 {%r5, %r6}, %q1;
        mov.b32 {%h1, %h2}, %r3; mov.b32 %r7, {%h2, %h1};
        st.global.v2.u32 [%p1], {%r6, %r5}; st.global.v2.u32 [%p1+8], {%r7, %r4};"""
    assert ptx.run(body, x, out) == 0, ptx.error
    a, b, c, d = x.reshape(32, 4).T
    np.testing.assert_array_equal(out.reshape(32, 4).T, [b, a, c << 16 | c >> 16, d])


# ---- lanes ----


@pytest.mark.parametrize("seed", range(9))
def test_lanes_that_part_and_meet_again(ptx: Ptx, seed: int) -> None:
    """Each lane counts up to its own number in its own way; a ballot in the end has all of them."""
    ptx.lib.hr_host_seed(seed)
    out = np.zeros((64, 2), U32)
    body = """and.b32 %r1, %x, 3; setp.eq.u32 %t1, %r1, 0; mov.u32 %r2, 0; mov.u32 %r3, %x;
        @%t1 bra over;
        again: setp.eq.u32 %t2, %r3, 0; @%t2 bra over;
        { .reg .pred inner; and.b32 %r4, %r3, 1; setp.eq.u32 inner, %r4, 1; @inner add.u32 %r2, %r2, 100;
          @!inner add.u32 %r2, %r2, 1; }
        sub.u32 %r3, %r3, 1; bra.uni again;
        over: setp.gt.u32 %t3, %r2, 500; vote.sync.ballot.b32 %r5, %t3, -1;
        mul.wide.u32 %q0, %x, 8; add.s64 %p0, %p0, %q0; st.global.v2.u32 [%p0], {%r2, %r5};"""
    assert ptx.run(body, out, threads=64) == 0, ptx.error
    x = np.arange(64)
    count = np.where(x % 4 == 0, 0, (x + 1) // 2 * 100 + x // 2)
    np.testing.assert_array_equal(out[:, 0], count)
    votes = ((count > 500).reshape(2, 32) << np.arange(32)).sum(1)
    np.testing.assert_array_equal(out[:, 1], np.repeat(votes, 32))


@pytest.mark.parametrize("segment", [32, 8])
@pytest.mark.parametrize(("way", "by"), [("bfly", 5), ("down", 3), ("up", 2), ("idx", 6)])
def test_shuffles(ptx: Ptx, way: str, by: int, segment: int) -> None:
    """CUDA's __shfl_*_sync with a width: lanes outside of the segment give one's own value."""
    clamp = (32 - segment) << 8 | (0 if way == "up" else 31)
    out = np.zeros((32, 2), U32)
    body = f"""mul.lo.u32 %r1, %x, 7; shfl.sync.{way}.b32 %r2|%t1, %r1, {by}, {clamp}, -1; selp.b32 %r3, 1, 0, %t1;
        mul.wide.u32 %q0, %x, 8; add.s64 %p0, %p0, %q0; st.global.v2.u32 [%p0], {{%r2, %r3}};"""
    assert ptx.run(body, out) == 0, ptx.error
    lane = np.arange(32)
    first = lane // segment * segment
    source = {"bfly": lane ^ by, "down": lane + by, "up": lane - by, "idx": first + by}[way]
    inside = (source >= first) & (source < first + segment)
    np.testing.assert_array_equal(out[:, 0], 7 * np.where(inside, source, lane))
    np.testing.assert_array_equal(out[:, 1], inside)


# ---- tensor cores ----


@pytest.mark.parametrize("trans", ["", ".trans"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix(ptx: Ptx, count: int, trans: str) -> None:
    """PTX ISA, "ldmatrix": thread t holds row t / 4, elements t % 4 * 2 and the next one, of each matrix."""
    matrices, out = aligned(4, 8, 8, dtype=np.uint16), aligned(32, 4)
    matrices[:] = np.arange(256).reshape(4, 8, 8)
    registers = ", ".join(f"%r{n + 4}" for n in range(count))
    body = f"""mul.wide.u32 %q0, %x, 16; add.s64 %q1, %p0, %q0; add.s64 %q2, %p1, %q0;
        mov.u32 %r1, block_memory; mul.lo.u32 %r2, %x, 16; add.u32 %r1, %r1, %r2;
        ld.global.v4.u32 {{%r4, %r5, %r6, %r7}}, [%q1]; st.shared.v4.u32 [%r1], {{%r4, %r5, %r6, %r7}};
        mov.u32 %r4, 0; mov.u32 %r5, 0; mov.u32 %r6, 0; mov.u32 %r7, 0; bar.warp.sync -1;
        ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {{{registers}}}, [%r1];
        st.global.v4.u32 [%q2], {{%r4, %r5, %r6, %r7}};"""
    assert ptx.run(body, matrices, out) == 0, ptx.error
    for thread in range(32):
        for matrix in range(count):
            held = matrices[matrix].T if trans else matrices[matrix]
            low, high = held[thread // 4, thread % 4 * 2 : thread % 4 * 2 + 2].tolist()
            assert out[thread, matrix] == low | high << 16


@pytest.mark.parametrize("depth", [16, 8])
def test_mma_fragments(ptx: Ptx, depth: int) -> None:
    """PTX ISA, "Matrix Fragments for mma.m16n8k16" (and k8): small integers, so sums are exact in any order."""
    rng = np.random.default_rng(depth)
    a, b = rng.integers(-9, 9, (16, depth)).astype(F16), rng.integers(-9, 9, (depth, 8)).astype(F16)
    c = rng.integers(-99, 99, (16, 8)).astype(F32)
    count_a, count_b = depth // 2, depth // 4  # halves that a thread holds
    fa, fb, fc = aligned(32, 8, dtype=F16), aligned(32, 8, dtype=F16), aligned(32, 4, dtype=F32)
    for thread in range(32):
        group, place = thread >> 2, thread % 4
        for i in range(count_a):
            upper = i < 2 or 4 <= i < 6 if depth == 16 else i < 2
            column = place * 2 + (i & 1) + (8 if i >= 4 else 0)
            fa[thread, i] = a[group if upper else group + 8, column]
        for i in range(count_b):
            fb[thread, i] = b[place * 2 + (i & 1) + (8 if i >= 2 else 0), group]
        for i in range(4):
            fc[thread, i] = c[group if i < 2 else group + 8, place * 2 + (i & 1)]
    registers_a = ", ".join(f"%r{n + 1}" for n in range(depth // 4))
    registers_b = ", ".join(f"%r{n + 5}" for n in range(depth // 8))
    body = f"""mul.wide.u32 %q0, %x, 16; add.s64 %p0, %p0, %q0; add.s64 %p1, %p1, %q0; add.s64 %p2, %p2, %q0;
        ld.global.v4.u32 {{%r1, %r2, %r3, %r4}}, [%p0]; ld.global.v2.u32 {{%r5, %r6}}, [%p1];
        ld.global.v4.f32 {{%f1, %f2, %f3, %f4}}, [%p2];
        mma.sync.aligned.m16n8k{depth}.row.col.f32.f16.f16.f32 {{%f1, %f2, %f3, %f4}}, {{{registers_a}}},
            {{{registers_b}}}, {{%f1, %f2, %f3, %f4}};
        st.global.v4.f32 [%p2], {{%f1, %f2, %f3, %f4}};"""
    assert ptx.run(body, fa, fb, fc) == 0, ptx.error
    wanted = a.astype(F32) @ b.astype(F32) + c
    for thread in range(32):
        for i in range(4):
            assert fc[thread, i] == wanted[(thread >> 2) + (0 if i < 2 else 8), thread % 4 * 2 + (i & 1)]


def test_rough_tensor_cores_truncate(ptx: Ptx) -> None:
    """1 + 16 times 2^-24 is 1 + 2^-20; a sum that cuts each term to 24 bits below the largest loses all of them."""
    fa, fb, fc = aligned(32, 8, dtype=F16), aligned(32, 8, dtype=F16), aligned(32, 4, dtype=F32)
    body = """mul.wide.u32 %q0, %x, 16; add.s64 %p0, %p0, %q0; add.s64 %p1, %p1, %q0; add.s64 %p2, %p2, %q0;
        ld.global.v4.u32 {%r1, %r2, %r3, %r4}, [%p0]; ld.global.v2.u32 {%r5, %r6}, [%p1];
        ld.global.v4.f32 {%f1, %f2, %f3, %f4}, [%p2];
        mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%f1, %f2, %f3, %f4}, {%r1, %r2, %r3, %r4}, {%r5, %r6},
            {%f1, %f2, %f3, %f4};
        st.global.v4.f32 [%p2], {%f1, %f2, %f3, %f4};"""
    for rough, wanted in ((0, 1 + 2**-20), (1, 1.0)):
        ptx.set(rough=rough)
        fa[:], fb[:], fc[:] = 2.0**-12, 2.0**-13, 1.0  # products of 2^-25: half of the last of 24 bits
        if not rough:
            fb[:] = 2.0**-12
        assert ptx.run(body, fa, fb, fc) == 0, ptx.error
        assert (fc == F32(wanted)).all()


# ---- asynchronous copies ----

TO_SHARED = """mov.u32 %r1, block_memory; mul.lo.u32 %r2, %x, 32; add.u32 %r1, %r1, %r2;
    mul.wide.u32 %q0, %x, 32; add.s64 %q1, %p0, %q0; add.s64 %q2, %q1, 16; add.u32 %r3, %r1, 16;"""
TWO_GROUPS = f"""{TO_SHARED}
    cp.async.cg.shared.global [%r1], [%q1], 16; cp.async.commit_group;
    cp.async.cg.shared.global [%r3], [%q2], 16, 4; cp.async.commit_group;
    cp.async.wait_group WAIT;
    add.s64 %p1, %p1, %q0;
    ld.shared.v4.u32 {{%r4, %r5, %r6, %r7}}, [%r1]; st.global.v4.u32 [%p1], {{%r4, %r5, %r6, %r7}};
    ld.shared.v4.u32 {{%r4, %r5, %r6, %r7}}, [%r3]; st.global.v4.u32 [%p1+16], {{%r4, %r5, %r6, %r7}};"""
AT_THE_WAIT, AT_ONCE = 0, 1


@pytest.mark.parametrize(("wait", "arrived"), [(0, 2), (1, 1), (2, 0)])
def test_cp_async_groups_arrive_as_late_as_allowed(ptx: Ptx, wait: int, arrived: int) -> None:
    """The first group brings 16 bytes, the second 4 and zeros; what has not come reads as all ones."""
    x, out = aligned(32, 8), aligned(32, 8)
    x[:] = np.arange(1, 257).reshape(32, 8)
    whole = np.concatenate([x[:, :5], np.zeros((32, 3), U32)], 1)
    for copies, count in ((AT_THE_WAIT, arrived), (AT_ONCE, 2)):
        ptx.set(copies=copies)
        assert ptx.run(TWO_GROUPS.replace("WAIT", str(wait)), x, out) == 0, ptx.error
        np.testing.assert_array_equal(out[:, : 4 * count], whole[:, : 4 * count])
        assert (out[:, 4 * count :] == ALL).all()


BULK = """mov.u32 %r1, block_memory; add.u32 %r2, %r1, 512; setp.eq.u32 %t1, %x, 0; mov.u32 %r9, 0;
    @%t1 mbarrier.init.shared::cta.b64 [%r2], 1;
    @%t1 fence.mbarrier_init.release.cluster;
    bar.sync 0;
    again:
    @%t1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r2], 256;
    @%t1 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r1], [%p0], 256, [%r2];
    and.b32 %r8, %r9, 1;
    wait: mbarrier.try_wait.parity.shared::cta.b64 %t2, [%r2], %r8; @!%t2 bra wait;
    mul.lo.u32 %r3, %x, 4; add.u32 %r3, %r1, %r3; ld.shared.u32 %r4, [%r3];
    mul.wide.u32 %q0, %x, 4; add.s64 %q1, %p1, %q0; st.global.u32 [%q1], %r4;
    bar.sync 0;
    add.s64 %p0, %p0, 256; add.s64 %p1, %p1, 256; add.u32 %r9, %r9, 1;
    setp.lt.u32 %t3, %r9, 3; @%t3 bra again;"""


@pytest.mark.parametrize("seed", range(9))
def test_bulk_copies_by_phases_of_an_mbarrier(ptx: Ptx, seed: int) -> None:
    ptx.lib.hr_host_seed(seed)
    x, out = aligned(3, 64), aligned(3, 64)
    x[:] = np.arange(192).reshape(3, 64)
    assert ptx.run(BULK, x, out, threads=64) == 0, ptx.error
    np.testing.assert_array_equal(out, x)


# ---- between blocks and launches ----

HANDSHAKE = """mov.u32 %r1, %ctaid.x; setp.ne.u32 %t1, %r1, 0; mov.u32 %r9, 0; @%t1 bra reader;
    st.global.u32 [%p0], 7; red.RELEASE.gpu.global.add.u32 [%p1], 1;
    stays: ld.acquire.gpu.global.u32 %r2, [%p2+64]; setp.eq.u32 %t2, %r2, 0; @%t2 bra stays; bra.uni over;
    reader: ld.global.u32 %r9, [%p0];
    again: ld.ACQUIRE.gpu.global.u32 %r2, [%p1]; setp.eq.u32 %t2, %r2, 0; @%t2 bra again;
    ld.global.u32 %r3, [%p0]; st.global.u32 [%p2], %r3;
    red.release.gpu.global.add.u32 [%p2+64], 1;
    over:"""


@pytest.mark.parametrize(
    ("release", "acquire", "right"),
    [("release", "acquire", True), ("relaxed", "acquire", False), ("release", "relaxed", False)],
)
def test_release_and_acquire_are_needed(ptx: Ptx, release: str, acquire: str, right: bool) -> None:
    """The reader has seen the old value; only both together make it see the new one under every schedule."""
    body = HANDSHAKE.replace("RELEASE", release).replace("ACQUIRE", acquire)
    kernel, results = ptx.kernel(body, 3), set()
    for seed in range(27):
        ptx.set(always_weak=1)
        ptx.lib.hr_host_seed(seed)
        data, flag, out = aligned(32), aligned(32), aligned(32)
        assert ptx.launch(kernel, data, flag, out, threads=1, blocks=2, cooperative=True) == 0
        assert ptx.lib.hr_ptx_finish() == 0, ptx.error
        results.add(int(out[0]))
    assert results == {7} if right else 0 in results


def test_a_block_sees_its_own_stores_and_atomics_in_order(ptx: Ptx) -> None:
    """Under weak memory too: one address is read, written, added to and read again."""
    body = """ld.global.u32 %r1, [%p0]; st.global.u32 [%p0], 5; ld.global.u32 %r2, [%p0];
        red.relaxed.gpu.global.add.u32 [%p0], 3; ld.global.u32 %r3, [%p0]; atom.global.max.u32 %r4, [%p0], 9;
        st.global.v4.u32 [%p1], {%r1, %r2, %r3, %r4};"""
    ptx.set(always_weak=1)
    for seed in range(9):
        ptx.lib.hr_host_seed(seed)
        data, out = aligned(32), aligned(4)
        assert ptx.run(body, data, out, threads=1) == 0, ptx.error
        assert (out.tolist(), int(data[0])) == ([0, 5, 8, 8], 9)


@pytest.mark.parametrize("waits", [True, False])
def test_a_dependent_launch_must_wait(ptx: Ptx, waits: bool) -> None:
    slow = "mov.u32 %r1, 0; again: add.u32 %r1, %r1, 1; setp.lt.u32 %t1, %r1, 200; @%t1 bra again;"
    first = ptx.kernel(f"griddepcontrol.launch_dependents; {slow} st.global.u32 [%p0], 7;", 1)
    body = "ld.global.u32 %r1, [%p0]; st.global.u32 [%p1], %r1;"
    second = ptx.kernel(("griddepcontrol.wait;" if waits else "") + body, 2)
    results = set()
    for seed in range(27):
        ptx.lib.hr_host_seed(seed)
        data, out = aligned(32), aligned(32)
        assert ptx.launch(first, data) == ptx.launch(second, data, out, dependent=True) == 0
        assert ptx.lib.hr_ptx_finish() == 0, ptx.error
        results.add(int(out[0]))
    assert results == {7} if waits else results == {0, 7}


# ---- faults ----

PLACE = "mov.u32 %r1, block_memory; mul.lo.u32 %r2, %x, 4; add.u32 %r1, %r1, %r2;"
INIT = (
    "mov.u32 %r1, block_memory; setp.eq.u32 %t1, %x, 0; @%t1 mbarrier.init.shared::cta.b64 [%r1], 1; FENCE bar.sync 0;"
)
FENCED = INIT.replace("FENCE", "fence.mbarrier_init.release.cluster;")
BULK_COPY = "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"
FAULTS = {
    "read_after_write": (f"{PLACE} st.shared.u32 [%r1], %x; ld.shared.u32 %r3, [block_memory];", r"race: read at 0"),
    "write_after_read": (
        f"{PLACE} ld.shared.u32 %r3, [%r1]; st.shared.u32 [block_memory+4], %r3;", r"race: write at 4 after the read"
    ),
    "read_after_atomic": (
        "mov.u32 %r1, block_memory; atom.shared.add.u32 %r2, [%r1], 1; ld.shared.u32 %r3, [%r1];",
        r"race: read at 0 after the write of several threads",
    ),
    "beyond_shared_memory": ("ld.shared.u32 %r3, [block_memory+1024];", r"out of bounds: 4 bytes at 1024 of 1024"),
    "before_shared_memory": (
        "mov.u32 %r1, block_memory; sub.u32 %r1, %r1, 4; ld.shared.u32 %r3, [%r1];", r"out of bounds: 4 bytes at -4"
    ),
    "beyond_a_tensor": ("ld.global.u32 %r3, [%p0+256];", r"out of bounds: 4 bytes at 256 of a tensor's 256"),
    "no_memory_at_all": ("mov.u64 %q1, 8; ld.global.u32 %r3, [%q1];", r"out of bounds: no global memory is at 8"),
    "misaligned_global": ("ld.global.v4.u32 {%r3, %r4, %r5, %r6}, [%p0+8];", r"misaligned: a global address .* of 16"),
    "misaligned_shared": ("ld.shared.u64 %q3, [block_memory+4];", r"misaligned: 4 in shared memory .* of 8"),
    "misaligned_cp_async": (
        "add.s64 %q1, %p0, 4; cp.async.cg.shared.global [block_memory], [%q1], 16;", r"misaligned: a global address"
    ),
    "mbarrier_not_initialised": (
        "mbarrier.try_wait.parity.shared::cta.b64 %t1, [block_memory], 0;", r"no mbarrier was initialised there"
    ),
    "no_fence_for_the_async_proxy": (
        INIT.replace("FENCE", "") + f"add.u32 %r2, %r1, 128; @%t1 {BULK_COPY} [%r2], [%p0], 64, [%r1];",
        r"no fence between the mbarrier's init and the asynchronous proxy",
    ),
    "bulk_copy_of_20_bytes": (
        f"{FENCED} add.u32 %r2, %r1, 128; @%t1 {BULK_COPY} [%r2], [%p0], 20, [%r1];", r"a bulk copy of 20 bytes"
    ),
    "bulk_copy_not_awaited": (
        f"{FENCED} add.u32 %r2, %r1, 128; @%t1 {BULK_COPY} [%r2], [%p0], 64, [%r1]; ld.shared.u32 %r3, [%r2];",
        r"race: read at 128 after a bulk copy that this lane has not waited for",
    ),
    "ends_before_its_bulk_copy": (
        f"{FENCED} add.u32 %r2, %r1, 128; @%t1 {BULK_COPY} [%r2], [%p0], 64, [%r1];", r"ends with 1 bulk copies"
    ),
    "too_many_arrivals": (
        f"{FENCED} mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r1], 16;", r"more arrivals than the mbarrier expects"
    ),
    "never_complete": (
        f"{FENCED} again: mbarrier.try_wait.parity.shared::cta.b64 %t2, [%r1], 0; @!%t2 bra again;", r"livelock"
    ),
    "barriers_of_two_kinds": (
        "setp.lt.u32 %t1, %x, 16; @%t1 bra one; bar.warp.sync -1; bra.uni over; one: bar.sync 0; over:",
        r"deadlock\n  lanes ffff0000 wait for their warp: k, PTX line \d+",
    ),
    "shuffle_from_a_lane_elsewhere": (
        "setp.eq.u32 %t1, %x, 7; @%t1 bra over; shfl.sync.bfly.b32 %r3, %x, 1, 31, 0xffffff7f; over:",
        r"a shuffle from lane 7, which takes no part",
    ),
    "a_lane_that_its_mask_leaves_out": ("bar.warp.sync 1;", r"divergence: a lane that its own mask does not name"),
    "half_a_warp_multiplies": (
        "setp.lt.u32 %t1, %x, 16; @%t1 bra over; ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r3}, [block_memory]; ret;"
        " over: bar.warp.sync 0xffff; ret;",
        r"divergence: an operation of the whole warp|deadlock",
    ),
    "read_only_memory_written": (
        "st.global.u32 [%p0], 1; ld.global.nc.u32 %r3, [%p0];", r"ld\.global\.nc of what was written in this launch"
    ),
    "spins_in_vain": (
        "again: ld.global.u32 %r3, [%p0]; setp.eq.u32 %t1, %r3, 0; @%t1 bra again;", r"the budget of instructions"
    ),
}  # fmt: skip


@pytest.mark.parametrize("seed", [0, 1, 5])
@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_reported(ptx: Ptx, name: str, seed: int) -> None:
    body, words = FAULTS[name]
    ptx.lib.hr_host_seed(seed)
    ptx.set(copies=AT_THE_WAIT)
    memory = aligned(64)
    assert ptx.run(body, memory) == FAULT
    assert re.search(words, ptx.error), ptx.error
    assert ptx.run("", memory) == FAULT  # refused until the next seed
    ptx.lib.hr_host_seed(seed)
    assert ptx.run("", memory) == 0, ptx.error


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("madeup.s32 %r1, %r2, %r3;", r"unknown instruction madeup\.s32 -- k, PTX line \d+: madeup\.s32 %r1, %r2, %r3"),
        ("add.s32 %r1, %r2, %q1;", r"the width of %q1"),
        ("add.s32 %r1, %r2;", r"3 operands were expected"),
        ("mov.u32 %r1, %nothing;", r"unknown operand %nothing"),
        ("bra nowhere;", r"no label nowhere"),
        (".local .b8 deep[4];", r"unknown directive"),
    ],
)
def test_what_it_does_not_know_it_names_with_the_line(ptx: Ptx, line: str, words: str) -> None:
    kernel = ptx.kernel(line, 0)
    assert ptx.launch(kernel) == FAULT
    assert re.search(words, ptx.error), ptx.error
    assert line.split()[0].strip(";") in ptx.lib.hr_ptx_unknown().decode()


def test_a_clock_goes_up_with_each_look(ptx: Ptx) -> None:
    out = np.zeros((2, 32), np.uint64)
    body = """mov.u64 %q1, %globaltimer;
    mov.u64 %q2, %globaltimer;
    mul.wide.u32 %q3, %x, 8;
    add.s64 %q3, %q3, %p0;
    st.global.u64 [%q3], %q1;
    st.global.u64 [%q3+256], %q2;"""
    assert ptx.run(body, out) == 0, ptx.error
    assert (out[1] > out[0]).all() and (out[0] == out[0, 0]).all()


def test_barriers_order_shared_memory(ptx: Ptx) -> None:
    """The races of FAULTS are none with a barrier between; and without `races`, nobody looks."""
    write, read = f"{PLACE} st.shared.u32 [%r1], %x;", "ld.shared.u32 %r3, [block_memory];"
    assert ptx.run(f"{write} bar.sync 0; {read}", threads=64) == 0, ptx.error
    assert ptx.run(f"{write} bar.warp.sync -1; {read}", threads=32) == 0, ptx.error
    assert ptx.run(f"{write} bar.warp.sync -1; {read}", threads=64) == FAULT
    ptx.lib.hr_host_seed(0)
    atomics = "mov.u32 %r1, block_memory; atom.shared.exch.b32 %r2, [%r1], 0; atom.shared.add.u32 %r2, [%r1], 1;"
    assert ptx.run(f"{atomics} bar.sync 0; {read}", threads=64) == 0, ptx.error
    ptx.set(races=0)
    assert ptx.run(f"{write} {read}", threads=64) == 0, ptx.error
