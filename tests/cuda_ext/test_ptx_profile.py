"""The interpreter's profile on PTX written by hand, whose sectors, bank conflicts and chains can be told by heart."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_ptx import Ptx, aligned

DRAM, L2, L1 = 1000, 300, 50
Profiled = Callable[..., dict[str, Any]]


@pytest.fixture
def profiled(tmp_path: Path) -> Iterator[Profiled]:
    """profiled(body, *arrays, **how) runs a kernel and gives what was counted of its launch."""
    machine = Ptx()
    machine.lib.hr_host_seed(0)

    def run(body: str, *arrays: Any, **how: Any) -> dict[str, Any]:
        path = tmp_path / "launches.json"
        machine.lib.hr_ptx_profile_begin(DRAM, L2, L1)
        code = machine.run(body, *arrays, **how)
        assert machine.lib.hr_ptx_profile_end(str(path).encode()) == 0
        assert code == 0, machine.error
        (line,) = path.read_text().splitlines()
        return json.loads(line)

    yield run
    machine.lib.hr_host_seed(0)


def _asked(launch: dict[str, Any], opcode: str) -> tuple[int, int]:
    (row,) = (row for row in launch["memory"] if row["opcode"].startswith(opcode))
    return row["asked"], row["needed"]


@pytest.mark.parametrize(
    ("stride", "asked", "needed"),
    [(0, 1, 1), (4, 4, 4), (8, 8, 4), (32, 32, 4), (128, 32, 4)],
)
def test_sectors_of_strided_words(profiled: Profiled, stride: int, asked: int, needed: int) -> None:
    body = f"mad.lo.u32 %r0, %x, {stride}, 0;\ncvt.u64.u32 %q0, %r0;\nadd.u64 %q0, %p0, %q0;\nld.global.u32 %r1, [%q0];"
    assert _asked(profiled(body, aligned(1024)), "ld.global") == (asked, needed)


@pytest.mark.parametrize(("stride", "asked"), [(16, 16), (32, 32)])
def test_sectors_of_vectors(profiled: Profiled, stride: int, asked: int) -> None:
    body = (
        f"mad.lo.u32 %r0, %x, {stride}, 0;\ncvt.u64.u32 %q0, %r0;\nadd.u64 %q0, %p0, %q0;\n"
        "ld.global.v4.u32 {%r1, %r2, %r3, %r4}, [%q0];"
    )
    launch = profiled(body, aligned(1024))
    assert _asked(launch, "ld.global") == (asked, 16)
    assert launch["bytes_read"] == launch["bytes_cold"] == 32 * asked


def test_a_word_off_its_sector_asks_for_one_more(profiled: Profiled) -> None:
    body = "mad.lo.u32 %r0, %x, 4, 4;\ncvt.u64.u32 %q0, %r0;\nadd.u64 %q0, %p0, %q0;\nst.global.u32 [%q0], %x;"
    launch = profiled(body, aligned(1024))
    assert _asked(launch, "st.global") == (5, 4)
    assert launch["bytes_written"] == 5 * 32 and launch["bytes_read"] == 0


def _place(*steps: str) -> str:
    """%r0, within the block's memory, by steps that begin with the thread in %r0."""
    return "\n".join(("mov.u32 %r0, %x;", *steps, "mov.u32 %r9, block_memory;", "add.u32 %r0, %r0, %r9;\n"))


@pytest.mark.parametrize(
    ("words", "taken"),
    [(0, 1), (1, 1), (2, 2), (3, 1), (4, 4), (8, 8), (32, 32), (33, 1)],  # 32: a column; 33: a padded one
)
def test_bank_conflicts_of_words(profiled: Profiled, words: int, taken: int) -> None:
    body = _place(f"mul.lo.u32 %r0, %r0, {4 * words};") + "st.shared.u32 [%r0], 1;"
    if words == 0:  # all threads in one place: reads, for writes would race
        body = "mov.u32 %r9, block_memory;\nld.shared.u32 %r1, [%r9];"
    launch = profiled(body, shared=8192)
    assert _asked(launch, "ld.shared" if words == 0 else "st.shared") == (taken, 1)


@pytest.mark.parametrize(
    ("steps", "taken"),
    [
        (("mul.lo.u32 %r0, %r0, 16;",), 4),  # side by side: a quarter of a warp at once
        (("mul.lo.u32 %r0, %r0, 128;",), 32),  # a column of rows of 128 bytes
        (("mul.lo.u32 %r0, %r0, 144;",), 4),  # of padded rows
        # swizzled: chunk 0 of row r lies at chunk r % 8
        (("and.b32 %r1, %r0, 7;", "shl.b32 %r1, %r1, 4;", "mul.lo.u32 %r0, %r0, 128;", "xor.b32 %r0, %r0, %r1;"), 4),
    ],
)
def test_bank_conflicts_of_vectors(profiled: Profiled, steps: tuple[str, ...], taken: int) -> None:
    launch = profiled(_place(*steps) + "st.shared.v4.u32 [%r0], {1, 1, 1, 1};", shared=8192)
    assert _asked(launch, "st.shared") == (taken, 4)


def test_ldmatrix_reads_rows(profiled: Profiled) -> None:
    ldmatrix = "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r1, %r2, %r3, %r4}, [%r0];"
    fill = _place("mul.lo.u32 %r0, %r0, 128;") + "st.shared.v4.u32 [%r0], {1, 1, 1, 1};\nbar.warp.sync -1;\n"
    assert _asked(profiled(fill + ldmatrix, shared=8192), "ldmatrix") == (32, 4)
    fill = fill.replace("128", "144")
    assert _asked(profiled(fill + ldmatrix, shared=8192), "ldmatrix") == (4, 4)


