"""Every kernel's plain entry point as one library for this machine's GPUs: python tests/gpu/shims.py builds it.

Kept in the build cache, so the tests that load it need not wait for nvcc.
"""

import hashlib
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from cuda_ext import build

SHIM = Path(__file__).parents[1] / "cuda_ext" / "shims" / "ops.cpp"


def shim_library() -> Path:
    """The library, compiled if it is not there yet, one nvcc a source. Raises CudaExtError."""
    architectures = build.wanted_architectures()
    nvcc = build.find_nvcc()
    path = build.cache_folder() / f"shims-{build.key(architectures, hashlib.sha256(SHIM.read_bytes()).hexdigest())}.so"
    if path.exists():
        return path
    targets = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in architectures]
    sources = [*(f"kernels/{name}.cu" for name in build.KERNELS), str(SHIM)]
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch, ThreadPoolExecutor() as pool:
        objects = [f"{scratch}/{Path(source).stem}.o" for source in sources]

        def compile_one(source: str, target: str) -> None:
            build._run([nvcc, *build.FLAGS, *targets, "-I.", "-c", source, "-o", target])

        list(pool.map(compile_one, sources, objects))
        part = Path(scratch) / path.name
        build._run([nvcc, "-shared", "-cudart", "static", *objects, "-o", str(part)])
        part.rename(path)
    return path


if __name__ == "__main__":
    print(shim_library())
