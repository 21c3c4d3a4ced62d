"""What works on this machine, and why the rest does not."""

import importlib.metadata
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.texts import ASSETS

_PACKAGES = {
    "torch": "everything",
    "transformers": "everything",
    "datasets": "texts from the Hub",
    "accelerate": "fine-tuning",
    "neural-compressor": "INT8 quantisation",
    "optimum-intel": "OpenVINO export",
    "openvino": "INT8 on the CPU",
    "matplotlib": "figures",
    "tensorboard": "profiles",
}


def diagnose() -> list[dict[str, Any]]:
    """Findings in order: `{"what", "works", "detail"}`. Nothing is downloaded or written."""
    checks: list[tuple[str, Callable[[], tuple[bool, str]]]] = [
        ("CPU", _cpu),
        ("GPU", _gpu),
        ("CUDA engine", _cuda_engine),
        ("OpenVINO", _openvino),
        ("embedded model", _embedded),
        ("Hub access", _hub),
        ("disk", _disk),
    ]
    found = [{"what": name, "works": works, "detail": detail} for name, (works, detail) in map(_package, _PACKAGES)]
    for what, check in checks:
        try:
            works, detail = check()
        except Exception as error:  # a broken installation fails in its own way; the doctor goes on
            works, detail = False, f"{type(error).__name__}: {error}"
        found.append({"what": what, "works": works, "detail": detail})
    return found


def format_findings(findings: list[dict[str, Any]]) -> str:
    """One line a finding."""
    return "\n".join(f"{'ok ' if f['works'] else 'NO '} {f['what']:<18} {f['detail']}" for f in findings)


def _package(name: str) -> tuple[str, tuple[bool, str]]:
    try:
        return name, (True, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return name, (False, f"not installed; needed for {_PACKAGES[name]}: pip install -r requirements.txt")


def _cpu() -> tuple[bool, str]:
    from pipeline import hardware

    cpu = hardware.cpu()
    bf16 = "bf16 in hardware" if hardware.cpu_has_bf16() else "no bf16 units: BF16 rows are left out"
    return True, f"{cpu['model']}, {cpu['cores']} cores, {' '.join(cpu['isa']) or 'no vector units known'}; {bf16}"


def _gpu() -> tuple[bool, str]:
    from pipeline import hardware

    gpu = hardware.gpu()
    if gpu is None:
        return False, f"{hardware.why_no_gpu()}; GPU rows are left out"
    return True, f"{gpu['name']}, {gpu['memory'] / 2**30:.0f} GiB, sm_{gpu['capability'].replace('.', '')}"


def _cuda_engine() -> tuple[bool, str]:
    from cuda_ext import CudaExtError, why_not
    from cuda_ext.build import find_nvcc

    try:
        compiler = find_nvcc()
    except CudaExtError as error:
        return False, str(error)
    reason = why_not()
    return reason is None, f"{reason or 'a GPU is here'}; kernels compile with {compiler}"


def _openvino() -> tuple[bool, str]:
    from pipeline.openvino_runtime import import_openvino

    devices = import_openvino().Core().available_devices
    return "CPU" in devices, f"devices {', '.join(devices)}"


def _embedded() -> tuple[bool, str]:
    path = ASSETS / "gpt2-mini" / "model.safetensors"
    if not path.exists():
        return False, f"{path} is missing; get the whole repository"
    return True, f"{path.stat().st_size / 1e6:.0f} MB"


def _hub() -> tuple[bool, str]:
    import socket
    import urllib.parse

    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False, "HF_HUB_OFFLINE is set; local folders and the embedded model work"
    host = urllib.parse.urlparse(constants.ENDPOINT)
    try:
        socket.create_connection((host.hostname, host.port or 443), timeout=3).close()
    except OSError as error:
        return False, f"{constants.ENDPOINT} not reached ({error}); local folders and the embedded model work"
    return True, constants.ENDPOINT


def _disk() -> tuple[bool, str]:
    free = shutil.disk_usage(Path.cwd()).free
    writable = os.access(Path.cwd(), os.W_OK)
    return writable and free > 2**30, f"{free / 2**30:.0f} GiB free here" + ("" if writable else ", not writable")
