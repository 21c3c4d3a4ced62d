"""Traces of prefill and of decode for TensorBoard and Perfetto, beside the same facts as numbers, tables and charts."""

import contextlib
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, record_function, schedule, tensorboard_trace_handler

from eval.engine import Engine
from eval.errors import UserError, WorkError
from eval.flame import flame_graph
from eval.latency import measure
from eval.operators import NodeTime, add_modules, add_nodes, add_operators, markdown_table, operators_of
from eval.trace import Folded, allocated_peak, by_module, fold, fold_nodes, module_calls, name_modules, save_trace

TRACED_STEPS = 8
"""Decode steps in a trace at most: one looks like the next, and viewers choke on large files."""
_SUFFIX = ".profile"
_PHASES = ("prefill", "decode")
_TITLES = {
    "cpu": "time on the CPU",
    "cuda": "time on the GPU, by what launched the kernel",
    "nodes": "time of the graph's nodes, a step",
}
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
) -> Path:
    """Profile an engine into the TensorBoard run `out/name`, and return that folder.

    The prompt is the first `prompt_tokens` of `token_ids` (`[tokens]`, integer). The folder gets

    - `prefill.TIME.pt.trace.json` and `decode.TIME.pt.trace.json`, traces of `torch.profiler` (Chrome's format) of one
      prefill and of up to `TRACED_STEPS` decode steps, after a warm-up, with shapes, memory, Python stacks and
      modules by name; each below `eval.trace.SIZE_LIMIT` bytes, and what had to go for that is said on stderr;
    - `prefill.cpu.svg` and the like, flame graphs of the same by place: `cpu`, `cuda`, `nodes`;
    - an event file: median prefill and decode times of rounds without the profiler, the peak of what torch
      allocated in each phase, tables and charts of operators and modules by their own time, the engine in words,
      and the `scalars` given.

    An engine that is no PyTorch program leaves little in a trace. If it has a method
    `operator_times() -> list[tuple[name, type, ms]]` about its steps since last asked, these get tables, charts and
    flame graphs too; if it tells them only when built for it, its method `for_profiling()` returns such an engine.

    What an earlier call wrote into the same folder is replaced. Raises `UserError` where TensorBoard
    is not installed, the folder cannot be written, or the lengths fit neither engine nor text;
    `WorkError` where the disk fills up.
    """
    with tensorboard_run(out, name) as (writer, folder):
        timed = measure(
            {name: engine},
            prompt_pool=token_ids,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            min_count=3,
            min_seconds=0,
            warmup=1,
        )[name]
        writer.add_text("engine", _engine_table(engine, prompt_tokens, new_tokens))
        numbers = {
            "latency/prefill_ms": 1000 * timed.prefill.p50,
            "latency/decode_ms_per_token": 1000 * timed.decode.p50,
        }
        for tag, value in (numbers | dict(scalars or {})).items():
            writer.add_scalar(tag, value)
        _add_traces(writer, engine, token_ids[:prompt_tokens], new_tokens - 1, folder, name)
    return out / name


@contextlib.contextmanager
def tensorboard_run(out: Path, name: str) -> Iterator[tuple[Any, Path]]:
    """A `SummaryWriter` and a folder whose files become the TensorBoard run `out/name`, instead of an earlier one's.

    All of them or, after an exception, none. Other files in `out/name` stay. Raises `UserError` where TensorBoard is
    not installed or the folder cannot be written, `WorkError` where the disk fills up.
    """
    summary_writer = _summary_writer()
    folder = _writable(out, name)
    # Elsewhere first: a TensorBoard that watches the folder would read half of a trace and never look again.
    with tempfile.TemporaryDirectory() as staging:
        try:
            with summary_writer(staging, filename_suffix=_SUFFIX) as writer:
                yield writer, Path(staging)
            _replace(_written(folder), Path(staging), folder)
        except OSError as error:
            raise WorkError(f"{folder}: {error.strerror or error}; make room and profile again") from error


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
    patterns = [f"events.out.tfevents.*{_SUFFIX}"]
    patterns += [
        f"{phase}.{kind}" for phase in _PHASES for kind in ("*.pt.trace.json", "cpu.svg", "cuda.svg", "nodes.svg")
    ]
    return [path for pattern in patterns for path in folder.glob(pattern)]


