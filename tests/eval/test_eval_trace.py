"""Traces cut to size, stacks added up, flame graphs: against torch's own sums, hand-made events, and a browser."""

import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
import torch
from browser import Browser
from torch.profiler import ProfilerActivity, record_function

from eval.flame import flame_graph
from eval.operators import operators_of
from eval.trace import (
    Folded,
    Frame,
    allocated_peak,
    by_module,
    fold,
    fold_nodes,
    module_calls,
    name_modules,
    ranges,
    save_trace,
)

STEPS = 3
SVG = "{http://www.w3.org/2000/svg}"


class Twice(torch.nn.Module):
    """Calls its second layer before the first, and that twice."""

    def __init__(self) -> None:
        super().__init__()
        self.h = torch.nn.ModuleList([torch.nn.Linear(7, 7), torch.nn.Linear(7, 7)])
        self.norm = torch.nn.LayerNorm(7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.h[0](self.norm(self.h[1](self.h[0](x))))


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> tuple[torch.profiler.profile, dict[str, Any]]:
    """A real trace of `STEPS` steps, and the profiler that made it."""
    path = tmp_path_factory.mktemp("trace") / "x.json"
    model, x = Twice(), torch.ones(1, 7)
    with torch.profiler.profile(activities=[ProfilerActivity.CPU], with_stack=True, profile_memory=True) as profiler:
        x + 1  # before the steps
        for _ in range(STEPS):
            with record_function("decode"):
                model(x)
    profiler.export_chrome_trace(str(path))
    trace = json.loads(path.read_text())
    name_modules(trace["traceEvents"], module_calls(model, lambda: model(x)))
    return profiler, trace


def test_modules_have_their_names_although_called_in_another_order(traced) -> None:
    found = [e for e in traced[1]["traceEvents"] if e["name"].startswith("nn.Module: ")]
    called = [e["name"].removeprefix("nn.Module: ") for e in sorted(found, key=lambda e: e["ts"])]
    assert called == ["Twice", "h.0", "h.1", "norm", "h.0"] * STEPS


def test_modules_keep_their_numbers_where_the_calls_are_others() -> None:
    names = ["nn.Module: A_0", "nn.Module: B_0", "nn.Module: A_1"]
    for calls in ([("A", "x")], [("A", "x"), ("B", "y"), ("B", "z")], []):
        events = [{"cat": "python_function", "name": name, "ts": i} for i, name in enumerate(names)]
        name_modules(events, calls)
        assert [e["name"] for e in events] == names


def test_folded_stacks_agree_with_the_profilers_own_sums(traced) -> None:
    profiler, trace = traced
    cpu, gpu = fold(trace["traceEvents"], "decode")
    assert gpu == {} and {stack[0] for stack in cpu} == {Frame("range", "decode")}
    steps = ranges(trace["traceEvents"], "decode")
    assert len(steps) == STEPS
    assert sum(cpu.values()) == pytest.approx(sum(e["dur"] for e in steps) / 1000)
    python = {e["name"] for e in trace["traceEvents"] if e.get("cat") == "python_function"}
    operators, _ = operators_of(e for e in profiler.events() if e.name not in python)
    expected = {op.name: op.cpu_ms for op in operators}
    for name in ("aten::addmm", "aten::native_layer_norm"):
        own = sum(time for stack, time in cpu.items() if stack[-1] == Frame("operator", name))
        assert own == pytest.approx(expected[name], rel=0.02)
    path = [frame for frame in next(s for s in cpu if s[-1].name == "aten::addmm") if frame.kind != "Python"]
    assert path == [
        ("range", "decode"),
        ("module", "Twice"),
        ("module", "h.0"),
        ("operator", "aten::linear"),
        ("operator", "aten::addmm"),
    ]
    assert set(by_module(cpu)) == {"Twice", "h.0", "h.1", "norm"}


def span(cat: str, name: str, ts: float, dur: float, tid: int = 1, **args: object) -> dict[str, Any]:
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "tid": tid, "args": args}


