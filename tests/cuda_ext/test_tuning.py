"""Measured choices: the tuner on a clock of the test's own, and that the kernels go the way that was chosen."""

import json
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from cuda_ext import CudaExtError, Engine, build, ops
from cuda_ext.packing import pack
from cuda_ext.products import bucket, choose
from cuda_ext.tuning import SWITCH, Tuner, decide
from pipeline.model import CompactGPT2Config, CompactGPT2LMHeadModel

GPU = torch.device("cuda")
ROOM = torch.empty(0, dtype=torch.uint8)


class Ways:
    """Named ways, and a clock that knows how many microseconds each takes, give or take some noise."""

    def __init__(self, costs: dict[str, float], noise: float = 0.0, seed: int = 0) -> None:
        self.now = ""
        self.timed = 0
        self.costs, self.noise, self.random = costs, noise, random.Random(seed)
        self.ways: dict[str, Callable[[], None]] = {name: partial(self.run, name) for name in costs}

    def run(self, name: str) -> None:
        if self.costs[name] < 0:
            raise CudaExtError("cannot")
        self.now = name

    def clock(self, run: Callable[[], None], together: int) -> Callable[[], float]:
        run()
        cost = self.costs[self.now]

        def measure() -> float:
            self.timed += 1
            return cost * (1 + self.noise * self.random.gauss())

        return measure


def test_the_fastest_is_measured_once_and_remembered(tmp_path: Path) -> None:
    file = tmp_path / "choices.json"
    first = Ways({"slow": 90.0, "fast": 5.0, "broken": -1.0, "middling": 20.0})
    tuner = Tuner(GPU, file, first.clock)
    assert tuner.fastest("a", first.ways) == tuner.fastest("a", first.ways) == "fast"
    other = Ways({"fast": 5.0, "slow": 1.0})
    later = Tuner(GPU, file, other.clock)
    assert later.fastest("a", other.ways) == "fast" and other.timed == 0  # from the file
    assert later.fastest("b", other.ways) == "slow"
    gone = Ways({"new": 2.0, "newer": 1.0})
    assert Tuner(GPU, file, gone.clock).fastest("a", gone.ways) == "newer"  # what the file names is no longer there
    file.write_text("{ damaged")
    again = Ways({"slow": 1.0, "fast": 5.0})
    assert Tuner(GPU, file, again.clock).fastest("a", again.ways) == "slow"
    broken = Ways({"fixed": -1.0, "works": 5.0, "works better": 4.0})
    assert Tuner(GPU, file, broken.clock).fastest("c", broken.ways) == "works better"


@pytest.mark.parametrize("noise", [0.0, 0.01, 0.1])
def test_ways_that_are_alike_take_the_fixed_choice(tmp_path: Path, noise: float) -> None:
    """Ten ways of one cost, or within the margin, under 200 noises: the first each time but for very few."""
    others = 0
    for seed in range(200):
        costs = {"fixed": 10.0} | {str(i): 10.0 - 0.02 * i for i in range(9)}
        ways = Ways(costs, noise, seed)
        others += Tuner(GPU, tmp_path / f"{seed}", ways.clock).fastest("a", ways.ways) != "fixed"
    assert others <= 4


@pytest.mark.parametrize(("noise", "gain"), [(0.0, 0.05), (0.01, 0.1), (0.03, 0.25)])
def test_a_way_that_is_clearly_faster_is_taken(tmp_path: Path, noise: float, gain: float) -> None:
    taken = 0
    for seed in range(200):
        ways = Ways({"fixed": 10.0, "same": 10.0, "fast": 10.0 * (1 - gain)}, noise, seed)
        taken += Tuner(GPU, tmp_path / f"{seed}", ways.clock).fastest("a", ways.ways) == "fast"
    assert taken >= 195


def test_the_rule() -> None:
    """3 % of the fixed way's median, or the distance of either's quartiles, whichever is more."""
    assert decide({"fixed": [100.0] * 5, "b": [97.1] * 5}, "fixed") == "fixed"
    assert decide({"fixed": [100.0] * 5, "b": [96.9] * 5}, "fixed") == "b"
    assert decide({"fixed": [90.0, 90.0, 100.0, 110.0, 110.0], "b": [85.0] * 5}, "fixed") == "fixed"
    assert decide({"fixed": [100.0] * 5, "b": [70.0, 70.0, 90.0, 95.0, 95.0]}, "fixed") == "fixed"
    assert decide({"fixed": [90.0, 90.0, 100.0, 110.0, 110.0], "b": [75.0] * 5}, "fixed") == "b"


def test_nothing_is_measured_where_it_is_switched_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ways = Ways({"slow": 90.0, "fast": 5.0})
    assert Tuner(torch.device("cpu"), tmp_path / "file", ways.clock).fastest("a", ways.ways) == "slow"
    monkeypatch.setenv(SWITCH, "0")
    assert Tuner(GPU, tmp_path / "file", ways.clock).fastest("a", ways.ways) == "slow"
    assert ways.timed == 0 and not (tmp_path / "file").exists()


def test_a_file_that_cannot_be_written_is_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("where a folder should be")
    ways = Ways({"slow": 90.0, "fast": 5.0})
    tuner = Tuner(GPU, tmp_path / "file" / "choices.json", ways.clock)
    assert [tuner.fastest(name, ways.ways) for name in ("a", "b", "a")] == ["fast"] * 3
    timed = ways.timed
    tuner.fastest("b", ways.ways)
    assert ways.timed == timed  # from memory
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("measured choices are not kept for the next process: ")


