"""The tests of the kernels catch faults: with one barrier less, or one index off by one, they fail.

Each mutation changes one place in a copy of `csrc/` and runs the tests that watch over it, in this process, on
the copy. They must fail, in a test's body and not in the build; and without the mutation they must pass.
"""

import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from cuda_ext import host_build

HERE = Path(__file__).parent
pytestmark = [pytest.mark.thorough, pytest.mark.host_runtime]


@dataclass(frozen=True)
class Mutation:
    """In `source`, below csrc, `old` becomes `new`, the first time that it occurs behind `after`."""

    source: str
    old: str
    new: str
    tests: str  # a file of this folder, and with " -k words" those of its tests that watch this place
    after: str = ""


BLOCK_SUM = "test_host_runtime.py -k block_sum"
NORM = "test_norm_and_embedding.py -k test_layer_norm"
EMBED = "test_norm_and_embedding.py -k test_embedding"
CUBLASLT = "test_cublaslt.py"
ADVANCE = "test_sample.py -k test_after_a_token"
GEMM = "test_gemm.py -k any_order"
PREFILL = "test_attention.py -k behind_a_past"
PREFILL_WINDOW = "test_attention.py -k prefill_by_windows"
PREFILL_HEADS = "test_attention.py -k rotary_and_grouped_heads"
DECODE_WINDOW = "test_attention.py -k decode_by_windows"
DECODE = "test_attention.py -k decode_in_any_order"
MATVEC = "test_matvec.py -k any_order"
MATVEC_LONG = "test_matvec.py -k odd_sizes"
MATVEC_HEADS = "test_matvec.py -k rotary_and_grouped_heads"
PERSISTENT = "test_persistent.py -k any_order and bulk"
PERSISTENT_WINDOW = "test_persistent.py -k before_a_window and bulk"
PERSISTENT_CP_ASYNC = "test_persistent.py -k any_order and cp_async"
PERSISTENT_STAMPS = "test_persistent.py -k stamps and bulk-0"
PERSISTENT_MANY = "test_persistent.py -k many_tokens and bulk-1"
SAMPLE = "test_sample.py -k seed_row_and_step"