def test_gpu_time_stands_under_what_launched_it() -> None:
    events = [
        span("python_function", "main.py(3): <module>", 0, 900),
        span("user_annotation", "prefill", 100, 500),
        span("python_function", "torch/nn/functional.py(9): linear", 110, 300),
        span("python_function", "nn.Module: h.0", 120, 200),
        span("cpu_op", "aten::mm", 150, 100),
        span("cuda_runtime", "cudaLaunchKernel", 160, 20, correlation=7),
        span("kernel", "gemm<float>", 400, 3000, tid=70, correlation=7),
        span("kernel", "of the warm-up", 50, 10, tid=70, correlation=5),
        span("cpu_op", "aten::mm", 700, 10),  # after the step
        span("cpu_op", "aten::other", 200, 10, tid=2),  # another thread
    ]
    cpu, gpu = fold(events, "prefill")
    step, module = Frame("range", "prefill"), Frame("module", "h.0")
    mm, launch = Frame("operator", "aten::mm"), Frame("CUDA call", "cudaLaunchKernel")
    assert gpu == {(step, module, mm, launch, Frame("kernel", "gemm<float>")): 3.0}
    assert cpu == pytest.approx(
        {(step,): 0.3, (step, module): 0.1, (step, module, mm): 0.08, (step, module, mm, launch): 0.02}
    )
    assert by_module(gpu) == {"h.0": 3.0}


def test_allocated_peak() -> None:
    def change(ts: float, size: int, kind: int = 0) -> dict[str, Any]:
        return {"ph": "i", "name": "[memory]", "ts": ts, "args": {"Bytes": size, "Device Type": kind}}

    events = [change(5, 9999), span("user_annotation", "decode", 10, 5), span("user_annotation", "decode", 20, 5)]
    events += [change(21, 50), change(11, 100), change(12, 30), change(13, -100), change(14, 7, 1), change(30, 500)]
    assert allocated_peak(events, "decode", on_gpu=False) == 130
    assert allocated_peak(events, "decode", on_gpu=True) == 7
    assert allocated_peak(events, "prefill", on_gpu=False) == 0


def test_nodes_of_a_graph_stand_under_their_modules() -> None:
    nodes = [("__module.transformer.h.3.attn/aten::x/MatMul", "FC jit", 2.0), ("beam", "Gather", 1.0), ("z", "T", 0.0)]
    step = Frame("range", "decode")
    modules = [Frame("module", name) for name in ("transformer", "transformer.h.3", "transformer.h.3.attn")]
    assert fold_nodes("decode", nodes) == {
        (step, *modules, Frame("node", "FC jit · MatMul")): 2.0,
        (step, Frame("node", "Gather · beam")): 1.0,
    }


