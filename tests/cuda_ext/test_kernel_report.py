"""What the report says of kernels without a GPU: occupancy, useful work, estimates, the page, and the command line."""

import ctypes
import json
import random
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import roofline
from cuda_ext import build, ptx_build
from cuda_ext.packing import Shape, cache_elements, table
from cuda_ext.report import compiled, counted, page, subjects, useful
from cuda_ext.report.__main__ import main
from cuda_ext.report.compiled import Resources
from cuda_ext.report.counted import Chain, Launch, gpt2_shape
from cuda_ext.report.estimate import estimate
from cuda_ext.report.gpus import GPUS
from cuda_ext.report.occupancy import ADA, AMPERE, HOPPER, TURING, Limits, occupancy
from pipeline.model import CompactGPT2Config

TINY = gpt2_shape(128, 512, 1000, 64, (2, 1, 2))
GPT2 = gpt2_shape(768, 3072, 50257, 64, (10,) * 12)
VARIANT = replace(
    gpt2_shape(256, 1024, 1000, 64, (4, 3)), groups=((2, 2), (1, 2)), windows=(64, 0), rotary=32, rope_base=10000.0
)


# ---- occupancy ----


@pytest.mark.parametrize(
    ("limits", "threads", "registers", "shared", "blocks", "limit"),
    [
        # By the occupancy calculator's tables: all warps at 32 registers (64 on Turing), half of them at twice as many.
        (AMPERE, 256, 32, 0, 8, "warps"),
        (HOPPER, 256, 64, 0, 4, "registers"),
        (TURING, 256, 64, 0, 4, "warps"),
        (TURING, 1024, 64, 0, 1, "warps"),
        (HOPPER, 1024, 65, 0, 0, "registers"),
        (AMPERE, 32, 16, 0, 32, "blocks"),
        (ADA, 32, 16, 0, 24, "blocks"),
        (ADA, 512, 40, 0, 3, "warps"),
        (AMPERE, 128, 32, 48 * 1024, 3, "shared memory"),  # each with 1 KiB of the system's
        (HOPPER, 384, 134, 227 * 1024, 1, "registers"),
        (HOPPER, 128, 32, 227 * 1024 + 1, 0, "shared memory"),
        (TURING, 128, 32, 64 * 1024, 1, "shared memory"),
        (HOPPER, 256, 127, 5696, 2, "registers"),
        (HOPPER, 96, 168, 0, 4, "registers"),  # 12 warps of 43 rounded registers fit, in fours
    ],
)
def test_occupancy(limits: Limits, threads: int, registers: int, shared: int, blocks: int, limit: str) -> None:
    held = occupancy(limits, threads, registers, shared)
    assert (held.blocks, held.limit) == (blocks, limit)
    assert held.warps == blocks * -(-threads // 32)


CALCULATOR = """
#include <climits>
#include <cstddef>
#include "cuda_occupancy.h"
extern "C" int blocks(int major, int minor, int threads_sm, int shared_sm, int shared_block, int reserved, int threads,
                      int registers, int shared) {
    cudaOccDeviceProp p;
    p.computeMajor = major, p.computeMinor = minor, p.maxThreadsPerBlock = 1024;
    p.maxThreadsPerMultiprocessor = threads_sm, p.regsPerBlock = p.regsPerMultiprocessor = 65536, p.warpSize = 32;
    p.sharedMemPerBlock = 49152, p.sharedMemPerMultiprocessor = shared_sm, p.numSms = 1;
    p.sharedMemPerBlockOptin = shared_block, p.reservedSharedMemPerBlock = reserved;
    cudaOccFuncAttributes f;
    f.maxThreadsPerBlock = 1024, f.numRegs = registers, f.sharedSizeBytes = 0;
    f.partitionedGCConfig = PARTITIONED_GC_OFF;
    f.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN, f.maxDynamicSharedSizeBytes = INT_MAX, f.numBlockBarriers = 1;
    cudaOccDeviceState s;
    cudaOccResult r;
    const int error = cudaOccMaxActiveBlocksPerMultiprocessor(&r, &p, &f, &s, threads, shared);
    return error != CUDA_OCC_SUCCESS ? -error : r.activeBlocksPerMultiprocessor;
}
"""


def test_occupancy_is_the_toolkits(tmp_path: Path) -> None:
    """Against NVIDIA's own header, over random kernels."""
    homes = [Path(shutil.which("nvcc") or "/").resolve().parents[1:2], [Path("/usr/local/cuda")]]
    found = [home / "include" for part in homes for home in part if (home / "include/cuda_occupancy.h").is_file()]
    if not found or shutil.which("g++") is None:
        pytest.skip("no cuda_occupancy.h of a toolkit, or no g++")
    folder = found[0]
    source, library = tmp_path / "calculator.cpp", tmp_path / "calculator.so"
    source.write_text(CALCULATOR)
    subprocess.run(["g++", "-w", "-shared", "-fPIC", f"-I{folder}", source, "-o", library], check=True)
    blocks = ctypes.CDLL(str(library)).blocks
    draw = random.Random(0)
    for (major, minor), limits in {(7, 5): TURING, (8, 0): AMPERE, (8, 9): ADA, (9, 0): HOPPER}.items():
        for _ in range(300):
            threads, registers = draw.randint(1, 1024), draw.randint(16, 255)
            shared = draw.choice([0, draw.randint(0, limits.shared_bytes_of_block)])
            theirs = blocks(
                major, minor, 32 * limits.warps, limits.shared_bytes, limits.shared_bytes_of_block,
                limits.reserved_bytes, threads, registers, shared,
            )  # fmt: skip
            ours = occupancy(limits, threads, registers, shared).blocks
            assert ours == theirs, (major, minor, threads, registers, shared)


# ---- what launches are for ----


def _config(shape: Shape) -> CompactGPT2Config:
    return CompactGPT2Config(
        vocab_size=shape.vocabulary, n_positions=shape.context, n_embd=shape.width, n_head=max(shape.heads),
        n_layer=len(shape.heads), n_inner=shape.inner, head_dim=shape.head_dim,
        kept_heads=[list(range(heads)) for heads in shape.heads],
    )  # fmt: skip


VARIANT_CONFIG = CompactGPT2Config(
    vocab_size=1000, n_positions=1024, n_embd=256, n_head=4, n_layer=2, n_inner=1024, head_dim=64, n_kv_head=2,
    kept_heads=[[0, 1, 2, 3], [1, 2, 3]], window=[64, None], position="rope", rope_share=0.5, rope_base=10000.0,
)  # fmt: skip


@pytest.mark.parametrize(("shape", "config"), [(TINY, _config(TINY)), (GPT2, _config(GPT2)), (VARIANT, VARIANT_CONFIG)])
@pytest.mark.parametrize("batch", [1, 8, 9])
def test_useful_work_is_the_rooflines(shape: Shape, config: CompactGPT2Config, batch: int) -> None:
    token = useful.decode(shape, batch, 500)
    assert sum(operation.fixed for operation in token) == roofline.bytes_per_token(config, batch, 500)
    work = sum(operation.operations for operation in useful.prefill(shape, batch, 500))
    assert work == roofline.prefill_operations(config, batch, 500)


def test_a_long_prefill_goes_in_chunks() -> None:
    launches = useful.prefill(GPT2, 5, 1000)  # 2,048 rows at once: 409 tokens of each sequence
    assert len(launches) == 3 * (1 + 8 * 12) + 2
    assert sum(launch.operations for launch in launches) == roofline.prefill_operations(_config(GPT2), 5, 1000)


def test_one_layer_stands_for_all_of_its_kind() -> None:
    assert counted.distinct(TINY).heads == (2, 1)
    assert counted.repeats(TINY) == [2, 1]
    assert counted.distinct(VARIANT).windows == (64, 0)


@pytest.mark.parametrize("shape", [TINY, VARIANT])
def test_random_weights_are_laid_out_as_a_checkpoints(shape: Shape) -> None:
    packed = counted.random_weights(shape)
    made = table(packed, packed.weights, torch.zeros(cache_elements(shape, 1, 8)), 1, 8)
    assert len(made) > 0
    begins = sorted(packed.offsets.values())
    assert all(begin % 128 == 0 for begin in begins) and begins[-1] < packed.weights.numel()
    assert packed.weights.isfinite().all()


# ---- estimates and the page, of made-up counts ----


def _launch(kernel: str = "_ZN8headroom13matvec_kernelE", **changes: object) -> Launch:
    kinds = dict.fromkeys(page._KINDS, (0, 0)) | {"free": (5, 0), "integer": (100, 200), "load_global": (50, 50)}
    kinds |= {"barrier": (2, 2)}
    row = {"place": "a.cu:7", "line": 1, "opcode": "ld.global.u32", "write": 0, "lanes": 320, "executions": 10}
    memory = ({**row, "shared": 0, "asked": 80, "needed": 40}, {**row, "shared": 1, "asked": 20, "needed": 10})
    chain = Chain(4000, 2, 1, 0, 1)
    launch = Launch(
        kernel, (132, 1, 1), 64, 1024, False, 4096, 128, 2048, 80, chain, replace(chain, cycles=3000), kinds, memory,
        (("a.cu:9", "ld.global.u32", 900), ("a.cu:9", "fma", 100), ("a.cu:3", "bar.sync", 5000)),
    )  # fmt: skip
    return replace(launch, **changes)


def test_an_estimate_is_its_longest_part() -> None:
    h100, t4 = GPUS[0], GPUS[-1]
    few = Resources(32, 0, 0)
    guess = estimate(_launch(), few, h100)
    assert guess.bound == "chain"
    assert guess.seconds == pytest.approx(h100.gap + 4000 / h100.clock)
    dependent = estimate(_launch(), few, h100, dependent=True)
    assert dependent.seconds == pytest.approx(h100.dependent_gap + 3000 / h100.clock)
    assert estimate(_launch(), few, t4, dependent=True).seconds == estimate(_launch(), few, t4).seconds
    read = estimate(_launch(bytes_cold=10**9), few, h100)
    assert read.bound == "DRAM" and read.seconds == pytest.approx(h100.gap + 10**9 / h100.dram)
    busy = estimate(_launch(kinds=_launch().kinds | {"integer": (10**9, 10**9)}), few, h100)
    assert busy.bound == "issue" and busy.parts["issue"] == pytest.approx(10**9 / 132 / 4 / h100.clock, rel=1e-4)
    # A block a multiprocessor: one block more takes a second wave.
    alone = Resources(255, 0, 200 * 1024)
    assert estimate(_launch(grid=(132, 1, 1)), alone, h100).parts["chain"] == pytest.approx(4000 / h100.clock)
    assert estimate(_launch(grid=(133, 1, 1)), alone, h100).parts["chain"] == pytest.approx(8000 / h100.clock)


def _made_up() -> list[list[subjects.Subject]]:
    reports = []
    for gpu in GPUS:
        rows = []
        for operation in useful.decode(TINY, 1, 100)[:4]:
            guess = estimate(_launch(), Resources(40, 8, 0), gpu)
            rows.append(subjects.Row(operation, 3, _launch(), Resources(40, 8, 0), guess, 1e-9))
        reports.append([subjects.Subject(subjects.GRAPH, gpu, tuple(rows))])
    return reports


def test_the_page_says_that_it_estimates_and_what_it_counted() -> None:
    reports = _made_up()
    text = page.markdown(reports, "Kernels", ["command: none"])
    assert "No GPU was used" in text and "estimate" in text
    assert "| a token by graph | LayerNorm, q, k, v | a.cu:9 4 | 19 |" in text  # 1,000 cycles of 264 warps; 5,000
    assert "2.00 | 2.00 | 2 + 1 + 0 | 4,000 | 3,000 | 0 |" in text  # sectors, passes, chain, barriers
    assert "1. **embedding** x 3" in text and "Chain-bound: 3 loads one behind the other (2 of DRAM, 1 of L2" in text
    for gpu in GPUS:
        assert gpu.name in text
    data = json.loads(json.dumps(page.as_json(reports, {"command": "none"})))
    assert "no GPU" in data["all_times_are"]
    assert data["subjects"][0]["rows"][0]["launch"]["path"]["dram"] == 2
    assert "estimates; no GPU was used" in page.summary(reports)


PTXAS = """\
ptxas info    : Compiling entry function '_ZN8headroom46_GLOBAL__N__c56deb68_13_layer_norm_cu_d08fc87c17layer_norm_kE'
ptxas info    : Function properties for _ZN8headroom46_GLOBAL__N__c56deb68_13_layer_norm_cu_d08fc87c17layer_norm_kE
    0 bytes stack frame, 8 bytes spill stores, 16 bytes spill loads
ptxas info    : Used 64 registers, used 1 barriers, 24 bytes smem, 400 bytes cmem[0]
ptxas info    : Compiling entry function '_Z1av' for 'sm_90a'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 8 registers, used 0 barriers
"""


def test_ptxas_words_are_read() -> None:
    found = compiled.parse(PTXAS)
    assert found == {"_ZN8headroomlayer_norm.17layer_norm_kE": Resources(64, 24, 24), "_Z1av": Resources(8, 0, 0)}


# ---- the command line ----


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--shape", "12,768"], "--shape is '12,768'; give 3 to 6 numbers"),
        (["--shape", "a,b,c"], "--shape is 'a,b,c'"),
        (["--shape", "1,64,0"], "--shape is '1,64,0'"),
        (["--shape", "1,64,1,48"], "head_dim is 48"),
        (["--batch", "0"], "--batch is 0; give 1 or more"),
        (["--context", "1023"], "--context is 1023; give 1 to 1022, of the model's 1024 positions"),
        (["--context", "0"], "--context is 0; give 1 to 1022"),
        (["--gpu", "SXM"], "--gpu is 'SXM'; give one of H100 SXM, A100 SXM 80 GB, RTX 4090, T4"),
        (["--model", "nowhere"], "nowhere"),
        (["--out", __file__], "give a folder that can be written"),
    ],
)
def test_what_is_wrong_is_one_line(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ptx_build, "why_not", lambda: None)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and said in error and error.count("\n") == 1


def test_without_a_compiler_it_says_what_is_missing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert main([]) == 2
    assert "error: the report cannot be made: no C++ compiler" in capsys.readouterr().err


# ---- all of it ----


@pytest.mark.slow
@pytest.mark.usefixtures("needs_nvcc")
def test_a_small_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """nvcc of all kernels is most of the time; bytes are the model's own, and layers count alike."""
    code = main(["--shape", "3,128,2,64,512,1000", "--context", "80", "--gpu", "H100", "--out", str(tmp_path)])
    assert code == 0, capsys.readouterr().err
    assert "look first" in capsys.readouterr().out
    text = (tmp_path / "kernel-report.md").read_text(encoding="utf-8")
    assert "estimate" in text
    data = json.loads((tmp_path / "kernel-report.json").read_text(encoding="utf-8"))
    graph, persistent, prefill = data["subjects"]
    assert graph["launches"] == 1 + 5 * 3 + 3 and prefill["launches"] == 1 + 8 * 3 + 2 and persistent["launches"] == 1
    useful_bytes = roofline.bytes_per_token(_config(gpt2_shape(128, 512, 1000, 64, (2, 2, 2))), 1, 80)
    for subject in (graph, persistent):
        assert subject["bytes_from_dram"] == pytest.approx(useful_bytes, rel=0.01)
    spilled = [row["resources"]["spilled_bytes"] for subject in data["subjects"] for row in subject["rows"]]
    assert not any(spilled)


@pytest.mark.slow
@pytest.mark.usefixtures("needs_nvcc")
def test_gpt2s_size() -> None:
    """At 124M without two heads of twelve a token's bytes from DRAM are the roofline's to a thousandth."""
    shape, h100 = GPT2, GPUS[0]
    graph, persistent, _ = subjects.subjects(shape, 1, 512, h100, lambda _: None)
    useful_bytes = roofline.bytes_per_token(_config(shape), 1, 512)
    for subject in (graph, persistent):
        assert subject.bytes_from_dram == pytest.approx(useful_bytes, rel=1e-3)
    assert len(build.KERNELS) == 11  # a new one may need a row in report/useful.py