def test_choices_lie_in_the_users_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Never beside an installed library, whose folder may be read-only; another library has another file."""
    installed = tmp_path / "site-packages" / "lib.so"
    installed.parent.mkdir()
    monkeypatch.setattr(build, "library", lambda: installed)
    monkeypatch.setattr(build, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100/80")
    (tmp_path / "cache").mkdir()
    for content in (b"one", b"other"):
        installed.write_bytes(content)
        ways = Ways({"slow": 90.0, "fast": 5.0})
        assert Tuner(GPU, None, ways.clock).fastest("a", ways.ways) == "fast" and ways.timed
    files = list((tmp_path / "cache").iterdir())
    assert len(files) == 2 and all(file.name.startswith("choices-NVIDIA-H100-80-") for file in files)
    assert list(installed.parent.iterdir()) == [installed]


def test_processes_do_not_lose_each_others_choices(tmp_path: Path) -> None:
    ways = Ways({"slow": 90.0, "fast": 5.0})
    one, other = (Tuner(GPU, tmp_path / "file", ways.clock) for _ in range(2))
    assert one._known == other._known == {}
    one.fastest("a", ways.ways)
    other.fastest("b", ways.ways)
    assert json.loads((tmp_path / "file").read_text()) == {"a": "fast", "b": "fast"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = CompactGPT2Config(
        vocab_size=50, n_positions=16, n_embd=40, n_layer=2, n_head=2, head_dim=32, kept_heads=[[0, 1], [1]],
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("model")
    CompactGPT2LMHeadModel(config).half().save_pretrained(path)
    return path


@pytest.mark.parametrize(("rows", "wanted"), [(1, 0), (8, 0), (9, 16), (16, 16), (17, 32), (64, 64), (65, 128)])
def test_buckets(rows: int, wanted: int) -> None:
    assert bucket(rows) == wanted


def test_every_product_of_the_model_goes_the_chosen_way(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = torch.randint(0, 50, (1, 12))
    engine = Engine.from_checkpoint(folder, device="cpu")
    wanted = engine.forward(ids)
    names, product = ops.product_variants("cpu"), ops.product
    seen: list[int] = []

    def noted(*arguments: Any) -> None:
        seen.append(arguments[6])
        product(*arguments)

    monkeypatch.setattr(ops, "product", noted)
    packed = pack(folder)
    for favourite in (0, len(names) - 1):
        tried: set[int] = set()

        def clock(
            run: Callable[[], None], together: int, favourite: int = favourite, tried: set[int] = tried
        ) -> Callable[[], float]:
            run()
            tried.add(seen[-1])
            cost = 1.0 if seen[-1] == favourite else 2.0
            return lambda: cost

        choices = choose(packed, packed.weights, 16, 16, Tuner(GPU, tmp_path / str(favourite), clock), ROOM)
        assert tried == set(range(len(names)))
        assert len(choices) == 7 and {choice[4] for choice in choices} == {favourite}
        engine._choices = choices
        engine.table = engine._make_table()
        assert torch.allclose(engine.forward(ids), wanted, atol=1e-2)
    for choice in choices:  # a way that is not there fails, so each choice is asked for
        engine._choices = [(*choice[:4], len(names), *choice[5:])]
        engine.table = engine._make_table()
        with pytest.raises(CudaExtError, match="no such variant"):
            engine.forward(ids)


def test_a_fixed_choice_is_none(folder: Path, tmp_path: Path) -> None:
    """What was measured to be no faster leaves the table, and so the bits, as they are unmeasured."""
    packed = pack(folder)
    tuner = Tuner(GPU, tmp_path / "file", lambda run, together: lambda: 1.0)
    assert choose(packed, packed.weights, 16, 16, tuner, ROOM) == []
    kept = json.loads((tmp_path / "file").read_text())
    assert len(kept) == 7 and set(kept.values()) == {
        ops.product_variants("cpu")[ops.product_variant_for(16, 50, "cpu")]
    }


def test_no_head_is_measured_where_nothing_would_use_it(folder: Path, tmp_path: Path) -> None:
    packed = pack(folder)
    tuner = Tuner(GPU, tmp_path / "file", lambda run, together: lambda: 1.0)
    choose(packed, packed.weights, 16, 0, tuner, ROOM)
    assert len(tuner._known) == 6 and not any("x 50 x" in name for name in tuner._known)


def test_a_way_takes_the_weights_of_all_layers_in_turns(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that, on a GPU, they come from memory as in a model."""
    seen: dict[tuple[int, ...], set[int]] = {}

    def noted(a: torch.Tensor, weight: torch.Tensor, *_: object) -> None:
        seen.setdefault(tuple(weight.shape), set()).add(weight.data_ptr())

    monkeypatch.setattr(ops, "product", noted)
    packed = pack(folder)

    def clock(run: Callable[[], None], together: int) -> Callable[[], float]:
        assert together >= 20
        for _ in range(together):
            run()
        return lambda: 1.0

    choose(packed, packed.weights, 16, 16, Tuner(GPU, tmp_path / "file", clock), ROOM)
    assert sorted(len(places) for places in seen.values()) == [1, 1, 1, 1, 1, 2, 2]
