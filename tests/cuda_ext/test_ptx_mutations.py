"""With a fault in nvcc's PTX the tests of the kernels fail on the interpreter: what inline PTX can do wrong shows.

Each mutation changes the PTX of every kernel while it is loaded, and runs the tests that watch over it. A few changes
are none by the memory model; they and the unchanged PTX must pass.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

import ptx_backend
import pytest
from test_mutations import DECODE, PERSISTENT_MANY, run_tests

from cuda_ext import ops, ptx_build

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("needs_nvcc")]

GEMM = "test_gemm.py -k odd_sizes or any_order"
PREFILL = "test_attention.py -k test_prefill"
PERSISTENT = "test_persistent.py -k (any_order and 1) or (many_tokens and 2)"
ENGINE = "test_engine.py -k prefill_and_decode and auto"
MMA = r"(mma\.sync[^{]*\{[^}]*\}, )\{(%r\d+), (%r\d+), (%r\d+), (%r\d+)\}, \{(%r\d+), (%r\d+)\}"
ASYNC, BULK = ("80", "90a"), ("90a",)
WEAK = ("--ptx-set", "always_weak=1")


@dataclass(frozen=True)
class Mutation:
    """`pattern` becomes `becomes` everywhere in the PTX of `architectures`; `tests` as in test_mutations.py."""

    pattern: str
    becomes: str
    tests: str
    architectures: tuple[str, ...] = ASYNC
    caught: bool = True
    more: tuple[str, ...] = ()  # options of pytest


MUTATIONS = {
    "nothing (gemm)": Mutation("", "", GEMM, caught=False),
    "nothing (prefill)": Mutation("", "", PREFILL, caught=False),
    "nothing (decode)": Mutation("", "", DECODE, caught=False),
    "nothing (decode, weak memory)": Mutation("", "", DECODE, caught=False, more=WEAK),
    "nothing (persistent)": Mutation("", "", PERSISTENT, caught=False),
    "nothing (engine)": Mutation("", "", ENGINE, caught=False),
    "ldmatrix transposed": Mutation(r"x4\.shared", "x4.trans.shared", GEMM),
    "ldmatrix not transposed": Mutation(r"x4\.trans", "x4", PREFILL),
    "mma: a1 and a2 exchanged": Mutation(MMA, r"\1{\2, \4, \3, \5}, {\6, \7}", GEMM),
    "mma: b0 and b1 exchanged": Mutation(MMA, r"\1{\2, \3, \4, \5}, {\7, \6}", GEMM),
    "mma of depth 8: the second step is the first": Mutation(
        r"(mma\.sync\.aligned\.m16n8k8[^{]*\{[^}]*\}, )\{(%r\d+), (%r\d+)\}", r"\1{\3, \2}", GEMM, ("75",)
    ),
    "cp.async without its zeros": Mutation(r"(cp\.async\.cg[^;]*), 16, %r\d+;", r"\1, 16;", GEMM),
    "cp.async: a group too many on its way (gemm)": Mutation("wait_group 2;", "wait_group 3;", GEMM),
    "cp.async: a group too many on its way (prefill)": Mutation("wait_group 1;", "wait_group 2;", PREFILL),
    "cp.async: no commit": Mutation(r"cp\.async\.commit_group;", "", GEMM),
    "no block barriers (gemm)": Mutation(r"bar\.sync[ \t]+0;", ";", GEMM, ptx_build.ARCHITECTURES),
    "no block barriers (prefill)": Mutation(r"bar\.sync[ \t]+0;", ";", PREFILL, ptx_build.ARCHITECTURES),
    "no block barriers (persistent)": Mutation(r"bar\.sync[ \t]+0;", ";", PERSISTENT, ptx_build.ARCHITECTURES),
    "no fence of the device": Mutation(
        r"membar\.gl;|fence\.acq_rel\.gpu;", ";", DECODE, ptx_build.ARCHITECTURES, more=WEAK
    ),
    "parts by cached loads, behind a fence": Mutation(
        r"ld\.global\.cg", "ld.global", DECODE, caught=False, more=WEAK
    ),
    "no wait for the launch before": Mutation(r"griddepcontrol\.wait;", "", ENGINE, BULK),
    "grid barrier: red does not release": Mutation(r"red\.release", "red.relaxed", PERSISTENT),
    "grid barrier: cached loads and no acquire": Mutation(
        r"ld\.(acquire\.gpu\.global|global\.cg)\.", "ld.global.", PERSISTENT
    ),
    "cached loads behind an acquire": Mutation(r"ld\.global\.cg", "ld.global", PERSISTENT, caught=False),
    "ld.acquire relaxed, before loads past L1": Mutation(r"ld\.acquire", "ld.relaxed", PERSISTENT, caught=False),
    "mbarrier: no fence behind its init": Mutation(
        r"fence\.mbarrier_init\.release\.cluster;", "", PERSISTENT_MANY, BULK
    ),
    "mbarrier: always parity 0": Mutation(r"(try_wait[^;]*), %r\d+;", r"\1, 0;", PERSISTENT_MANY, BULK),
    "mbarrier: expects too few bytes": Mutation(
        r"(arrive\.expect_tx[^;]*), %r\d+;", r"\1, 16;", PERSISTENT_MANY, BULK
    ),
    "no warp barrier before a stage's refill": Mutation(r"bar\.warp\.sync[ \t]+-1;", "", PERSISTENT_MANY, BULK),
}  # fmt: skip


@pytest.fixture
def mutated(request: pytest.FixtureRequest) -> Iterator[list[int]]:
    """The mutation named by the test is in all PTX; gives how often it took hold."""
    mutation: Mutation = MUTATIONS[request.getfixturevalue("name")]
    changes = [0]

    def rewrite(text: str) -> str:
        if not mutation.pattern:
            return text
        changed, count = re.subn(mutation.pattern, mutation.becomes, text)
        changes[0] += count
        return changed

    ptx_backend.rewrite = rewrite
    ops.forget_libraries()
    yield changes
    ptx_backend.rewrite = None
    ops.forget_libraries()
    ptx_build.interpreter().hr_host_seed(0)


@pytest.mark.parametrize(
    ("name", "architecture"),
    [(name, architecture) for name, mutation in MUTATIONS.items() for architecture in mutation.architectures],
)
def test_mutated_ptx_fails_the_kernels_tests(name: str, architecture: str, mutated: list[int]) -> None:
    mutation = MUTATIONS[name]
    outcome = run_tests(mutation.tests, "--ptx", architecture, *mutation.more)
    said = re.findall(r"^E +(.*)$", outcome.failed[0], re.M)[:1] if outcome.failed else ["passes"]
    print(f"{architecture:4} {name:50} {said[0][:150]}")
    assert mutated[0] > 0 or not mutation.pattern, f"{mutation.pattern} is nowhere in the PTX: mend the table"
    assert bool(outcome.failed) == mutation.caught, outcome.failed[:1] or f"{mutation.tests} passes"
