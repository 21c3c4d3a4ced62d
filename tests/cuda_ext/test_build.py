"""The build without a GPU: what names it, what it refuses, and that spills are seen."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cuda_ext import build
from cuda_ext.errors import CudaExtError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def nvcc() -> str:
    try:
        return build.find_nvcc()
    except CudaExtError as error:
        pytest.skip(str(error))


def test_every_kernel_is_in_the_list() -> None:
    assert sorted(build.KERNELS) == sorted(path.stem for path in (build.CSRC / "kernels").glob("*.cu"))


def test_the_key_names_sources_compiler_and_architectures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "host").mkdir()
    (tmp_path / "a.cu").write_text("x")
    monkeypatch.setattr(build, "CSRC", tmp_path)
    first = build.key(("80",), "12.4")
    assert first == build.key(("80",), "12.4")
    (tmp_path / "host" / "only_for_tests.cpp").write_text("y")
    assert first == build.key(("80",), "12.4")
    assert len({first, build.key(("90a",), "12.4"), build.key(("80",), "13.0")}) == 3
    (tmp_path / "a.cu").write_text("z")
    assert first != build.key(("80",), "12.4")


@pytest.mark.parametrize("named", ["70", "sm_80", "80,x"])
def test_architectures_that_are_none(named: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(build.ARCHITECTURES, named)
    with pytest.raises(CudaExtError, match="give numbers from 75 on"):
        build.wanted_architectures()


def test_architectures_that_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(build.ARCHITECTURES, "80; 90a")
    assert build.wanted_architectures() == ("80", "90a")
    monkeypatch.delenv(build.ARCHITECTURES)
    if not torch.cuda.is_available():
        with pytest.raises(CudaExtError, match="no GPU to build for"):
            build.wanted_architectures()


def test_a_missing_compiler_is_one_line(tmp_path: Path) -> None:
    place = {"PATH": str(tmp_path), "HOME": str(tmp_path), build.ARCHITECTURES: "80"}
    code = "import cuda_ext.build as b; b.shutil.which = lambda _: None; raise SystemExit(b.main([]))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=place, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        "error: nvcc was not found; install the CUDA toolkit (12.4 or later) or set CUDA_HOME"
    )


GREEDY = """
__global__ void __launch_bounds__(1024, 2) greedy(float* p) {  // 32 registers a thread for 96 live values
    float v[96];
    for (int i = 0; i < 96; ++i) v[i] = p[i * 1024 + threadIdx.x];
    __syncthreads();
    for (int i = 0; i < 96; ++i) p[i * 1024 + threadIdx.x] = v[i] * v[(i * 7 + 1) % 96];
}
"""


def test_spills_are_seen(
    nvcc: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(build, "SOURCES", ["kernels/layer_norm.cu"])
    assert build.check(nvcc, ["80"]) == []
    assert "1 kernels" in capsys.readouterr().out
    greedy = tmp_path / "greedy.cu"
    greedy.write_text(GREEDY)
    monkeypatch.setattr(build, "SOURCES", [str(greedy)])
    (bad,) = build.check(nvcc, ["80"])
    assert bad.startswith(f"{greedy} for sm_80") and "bytes spilled" in bad


def test_it_builds_once(nvcc: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv(build.ARCHITECTURES, "80")
    monkeypatch.setattr(build, "SOURCES", ["kernels/advance.cu"])
    first = build.library()
    stamp = first.stat().st_mtime_ns
    assert build.library() == first and first.stat().st_mtime_ns == stamp
    assert sorted(path.name for path in first.parent.iterdir()) == ["libheadroom_cuda.so", "lock"]
    monkeypatch.setattr(build, "SOURCES", ["kernels/none.cu"])
    first.unlink()
    with pytest.raises(CudaExtError, match="nvcc failed"):
        build.library()
    assert [path.name for path in first.parent.iterdir()] == ["lock"]