def test_a_trace_is_cut_by_steps_then_by_the_shortest_calls(traced, tmp_path: Path) -> None:
    trace, path = traced[1], tmp_path / "x.json"
    assert save_trace(trace, path, "decode") == ""
    whole = path.stat().st_size
    assert json.loads(path.read_text()) == trace

    assert save_trace(trace, path, "decode", limit=whole) == "the last 1 of 3 steps"
    cut = json.loads(path.read_text())["traceEvents"]
    assert path.stat().st_size < whole and len(ranges(cut, "decode")) == 2
    last = max(e["ts"] + e["dur"] for e in ranges(cut, "decode"))
    assert cut == [e for e in trace["traceEvents"] if e["ph"] == "M" or e["ts"] <= last]

    for limit in (whole // 5, whole // 20):
        said = save_trace(trace, path, "decode", limit=limit)
        assert re.match(r"the last 2 of 3 steps, the \d+ shortest Python calls", said)
        assert ("other events" in said) == (limit == whole // 20)
        kept = json.loads(path.read_text())["traceEvents"]
        assert 0.8 * limit < path.stat().st_size < limit
        assert len(ranges(kept, "decode")) == 1
        # Callers stay while what they call goes.
        ids = {e["args"]["Python id"] for e in kept if e.get("cat") == "python_function"}
        assert {e["args"]["Python parent id"] for e in kept if e.get("cat") == "python_function"} <= ids | {None}


def boxes(panel: list[ET.Element]) -> list[tuple[str, float, float, float]]:
    """Title, left, top and width of each frame."""
    rects = [(group.findtext(f"{SVG}title") or "", group.find(f"{SVG}rect")) for group in panel]
    return [
        (title, *(float(rect.get(key) or "nan") for key in ("x", "y", "width")))
        for title, rect in rects
        if rect is not None
    ]


FOLDED: Folded = {
    (Frame("range", "decode"), Frame("module", "m")): 1.0,
    (Frame("range", "decode"), Frame("module", "m"), Frame("module", "m.h.0"), Frame("operator", "aten::mm")): 30.0,
    (Frame("range", "decode"), Frame("module", "m"), Frame("module", "m.h.1"), Frame("operator", "aten::mm")): 50.0,
    (Frame("range", "decode"), Frame("Python", 'f<"x" & y> · a.py:3')): 18.99,
    (Frame("range", "decode"), Frame("Python", "tiny · a.py:4")): 0.01,
}


def test_flame_graph_is_a_drawing_to_scale_that_needs_nothing_else() -> None:
    source = flame_graph(FOLDED, "a <b> & c")
    root = ET.fromstring(source)
    tags = {element.tag.removeprefix(SVG) for element in root.iter()}
    assert tags == {"svg", "title", "desc", "style", "path", "text", "g", "rect"}
    assert "href" not in source and "url(" not in source and source.count("http") == 1  # the name space
    assert root.findtext(f"{SVG}title") == "a <b> & c"
    assert "100.000 ms in all" in (root.findtext(f"{SVG}desc") or "")
    assert "2 frames too narrow to see are left out" in (root.findtext(f"{SVG}desc") or "")

    drawn = boxes(root.findall(f"{SVG}g"))
    first = {title.partition("\n")[0]: (left, top, width) for title, left, top, width in reversed(drawn)}
    scale = first["decode"][2] / 100
    assert first["m"][2] == pytest.approx(81 * scale, abs=0.02)
    assert first["m.h.0"] == pytest.approx((10, first["m"][1] + 18, 30 * scale), abs=0.02)
    assert first["m.h.1"][0] == pytest.approx(10 + 30 * scale, abs=0.02)
    assert first['f<"x" & y> · a.py:3'][:2] == pytest.approx((10 + 81 * scale, first["m"][1]), abs=0.02)
    assert "tiny · a.py:4" not in first
    added_up = [box for box in drawn if box[0].startswith("m.h.*\n")]
    assert [box[0] for box in added_up] == ["m.h.*\nmodule: 80.000 ms, 80.0%"]
    assert added_up[0][3] == pytest.approx(80 * scale, abs=0.02)

    labels = [text.text or "" for text in root.iter(f"{SVG}text")]
    assert {"h.0", "h.1", "h.*", "mm", "All layers added up"} <= set(labels)  # shorter than their names
    height = float(root.get("height") or 0)
    assert all(left >= 0 and left + width <= 1600 and top + 18 <= height for _, left, top, width in drawn)


def test_flame_graph_of_nothing() -> None:
    ET.fromstring(flame_graph({}, "empty"))


def test_browser_draws_the_flame_graph(browser: Browser, tmp_path: Path) -> None:
    """Labels stay inside their frames with the fonts that the browser has."""
    source = flame_graph({(Frame("range", "decode"), Frame("module", "W" * 400)): 100.0} | FOLDED, "x")
    page = tmp_path / "x.html"
    page.write_text(f"<!doctype html><meta charset=utf-8><body>{source}", encoding="utf-8")
    browser.open(page)
    shares = browser.ask(
        "[...document.querySelectorAll('g')].filter(g => g.querySelector('text'))"
        ".map(g => g.querySelector('text').getBBox().width / g.querySelector('rect').getBBox().width)"
    )
    assert len(shares) > 8 and 0.5 < max(shares) < 1