CHASE = "ld.global.u64 %q0, [%p0];\nld.global.u64 %q1, [%q0];\nld.global.u64 %q2, [%q1];\n"
USE = "st.global.u64 [%p1], %q2;"


def _chain(elements: int) -> np.ndarray:
    """Pointers, each to the one 64 bytes on."""
    links = aligned(8 * elements, dtype=np.uint64)
    links[::8] = links.ctypes.data + 64 * (np.arange(elements) + 1)
    return links


def test_a_chain_of_loads(profiled: Profiled) -> None:
    launch = profiled(CHASE + USE, _chain(4), aligned(16))
    assert [launch["path"][name] for name in ("dram", "l2", "l1")] == [3, 0, 0]
    assert 3 * DRAM < launch["path"]["cycles"] < 3 * DRAM + 50


def test_loads_side_by_side_are_one_wait(profiled: Profiled) -> None:
    loads = "".join(f"ld.global.u64 %q{n}, [%p0+{64 * n}];\n" for n in range(3))
    adds = "add.u64 %q2, %q2, %q1;\nadd.u64 %q2, %q2, %q0;\n"
    launch = profiled(loads + adds + USE, aligned(64), aligned(16))
    assert launch["path"]["dram"] == 1


def test_what_was_touched_is_near(profiled: Profiled) -> None:
    """L1 has what the block has loaded, L2 what any block has, or what a load past L1 asks for."""
    again = "and.b64 %q3, %q2, 0;\nadd.u64 %q3, %q3, %p0;\nld.global.u64 %q4, [%q3];\nld.global.cg.u64 %q2, [%q4];\n"
    launch = profiled(CHASE + again + USE, _chain(4), aligned(16))
    assert [launch["path"][name] for name in ("dram", "l2", "l1")] == [3, 1, 1]


def test_a_load_behind_a_far_branch_waits_for_what_was_used_before_it(profiled: Profiled) -> None:
    body = (
        "ld.global.u64 %q0, [%p0];\nsetp.eq.u64 %t0, %q0, 0;\n@%t0 bra END;\n"
        "ld.global.u64 %q1, [%p0+64];\nst.global.u64 [%p1], %q1;\n{filler}END:\n"
    )
    near, far = body.replace("{filler}", ""), body.replace("{filler}", "add.u32 %r1, %r1, 1;\n" * 12)
    numbers = _chain(4)
    assert profiled(far, numbers, aligned(16))["path"]["dram"] == 2
    assert profiled(near, numbers, aligned(16))["path"]["dram"] == 1  # becomes predicates


def test_a_barrier_makes_all_warps_wait_for_the_last(profiled: Profiled) -> None:
    first_warp = CHASE + "st.global.u64 [%p1], %q2;\n" + "add.u32 %r1, %r1, 1;\n" * 12
    all_warps = "MEET:\nbar.sync 0;\nld.global.u64 %q3, [%p0+128];\nst.global.u64 [%p1+64], %q3;"
    body = "setp.ge.u32 %t0, %x, 32;\n@%t0 bra MEET;\n" + first_warp + all_warps
    launch = profiled(body, _chain(4), aligned(32), threads=64)
    path = launch["path"]
    assert path["dram"] == 3 and path["barriers"] == 1 and path["l2"] + path["l1"] == 1
    assert launch["kinds"]["barrier"][0] == 2


def test_what_stands_before_the_launch_wait_is_told_apart(profiled: Profiled) -> None:
    body = CHASE + "st.global.u64 [%p1+32], %q2;\ngriddepcontrol.wait;\nld.global.u64 %q3, [%p0+256];\n"
    launch = profiled(body + "st.global.u64 [%p1], %q3;", _chain(5), aligned(16))
    assert launch["path"]["dram"] == 4
    assert launch["path_after_wait"]["dram"] == 1


def test_counts_grow_with_the_grid(profiled: Profiled) -> None:
    body = CHASE + "fma.rn.f32 %f1, %f0, %f0, %f0;\nadd.u32 %r1, %x, 1;\n" + USE
    one, three = (profiled(body, _chain(4), aligned(16), blocks=blocks) for blocks in (1, 3))
    for kind, (count, slots) in one["kinds"].items():
        assert three["kinds"][kind] == [3 * count, 3 * slots], kind
    assert one["kinds"]["fma"] == [1, 1] and one["kinds"]["load_global"] == [3, 3]
    assert [row["asked"] for row in three["memory"]] == [3 * row["asked"] for row in one["memory"]]
    assert three["bytes_read"] == one["bytes_read"] == 3 * 32


def test_polls_in_vain_are_not_counted(profiled: Profiled) -> None:
    """How often a warp polls depends on the interpreter's turns: a barrier of the grid costs what it costs once."""
    body = (
        "setp.ne.u32 %t0, %x, 0;\n@%t0 bra OVER;\nred.release.gpu.global.add.u32 [%p0], 1;\n"
        "AGAIN:\nld.acquire.gpu.global.u32 %r1, [%p0];\nsetp.lt.u32 %t1, %r1, 8;\n@%t1 bra AGAIN;\nOVER:\n"
    )
    launch = profiled(body, aligned(32), blocks=8, cooperative=True)
    assert launch["kinds"]["wait"][0] == 8 and launch["kinds"]["atomic"][0] == 8
    assert launch["path"]["l2"] == 2  # its own arrival, and seeing the others'
