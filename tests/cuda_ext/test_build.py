"""The build without a GPU: what names it, what it refuses, and that spills are seen."""

import os
import shutil
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


def test_pip_installs_the_package_and_compiles_where_it_can(nvcc: str, tmp_path: Path) -> None:
    """A wheel of a small list of sources; with another architecture, or changed sources, it is not taken."""
    source = Path(
        shutil.copytree(ROOT / "cuda_ext", tmp_path / "cuda_ext", ignore=shutil.ignore_patterns("__pycache__"))
    )
    text = (source / "build.py").read_text()
    listed = next(line for line in text.splitlines() if line.startswith("SOURCES = "))
    (source / "build.py").write_text(text.replace(listed, 'SOURCES = ["kernels/advance.cu"]'))
    target = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--target"]
    environment = os.environ | {build.ARCHITECTURES: "80"}
    subprocess.run([*command, str(target), str(source)], env=environment, check=True, capture_output=True)
    assert not list(source.glob("compiled")) and (target / "cuda_ext" / "csrc" / "kernels" / "gemm.cu").exists()

    def found(architectures: str) -> str:
        code = f"import sys; sys.path.insert(0, {str(target)!r}); import cuda_ext.build as b; print(b.__file__);"
        code += f"print(b._installed({architectures!r}.split()))"
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
        where, library = done.stdout.splitlines()
        assert where.startswith(str(target))
        return library

    assert found("80") == str(target / "cuda_ext" / "compiled" / build.LIBRARY) and Path(found("80")).exists()
    assert found("80 90a") == "None"
    with (target / "cuda_ext" / "csrc" / "kernels" / "advance.cu").open("a") as file:
        file.write("// changed")
    assert found("80") == "None"


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
