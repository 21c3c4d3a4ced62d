"""A trace of `torch.profiler` as a file: modules by their names, small enough to open, its stacks added up."""

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

Event = dict[str, Any]
"""One event of Chrome's trace format."""
SIZE_LIMIT = 20_000_000
"""Bytes a trace stays below: larger ones choke the viewers, which hold all of it in memory."""
_MODULE = "nn.Module: "
_KINDS = {
    "python_function": "Python",
    "user_annotation": "range",
    "cpu_op": "operator",
    "cuda_runtime": "CUDA call",
    "cuda_driver": "CUDA call",
    "kernel": "kernel",
    "gpu_memcpy": "kernel",
    "gpu_memset": "kernel",
}


class Frame(NamedTuple):
    """One level of a call stack."""

    kind: str
    """`range`, `module`, `Python`, `operator`, `CUDA call`, `kernel` or `node`."""
    name: str


Stack = tuple[Frame, ...]
"""Frames from the outermost in."""
Folded = dict[Stack, float]
"""Milliseconds spent in each stack itself, without those that go on from it; in order of first appearance."""


def module_calls(model: torch.nn.Module, run: Callable[[], object]) -> list[tuple[str, str]]:
    """Class and name (`transformer.h.3.attn`) of each module that `run` calls, in order; the model's own name is ''."""
    names = {id(module): name for name, module in model.named_modules()}
    calls: list[tuple[str, str]] = []

    def note(module: torch.nn.Module, _: object) -> None:
        if id(module) in names:
            calls.append((type(module).__name__, names[id(module)]))

    hook = torch.nn.modules.module.register_module_forward_pre_hook(note)
    try:
        run()
    finally:
        hook.remove()
    return calls


def name_modules(events: Iterable[Event], calls: Sequence[tuple[str, str]]) -> None:
    """Give the modules of a trace, which knows them as `Attention_3`, their names in the model, in place.

    `calls` are those of one step, and each step in the trace makes the same. Where it does not, all stay as they are.
    """
    found = [event for event in events if event.get("cat") == "python_function" and event["name"].startswith(_MODULE)]
    found.sort(key=lambda event: event["ts"])
    names: dict[str, str] = {}
    for index, event in enumerate(found if calls else ()):
        kind, path = calls[index % len(calls)]
        numbered = event["name"].removeprefix(_MODULE)
        if numbered.rpartition("_")[0] != kind or names.setdefault(numbered, path or kind) != (path or kind):
            return
    for event in found:
        numbered = event["name"].removeprefix(_MODULE)
        event["name"] = _MODULE + names.get(numbered, numbered)


def save_trace(trace: Mapping[str, Any], path: Path, phase: str, limit: int = SIZE_LIMIT) -> str:
    """Write a trace below `limit` bytes, and return in words what had to be left out, or nothing.

    The last steps go first (but one), then Python functions, then all the rest, the shortest first.
    """
    head = json.dumps({key: value for key, value in trace.items() if key != "traceEvents"}, separators=(",", ":"))
    start, end = head[:-1] + ("," if len(head) > 2 else "") + '"traceEvents":[\n', "\n]}\n"
    lines = [(event, json.dumps(event, separators=(",", ":"))) for event in trace["traceEvents"]]
    room = limit - len(start) - len(end)
    size = sum(len(line) + 2 for _, line in lines)
    left_out = []

    steps = sorted(event["ts"] + event["dur"] for event in ranges(trace["traceEvents"], phase))
    kept = len(steps)
    while size >= room and kept > 1:
        kept -= 1
        lines = [(event, line) for event, line in lines if event.get("ph") == "M" or event["ts"] <= steps[kept - 1]]
        size = sum(len(line) + 2 for _, line in lines)
    if kept < len(steps):
        left_out.append(f"the last {len(steps) - kept} of {len(steps)} steps")

    if size >= room:
        # A caller is no shorter than what it calls, and begins before it: stacks lose their inner ends.
        order = sorted(
            (index for index, (event, _) in enumerate(lines) if event.get("ph") != "M"),
            key=lambda index: (
                lines[index][0].get("cat") != "python_function",
                lines[index][0].get("dur", 0),
                -lines[index][0]["ts"],
            ),
        )
        dropped: set[int] = set()
        for index in order:
            if size < room:
                break
            size -= len(lines[index][1]) + 2
            dropped.add(index)
        python = sum(lines[index][0].get("cat") == "python_function" for index in dropped)
        left_out.append(f"the {python:,} shortest Python calls")
        if python < len(dropped):
            left_out.append(f"the {len(dropped) - python:,} shortest other events")
        lines = [line for index, line in enumerate(lines) if index not in dropped]
    path.write_text(start + ",\n".join(line for _, line in lines) + end, encoding="ascii")
    return ", ".join(left_out)


