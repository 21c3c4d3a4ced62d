"""A little of `make test-ptx` for every run of the suite: device_gpu.h's wrappers and one kernel as nvcc emits them."""

import ctypes
from pathlib import Path

import numpy as np
import pytest
from test_mutations import run_tests

from cuda_ext import build, host_build, ptx_build
from cuda_ext.host_build import HostBuildError

SHIM = Path(__file__).parent / "shims" / "host_runtime.cpp"


@pytest.mark.usefixtures("needs_nvcc")
@pytest.mark.parametrize(
    ("tests", "architecture"),
    [
        ("test_host_runtime.py", "90a"),
        ("test_host_runtime.py -k mma or ldmatrix or pipeline", "75"),  # mma is two of half the depth
        ("test_persistent.py -k any_order and bulk-2", "90a"),
    ],
)
def test_of_nvccs_ptx(tests: str, architecture: str) -> None:
    outcome = run_tests(tests, "--ptx", architecture)
    assert not outcome.failed, outcome.failed[0]
    assert outcome.passed


@pytest.mark.usefixtures("needs_nvcc")
def test_a_second_library_is_loaded_from_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    ptx_build.library([SHIM], "90a")
    monkeypatch.setattr(host_build.subprocess, "run", None)  # nothing is compiled or linked
    out = np.zeros(32, np.uint32)
    assert ptx_build.library([SHIM], "90a").hr_test_poison(ctypes.c_void_p(out.ctypes.data)) == 0
    assert (out == 0xFFFFFFFF).all()


@pytest.mark.usefixtures("needs_nvcc")
def test_what_is_missing_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "no C++ compiler: `no-such-compiler` was not found" in str(ptx_build.why_not())
    monkeypatch.delenv("CXX")
    fake = tmp_path / "nvcc"  # a toolkit without its headers
    lines = ("#!/bin/sh", "[ $1 = --version ] && echo V1 && exit", "echo no cuda_runtime_api.h >&2", "exit 1")
    fake.write_text("\n".join(lines))
    fake.chmod(0o755)
    monkeypatch.setattr(build, "find_nvcc", lambda: str(fake))
    said = ptx_build.why_not()
    assert said == f"{fake} finds no cuda_runtime_api.h; install the toolkit's cudart headers (cuda-cudart-dev)"
    with pytest.raises(HostBuildError, match="finds no cuda_runtime_api"):
        ptx_build.library([SHIM], "90a")


def test_the_interpreter_is_no_part_of_other_builds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A change of it compiles neither the engine nor the host runtime anew."""
    (tmp_path / "ptx").mkdir()
    (tmp_path / "device.h").write_text("x")
    monkeypatch.setattr(build, "CSRC", tmp_path)
    monkeypatch.setattr(host_build, "CSRC", tmp_path)
    before = build.key(("80",), ""), host_build.headers()
    (tmp_path / "ptx" / "machine.h").write_text("y")
    assert before == (build.key(("80",), ""), host_build.headers())
