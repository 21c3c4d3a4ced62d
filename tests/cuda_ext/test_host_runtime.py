"""The host runtime: every primitive gives what the hardware gives, and every kind of fault is found.

The kernels are in shims/host_runtime.cpp; references are numpy's. With --ptx the same holds of device_gpu.h's inline
PTX on the interpreter, but for tests of the runtime itself, which are marked `host_runtime`.
"""

import ctypes
import re
import select
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from cuda_ext.host_build import CSRC, HostBuildError, host_library, run_sanitized

SHIM = Path(__file__).parent / "shims" / "host_runtime.cpp"
STRAY_SHIM = SHIM.with_name("stray.cpp")
FAULT, BAD_CONFIGURATION = 719, 9
Seeds = Callable[[ctypes.CDLL], Iterator[int]]


@pytest.fixture(scope="module")
def lib() -> ctypes.CDLL:
    return host_library([SHIM])


@pytest.fixture(autouse=True)
def _first_seed(lib: ctypes.CDLL) -> None:
    lib.hr_host_seed(0)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def at(array: NDArray) -> ctypes.c_void_p:
    """The array's data as a pointer argument; asked of torch, which --ptx hears (ptx_backend.py)."""
    return ctypes.c_void_p(torch.from_numpy(array).data_ptr())


def floats(*shape: int) -> NDArray[np.float32]:
    return np.full(shape, np.nan, np.float32)


def failing_seeds(lib: ctypes.CDLL, run: Callable[[], bool], seeds: range = range(18)) -> list[int]:
    """The seeds under which `run` does not give what it should."""
    failed = []
    for seed in seeds:
        lib.hr_host_seed(seed)
        if not run():
            failed.append(seed)
    return failed


# ---- numbers ----


def test_half_rounds_to_nearest_even(lib: ctypes.CDLL) -> None:
    """Every half, all midpoints between neighbours and just beside them, overflow, subnormals, infinities."""
    every = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    middle = (every[1:] + every[:-1]) / 2
    x = np.concatenate([every, middle, np.nextafter(middle, 0), np.nextafter(middle, np.inf)]).astype(np.float32)
    x = np.concatenate([x, -x, np.array([65519.99, 65520, 1e9, np.inf, -np.inf, 1e-8, 0], np.float32)])
    out = np.zeros(x.size, np.float16)
    assert lib.hr_test_halves(at(x), at(out), x.size) == 0
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(out.view(np.uint16), x.astype(np.float16).view(np.uint16))


def test_packing(lib: ctypes.CDLL, rng: np.random.Generator) -> None:
    x, bits, back = rng.standard_normal(64).astype(np.float32), np.zeros(32, np.uint32), floats(64)
    assert lib.hr_test_packed(at(x), at(bits), at(back)) == 0
    np.testing.assert_array_equal(bits.view(np.float16), x.astype(np.float16))
    np.testing.assert_array_equal(back, x.astype(np.float16).astype(np.float32))


# ---- warps and blocks ----

LANES = np.arange(32)
SHUFFLES = {
    "xor": (0, 5, LANES ^ 5),
    "down": (1, 3, np.where(LANES + 3 < 32, LANES + 3, LANES)),
    "up": (2, 7, np.where(LANES - 7 >= 0, LANES - 7, LANES)),
    "from": (3, 40, np.full(32, 8)),  # the lane counts modulo 32
}


@pytest.mark.parametrize("name", SHUFFLES)
def test_shuffles(lib: ctypes.CDLL, rng: np.random.Generator, each_seed: Seeds, name: str) -> None:
    what, argument, lanes = SHUFFLES[name]
    x = rng.standard_normal(64).astype(np.float32)
    for _ in each_seed(lib):
        out = floats(64)
        assert lib.hr_test_shuffle(at(x), at(out), what, argument) == 0
        np.testing.assert_array_equal(out.reshape(2, 32), x.reshape(2, 32)[:, lanes])