def ranges(events: Iterable[Event], phase: str) -> list[Event]:
    """The steps of a phase: its `record_function` ranges on the CPU."""
    return [event for event in events if event.get("cat") == "user_annotation" and event["name"] == phase]


def fold(events: Sequence[Event], phase: str) -> tuple[Folded, Folded]:
    """The time in each stack below the ranges of `phase`: on the CPU, and on the GPU by what launched the kernel.

    Torch's own Python functions and built-ins are left out: its modules and operators tell what it does.
    """
    own: dict[Stack, float] = defaultdict(float)
    launched: dict[int, Stack] = {}
    threads = {event["tid"] for event in ranges(events, phase)}
    spans = [event for event in events if event.get("ph") == "X" and event.get("cat") in _KINDS]
    on_cpu = [event for event in spans if event["tid"] in threads and _KINDS[event["cat"]] != "kernel"]
    open_: list[tuple[float, Stack]] = []
    for event in sorted(on_cpu, key=lambda event: (event["ts"], -event["dur"])):
        while open_ and open_[-1][0] <= event["ts"]:
            open_.pop()
        frame = _frame(event)
        if not open_ and frame != Frame("range", phase):
            continue
        outer_end, outer = open_[-1] if open_ else (float("inf"), ())
        end = min(event["ts"] + event["dur"], outer_end)  # times are rounded
        stack = (*outer, frame) if frame else outer
        own[stack] += (end - event["ts"]) / 1000
        if outer:
            own[outer] -= (end - event["ts"]) / 1000
        open_.append((end, stack))
        if "correlation" in event.get("args", {}):
            launched[event["args"]["correlation"]] = stack
    gpu: dict[Stack, float] = defaultdict(float)
    for event in sorted(spans, key=lambda event: event["ts"]):
        if _KINDS[event["cat"]] == "kernel" and (by := launched.get(event["args"].get("correlation"))):
            gpu[(*by, Frame("kernel", event["name"]))] += event["dur"] / 1000
    return {stack: max(0.0, time) for stack, time in own.items()}, dict(gpu)


def _frame(event: Event) -> Frame | None:
    """The event as a level of a stack, if it is worth one."""
    kind, name = _KINDS[event["cat"]], event["name"]
    if kind != "Python":
        return Frame(kind, name)
    if name.startswith(_MODULE):
        return Frame("module", name.removeprefix(_MODULE))
    place = re.fullmatch(r"(.+)\((\d+)\): (.+)", name)
    if place is None or re.search(r"(^|/)torch/|(^|/)eval/profiling\.py$", place[1]):
        return None
    return Frame("Python", f"{place[3]} · {place[1]}:{place[2]}")


def fold_nodes(phase: str, nodes: Iterable[tuple[str, str, float]]) -> Folded:
    """Nodes of an OpenVINO graph (name, type, ms) as stacks: the module that a node's name tells, then the node."""
    folded: Folded = defaultdict(float)
    for name, kind, ms in nodes:
        modules: Stack = ()
        if place := re.match(r"__module\.([^/]+)/", name):
            # `h.3` is one level: the list of layers is never called.
            ends = [end.end() for end in re.finditer(r"[^.]+(\.\d+)*", place[1])]
            modules = tuple(Frame("module", place[1][:end]) for end in ends)
        if ms > 0:
            folded[(Frame("range", phase), *modules, Frame("node", f"{kind} · {name.rpartition('/')[2]}"))] += ms
    return dict(folded)


def by_module(folded: Folded) -> dict[str, float]:
    """Milliseconds in each module itself, without those of the modules in it; longest first."""
    own: dict[str, float] = defaultdict(float)
    for stack, time in folded.items():
        modules = [frame.name for frame in stack if frame.kind == "module"]
        if modules:
            own[modules[-1]] += time
    return dict(sorted(own.items(), key=lambda item: -item[1]))


def allocated_peak(events: Sequence[Event], phase: str, on_gpu: bool) -> int:
    """Bytes that torch held at once, above what it held when the phase began, at most."""
    steps = ranges(events, phase)
    if not steps:
        return 0
    begin, end = min(step["ts"] for step in steps), max(step["ts"] + step["dur"] for step in steps)
    held = peak = 0
    changes = [
        event
        for event in events
        if event["name"] == "[memory]" and begin <= event["ts"] <= end and event["args"]["Device Type"] == int(on_gpu)
    ]
    for event in sorted(changes, key=lambda event: event["ts"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak
