"""All tests of kernels once more, as AddressSanitizer and UBSan builds: no stray access, no undefined step."""

import shutil
from pathlib import Path

import pytest

from cuda_ext import host_build
from cuda_ext.host_build import run_sanitized

pytestmark = pytest.mark.host_runtime
HERE = Path(__file__).parent
# What these test is the machinery around the kernels, with faults made on purpose.
NOT_HERE = ("test_sanitized.py", "test_mutations.py", "test_host_runtime.py", "test_build.py")
NOT_HERE += ("test_ptx.py", "test_ptx_kernels.py", "test_ptx_mutations.py")
PYTEST = ("-q", "-x", "-p", "no:cacheprovider")


@pytest.mark.slow
@pytest.mark.parametrize("sanitize", ["address", "undefined"])
def test_kernels_under_a_sanitizer(sanitize: str) -> None:
    files = [str(path) for path in sorted(HERE.glob("test_*.py")) if path.name not in NOT_HERE]
    assert files, "no tests of kernels"
    result = run_sanitized(["-m", "pytest", *PYTEST, *files], sanitize, timeout=1800)
    assert result.returncode == 0, (result.stdout + result.stderr)[-8000:]


@pytest.mark.slow
def test_one_row_too_many_is_found(tmp_path: Path) -> None:
    """It would change no result: the row that gemm reads behind the last one feeds outputs that are not written."""
    csrc = Path(shutil.copytree(host_build.CSRC, tmp_path / "csrc"))
    kernel = csrc / "kernels" / "gemm.cu"
    text = kernel.read_text()
    assert "from < (of_a ? p.m : p.n)" in text
    kernel.write_text(text.replace("from < (of_a ? p.m : p.n)", "from <= (of_a ? p.m : p.n)"))
    arguments = [*PYTEST, "-s", str(HERE / "test_gemm.py"), "-k", "any_order"]
    program = f"""if True:
        import pathlib, sys, pytest
        from cuda_ext import host_build
        host_build.CSRC = pathlib.Path({str(csrc)!r})
        sys.exit(pytest.main({arguments!r}))
    """
    result = run_sanitized(["-c", program], "address")
    assert result.returncode != 0
    assert "heap-buffer-overflow" in result.stderr