def test_ballot_sum_and_maximum(lib: ctypes.CDLL, rng: np.random.Generator) -> None:
    x, out = rng.standard_normal(64).astype(np.float32), floats(64)
    assert lib.hr_test_shuffle(at(x), at(out), 4, 0) == 0
    votes = ((x.reshape(2, 32) > 0) << LANES).sum(axis=1).astype(np.uint32)
    np.testing.assert_array_equal(out.view(np.uint32).reshape(2, 32), np.repeat(votes[:, None], 32, axis=1))
    assert lib.hr_test_shuffle(at(x), at(out), 5, 0) == 0
    np.testing.assert_allclose(out.reshape(2, 32), np.repeat(x.reshape(2, 32).sum(1)[:, None], 32, 1), rtol=1e-5)
    assert lib.hr_test_shuffle(at(x), at(out), 6, 0) == 0
    np.testing.assert_array_equal(out.reshape(2, 32), np.repeat(x.reshape(2, 32).max(1)[:, None], 32, 1))


@pytest.mark.parametrize(("blocks", "threads", "n"), [(1, 32, 7), (3, 64, 131), (2, 1024, 1500)])
def test_block_sum(
    lib: ctypes.CDLL, rng: np.random.Generator, each_seed: Seeds, blocks: int, threads: int, n: int
) -> None:
    x = rng.standard_normal((blocks, n)).astype(np.float32)
    for _ in each_seed(lib):
        out = floats(blocks)
        assert lib.hr_test_sums(at(x), at(out), blocks, threads, n) == 0
        np.testing.assert_allclose(out, x.sum(1), rtol=1e-5, atol=1e-5)


def test_indices_of_blocks_and_threads(lib: ctypes.CDLL) -> None:
    out = np.full((4, 3, 2, 3, 2, 5), -1, np.int32)
    assert lib.hr_test_indices(at(out)) == 0
    bz, by, bx, tz, ty, tx = np.indices(out.shape)
    np.testing.assert_array_equal(out, ((((bx * 8 + by) * 8 + bz) * 8 + tx) * 8 + ty) * 8 + tz)


def test_shared_memory_is_new_and_poisoned_in_every_block(lib: ctypes.CDLL) -> None:
    out = np.zeros(32, np.uint32)
    assert lib.hr_test_poison(at(out)) == 0
    assert (out == 0xFFFFFFFF).all()


@pytest.mark.parametrize("cooperative", [0, 1])
def test_atomics(lib: ctypes.CDLL, each_seed: Seeds, cooperative: int) -> None:
    for _ in each_seed(lib):
        total, tickets, seen = np.zeros(1, np.float32), np.zeros(1, np.uint32), np.zeros(128, np.uint32)
        assert lib.hr_test_count(at(total), at(tickets), at(seen), cooperative) == 0
        assert (total[0], tickets[0]) == (128, 128)
        np.testing.assert_array_equal(np.sort(seen), np.arange(128))


@pytest.mark.host_runtime
def test_every_seed_has_its_own_order(lib: ctypes.CDLL, each_seed: Seeds) -> None:
    orders = set()
    for _ in each_seed(lib):
        total, tickets, seen = np.zeros(1, np.float32), np.zeros(1, np.uint32), np.zeros(128, np.uint32)
        lib.hr_test_count(at(total), at(tickets), at(seen), 1)
        orders.add(seen.tobytes())
    assert len(orders) == 9


def test_a_sum_without_an_atomic_loses_some(lib: ctypes.CDLL) -> None:
    def whole() -> bool:
        total = np.zeros(1, np.float32)
        assert lib.hr_test_lost_count(at(total)) == 0
        return bool(total[0] == 128)

    assert failing_seeds(lib, whole)


@pytest.mark.host_runtime
def test_a_seed_repeats_its_schedule(lib: ctypes.CDLL) -> None:
    orders = []
    for _ in range(2):
        lib.hr_host_seed(5)
        for _ in range(3):
            total, tickets, seen = np.zeros(1, np.float32), np.zeros(1, np.uint32), np.zeros(128, np.uint32)
            lib.hr_test_count(at(total), at(tickets), at(seen), 1)
            orders.append(seen.tobytes())
    assert orders[:3] == orders[3:]
    assert len(set(orders)) == 3


@pytest.mark.parametrize(("barrier", "safe"), [(0, False), (1, True), (2, True)])
def test_a_missing_barrier_shows(lib: ctypes.CDLL, barrier: int, safe: bool) -> None:
    """0: none; 1: of the warp, where neighbours exchange; 2: of the block, where warps do."""

    def right() -> bool:
        out = floats(64)
        return lib.hr_test_racy(at(out), barrier) == 0 and bool((out == 1).all())

    failed = failing_seeds(lib, right)
    assert (len(failed) == 0) if safe else (len(failed) == 18)


