"""Memory of one engine, read in a process of its own: a process that did other things tells nothing."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch

from eval.engine import Engine
from eval.errors import WorkError
from eval.results import Memory


@torch.no_grad()
def exercise(load: Callable[[], Engine], prompt: torch.Tensor, new_tokens: int) -> Memory:
    """Load an engine, read `prompt` (`[batch, length]` int64), write `new_tokens` greedily, tell the memory.

    To be called in a fresh process, with the libraries imported and no model loaded yet.
    """
    baseline_rss = psutil.Process().memory_info().rss
    engine = load()
    token = engine.prefill(prompt).argmax(-1).cpu()
    for _ in range(new_tokens - 1):
        token = engine.decode(token).argmax(-1).cpu()
    engine.synchronize()
    return snapshot(baseline_rss, engine.device)


def snapshot(baseline_rss: int, device: str, pid: int | None = None) -> Memory:
    """Memory of this process, or on a CPU of process `pid`, now, and its peaks so far, in bytes.

    `device` is the engine's, as in `cuda:0`.

    `rss` counts pages shared with other processes, `uss` leaves them out, `pss` takes its share of them.
    `gpu_allocator_peak` is what torch handed out; only `gpu_process` has the CUDA context
    and what an extension allocated by itself.
    """
    full = psutil.Process(pid).memory_full_info()
    on_gpu = device.startswith("cuda")
    return Memory(
        peak_rss=max(_peak_rss(pid), full.rss),
        rss=full.rss,
        uss=full.uss,
        pss=getattr(full, "pss", None),
        baseline_rss=baseline_rss,
        gpu_allocator_peak=torch.cuda.max_memory_allocated(device) if on_gpu else None,
        gpu_process=_gpu_process(device) if on_gpu else None,
    )


def _peak_rss(pid: int | None) -> int:
    status = Path(f"/proc/{pid or 'self'}/status")
    if status.exists():
        # Not getrusage: its maximum is inherited from the parent through fork and exec.
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    if pid is not None:
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _gpu_process(device: str) -> int | None:
    """What the driver counts for this process on `device`; `None` where it does not tell.

    It does not in some containers, which see other process ids than the driver.
    """
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    try:
        # By UUID: NVML numbers all GPUs, torch only those in CUDA_VISIBLE_DEVICES.
        uuid = torch.cuda.get_device_properties(device).uuid
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        processes = pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
    except pynvml.NVMLError:
        return None
    finally:
        pynvml.nvmlShutdown()
    return next((process.usedGpuMemory for process in processes if process.pid == os.getpid()), None)


def memory_in_fresh_process(command: Sequence[str], timeout: float) -> Memory:
    """The `Memory` that a child process prints as JSON; see `in_fresh_process`."""
    record = in_fresh_process(command, timeout)
    try:
        return Memory(**record)
    except TypeError as error:
        raise WorkError(f"{_name(command)} printed no memory record: {error}") from error


def in_fresh_process(command: Sequence[str], timeout: float) -> dict[str, Any]:
    """Run `command` and return the JSON object that is the last line of its stdout.

    Raises `WorkError`, in one line, where the child cannot start, takes more than `timeout` seconds,
    fails (the line ends with the last one of its stderr) or prints something else. On a timeout or
    an interrupt the child and its children are killed.
    """
    try:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            errors="replace",
        )
    except OSError as error:
        raise WorkError(f"{_name(command)} cannot be started: {error.strerror}") from error
    try:
        stdout, stderr = child.communicate(timeout=timeout)
    except subprocess.TimeoutExpired as error:
        raise WorkError(f"{_name(command)} was stopped after {timeout:g} s without an answer") from error
    finally:
        _kill(child)
    if child.returncode:
        raise WorkError(f"{_name(command)} failed ({_ending(child.returncode)}): {_last_line(stderr)}")
    try:
        record = json.loads(_last_line(stdout))
    except ValueError:
        record = None
    if not isinstance(record, dict):
        raise WorkError(f"{_name(command)} should end with a line of JSON, not {_last_line(stdout)[:200]!r}")
    return record


def _kill(child: subprocess.Popen[str]) -> None:
    """End the child and its children; no harm where it has ended."""
    if child.poll() is None:
        process = psutil.Process(child.pid)
        for each in [*process.children(recursive=True), process]:
            try:
                each.kill()
            except psutil.NoSuchProcess:
                continue
        child.wait()
    for pipe in (child.stdout, child.stderr):
        if pipe is not None:
            pipe.close()


def _name(command: Sequence[str]) -> str:
    text = " ".join(command)
    return text if len(text) <= 120 else text[:117] + "..."


def _ending(code: int) -> str:
    return f"exit code {code}" if code > 0 else f"killed by signal {-code}"


def _last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")
