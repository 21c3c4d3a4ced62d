"""Traces of prefill and of decode for TensorBoard and Perfetto, beside the same facts as numbers, tables and charts."""

import json
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, record_function, schedule, tensorboard_trace_handler

from eval.engine import Engine
from eval.errors import UserError, WorkError
from eval.latency import measure
from eval.memory import snapshot
from eval.operators import NodeTime, Operator, add_nodes, add_operators, markdown_table, operators_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TRACED_STEPS = 8
"""Decode steps in a trace at most: one looks like the next, and viewers choke on large files."""
_SUFFIX = ".profile"
_MIB = 2**20


def profile(
    engine: Engine,
    token_ids: np.ndarray,
    out: Path,
    *,
    name: str,
    prompt_tokens: int,
    new_tokens: int,
    scalars: Mapping[str, float] | None = None,
    figures: Mapping[str, "Figure"] | None = None,
) -> Path:
    """Profile an engine into the TensorBoard run `out/name`, and return that folder.

    The prompt is the first `prompt_tokens` of `token_ids` (`[tokens]`, integer). The folder gets

    - `prefill.TIME.pt.trace.json` and `decode.TIME.pt.trace.json`, traces of `torch.profiler` (Chrome's format) of one
      prefill and of up to `TRACED_STEPS` decode steps, after a warm-up, with shapes, memory and Python stacks;
    - an event file: median prefill and decode times of rounds without the profiler, peak memory before it
      started, tables and charts of the operators by their own time, the engine in words, and the `scalars`
      and `figures` given.

    An engine that is no PyTorch program leaves little in a trace. If it has a method
    `operator_times() -> list[tuple[name, type, ms]]` about its last inference, these get tables and charts
    too; if it tells them only when built for it, its method `for_profiling()` returns such an engine.

    What an earlier call wrote into the same folder is replaced. Raises `UserError` where TensorBoard
    is not installed, the folder cannot be written, or the lengths fit neither engine nor text;
    `WorkError` where the disk fills up.
    """
    summary_writer = _summary_writer()
    folder = _writable(out, name)
    timed = measure(
        {name: engine},
        prompt_pool=token_ids,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        min_count=3,
        min_seconds=0,
        warmup=1,
    )[name]
    memory = snapshot(0, engine.device)
    numbers = {
        "latency/prefill_ms": 1000 * timed.prefill.p50,
        "latency/decode_ms_per_token": 1000 * timed.decode.p50,
        "memory/peak_rss_mib": memory.peak_rss / _MIB,
    }
    if memory.gpu_allocator_peak is not None:
        numbers["memory/gpu_allocator_peak_mib"] = memory.gpu_allocator_peak / _MIB

    # Elsewhere first: a TensorBoard that watches the folder would read half of a trace and never look again.
    with tempfile.TemporaryDirectory() as staging:
        try:
            with summary_writer(staging, filename_suffix=_SUFFIX) as writer:
                writer.add_text("engine", _engine_table(engine, prompt_tokens, new_tokens))
                for tag, value in (numbers | dict(scalars or {})).items():
                    writer.add_scalar(tag, value)
                for tag, figure in (figures or {}).items():
                    writer.add_figure(tag, figure, close=False)
                _add_traces(writer, engine, token_ids[:prompt_tokens], new_tokens - 1, Path(staging))
            _replace(_written(folder), Path(staging), folder)
        except OSError as error:
            raise WorkError(f"{folder}: {error.strerror or error}; make room and profile again") from error
    return folder


def _summary_writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError("TensorBoard is not installed: pip install tensorboard torch-tb-profiler") from error
    return SummaryWriter


def _writable(out: Path, name: str) -> Path:
    if Path(name).name != name or name in ("", ".."):
        raise UserError(f"run name {name!r}: give the name of one folder, such as prune-fp16")
    folder = out / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror}; give an output folder that can be written") from error
    return folder


def _written(folder: Path) -> list[Path]:
    """What an earlier call left there."""
    patterns = ("prefill.*.pt.trace.json", "decode.*.pt.trace.json", f"events.out.tfevents.*{_SUFFIX}")
    return [path for pattern in patterns for path in folder.glob(pattern)]


def _replace(earlier: Sequence[Path], staging: Path, folder: Path) -> None:
    """Move all files from `staging` into `folder`, then drop the earlier ones; all or nothing."""
    moves = [(path, folder / path.name) for path in _written(staging)]
    try:
        for source, target in moves:
            shutil.move(source, target)
    except OSError:
        for _, target in moves:
            target.unlink(missing_ok=True)
        raise
    for path in earlier:
        path.unlink()


def _add_traces(writer: Any, engine: Any, prompt_ids: np.ndarray, decode_steps: int, folder: Path) -> None:
    """Trace both phases, and write what the traces and the engine itself tell about operators."""
    if hasattr(engine, "for_profiling"):
        engine = engine.for_profiling()
    prompt = torch.from_numpy(np.asarray(prompt_ids, dtype=np.int64))[None]
    runs: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], int]] = {
        "prefill": (lambda _: engine.prefill(prompt), 1),
        "decode": (engine.decode, min(decode_steps, TRACED_STEPS)),
    }
    for phase, (run, steps) in runs.items():
        operators, kernels = _trace(engine, prompt, phase, run, steps, folder)
        add_operators(writer, f"operators/{phase}", operators)
        add_operators(writer, f"kernels/{phase}", kernels)
        if hasattr(engine, "operator_times"):
            add_nodes(writer, f"nodes/{phase}", [NodeTime(*each) for each in engine.operator_times()])


def _trace(
    engine: Engine,
    prompt: torch.Tensor,
    phase: str,
    run: Callable[[torch.Tensor], torch.Tensor],
    steps: int,
    folder: Path,
) -> tuple[list[Operator], list[Operator]]:
    """Write the trace of `steps` calls of `run`, each given the last one's token; return operators and kernels."""
    on_gpu = engine.device.startswith("cuda")
    with (
        torch.no_grad(),
        torch.profiler.profile(
            activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu,
            # The profiler's own warm-up step: its first events cost more than the later ones.
            schedule=schedule(wait=0, warmup=1, active=steps, repeat=1),
            on_trace_ready=tensorboard_trace_handler(str(folder), phase),
            record_shapes=True,
            profile_memory=True,
            with_stack=True,  # brings the modules as well
        ) as profiler,
    ):
        token = engine.prefill(prompt).argmax(-1).cpu()
        engine.synchronize()
        profiler.step()
        for _ in range(steps):
            with record_function(phase):
                token = run(token).argmax(-1).cpu()
                engine.synchronize()
            profiler.step()
    # By name: that an event is a Python function is said in the file by all versions of torch, by its objects in few.
    python = {event["name"] for event in _read(folder, phase) if event.get("cat") == "python_function"}
    return operators_of(event for event in profiler.events() or [] if event.name not in python)


def _read(folder: Path, phase: str) -> list[dict[str, Any]]:
    """The events of a trace, which the profiler may have cut off without a word."""
    try:
        (trace,) = folder.glob(f"{phase}.*.pt.trace.json")
        return json.loads(trace.read_bytes())["traceEvents"]
    except ValueError as error:
        raise WorkError(f"{folder}: no room for the trace of {phase}; make some and profile again") from error


def _engine_table(engine: Engine, prompt_tokens: int, new_tokens: int) -> str:
    facts = {
        "engine": engine.name,
        "device": engine.device,
        "precision": engine.precision,
        "compute": engine.compute,
        "context": str(engine.context),
        "prompt tokens": str(prompt_tokens),
        "new tokens": str(new_tokens),
        "torch": torch.__version__,
    }
    if engine.device.startswith("cuda"):
        facts["GPU"] = torch.cuda.get_device_name(engine.device)
    return markdown_table(("", "value"), list(facts.items()))