MUTATIONS = {
    "block_sum: reads before all warps wrote": Mutation(
        "device.h", "sync_block();", "", BLOCK_SUM, after="float block_sum("
    ),
    "block_sum: leaves while others still read": Mutation(
        "device.h", "sync_block();", "", BLOCK_SUM, after="total = warp_sum(total);"
    ),
    "warp_sum: of half a warp": Mutation("device.h", "offset = kWarp / 2", "offset = kWarp / 4", BLOCK_SUM),
    "layer_norm: one column too few": Mutation(
        "row_norm.h", "column + i < width ? row[column + i] : fill", "column + i < width - 1 ? row[column + i] : fill",
        NORM,
    ),
    "layer_norm: the row after": Mutation("kernels/layer_norm.cu", "rows[row] : row", "rows[row] : row ^ 1", NORM),
    "layer_norm: no zeros in the padding": Mutation(
        "row_norm.h", "each_eight(in, width, ld_out, mean", "each_eight(in, width, width, mean", NORM
    ),
    "embed: the position before": Mutation("kernels/embed.cu", "length] + t", "length] + t - 1", EMBED),
    "embed: one load too few": Mutation("kernels/embed.cu", "column < ld;", "column < ld - 8;", EMBED),
    "kv_append: behind its place": Mutation("kernels/kv_append.cu", "sequence] + t", "sequence] + t + 1", PREFILL),
    "kv_append: padding too": Mutation("kernels/kv_append.cu", "t >= lengths[", "t > lengths[", PREFILL),
    "kv_append: turns the other way": Mutation(
        "qkv.h", "? -partner : partner", "? partner : -partner", PREFILL_HEADS
    ),
    "kv_append: turns one pair too many": Mutation(
        "kernels/kv_append.cu", "d + 2 * i >= rotary.dims", "d + 2 * i > rotary.dims", PREFILL_HEADS
    ),
    "kv_append: turns values too": Mutation(
        "kernels/kv_append.cu", "i >= q_width + kv_width;", "i > q_width + kv_width;", PREFILL_HEADS
    ),
    "advance: later in the history": Mutation("kernels/advance.cu", "step[row] - 1", "step[row]", ADVANCE),
    "advance: overlooks a stop token": Mutation("kernels/advance.cu", "->stop_count;", "->stop_count - 1;", ADVANCE),
    "gemm: reads a stage that is not there for all": Mutation(
        "kernels/gemm.cu", "sync_block();", "", GEMM, after="cp_async_wait<T::STAGES - 2>"
    ),
    "gemm: waits for one slice too few": Mutation(
        "kernels/gemm.cu", "cp_async_wait<T::STAGES - 2>", "cp_async_wait<T::STAGES - 1>", GEMM
    ),
    "gemm: fills the stage that is read": Mutation(
        "kernels/gemm.cu", "next = slice + T::STAGES - 1", "next = slice + T::STAGES", GEMM
    ),
    "gemm: sums over a ring that is still read": Mutation(
        "kernels/gemm.cu", "sync_block();", "", GEMM, after="float* mine ="
    ),
    "gemm: adds sums that are not there": Mutation(
        "kernels/gemm.cu", "sync_block();", "", GEMM, after="if (warp_k > 0) mine["
    ),
    "gemm: one output column to the right": Mutation(
        "kernels/gemm.cu", "* 8 + lane % 4 * 2;", "* 8 + lane % 4 * 2 + 1;", GEMM
    ),
    "prefill: queries before they are there": Mutation(
        "kernels/attention_prefill.cu", "sync_block();", "", PREFILL, after="cp_async_wait<0>();"
    ),
    "prefill: keys over queries that are still read": Mutation(
        "kernels/attention_prefill.cu", "sync_block();", "", PREFILL, after="ldmatrix_x4(q[d]"
    ),
    "prefill: keys before they are there": Mutation(
        "kernels/attention_prefill.cu", "sync_block();", "", PREFILL, after="cp_async_wait<1>();"
    ),
    "prefill: keys over keys that are still read": Mutation(
        "kernels/attention_prefill.cu", "sync_block();", "", PREFILL, after="mma_16816(sums[d + 1]"
    ),
    "prefill: sees one key too many": Mutation(
        "kernels/attention_prefill.cu", "(key > row_position", "(key > 1 + row_position", PREFILL
    ),
    "prefill: a window of one key more": Mutation(
        "softmax.h", "length - window)", "length - window - 1)", PREFILL_WINDOW
    ),
    "prefill: no mask at the window's edge": Mutation(
        "kernels/attention_prefill.cu", " || key < row_first[i / 2]", "", PREFILL_WINDOW
    ),
    "prefill: reads keys before the window": Mutation(
        "kernels/attention_prefill.cu", "row >= begin && ", "", PREFILL_WINDOW
    ),
    "prefill: exponents from minus infinity": Mutation(
        "kernels/attention_prefill.cu", "== -INFINITY ? 0.0f : new_highest[r]", "== 1.0f ? 0.0f : new_highest[r]",
        PREFILL_WINDOW,
    ),
    "prefill: the query's own number for its key/value head": Mutation(
        "kernels/attention_prefill.cu", "queries.kv_head[head] : head", "head : head", PREFILL_HEADS
    ),
    "decode: a window's keys from the first": Mutation(
        "kernels/attention_decode.cu", "begin = seen + split", "begin = split", DECODE_WINDOW
    ),
    "decode: merges before all groups wrote": Mutation(
        "kernels/attention_decode.cu", "sync_block();", "", DECODE
    ),
    "decode: counts a block whose part is not written": Mutation(
        "kernels/attention_decode.cu", "sync_block();", "", DECODE, after="fence_device();"
    ),
    "decode: looks at the count before it is taken": Mutation(
        "kernels/attention_decode.cu", "sync_block();", "", DECODE, after="if (thread == 0) *arrived"
    ),
    "decode: one key too few": Mutation("softmax.h", "group < end ?", "group < end - 1 ?", DECODE),
    "matvec: multiplies rows that are not normalised yet": Mutation(
        "kernels/matvec.cu", "sync_block();", "", MATVEC
    ),
    "matvec: sums before all warps wrote": Mutation(
        "kernels/matvec.cu", "sync_block();", "", MATVEC, after="make_float2(d[t][0]"
    ),
    "matvec: the step after": Mutation(
        "kernels/matvec.cu", "fetch_weights(step + kRound", "fetch_weights(step + kRound + 1", MATVEC_LONG
    ),
    "matvec: the pair's other number from further away": Mutation(
        "kernels/matvec.cu", "warp_xor(value, 1)", "warp_xor(value, 2)", MATVEC_HEADS
    ),
    "matvec: turns values too": Mutation(
        "kernels/matvec.cu", "(p.heads + p.cache.heads) *", "(p.heads + 2 * p.cache.heads) *", MATVEC_HEADS
    ),
    "persistent: blocks part a pair": Mutation("persistent/block.h", "? kPairBits : 0", "? 0 : 0", PERSISTENT),
    "persistent: the next row's pair": Mutation(
        "kernels/decode_persistent.cu", "warp_xor(value, ROWS)", "warp_xor(value, 1)", PERSISTENT
    ),
    "persistent: reads keys before the window": Mutation(
        "persistent/attention.h", "begin = first + split", "begin = split", PERSISTENT_WINDOW
    ),
    "persistent: multiplies a tile that is not there": Mutation(
        "persistent/weight_ring.h", "mbarrier_wait(full_ + at_, parity_);", "", PERSISTENT
    ),
    "persistent: waits for one tile too few": Mutation(
        "persistent/weight_ring.h", "cp_async_wait_at_most(depth_ - 1)", "cp_async_wait_at_most(depth_)",
        PERSISTENT_CP_ASYNC,
    ),
    "persistent: adds sums that are not there": Mutation(
        "kernels/decode_persistent.cu", "sync_block();", "", PERSISTENT, after="ring.release();"
    ),
    "persistent: the next pass's sums over these": Mutation(
        "kernels/decode_persistent.cu", "sync_block();", ";", PERSISTENT, after="if (first > m.begin)"
    ),
    "persistent: merges before all parts are there": Mutation(
        "kernels/decode_persistent.cu", "meet();", "", PERSISTENT, after="attend<128>"
    ),
    "persistent: left a barrier before it is met": Mutation(
        "kernels/decode_persistent.cu", "grid_barrier(counters, ++round);\n        stamp(2 * round);",
        "stamp(2 * round + 2);\n        grid_barrier(counters, ++round);", PERSISTENT_STAMPS,
    ),
    "persistent: chooses before all blocks have nominated": Mutation(
        "kernels/decode_persistent.cu", "meet();", "", PERSISTENT_MANY, after="nominate<ROWS>"
    ),
    "sample: the argmax before all warps wrote": Mutation(
        "kernels/sample.cu", "sync_block();", "", SAMPLE, after="keys[kWarps + warp_id()] ="
    ),
    "cublaslt: algorithms that can do the largest size alone": Mutation(
        "cublaslt.cpp", "part.m >= fewest", "part.m >= p.m", f"{CUBLASLT} -k whole_bucket"
    ),
    "cublaslt: one handle for all devices": Mutation(
        "cublaslt.cpp", "handles[current_device()]", "handles[0]", f"{CUBLASLT} -k handle"
    ),
    "model: a refusal ends the prefill": Mutation(
        "model.cpp", "error == kCublasLtCannot", "error == kNoVariant", f"{CUBLASLT} -k goes_on"
    ),
    "api: a product on the current device": Mutation(
        "api.cpp", "guard(device)", "guard(0)", f"{CUBLASLT} -k handle", after="int hr_product("
    ),
    "sample: draws before all threads offered": Mutation(
        "kernels/sample.cu", "sync_block();", "", SAMPLE, after="atomic_min(drawn"
    ),
}  # fmt: skip