@pytest.mark.host_runtime
def test_deep_stacks_in_a_full_block(lib: ctypes.CDLL, each_seed: Seeds) -> None:
    x = np.zeros(32, np.float32)
    for _ in each_seed(lib):
        out = floats(1024)
        assert lib.hr_test_recurse(at(x), at(out)) == 0
        assert (out == sum(range(21))).all()


# ---- tensor cores ----


@pytest.mark.parametrize("trans", [0, 1])
def test_mma_of_matrices_by_ldmatrix(lib: ctypes.CDLL, rng: np.random.Generator, each_seed: Seeds, trans: int) -> None:
    """Small integers: FP32 sums of their products are exact in any order."""
    a = rng.integers(-8, 9, (16, 16)).astype(np.float16)
    b = rng.integers(-8, 9, (8, 16)).astype(np.float16)  # as the columns of B
    c = rng.integers(-99, 99, (16, 8)).astype(np.float32)
    given = np.ascontiguousarray(b.T) if trans else b
    for _ in each_seed(lib):
        out = floats(16, 8)
        assert lib.hr_test_tile(at(a), at(given), at(c), at(out), trans) == 0
        np.testing.assert_array_equal(out, a.astype(np.float32) @ b.T.astype(np.float32) + c)


def test_mma_sums_in_fp32(lib: ctypes.CDLL, rng: np.random.Generator) -> None:
    a, b = rng.standard_normal((16, 16)).astype(np.float16), rng.standard_normal((8, 16)).astype(np.float16)
    c, out = np.zeros((16, 8), np.float32), floats(16, 8)
    assert lib.hr_test_tile(at(a), at(b), at(c), at(out), 0) == 0
    np.testing.assert_allclose(out, a.astype(np.float64) @ b.T.astype(np.float64), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("trans", [0, 1])
def test_ldmatrix(lib: ctypes.CDLL, trans: int) -> None:
    """PTX ISA, "ldmatrix": lane i holds row i / 4 of each matrix, columns i % 4 * 2 and the next one."""
    m = np.arange(256, dtype=np.uint16).reshape(4, 8, 8)
    out = np.zeros((32, 4), np.uint32)
    assert lib.hr_test_matrices(at(m), at(out), trans) == 0
    held = m.transpose(0, 2, 1) if trans else m
    np.testing.assert_array_equal(
        out.view(np.uint16).reshape(8, 4, 4, 2), held.reshape(4, 8, 4, 2).transpose(1, 2, 0, 3)
    )


# ---- copies that arrive later ----


def pipelined(lib: ctypes.CDLL, fault: int, n: int = 5 * 256 - 12) -> bool:
    """Five rows of 256 floats through two stages; what is beyond n, a multiple of 4, must read as 0."""
    x = np.arange(1, n + 1, dtype=np.float32)  # no memory beyond n
    x = x if x.ctypes.data % 16 == 0 else aligned(x)
    out = floats(5 * 256)
    code = lib.hr_test_pipeline(at(x), at(out), 5, n, fault)
    return bool(code == 0 and np.array_equal(out, np.concatenate([x, np.zeros(5 * 256 - n, np.float32)])))


def aligned(x: NDArray) -> NDArray:
    room = np.empty(x.size + 4, x.dtype)
    start = (-room.ctypes.data % 16) // x.itemsize
    room[start : start + x.size] = x
    return room[start : start + x.size]


def test_cp_async(lib: ctypes.CDLL) -> None:
    assert failing_seeds(lib, lambda: pipelined(lib, 0), range(27)) == []


@pytest.mark.parametrize("fault", [1, 2, 3, 4], ids=["waits_too_little", "no_barrier", "no_commit", "overtaken"])
def test_cp_async_used_wrongly_shows(lib: ctypes.CDLL, fault: int, ptx_architecture: str | None) -> None:
    if ptx_architecture == "75" and fault in (1, 3):
        pytest.skip("without cp.async there is nothing to wait for or commit")
    assert failing_seeds(lib, lambda: pipelined(lib, fault))


@pytest.fixture
def bulk_copies(ptx_architecture: str | None) -> None:
    if ptx_architecture is not None and not ptx_architecture.startswith("9"):
        pytest.skip(f"sm_{ptx_architecture} has no bulk copies")


def bulk_copied(lib: ctypes.CDLL, fault: int) -> bool:
    x = aligned(np.arange(7 * 64, dtype=np.float32))
    out = floats(7 * 64)
    return bool(lib.hr_test_bulk(at(x), at(out), 7, fault) == 0 and np.array_equal(out, x))


def test_bulk_copy(lib: ctypes.CDLL, bulk_copies: None) -> None:
    assert failing_seeds(lib, lambda: bulk_copied(lib, 0), range(27)) == []


@pytest.mark.parametrize("fault", [1, 2], ids=["no_wait", "wrong_phase"])
def test_bulk_copy_used_wrongly_shows(lib: ctypes.CDLL, bulk_copies: None, fault: int) -> None:
    assert failing_seeds(lib, lambda: bulk_copied(lib, fault))


# ---- grids ----


def summed(lib: ctypes.CDLL, fault: int) -> bool:
    values, counter = np.zeros((6, 4), np.float32), np.zeros(1, np.uint32)
    values[0] = expected = np.arange(4, dtype=np.float32)
    code = lib.hr_test_rounds(at(values), at(counter), 5, fault)
    for _ in range(5):
        expected = expected.sum() + np.arange(4, dtype=np.float32)
    return bool(code == 0 and counter[0] == 20 and np.array_equal(values[5], expected))


def test_grid_barrier(lib: ctypes.CDLL) -> None:
    assert failing_seeds(lib, lambda: summed(lib, 0), range(27)) == []


def test_a_missing_grid_barrier_shows(lib: ctypes.CDLL) -> None:
    assert failing_seeds(lib, lambda: summed(lib, 1)) == list(range(18))


@pytest.mark.host_runtime
def test_a_wrong_round_is_reported(lib: ctypes.CDLL) -> None:
    assert not summed(lib, 2)
    assert b"the counter is 0 as round 2 of 4 blocks begins" in lib.hr_host_error()


def test_blocks_may_spin_for_one_another(lib: ctypes.CDLL, each_seed: Seeds) -> None:
    for _ in each_seed(lib):
        flag, out = np.zeros(1, np.float32), floats(256)
        assert lib.hr_test_flagged(at(flag), at(out)) == 0
        assert (out == 7).all()


# ---- faults that are reported ----

REPORTS = {
    "some_return_before_a_barrier": (0, r"sync_block"),
    "barriers_of_two_kinds": (1, r"deadlock: block \(0, 0, 0\): 32 in sync_block \(thread 0\), 32 in sync_warp"),
    "a_lane_misses_a_shuffle": (2, r"warp_xor"),
    "two_operations_in_one_warp": (3, r"divergence: warp_(xor|down), while other lanes of the warp wait in warp_"),
    "misaligned_load": (4, r"load16: the address 0x\w+ is not 16-byte aligned"),
    "misaligned_store": (5, r"store16: the address"),
    "misaligned_cp_async": (6, r"cp_async16: the address"),
    "cp_async_beyond_shared_memory": (7, r"cp_async16: 16 bytes at offset 4096 are not within the 4096 bytes"),
    "ldmatrix_beyond_shared_memory": (8, r"ldmatrix_x4: 16 bytes at offset"),
    "written_beyond_shared_memory": (9, r"wrote \d+ bytes past the end of its 4096 bytes of shared memory"),
    "grid_barrier_without_cooperation": (10, r"grid_barrier in a launch that is not cooperative"),
    "barrier_not_initialised": (11, r"mbarrier_wait: the barrier was not initialised"),
    "barrier_never_complete": (12, r"deadlock: block \(0, 0, 0\): 64 in mbarrier_wait"),
    "too_many_arrivals": (13, r"mbarrier_expect_and_arrive: all its arrivals have come already"),
    "bulk_copy_of_20_bytes": (14, r"bulk_copy of 20 bytes, which is no multiple of 16"),
    "a_lane_returned_before_a_vote": (15, r"warp_ballot"),
    "written_before_shared_memory": (16, r"\d bytes before its shared memory were overwritten"),
    "spins_in_vain": (18, r"livelock: \d+ steps since the last barrier"),
    "bulk_copy_never_awaited": (17, r"the block ended with 1 bulk copies on their way"),
}


# The interpreter's words for the same, and why it has none for the rest.
IN_PTX = {
    "barriers_of_two_kinds": r"deadlock\n  lanes aaaaaaaa wait for their warp: broken, .*\n  lanes 55555555 wait",
    "a_lane_misses_a_shuffle": r"a shuffle from lane 7, which takes no part",
    "two_operations_in_one_warp": r"deadlock\n  lanes aaaaaaaa wait for their warp: broken, .*shfl\.sync\.down",
    "misaligned_store": r"misaligned: 8 in shared memory is no multiple of 16.*device_gpu\.h",
    "misaligned_cp_async": r"misaligned: 4 in shared memory is no multiple of 16",
    "cp_async_beyond_shared_memory": r"out of bounds: 16 bytes at 4096 of 4096 bytes of shared memory",
    "ldmatrix_beyond_shared_memory": r"out of bounds: 16 bytes at 4\d+ of 4096 bytes of shared memory",
    "written_beyond_shared_memory": r"out of bounds: 4 bytes at 4\d+ of 4096 bytes of shared memory",
    "barrier_not_initialised": r"no mbarrier was initialised there",
    "barrier_never_complete": r"livelock: nothing moves",
    "too_many_arrivals": r"more arrivals than the mbarrier expects",
    "bulk_copy_of_20_bytes": r"a bulk copy of 20 bytes, not in units of 16",
    "written_before_shared_memory": r"out of bounds: 4 bytes at -4 of 4096 bytes of shared memory",
    "bulk_copy_never_awaited": r"a block ends with 1 bulk copies on their way",
}
NOT_IN_PTX = {
    "some_return_before_a_barrier": "a barrier goes on without threads that have ended, as on a GPU",
    "misaligned_load": "nvcc removes a load whose value nobody uses",
    "grid_barrier_without_cooperation": "its PTX is that of any other counter",
    "spins_in_vain": "takes its whole budget of instructions; test_ptx.py has it with a small one",
    "a_lane_returned_before_a_vote": "a vote goes on without lanes that have ended, as on a GPU; it is a remark",
}
NEEDS_BULK_COPY = ("barrier_", "too_many", "bulk_copy")


@pytest.mark.parametrize("name", REPORTS)
def test_faults_are_reported(lib: ctypes.CDLL, name: str, ptx_architecture: str | None) -> None:
    fault, report = REPORTS[name]
    seed = 1
    if ptx_architecture is not None:
        if name in NOT_IN_PTX:
            pytest.skip(NOT_IN_PTX[name])
        if ptx_architecture < "80" and "cp_async" in name:
            pytest.skip("sm_75 has no cp.async")
        if not ptx_architecture.startswith("9") and name.startswith(NEEDS_BULK_COPY):
            pytest.skip(f"sm_{ptx_architecture} has no bulk copies")
        report, seed = IN_PTX[name], 0  # under which copies arrive as late as allowed
    x, out = aligned(np.zeros(2048, np.float32)), np.zeros(64, np.float32)
    lib.hr_host_seed(seed)
    assert lib.hr_test_broken(fault, at(x), at(out)) == FAULT
    assert re.search(report, lib.hr_host_error().decode()), lib.hr_host_error()
    assert lib.hr_test_broken(99, at(x), at(out)) == FAULT  # refused until hr_host_seed
    lib.hr_host_seed(seed)
    assert lib.hr_test_broken(99, at(x), at(out)) == 0


@pytest.mark.host_runtime
@pytest.mark.parametrize(("blocks", "threads", "shared"), [(0, 32, 0), (1, 0, 0), (1, 1056, 0), (1, 32, 233472)])
def test_impossible_launches_are_refused(lib: ctypes.CDLL, blocks: int, threads: int, shared: int) -> None:
    assert lib.hr_test_geometry(blocks, threads, shared) == BAD_CONFIGURATION
    assert b"no GPU takes that" in lib.hr_host_error()


@pytest.mark.host_runtime
def test_a_partial_warp_may_not_shuffle(lib: ctypes.CDLL) -> None:
    x, out = np.zeros(48, np.float32), floats(1)
    assert lib.hr_test_sums(at(x), at(out), 1, 48, 48) == FAULT
    assert b"warp_xor in a warp of 16 threads" in lib.hr_host_error()


# ---- sanitizers, in processes of their own ----

STRAY_PROGRAM = f"""
import ctypes, sys
from cuda_ext.host_build import host_library
library = host_library([{str(STRAY_SHIM)!r}])
x, out = (ctypes.c_float * 32)(), (ctypes.c_float * 32)()
code = library.hr_test_stray(int(sys.argv[1]), x, out, 32)
print("code", code, library.hr_host_error())
"""


@pytest.mark.host_runtime
@pytest.mark.parametrize(
    ("sanitize", "fault", "report"),
    [
        ("address", 0, None),
        ("address", 1, "heap-buffer-overflow"),
        ("address", 2, "heap-buffer-overflow"),
        ("address", 3, "heap-buffer-overflow"),
        ("undefined", 0, None),
        ("undefined", 4, "misaligned address"),
        ("undefined", 5, "shift exponent"),
    ],
)
def test_sanitizers_find_stray_accesses(sanitize: str, fault: int, report: str | None) -> None:
    result = run_sanitized(["-c", STRAY_PROGRAM, str(fault)], sanitize)
    if report is None:
        assert (result.returncode, result.stdout) == (0, "code 0 b''\n"), result.stderr
    else:
        assert result.returncode != 0
        assert report in result.stderr
        assert "stray" in result.stderr  # the kernel is named


# ---- builds ----


@pytest.mark.host_runtime
def test_both_sides_offer_the_same_names() -> None:
    """What device_gpu.h gives kernels, runtime.h gives too, and with the same parameters."""
    declared = re.compile(
        r"^(?:HR_DEVICE|HR_ANY|constexpr) (.+?)(?: \{| =)|define (HR_\w+)|^(?:struct|int) (\w+)", re.M
    )
    gpu, host = (
        {match.groups() for match in declared.finditer((CSRC / file).read_text())}
        for file in ("device_gpu.h", "host/runtime.h")
    )
    assert {(None, None, "launch"), ("void sync_block()", None, None), (None, "HR_SHARED", None)} <= gpu
    assert gpu - host == set()


@pytest.mark.host_runtime
def test_the_path_without_bulk_copies_can_be_chosen() -> None:
    assert host_library([STRAY_SHIM]).hr_test_bulk_copy()
    assert not host_library([STRAY_SHIM], defines={"HEADROOM_BULK_COPY": 0}).hr_test_bulk_copy()


@pytest.mark.host_runtime
def test_no_compiler_is_one_clear_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(HostBuildError, match="no C\\+\\+ compiler: `no-such-compiler` was not found"):
        host_library([SHIM])


@pytest.mark.host_runtime
def test_a_refused_source_shows_the_compilers_words(tmp_path: Path) -> None:
    source = tmp_path / "wrong.cpp"
    source.write_text("int f() { return nothing_of_this_name; }")
    with pytest.raises(HostBuildError, match="nothing_of_this_name"):
        host_library([source])
    source.write_text("int undefined(); int f() { return undefined(); }")
    with pytest.raises(HostBuildError, match="undefined"):
        host_library([source])
    with pytest.raises(FileNotFoundError, match=r"absent\.cu"):
        host_library(["kernels/absent.cu"])
    with pytest.raises(ValueError, match="sanitize is 'thread'"):
        host_library([SHIM], sanitize="thread")


@pytest.mark.host_runtime
def test_a_killed_build_leaves_no_lock() -> None:
    program = "from cuda_ext import host_build as b\nwith b.lock(b.cache_folder()):\n print(flush=True); input()"
    holder = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout is not None
    holder.stdout.readline()  # it has the lock
    waiter = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert waiter.stdout is not None
    assert select.select([waiter.stdout], [], [], 0.5)[0] == []  # has to wait
    holder.kill()
    assert select.select([waiter.stdout], [], [], 30)[0] == [waiter.stdout]
    waiter.communicate(b"\n")
    holder.communicate()


@pytest.mark.host_runtime
def test_a_changed_source_is_built_anew(tmp_path: Path) -> None:
    source = tmp_path / "number.cpp"
    for number in (1, 2):
        source.write_text(f'extern "C" int number() {{ return {number}; }}')
        assert host_library([source]).number() == number
