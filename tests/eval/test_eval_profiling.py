"""Profiles of a tiny engine: the files, what TensorBoard makes of them, and what a browser shows."""

import gzip
import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from browser import Browser
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from eval.errors import UserError, WorkError
from eval.operators import add_nodes, markdown_table, operators_of
from eval.profiling import TRACED_STEPS, profile
from pipeline.engines.torch import TorchEngine
from pipeline.model import CompactGPT2Config, CompactGPT2LMHeadModel

KEPT = [[0, 2, 4], [0, 1, 2, 3, 4], [3]]
LAYERS, PROMPT, NEW = len(KEPT), 19, 4
NAME = "pruned-tiny"
TEXT = """(body => {
  body.querySelectorAll("script, style").forEach(node => node.remove());
  return body.textContent;
})(document.body.cloneNode(true))"""


def tiny_model(kept_heads: list[list[int]]) -> CompactGPT2LMHeadModel:
    shape = {"vocab_size": 101, "n_positions": 67, "n_embd": 40, "n_head": 5, "n_layer": len(kept_heads)}
    return CompactGPT2LMHeadModel(CompactGPT2Config(**shape, kept_heads=kept_heads, bos_token_id=0, eos_token_id=0))


def token_ids(count: int = 50) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 101, count)


def run_profile(out: Path, name: str = NAME, **changes: Any) -> Path:
    """Profile one layer of three heads."""
    lengths = {"prompt_tokens": PROMPT, "new_tokens": NEW}
    return profile(TorchEngine(tiny_model([[1, 2, 4]])), token_ids(), out, name=name, **(lengths | changes))


@pytest.fixture(scope="module")
def logdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A log folder with one profiled run."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("traces")
    folder = profile(
        TorchEngine(tiny_model(KEPT)),
        token_ids(),
        out,
        name=NAME,
        prompt_tokens=PROMPT,
        new_tokens=NEW,
        scalars={"quality/perplexity": 31.25},
    )
    assert folder == out / NAME
    torch.set_num_threads(threads)
    return out


def load_trace(folder: Path, phase: str) -> list[dict[str, Any]]:
    (path,) = folder.glob(f"{phase}.*.pt.trace.json")
    assert path.stat().st_size < 20e6
    return json.loads(path.read_text())["traceEvents"]


def inside(event: dict[str, Any], ranges: list[dict[str, Any]]) -> bool:
    return any(r["ts"] <= event["ts"] and event["ts"] + event["dur"] <= r["ts"] + r["dur"] for r in ranges)


@pytest.mark.parametrize(("phase", "steps"), [("prefill", 1), ("decode", NEW - 1)])
def test_trace_has_one_range_a_step_with_the_models_work_inside(logdir: Path, phase: str, steps: int) -> None:
    events = load_trace(logdir / NAME, phase)
    ranges = [e for e in events if e.get("cat") == "user_annotation" and e["name"] == phase]
    assert len(ranges) == steps
    assert not {"prefill", "decode"} - {phase} & {e["name"] for e in events}

    attention = [e for e in events if e["name"] == "aten::scaled_dot_product_attention"]
    assert len(attention) == steps * LAYERS  # the warm-up is outside the trace
    assert all(inside(e, ranges) for e in attention)
    lengths = [e["args"]["Input Dims"][0][2] for e in attention]
    assert lengths == [PROMPT if phase == "prefill" else 1] * len(attention)
    keys = [e["args"]["Input Dims"][1][2] for e in attention][::LAYERS]
    assert keys == ([PROMPT] if phase == "prefill" else [PROMPT + 1 + step for step in range(steps)])

    heads = Counter(e["args"]["Input Dims"][0][1] for e in attention)
    assert heads == {3: steps, 5: steps, 1: steps}
    modules = Counter(e["name"] for e in events if e["name"].startswith("nn.Module: "))
    names = {f"nn.Module: {name or 'CompactGPT2LMHeadModel'}" for name, _ in tiny_model(KEPT).named_modules()}
    assert modules == dict.fromkeys(names - {"nn.Module: transformer.h"}, steps)  # the list itself is never called
    assert any(e["name"] == "[memory]" for e in events)


