"""`pip install ./cuda_ext`: the package, and the kernels compiled into it where nvcc is.

Without nvcc the package is installed all the same and compiles on first use, or says what is missing.
"""

import sys
import types
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent
# cuda_ext/__init__.py needs torch, which an isolated build has not; the build itself does not.
package = types.ModuleType("cuda_ext")
package.__path__ = [str(HERE)]
sys.modules["cuda_ext"] = package

from cuda_ext import build  # noqa: E402
from cuda_ext.errors import CudaExtError  # noqa: E402


class BuildKernels(build_py):
    def run(self) -> None:
        super().run()
        try:
            build.find_nvcc()
        except CudaExtError as error:
            print(f"the kernels are not compiled now: {error}", file=sys.stderr)
            return
        build.install(Path(self.build_lib).resolve() / "cuda_ext")


setup(cmdclass={"build_py": BuildKernels}, has_ext_modules=lambda: True)
