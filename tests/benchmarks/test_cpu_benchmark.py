"""The CPU benchmark: converted peers compute what torch computes, and a wrong or missing one costs only its row."""

import contextlib
import importlib.metadata
import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GPT2LMHeadModel

from benchmarks import cpu
from benchmarks.cpu_peers import ctranslate, llama
from benchmarks.cpu_peers.table import FP32, OURS, SUBJECTS, Subject
from eval.errors import WorkError
from eval.perplexity import perplexity
from pipeline.engines.torch import TorchEngine
from pipeline.model import from_gpt2, slice_heads

PEER_ROWS = [name for name, subject in SUBJECTS.items() if subject.peer and subject.variant != "flash"]


@contextlib.contextmanager
def peer(name: str) -> Iterator[cpu.Worker]:
    """A peer's process; the test is skipped where it is not installed."""
    subject = SUBJECTS[name]
    code = f"import importlib.metadata as m; m.version({subject.package!r})"
    if not cpu.PEERS.exists() or subprocess.run([cpu.PEERS, "-c", code], capture_output=True, check=False).returncode:
        pytest.skip(f"{subject.package} is not installed: make bench-cpu")
    with cpu.Worker(subject, cpu.PEERS, 1) as worker:
        yield worker


@pytest.mark.parametrize("name", PEER_ROWS)
def test_a_peer_computes_what_torch_computes(
    name: str, make_gpt2: Callable[..., GPT2LMHeadModel], tmp_path: Path
) -> None:
    """Biases and norms matter in this model; a batch of three, each row a sequence of its own."""
    model = from_gpt2(make_gpt2(n_embd=64, n_head=4))
    model.save_pretrained(tmp_path / "dense")
    rng = np.random.default_rng(0)
    np.save(tmp_path / "text.npy", text := rng.integers(0, 269, 301))
    prompts = rng.integers(0, 269, (3, 17))
    out = str(tmp_path / "converted")
    with peer(name) as worker:
        assert worker.ask("convert", source=str(tmp_path / "dense"), out=out)["version"][0].isdigit()
        worker.ask("load", folder=out, threads=1, batch=1, capacity=64)
        judged = worker.ask("perplexity", text=str(tmp_path / "text.npy"), vocab_size=269, context=33)
    with peer(name) as worker:
        worker.ask("load", folder=out, threads=1, batch=3, capacity=64)
        answers = [worker.ask("generate", prompts=prompts.tolist(), count=9) for _ in range(2)]
        maps = Path(f"/proc/{worker.child.process.pid}/maps")
        assert not maps.exists() or "libtorch" not in maps.read_text()  # its memory is the peer's own
    assert answers[0]["tokens"] == answers[1]["tokens"] and min(answers[0]["prefill"], answers[0]["decode"]) > 0
    tokens = torch.tensor(answers[0]["tokens"])
    assert tokens.shape == (3, 9)
    with torch.inference_mode():
        logits = model(torch.cat([torch.from_numpy(prompts), tokens], 1)[:, :-1], use_cache=False).logits[:, 16:]
    below = (logits.amax(-1) - logits.gather(-1, tokens[..., None])[..., 0]) / logits.std(-1)
    assert float(below.max()) < 0.3
    exact = perplexity(TorchEngine(model), text, context=33, stride=33, text_sha256="", text_share=1, progress=False)
    assert judged["perplexity"] == pytest.approx(exact.perplexity, rel=0.05) and judged["tokens"] == 300


def test_what_a_pruned_model_is_to_peers(make_gpt2: Callable[..., GPT2LMHeadModel], tmp_path: Path) -> None:
    slice_heads(from_gpt2(make_gpt2()), [[1], [0, 2], [3]]).save_pretrained(tmp_path)
    with pytest.raises(WorkError, match="as many heads as the width holds"):
        llama.convert(tmp_path, tmp_path / "out", "plain")
    with pytest.raises(WorkError, match="one head count for all layers"):
        ctranslate.convert(tmp_path, tmp_path / "out", "int8")


