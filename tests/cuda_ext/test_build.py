"""The build without a GPU: what names it, what it refuses, and that spills are seen."""

import ctypes
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from cuda_ext import build, folders, host_build
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
        "error: nvcc was not found; install the CUDA toolkit (12.4 or later; 12.8 for Blackwell) or set CUDA_HOME"
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
    assert found("86 89 90a 120") == found("80")  # its machine code, or its PTX
    assert found("75 80") == "None"
    with (target / "cuda_ext" / "csrc" / "kernels" / "advance.cu").open("a") as file:
        file.write("// changed")
    assert found("80") == "None"


@pytest.mark.parametrize(
    ("wanted", "runs"),
    [("75", True), ("80", True), ("86", True), ("87", True), ("89", True), ("90a", True), ("100", False),
     ("103", False), ("121", True), ("130", True), ("72", False)],
)  # fmt: skip
def test_what_a_library_runs_on(wanted: str, runs: bool) -> None:
    """Later minor numbers of a generation run its machine code; what is newer than the PTX runs that."""
    assert build.runs_on(("75", "80", "90a", "120"), 120, wanted) == runs


def test_code_for_one_architecture_alone() -> None:
    assert build.runs_on(("90a",), None, "90a") and build.runs_on(("90",), None, "90a")
    assert not build.runs_on(("90a",), None, "91") and build.runs_on(("90a",), 90, "100")
    assert not build.runs_on(("86",), None, "80") and not build.runs_on(("80",), None, "90a")
    assert build.runs_on(("100f",), None, "103") and not build.runs_on(("103",), 103, "100")


def test_the_newest_architecture_comes_as_ptx_too(nvcc: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "SOURCES", ["kernels/advance.cu"])
    build._compile(nvcc, ["80", "90a"], tmp_path, tmp_path / "lib.so")
    content = (tmp_path / "lib.so").read_bytes()
    assert b".target sm_90" in content or b"compute_90" in content
    assert build._ptx_target(["75", "90a", "80"]) == "-gencode=arch=compute_90,code=compute_90"


def test_an_architecture_that_the_compiler_does_not_know(nvcc: str, tmp_path: Path) -> None:
    with pytest.raises(CudaExtError, match=r"knows no sm_999; `nvcc --list-gpu-code` tells which it does") as caught:
        build._compile(nvcc, ["999"], tmp_path, tmp_path / "lib.so")
    assert "\n" not in str(caught.value)


def test_a_compiler_that_is_too_old_says_which_would_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "_run", lambda command: "Cuda compilation tools, release 12.6, V12.6.20")
    build._check_version("nvcc", ["75", "80", "90a"])
    with pytest.raises(CudaExtError, match=r"nvcc 12\.6 is too old for sm_120, which needs 12\.8 or later"):
        build._check_version("nvcc", ["90a", "120"])


def wheel(folder: Path, error: str = "") -> Path:
    """Headers as a wheel of CUDA 13 brings them: cuBLAS's, beside all the others, of another version than nvcc's."""
    include = folder / "cu13" / "include"
    include.mkdir(parents=True)
    (include / "cublasLt.h").write_text(f'#include "cublas_api.h"\n#include <cuda_runtime_api.h>\n{error}\n')
    (include / "cublas_api.h").write_text("#define CUBLAS_VER_MAJOR 13\n")
    for name in ("cuda_runtime.h", "cuda_runtime_api.h", "crt/host_config.h"):
        (include / name).parent.mkdir(exist_ok=True)
        (include / name).write_text("#error CUDA compiler and CUDA toolkit headers are incompatible\n")
    return include / "cublasLt.h"


@pytest.mark.parametrize("fits", [True, False])
def test_headers_of_wheels_do_not_hide_the_toolkits(
    nvcc: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], fits: bool
) -> None:
    """The wheel's cuBLAS headers are found alone; where they do not compile either, the build goes on without."""
    header = wheel(tmp_path, "" if fits else "#error of another version")
    source = tmp_path / "user.cu"
    source.write_text(
        "#include <cuda_runtime.h>\n#ifdef HEADROOM_CUBLASLT\n#include HEADROOM_CUBLASLT\n"
        'extern "C" int version() { return CUBLAS_VER_MAJOR; }\n#else\nextern "C" int version() { return 0; }\n#endif\n'
    )
    monkeypatch.setattr(build, "_wheel_headers", lambda: [header])
    monkeypatch.setattr(build, "_CUBLASLT", str(source))
    monkeypatch.setattr(build, "SOURCES", [str(source)])
    build._compile(nvcc, ["80"], tmp_path, tmp_path / "lib.so")
    assert ctypes.CDLL(str(tmp_path / "lib.so")).version() == (13 if fits else 0)
    assert ("cuBLASLt is left out" in capsys.readouterr().err) != fits
    assert build.check(nvcc, ["80"]) == []


def test_places_that_are_not_ours_are_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A library must not be loaded from a folder that somebody else made, or may write to."""
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file" / "cache"))  # as read-only as can be
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folders._fresh.cache_clear()
    ours = tmp_path / f"headroom-cuda-{os.getuid()}"
    assert build.cache_folder() == ours == build.cache_folder() and ours.stat().st_mode & 0o777 == 0o700
    assert host_build.cache_folder() == tmp_path / f"headroom-host-{os.getuid()}"
    for spoil in (lambda: ours.chmod(0o770), lambda: replace_by_link(ours, tmp_path / "elsewhere")):
        spoil()
        other = build.cache_folder()
        assert other.parent == tmp_path and other != ours and other.stat().st_mode & 0o777 == 0o700
        assert build.cache_folder() == other  # the same for the rest of this process
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    assert build.cache_folder() == other  # made by another user
    folders._fresh.cache_clear()


def replace_by_link(folder: Path, target: Path) -> None:
    folder.rmdir()
    target.mkdir(mode=0o700)
    folder.symlink_to(target)


def test_no_place_at_all_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "file"))
    folders._fresh.cache_clear()
    with pytest.raises(CudaExtError, match="there is no place for compiled kernels: "):
        build.cache_folder()
    with pytest.raises(host_build.HostBuildError, match="there is no place for builds: "):
        host_build.cache_folder()


def test_a_library_in_a_read_only_cache_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv(build.ARCHITECTURES, "80")
    monkeypatch.setattr(build, "find_nvcc", lambda: "nvcc")
    monkeypatch.setattr(build, "_version", lambda nvcc: "V1")
    monkeypatch.setattr(folders, "cache_folder", lambda name: tmp_path / "elsewhere")
    held = folders.user_folder("cuda") / build.key(("80",), f"V1 {build._cublaslt_version()}") / build.LIBRARY
    held.parent.mkdir(parents=True)
    held.write_bytes(b"")
    assert build.library() == held


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