def read_events(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder), size_guidance={"images": 0, "tensors": 0}).Reload()


def text(events: EventAccumulator, tag: str) -> str:
    (event,) = events.Tensors(f"{tag}/text_summary")
    return event.tensor_proto.string_val[0].decode()


def test_events_hold_scalars_charts_and_tables(logdir: Path) -> None:
    events = read_events(logdir / NAME)
    values = {tag: [e.value for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert values.pop("quality/perplexity") == [31.25]
    latencies, memory = {"prefill_ms", "decode_ms_per_token"}, {"prefill_peak_mib", "decode_peak_mib"}
    assert set(values) == {f"latency/{name}" for name in latencies} | {f"memory/{name}" for name in memory}
    assert all(len(each) == 1 and each[0] > 0 for each in values.values())
    # At least the keys and values of the prompt, and no more than a hundred times those.
    heads_kept = sum(map(len, KEPT))
    cache = 2 * heads_kept * 8 * PROMPT * 4 / 2**20
    assert cache <= values["memory/prefill_peak_mib"][0] < 100 * cache

    tags = {f"{what}/{phase}" for what in ("operators", "modules") for phase in ("prefill", "decode")}
    assert set(events.Tags()["images"]) == tags
    for tag in events.Tags()["images"]:
        (image,) = events.Images(tag)
        assert image.encoded_image_string.startswith(b"\x89PNG") and image.width > 300

    engine = text(events, "engine")
    for fact in ("torch", "cpu", "fp32", "FP32 weights, FP32 arithmetic", str(PROMPT), torch.__version__):
        assert f"| {fact}" in engine


@pytest.mark.parametrize(("phase", "steps"), [("prefill", 1), ("decode", NEW - 1)])
def test_table_agrees_with_the_trace(logdir: Path, phase: str, steps: int) -> None:
    table = text(read_events(logdir / NAME), f"operators/{phase}")
    header, _, *lines = table.splitlines()
    assert header == "| op | calls | self CPU ms | self CUDA ms | share |"
    rows = {name: cells for line in lines if line[:1] == "|" for name, *cells in [re.findall(r"[^|` ]+", line)]}
    trace = [e for e in load_trace(logdir / NAME, phase) if e.get("cat") == "cpu_op"]
    calls = Counter(e["name"] for e in trace)
    assert rows["aten::addmm"][0] == str(calls["aten::addmm"]) == str(steps * LAYERS * 4)
    assert {name: int(cells[0]) for name, cells in rows.items()} == {name: calls[name] for name in rows}

    # addmm calls nothing that takes long: its own time is close below its whole time, and never above.
    whole = sum(e["dur"] for e in trace if e["name"] == "aten::addmm") / 1000
    assert 0 < float(rows["aten::addmm"][1]) <= whole + 1e-3
    # All own times together are the time of the outermost operators.
    outermost, end = 0.0, 0.0
    for e in sorted(trace, key=lambda e: (e["ts"], -e["dur"])):
        if e["ts"] >= end:
            outermost, end = outermost + e["dur"] / 1000, e["ts"] + e["dur"]
    assert sum(float(cells[1]) for cells in rows.values()) == pytest.approx(outermost, rel=0.02)
    shares = [float(cells[3].rstrip("%")) for cells in rows.values()]
    assert shares == sorted(shares, reverse=True)
    assert sum(shares) == pytest.approx(100, abs=0.06 * len(shares))


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_modules_table_adds_up_to_the_model(logdir: Path, phase: str) -> None:
    lines = text(read_events(logdir / NAME), f"modules/{phase}").splitlines()
    assert lines[0] == "| module | self CPU ms | share |"
    cells = [re.findall(r"[^|` ]+", line) for line in lines[2:] if line[:1] == "|"]
    rows = {name: float(ms) for name, ms, _ in cells}
    assert {f"transformer.h.{layer}.attn.c_proj" for layer in range(LAYERS)} < set(rows)
    whole = [e["dur"] for e in load_trace(logdir / NAME, phase) if e["name"] == "nn.Module: CompactGPT2LMHeadModel"]
    assert sum(rows.values()) == pytest.approx(sum(whole) / 1000, rel=0.03)  # but for two that the table leaves out


def test_profiling_again_replaces_what_it_wrote_and_nothing_else(logdir: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(logdir / NAME, tmp_path / NAME))
    first = {path.name for path in folder.iterdir()}
    others = {"events.out.tfevents.1.training", "notes.txt"}
    for name in others:
        (folder / name).write_text("")
    run_profile(tmp_path, scalars={"round": 2}, prompt_tokens=5, new_tokens=TRACED_STEPS + 13)
    second = {path.name for path in folder.iterdir()}
    flames = {"prefill.cpu.svg", "decode.cpu.svg"}
    assert len(first) == 5 and others < second and len(second) == 7
    assert first & second == flames
    assert all((folder / name).read_bytes() != (logdir / NAME / name).read_bytes() for name in flames)
    (events,) = folder.glob("events.*.profile")
    assert [e.value for e in read_events(events).Scalars("round")] == [2]
    # A long text is measured whole and traced in part.
    ranges = [e for e in load_trace(folder, "decode") if e.get("cat") == "user_annotation" and e["name"] == "decode"]
    assert len(ranges) == TRACED_STEPS


class NodeEngine(TorchEngine):
    """Tells times of graph nodes, once built for it."""

    counting = False

    def for_profiling(self) -> "NodeEngine":
        engine = NodeEngine(self.model)
        engine.counting = True
        return engine

    def operator_times(self) -> list[tuple[str, str, float]]:
        assert self.counting
        length = float(self.cache.get_seq_length())
        return [("fc|0", "MatMul", 1.5), ("proj", "MatMul", length), ("norm", "MVN", 0.0)]


def test_times_of_an_engines_own_nodes(tmp_path: Path) -> None:
    engine = NodeEngine(tiny_model([[1, 2, 4]]))
    folder = profile(engine, token_ids(), tmp_path, name="x", prompt_tokens=PROMPT, new_tokens=2)
    events = read_events(folder)
    assert {"nodes/prefill", "nodes/decode"} < set(events.Tags()["images"])
    for phase, length in (("prefill", PROMPT), ("decode", PROMPT + 1)):
        lines = text(events, f"nodes/{phase}").splitlines()
        share = f"{length / (length + 1.5):.1%}"
        assert lines[0] == "| node | type | ms | share |"
        assert lines[2] == f"| `proj` | MatMul | {length:.3f} | {share} |"
        assert lines[3].startswith("| `fc/0` | MatMul | 1.500 |")
        assert len(lines) == 4  # a node that never ran is no row
        assert (
            text(events, f"nodes/{phase} by type").splitlines()[2] == f"| `MatMul` | 2 | {length + 1.5:.3f} | 100.0% |"
        )
        flame = (folder / f"{phase}.nodes.svg").read_text()
        assert f"{length + 1.5:.3f} ms in all" in flame and "<title>MatMul · proj" in flame


def test_long_tables_are_cut_and_say_so() -> None:
    lines = markdown_table(("op", "n"), [(f"op{i}" + "x" * 200 * (i == 3), str(i)) for i in range(57)]).splitlines()
    assert len(lines) == 2 + 40 + 2
    assert lines[-1] == "17 smaller ones are left out."
    assert max(map(len, lines)) < 120


def test_no_events_no_tables() -> None:
    assert operators_of([]) == ([], [])
    add_nodes(None, "tag", [])  # would fail if it wrote


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "a/b"}, "name of one folder"),
        ({"name": ".."}, "name of one folder"),
        ({"name": ""}, "name of one folder"),
        ({"new_tokens": 1}, "give at least 2"),
        ({"prompt_tokens": 51}, "has 50 tokens"),
        ({"prompt_tokens": 40, "new_tokens": 28}, "at most 67"),
    ],
)
def test_wrong_input_is_one_line(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        run_profile(tmp_path, **changes)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.rglob("*.*"))