@pytest.mark.thorough
def test_the_whole_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As `make bench-cpu` starts it, with torch in our place and a peer that is not there."""
    absent = Subject("absent", "llama", "plain", "no-such-package", "*", peer=True)
    monkeypatch.setattr(cpu, "SUBJECTS", {FP32: SUBJECTS[FP32], "absent": absent})
    monkeypatch.setattr(cpu, "OURS", FP32)
    out = tmp_path / "new" / "cpu.json"
    options = ["--quick", "--threads", "1", "--new-tokens", "3", "--quality-tokens", "40", "--note", "trial"]
    assert cpu.main([*options, "--out", str(out)]) == 0
    record = json.loads(out.read_text())
    assert record["subjects"]["absent"]["skipped"].startswith("not installed")
    row = record["subjects"][FP32]
    assert row["model"] == "pruned" and row["version"] == importlib.metadata.version("torch")
    assert row["perplexity"]["tokens"] == 39 and 1 < row["perplexity"]["perplexity"] < 8192
    (entry,) = record["cases"]
    found = entry["subjects"][FP32]
    assert len(found["latency"]["prefill"]["samples"]) == 2 and found["regret"] < 1e-3
    assert found["over_ours"]["decode"]["value"] == 1
    assert 0 < found["percent_of_bandwidth"] < 100 and found["memory"]["peak_rss"] >= found["memory"]["uss"] > 0
    assert record["note"] == "trial" and {"machine", "versions", "command", "date"} < record.keys()
    table = capsys.readouterr().out
    assert "not measured: not installed" in table and "prompt 9, batch 3, 3 new tokens" in table


@pytest.fixture
def bench(tmp_path: Path) -> cpu.Benchmark:
    choices = cpu.read_choices(["--quick", "--rounds", "4"])
    return cpu.Benchmark(choices, tmp_path)


def test_another_models_tokens_are_refused(bench: cpu.Benchmark) -> None:
    bench.record["subjects"]["x"] = {"model": "pruned"}
    prompts = next(bench.prompts(9, 2))
    model = TorchEngine.from_folder(bench.scratch / "pruned", device="cpu", precision="fp32")
    best = int(model.prefill(torch.from_numpy(prompts[-1:])).argmax())
    assert bench.check("x", prompts, [[0], [best]]) == 0
    worst = int(model.prefill(torch.from_numpy(prompts[-1:])).argmin())
    with pytest.raises(WorkError, match="wrong tokens"):
        bench.check("x", prompts, [[0], [worst]])


def test_rounds_rotate_and_leave_out_what_fails(bench: cpu.Benchmark) -> None:
    order: list[str] = []

    class Fake:
        def __init__(self, name: str):
            self.name = name

        def ask(self, do: str, **what: Any) -> dict[str, Any]:
            order.append(self.name)
            if self.name == "b" and len(order) > 3:
                raise WorkError("gone")
            return {"prefill": 2.0, "decode": 1.0}

    workers: Any = {name: Fake(name) for name in "abc"}
    found: dict[str, Any] = {name: {} for name in "abc"}
    samples = bench.rounds(workers, bench.prompts(3, 1), found)
    assert "".join(order) == "abc" + "bca" + "ac" + "ca"
    assert samples == {name: {"prefill": [2.0] * 4, "decode": [1.0] * 4} for name in "ac"}
    assert found["b"] == {"skipped": "gone"}
    bench.choices.seconds = 0  # out of time
    assert len(bench.rounds({"a": workers["a"]}, bench.prompts(3, 1), found)["a"]["decode"]) == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--subjects", "tensorrt"], "--subjects tensorrt: no such subject; give parts of ours INT8"),
        (["--prompts", "1000"], "1000 + 128 tokens; gpt2 has 1024 positions"),
        (["--new-tokens", "1"], "--new-tokens 1: give at least 2"),
        (["--batches", "0"], "--prompts and --batches: give numbers from 1 on"),
    ],
)
def test_bad_choices_are_told_in_one_line(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cpu.main(arguments) == 2
    captured = capsys.readouterr().err
    assert words in captured and captured.count("\n") == 1


def test_subjects_are_chosen_by_parts_of_their_names() -> None:
    assert cpu.chosen(["LLAMA", "ours int8"]) == [OURS, "llama.cpp Q8_0", "llama.cpp Q8_0, flash"]
    assert cpu.chosen([]) == list(SUBJECTS)