def _replace(earlier: Sequence[Path], staging: Path, folder: Path) -> None:
    """Put all files from `staging` into `folder` instead of the earlier ones; all or nothing."""
    # Copied under names that TensorBoard does not read, since it may watch.
    moves = [(path, folder / f".{index}.partial", folder / path.name) for index, path in enumerate(_written(staging))]
    try:
        for source, partial, _ in moves:
            shutil.move(source, partial)
    except OSError:
        for _, partial, _ in moves:
            partial.unlink(missing_ok=True)
        raise
    for path in earlier:
        path.unlink()
    for _, partial, target in moves:
        partial.rename(target)


def _add_traces(writer: Any, engine: Any, prompt_ids: np.ndarray, decode_steps: int, folder: Path, name: str) -> None:
    """Trace both phases, and write what the traces and the engine itself tell about operators."""
    if hasattr(engine, "for_profiling"):
        engine = engine.for_profiling()
    prompt = torch.from_numpy(np.asarray(prompt_ids, dtype=np.int64))[None]
    runs: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], int]] = {
        "prefill": (lambda _: engine.prefill(prompt), 1),
        "decode": (engine.decode, min(decode_steps, TRACED_STEPS)),
    }
    for phase, (run, steps) in runs.items():
        _add_trace(writer, engine, prompt, phase, run, steps, folder, name)


def _add_trace(
    writer: Any,
    engine: Any,
    prompt: torch.Tensor,
    phase: str,
    run: Callable[[torch.Tensor], torch.Tensor],
    steps: int,
    folder: Path,
    name: str,
) -> None:
    """Trace `steps` calls of `run`, each given the last one's token."""
    calls = []
    if isinstance(getattr(engine, "model", None), torch.nn.Module):
        token = engine.prefill(prompt).argmax(-1).cpu()
        calls = module_calls(engine.model, lambda: run(token))
    profiler = _trace(engine, prompt, phase, run, steps, folder)
    nodes = [NodeTime(*each) for each in engine.operator_times()] if hasattr(engine, "operator_times") else []
    trace, path = _read(folder, phase)
    events = trace["traceEvents"]
    # By name: that an event is a Python function is said in the file by all versions of torch, by its objects in few.
    python = {event["name"] for event in events if event.get("cat") == "python_function"}
    operators, kernels = operators_of(event for event in profiler.events() or [] if event.name not in python)
    add_operators(writer, f"operators/{phase}", operators)
    add_operators(writer, f"kernels/{phase}", kernels)
    name_modules(events, calls)
    cpu, gpu = fold(events, phase)
    add_modules(writer, f"modules/{phase}", by_module(gpu or cpu), "GPU" if gpu else "CPU")
    if peak := allocated_peak(events, phase, on_gpu=engine.device.startswith("cuda")):
        writer.add_scalar(f"memory/{phase}_peak_mib", peak / _MIB)
    add_nodes(writer, f"nodes/{phase}", nodes)
    places: dict[str, Folded] = {"cpu": cpu, "cuda": gpu, "nodes": fold_nodes(phase, nodes)}
    for place, folded in places.items():
        if folded:
            title = f"{name}, {phase}: {_TITLES[place]}"
            (folder / f"{phase}.{place}.svg").write_text(flame_graph(folded, title), encoding="utf-8")
    if left_out := save_trace(trace, path, phase):
        print(f"{name}: to stay small, the trace of {phase} lacks {left_out}", file=sys.stderr)
        writer.add_text(f"left out/{phase}", left_out)


def _trace(
    engine: Engine,
    prompt: torch.Tensor,
    phase: str,
    run: Callable[[torch.Tensor], torch.Tensor],
    steps: int,
    folder: Path,
) -> torch.profiler.profile:
    """Write the trace to `folder`."""
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
    return profiler


def _read(folder: Path, phase: str) -> tuple[dict[str, Any], Path]:
    """The trace and where it lies. The profiler may have cut it off without a word."""
    try:
        (path,) = folder.glob(f"{phase}.*.pt.trace.json")
        return json.loads(path.read_bytes()), path
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