def test_output_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(UserError, match=r"taken.*Not a directory.*output folder"):
        run_profile(tmp_path / "taken")
    assert (tmp_path / "taken").read_text() == "mine"


@pytest.mark.skipif(not Path("/proc/sys").is_dir(), reason="needs a folder that even root cannot write")
def test_output_folder_that_is_read_only() -> None:
    with pytest.raises(UserError, match=r"/proc/sys: .*output folder that can be written"):
        run_profile(Path("/proc"), name="sys")


def test_disk_full_keeps_the_earlier_profile(logdir: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(logdir / NAME, tmp_path / NAME))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(WorkError, match=r"make (some|room) and profile again") as error:
            run_profile(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(error.value)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_without_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [name for name in sys.modules if name.startswith(("torch.utils.tensorboard", "tensorboard"))]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(UserError, match=r"^TensorBoard is not installed: pip install tensorboard torch-tb-profiler$"):
        run_profile(tmp_path)


def get(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=30) as answer:
        content = answer.read()
    return json.loads(gzip.decompress(content) if answer.headers["Content-Encoding"] == "gzip" else content)


def wait_for(what: Callable[[], Any], seconds: float = 240) -> Any:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if found := what():
                return found
        except (urllib.error.URLError, ConnectionError):
            pass
        time.sleep(0.3)
    raise AssertionError("TensorBoard did not get there in time")


@pytest.fixture(scope="module")
def tensorboard(logdir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real server on the log folder; its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(logdir)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--load_fast", "false"]
    with log.open("wb") as stream:
        server = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True)
    address = f"http://127.0.0.1:{port}"
    try:
        wait_for(lambda: get(f"{address}/data/runs") or server.poll() is not None)
        assert server.poll() is None, log.read_text()
        wait_for(lambda: get(f"{address}/data/plugin/pytorch_profiler/runs")["runs"])
        yield address
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def test_tensorboard_lists_the_run(tensorboard: str) -> None:
    assert get(f"{tensorboard}/data/runs") == [NAME]
    scalars = wait_for(lambda: get(f"{tensorboard}/data/plugin/scalars/tags").get(NAME))
    assert "latency/decode_ms_per_token" in scalars
    assert "operators/decode" in wait_for(lambda: get(f"{tensorboard}/data/plugin/images/tags").get(NAME))
    assert "engine/text_summary" in wait_for(lambda: get(f"{tensorboard}/data/plugin/text/tags").get(NAME))


def test_profiler_tab_opens_both_traces(tensorboard: str, logdir: Path) -> None:
    plugin = f"{tensorboard}/data/plugin/pytorch_profiler"
    assert get(f"{plugin}/runs") == {"runs": [NAME], "loading": False}
    views = get(f"{plugin}/views?run={NAME}")
    assert {"Overview", "Operator", "Trace", "Memory", "Module"} <= set(views)
    assert get(f"{plugin}/workers?run={NAME}&view=Operator") == ["decode", "prefill"]
    for worker, steps in (("prefill", 1), ("decode", NEW - 1)):
        query = f"run={NAME}&worker={worker}&span=1"
        assert len(get(f"{plugin}/overview?{query}&view=Overview")["steps"]["rows"]) == steps
        modules = json.dumps(get(f"{plugin}/module?{query}&view=Module"))
        assert '"transformer.h.1.attn"' in modules and '"Attention_1"' not in modules
        drawn = get(f"{plugin}/trace?{query}&view=Trace")["traceEvents"]
        assert drawn == load_trace(logdir / NAME, worker)
        rows = get(f"{plugin}/operation/table?{query}&view=Operator&group_by=Operation")["data"]
        calls = {row["name"]: row["calls"] for row in rows}
        assert calls["aten::scaled_dot_product_attention"] == steps * LAYERS


@pytest.mark.parametrize(
    ("page", "shown"),
    [
        # What the profiler tab holds in a frame.
        ("data/plugin/pytorch_profiler/index.html", [NAME, "Overview", "decode"]),
        ("#timeseries", [NAME, "pytorch_profiler", "latency/decode_ms_per_token", "operators"]),
    ],
    ids=["profiler", "scalars"],
)
def test_browser_shows_the_run(tensorboard: str, browser: Browser, page: str, shown: list[str]) -> None:
    browser.open(f"{tensorboard}/{page}")
    for words in shown:
        wait_for(lambda words=words: words in browser.ask(TEXT))
