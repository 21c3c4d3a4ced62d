"""The persistent launch's stamps, from the emulation, as a trace; and its parts that measure overheads."""

import json
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config

from benchmarks import phases
from benchmarks.checkpoints import write_checkpoints
from benchmarks.timing import cpu_lap
from cuda_ext import CudaExtError, Engine

LAYERS, TOKENS = 2, 3
BARRIERS = TOKENS * (5 * LAYERS + 1)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    folder = tmp_path_factory.mktemp("model")
    write_checkpoints(GPT2Config(vocab_size=61, n_positions=32, n_embd=96, n_layer=LAYERS, n_head=3), folder)
    return Engine.from_checkpoint(folder / "pruned", device="cpu", decode="persistent")


IDS = torch.randint(0, 61, (1, 9), generator=torch.Generator().manual_seed(0))


def test_a_trace_of_every_phase_of_every_block(engine: Engine, tmp_path: Path) -> None:
    stamps = phases.stamped(engine, IDS, TOKENS)
    assert stamps.shape[1] == 2 * BARRIERS + 2 and (stamps.diff() > 0).all()
    written = phases.trace(stamps, LAYERS)
    events = json.loads(json.dumps(written))["traceEvents"]
    for block in range(stamps.shape[0]):
        mine = [event for event in events if event["tid"] == block and event["ph"] == "X"]
        assert len(mine) == 2 * BARRIERS
        names = [event["name"] for event in mine]
        assert names[1::2] == ["wait"] * BARRIERS
        token = names[0 : 2 * BARRIERS : 2][: 5 * LAYERS + 1]
        assert token[0] == "0: LayerNorm, q, k, v" and token[6] == "1: attention" and token[-1] == "LM head"
        assert names[0::2] == token * TOKENS
        ends = [event["ts"] + event["dur"] for event in mine]
        assert all(event["dur"] > 0 for event in mine)
        assert ends[:-1] == pytest.approx([event["ts"] for event in mine[1:]])  # without gaps
    assert min(event["ts"] for event in events if event["ph"] == "X") == 0
    found = phases.summary(stamps, LAYERS)
    assert set(found) == {*phases.PHASES, "LM head", "wait"}
    whole = float((stamps[:, -2] - stamps[:, 0]).double().mean()) / 1e3 / TOKENS
    assert sum(found.values()) == pytest.approx(whole)


def test_a_launch_that_ends_early_has_no_phases_behind_its_end() -> None:
    stamps = torch.tensor([[5, 10, 20, 40, 0, 0]])
    assert list(phases.spans(stamps, 1)) == [
        (0, "0: LayerNorm, q, k, v", 5, 10),
        (0, "wait", 10, 20),
    ]


def test_tokens_are_the_same_after_stamps_and_prices(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine.prefill(IDS)
    wanted = engine.extend(6)
    monkeypatch.setattr(phases, "gpu_lap", cpu_lap)
    monkeypatch.setattr(phases, "REPEATS", 1)
    monkeypatch.setattr(phases, "SHORT", 2)
    monkeypatch.setattr(phases, "LONG", 5)
    phases.stamped(engine, IDS, TOKENS)
    assert set(phases.prices(engine, IDS)) == {"all", "copies", "barriers"}
    engine.prefill(IDS)
    assert torch.equal(engine.extend(6), wanted)


@pytest.mark.parametrize("work", ["copies", "barriers"])
def test_overheads_alone_leave_logits_as_they_are(engine: Engine, work: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert engine._persistent is not None
    engine.prefill(IDS)
    engine._logits.fill_(float("nan"))
    monkeypatch.setattr(engine._persistent, "work", work)
    assert engine.decode(IDS[:, 0]).isnan().all()
    monkeypatch.setattr(engine._persistent, "work", "all")
    assert engine.decode(IDS[:, 0]).isfinite().all()


def test_stamps_that_do_not_fit_are_refused(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    persistent = engine._persistent
    assert persistent is not None
    right = persistent.room_for_stamps(1, TOKENS)
    for wrong in (right.int(), right[1:], right.mT.contiguous().mT, right[:, 1:].contiguous()):
        monkeypatch.setattr(persistent, "stamps", wrong)
        engine.prefill(IDS)
        with pytest.raises(CudaExtError):
            engine.extend(TOKENS + 1)


def test_without_a_gpu_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert phases.main([]) == 2
    assert capsys.readouterr().err.startswith("error: ")
