"""What this machine has: devices, instruction sets, and the precision that follows from them."""

import functools
import os
import platform
import re
from pathlib import Path
from typing import Any

import torch

_ISA_FLAGS = ("avx2", "fma", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_int8", "amx_bf16")


@functools.cache
def cpu() -> dict[str, Any]:
    """CPU model, the instruction-set flags that matter for inference, cores usable by this process."""
    model, flags = platform.processor() or platform.machine(), set()
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                model = value.strip()
            elif key.strip() == "flags":
                flags = set(value.split())
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {"model": model, "isa": [flag for flag in _ISA_FLAGS if flag in flags], "cores": cores}


def gpu() -> dict[str, Any] | None:
    """Name, memory in bytes and compute capability of the first CUDA device; `None` without one."""
    if not torch.cuda.is_available():
        return None
    props = torch.cuda.get_device_properties(0)
    return {
        "name": props.name,
        "memory": props.total_memory,
        "capability": f"{props.major}.{props.minor}",
        "cuda": torch.version.cuda,
        "driver": _driver(),
    }


PEAKS = {
    "T4": 65,
    "V100": 125,
    "L4": 121,
    "L40S": 362,
    "RTX 4090": 165,
    "A100": 312,
    "H100 PCIe": 756,
    "H100": 989,
    "H200": 989,
    "B200": 2250,
}
"""Dense TFLOPS with 16-bit inputs and FP32 sums, by NVIDIA's data sheets (FP16 where there is no bf16)."""


def peak_flops(name: str) -> float | None:
    """The peak of a GPU by its name, in FLOPs a second; `None` for one that is not in `PEAKS`."""
    found = [key for key in PEAKS if re.search(rf"\b{key}\b", name)]
    return 1e12 * PEAKS[max(found, key=len)] if found else None


MEMORIES = {
    "T4": 15,
    "V100": 32,
    "L4": 22,
    "L40S": 45,
    "RTX 4090": 24,
    "A100": 80,
    "H100 PCIe": 80,
    "H100": 80,
    "H200": 140,
    "B200": 179,
}
"""GiB that NVIDIA's driver reports of the largest card of that name."""


def memory(name: str) -> int | None:
    """Bytes of a GPU by its name, which may say how many GB; `None` for one that is not in `MEMORIES`."""
    said = re.search(r"\b(\d+) ?GB\b", name)
    found = [key for key in MEMORIES if re.search(rf"\b{key}\b", name)]
    if said:
        return int(said[1]) << 30
    return MEMORIES[max(found, key=len)] << 30 if found else None


def _driver() -> str | None:
    """The GPU driver's version; `None` where NVML is not there to tell."""
    try:
        import pynvml

        pynvml.nvmlInit()
        return str(pynvml.nvmlSystemGetDriverVersion())
    except Exception:  # no NVML library, or a container that hides it: not worth failing for
        return None


def why_no_gpu() -> str | None:
    """One phrase that says why GPU rows are absent; `None` where a GPU can be used."""
    if torch.cuda.is_available():
        return None
    if torch.version.cuda is None:
        return "this torch build has no CUDA support"
    return "no CUDA device is visible to torch"


def default_device() -> str:
    """`cuda:0` where a GPU is, else `cpu`."""
    return "cuda:0" if torch.cuda.is_available() else "cpu"


def cpu_has_bf16() -> bool:
    """Whether the CPU multiplies bf16 natively (AMX or AVX512-BF16); emulated bf16 is slower than FP32."""
    return bool({"amx_bf16", "avx512_bf16"} & set(cpu()["isa"]))


def autocast_dtype(device: str) -> torch.dtype | None:
    """The autocast dtype to train with on `device`; `None` means plain FP32."""
    if device.startswith("cuda"):
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return torch.bfloat16 if cpu_has_bf16() else None
