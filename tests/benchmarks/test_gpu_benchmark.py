"""The GPU benchmark tried on a CPU: a wrong subject is not timed, a broken one costs nobody else anything."""

import dataclasses
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config

from benchmarks import gpu, gpu_case, isolated, subjects
from benchmarks.checkpoints import write_checkpoints
from benchmarks.subjects import EAGER, SAMPLINGS, STOCK, Case, Check, EagerSubject, Kind, kinds, least_drawn
from benchmarks.timing import in_turns
from cuda_ext.engine import DECODE
from eval.errors import WorkError
from pipeline.model import CompactGPT2Config

CASE = Case("decode", 2, 9, 8)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, CompactGPT2Config]:
    folder = tmp_path_factory.mktemp("checkpoints")
    shape = GPT2Config(vocab_size=97, n_positions=48, n_embd=128, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
    return folder, write_checkpoints(shape, folder)


class Wrong(EagerSubject):
    """Right after prefill, wrong in the tokens after it."""

    def burst(self, count: int) -> torch.Tensor:
        return (super().burst(count) + 1) % 97


def only(monkeypatch: pytest.MonkeyPatch, **chosen: Callable[[Path, Case, str], Any]) -> None:
    table = {name: Kind(make, "pruned", 5) for name, make in chosen.items()}
    table |= {EAGER: Kind(subjects._eager, "pruned", 5), STOCK: Kind(subjects._stock, "dense", 5)}
    monkeypatch.setattr(gpu_case, "kinds", lambda case: table)
    monkeypatch.setattr(gpu, "kinds", lambda case: table)


def test_write_checkpoints_prunes_two_heads(checkpoints: tuple[Path, CompactGPT2Config]) -> None:
    folder, config = checkpoints
    assert config.kept_heads == [[1, 2], [1, 2]]
    assert json.loads((folder / "pruned" / "config.json").read_text())["dtype"] == "float16"
    assert json.loads((folder / "dense" / "config.json").read_text())["model_type"] == "gpt2"


def test_the_engine_passes_the_check(checkpoints: tuple[Path, CompactGPT2Config]) -> None:
    """Our kernels, on the CPU, in every mode that decodes."""
    check = Check(checkpoints[0] / "pruned", CASE, "cpu")
    for name, kind in kinds(CASE).items():
        if name.startswith("cuda"):
            found = check(kind.make(checkpoints[0] / "pruned", CASE, "cpu"))
            assert 0 < found["error"] <= found["allowed"] and found["regret"] <= found["allowed_regret"]


def test_the_check_refuses_wrong_logits_and_wrong_tokens(checkpoints: tuple[Path, CompactGPT2Config]) -> None:
    folder = checkpoints[0] / "pruned"
    check = Check(folder, CASE, "cpu")
    right = subjects._eager(folder, CASE, "cpu")
    assert check(right)["error"] * 2 == pytest.approx(check.allowed)
    with pytest.raises(WorkError, match="wrong tokens"):
        check(Wrong(right.model))
    with torch.no_grad():
        right.model.transformer.h[0].attn.c_proj.weight[3] += 0.05
    with pytest.raises(WorkError, match="wrong logits"):
        check(right)
    with torch.no_grad():
        right.model.transformer.ln_f.bias.fill_(float("nan"))
    with pytest.raises(WorkError, match="relative error nan"):
        check(right)


@pytest.mark.parametrize("how", [name for name in SAMPLINGS if name])
def test_sampled_tokens_are_checked_too(checkpoints: tuple[Path, CompactGPT2Config], how: str) -> None:
    """The engine's draws pass; a token that may not be drawn does not."""
    case = dataclasses.replace(CASE, sampling=how)
    assert case.name == f"decode 2 x 9, {how}" and set(kinds(case)) == {f"cuda {mode}" for mode in DECODE}
    folder = checkpoints[0] / "pruned"
    check = Check(folder, case, "cpu")
    subject = kinds(case)["cuda eager"].make(folder, case, "cpu")
    assert check(subject)["regret"] <= check.allowed_regret

    class Unlikely(EagerSubject):
        def burst(self, count: int) -> torch.Tensor:
            return self.logits.argmin(-1, keepdim=True).repeat(1, count)

    with pytest.raises(WorkError, match="wrong tokens"):
        check(Unlikely(subjects._eager(folder, case, "cpu").model))


def test_the_least_that_may_be_drawn() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    assert least_drawn(logits).exp().item() == pytest.approx(0.5)
    for how, wanted in (({"top_k": 3}, 0.15), ({"top_p": 0.79}, 0.3), ({"top_p": 0.81}, 0.15), ({"top_p": 1.0}, 0.05)):
        assert least_drawn(logits, temperature=1.0, **how).exp().item() == pytest.approx(wanted)
    # Twice as hot: 0.38, 0.29, 0.21, 0.12 of the whole; top-p is of those that top-k kept.
    assert least_drawn(logits, temperature=2.0, top_p=0.8).exp().item() == pytest.approx(0.15)
    assert least_drawn(logits, temperature=1.0, top_k=2, top_p=0.62).exp().item() == pytest.approx(0.5)


def test_dependent_launch_is_off_where_the_subject_says_so(
    monkeypatch: pytest.MonkeyPatch, checkpoints: tuple[Path, CompactGPT2Config]
) -> None:
    seen: list[str | None] = []
    monkeypatch.setattr(
        subjects.Engine, "from_checkpoint", lambda *where, **how: seen.append(os.environ.get(subjects.DEPENDENT))
    )
    monkeypatch.delenv(subjects.DEPENDENT, raising=False)
    for name in (subjects.NO_DEPENDENT, "cuda graph"):
        kinds(CASE)[name].make(checkpoints[0], CASE, "cpu")
    assert seen == ["0", None] and subjects.DEPENDENT not in os.environ


def test_a_case_times_the_right_and_tells_of_the_rest(
    checkpoints: tuple[Path, CompactGPT2Config], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(folder: Path, case: Case, device: str) -> EagerSubject:
        raise RuntimeError("\nno such kernel\nmore words")

    only(monkeypatch, wrong=lambda *where: Wrong(subjects._eager(*where).model), broken=broken)
    request = {"case": dataclasses.asdict(CASE), "folder": str(checkpoints[0]), "device": "cpu", "seconds": 60}
    gpu_case.measure_case(request | {"without": [STOCK], "min_count": 3, "min_seconds": 0})
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    about = {each["subject"]: each for each in said if "subject" in each}
    assert about["wrong"]["skipped"].startswith("WorkError: wrong tokens")
    assert about["broken"]["skipped"] == "RuntimeError: no such kernel"
    assert set(about) == {"wrong", "broken", EAGER} and "checked" in about[EAGER]
    (timings,) = (each["timings"] for each in said if "timings" in each)
    assert set(timings) == {EAGER} and timings[EAGER]["count"] == 3 and min(timings[EAGER]["samples"]) > 0


def test_subjects_take_turns() -> None:
    order: list[str] = []

    def subject(name: str) -> tuple[Callable[[], object], Callable[[], object]]:
        return lambda: order.append(f"prepare {name}"), lambda: order.append(name)

    clock = iter(range(1, 100))

    def lap(work: Callable[[], object]) -> float:
        work()
        return float(next(clock))

    both = {name: subject(name) for name in "ab"}
    found = in_turns(both, per=2, min_count=2, min_seconds=0, deadline=1e18, lap=lap, warmup=1)
    assert order == ["prepare a", "a", "prepare b", "b"] * 3
    assert found["a"].samples == [1.5, 2.5] and found["b"].samples == [2.0, 3.0]
    found = in_turns(both, per=1, min_count=50, min_seconds=9, deadline=0, lap=lap, warmup=0)
    assert found["a"].count == found["b"].count == 2  # out of time


def test_a_crash_costs_one_subject_and_is_not_tried_again(
    checkpoints: tuple[Path, CompactGPT2Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    only(monkeypatch, **{"cuda bad": subjects._eager})
    asked: list[list[str]] = []

    def child(command: list[str], **limits: float) -> isolated.Outcome:
        request = json.loads(command[-1])
        asked.append(request["without"])
        if "cuda bad" not in request["without"]:
            return isolated.Outcome([], "cuda bad", "exit code -11: no words on stderr")
        sample = {"samples": [2e-4, 2e-4, 2e-4]}
        return isolated.Outcome([{"subject": EAGER, "checked": {}}, {"timings": {EAGER: sample}}])

    monkeypatch.setattr(gpu, "run", child)
    bench = gpu.Benchmark(checkpoints[0], checkpoints[1], "cpu", 1000, 3)
    bench.record["ceilings"] = {"bandwidth": 1e9, "fp16_rate": 1e12}
    bench.case(CASE, 500)
    bench.case(CASE, 500)
    assert asked == [[], ["cuda bad"], ["cuda bad"]]
    entry = bench.record["cases"][0]
    assert entry["subjects"]["cuda bad"]["skipped"] == "in case decode 2 x 9: exit code -11: no words on stderr"
    mine = entry["figures"]["subjects"][EAGER]
    assert mine["microseconds"] == pytest.approx(200) and mine["over_eager"]["value"] == 1
    floor = 1e6 * gpu.bytes_per_token(checkpoints[1], 2, 13) / 1e9
    assert mine["percent_of_ceiling"] == pytest.approx(100 * floor / 200)
    text = gpu.report(entry)
    assert "cuda bad" in text and "not measured: in case" in text and "200.0 [200.0, 200.0]" in text


def test_the_whole_child(checkpoints: tuple[Path, CompactGPT2Config]) -> None:
    """As the benchmark starts it, without the subjects that compile."""
    request = {"do": "case", "case": dataclasses.asdict(Case("prefill", 1, 9, 0)), "folder": str(checkpoints[0])}
    request |= {"device": "cpu", "seconds": 100, "without": ["torch.compile"], "min_count": 2, "min_seconds": 0}
    command = [sys.executable, "-m", "benchmarks.gpu_case", json.dumps(request)]
    outcome = isolated.run(command, first_seconds=60, total_seconds=120)
    assert outcome.reason is None
    assert set(outcome.said[-1]["timings"]) == {"cuda", EAGER, STOCK}


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert gpu.main([]) == 2
    assert capsys.readouterr().err.startswith("error: ")