class Outcome:
    """A pytest plugin that notes what failed, and where."""

    def __init__(self) -> None:
        self.passed = 0
        self.failed: list[str] = []
        self.broken: list[str] = []  # no verdict on the kernel: collection, fixtures, builds

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            no_verdict = report.when != "call" or "HostBuildError" in report.longreprtext
            (self.broken if no_verdict else self.failed).append(f"{report.nodeid}\n{report.longreprtext}")
        elif report.when == "call" and report.passed:
            self.passed += 1

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.broken.append(report.longreprtext)


def run_tests(tests: str, *more: str) -> Outcome:
    """Runs `tests` up to the first failure in a session of its own within this process, with fresh modules."""
    file, *options = [*tests.split(" ", 2), *more]
    names = ("conftest", Path(file.partition("::")[0]).stem)
    outcome, kept = Outcome(), {name: sys.modules.pop(name, None) for name in names}
    try:
        quiet = ["-x", "-s", "-p", "no:terminal", "-p", "no:cacheprovider", "-p", "no:faulthandler"]
        pytest.main([*quiet, str(HERE / file), *options], plugins=[outcome])
    finally:
        for name, module in kept.items():
            sys.modules.pop(name, None)
            if module is not None:
                sys.modules[name] = module
    assert not outcome.broken, outcome.broken[0]
    assert outcome.passed or outcome.failed, f"{tests}: no tests"
    return outcome


@pytest.fixture
def csrc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of csrc/ that host_library builds from."""
    copy = Path(shutil.copytree(host_build.CSRC, tmp_path / "csrc"))
    monkeypatch.setattr(host_build, "CSRC", copy)
    yield copy
    shutil.rmtree(copy)


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mutated_kernel_fails_its_tests(csrc: Path, name: str) -> None:
    mutation = MUTATIONS[name]
    path = csrc / mutation.source
    text = path.read_text()
    place = text.find(mutation.old, text.find(mutation.after) + len(mutation.after))
    found = mutation.after in text and place >= 0
    assert found, f"{mutation.source} no longer holds {mutation.old!r} behind {mutation.after!r}: mend the table"
    path.write_text(text[:place] + mutation.new + text[place + len(mutation.old) :])
    assert run_tests(mutation.tests).failed, f"{mutation.tests} passes though {name}"


@pytest.mark.parametrize("tests", sorted({mutation.tests for mutation in MUTATIONS.values()}))
def test_the_same_tests_pass_without_a_mutation(csrc: Path, tests: str) -> None:
    assert not run_tests(tests).failed
