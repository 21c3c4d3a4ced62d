"""compute-sanitizer over tests/gpu/sanitize.py: stray accesses, races in shared memory, uninitialised reads."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cuda_ext.engine import DECODE

TOOL = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible to torch"),
    pytest.mark.skipif(TOOL is None, reason="compute-sanitizer is not installed"),
]
SCRIPT = Path(__file__).parent / "sanitize.py"
PROBE = "import torch; torch.zeros(8, device='cuda').add_(1); torch.cuda.synchronize()"


def under(tool: str, *program: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    """Three modes of a tool fit the limit that benchmarks/gpu_all.py gives them; what was said before it is shown."""
    assert TOOL is not None
    command = [TOOL, "--tool", tool, "--error-exitcode", "86", "--print-limit", "5", *_OPTIONS.get(tool, [])]
    environment = dict(os.environ, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    try:
        return subprocess.run(
            [*command, sys.executable, *program],
            env=environment,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired as late:
        said = b"".join(part for part in (late.stdout, late.stderr) if isinstance(part, bytes))
        pytest.fail(f"no end within {timeout:.0f} s: {said.decode(errors='replace')[-3000:] or 'no output'}")


_OPTIONS = {"memcheck": ["--padding", "64"], "racecheck": ["--racecheck-report", "all"]}


@pytest.fixture(scope="module")
def _tool_works() -> None:
    """On some machines (under gVisor, say) the tool refuses the device."""
    probe = under("memcheck", "-c", PROBE)
    if probe.returncode != 0:
        pytest.skip(f"compute-sanitizer does not work here: {(probe.stdout + probe.stderr).strip()[-300:]}")


@pytest.mark.usefixtures("_tool_works")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck"])
@pytest.mark.parametrize("mode", DECODE)
def test_no_findings(tool: str, mode: str) -> None:
    done = under(tool, str(SCRIPT), mode)
    assert "sanitize: done" in done.stdout, (done.stdout + done.stderr)[-3000:]
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
