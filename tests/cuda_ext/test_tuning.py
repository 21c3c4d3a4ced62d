"""Measured choices: the tuner on a clock of the test's own, and that the kernels go the way that was chosen."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from cuda_ext import CudaExtError, Engine, ops
from cuda_ext.packing import pack
from cuda_ext.products import bucket, choose
from cuda_ext.tuning import SWITCH, Tuner
from pipeline.model import CompactGPT2Config, CompactGPT2LMHeadModel

GPU = torch.device("cuda")


class Ways:
    """Named ways, and a clock that knows how many microseconds each takes."""

    def __init__(self, costs: dict[str, float]) -> None:
        self.now = ""
        self.timed = 0
        self.costs = costs
        self.ways: dict[str, Callable[[], None]] = {name: partial(self.run, name) for name in costs}

    def run(self, name: str) -> None:
        if self.costs[name] < 0:
            raise CudaExtError("cannot")
        self.now = name

    def clock(self, run: Callable[[], None], count: int) -> float:
        run()
        self.timed += 1
        return self.costs[self.now]


def test_the_fastest_is_measured_once_and_remembered(tmp_path: Path) -> None:
    file = tmp_path / "choices.json"
    first = Ways({"slow": 90.0, "fast": 5.0, "broken": -1.0, "middling": 20.0})
    tuner = Tuner(GPU, file, first.clock)
    assert tuner.fastest("a", first.ways) == tuner.fastest("a", first.ways) == "fast"
    other = Ways({"slow": 1.0, "fast": 5.0})
    later = Tuner(GPU, file, other.clock)
    assert later.fastest("a", other.ways) == "fast" and other.timed == 0  # from the file
    assert later.fastest("b", other.ways) == "slow"
    gone = Ways({"new": 2.0, "newer": 1.0})
    assert Tuner(GPU, file, gone.clock).fastest("a", gone.ways) == "newer"  # what the file names is no longer there
    file.write_text("{ damaged")
    again = Ways({"slow": 1.0, "fast": 5.0})
    assert Tuner(GPU, file, again.clock).fastest("a", again.ways) == "slow"


def test_nothing_is_measured_where_it_is_switched_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ways = Ways({"slow": 90.0, "fast": 5.0})
    assert Tuner(torch.device("cpu"), tmp_path / "file", ways.clock).fastest("a", ways.ways) == "slow"
    monkeypatch.setenv(SWITCH, "0")
    assert Tuner(GPU, tmp_path / "file", ways.clock).fastest("a", ways.ways) == "slow"
    assert ways.timed == 0 and not (tmp_path / "file").exists()


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


@pytest.mark.parametrize(("rows", "wanted"), [(1, 16), (16, 16), (17, 32), (64, 64), (65, 128)])
def test_buckets(rows: int, wanted: int) -> None:
    assert bucket(rows) == wanted


def test_every_product_of_the_model_goes_the_chosen_way(folder: Path, tmp_path: Path) -> None:
    ids = torch.randint(0, 50, (1, 12))
    engine = Engine.from_checkpoint(folder, device="cpu")
    wanted = engine.forward(ids)
    names = ops.product_ways("cpu")
    for favourite in (names[0], names[-1]):
        tried: list[int] = []

        def clock(run: Callable[[], None], count: int, favourite: str = favourite, tried: list[int] = tried) -> float:
            assert isinstance(run, partial)
            run()
            tried.append(run.args[-1])
            return 1.0 if names[run.args[-1]] == favourite else 2.0

        packed = pack(folder)
        choices = choose(packed, packed.weights, 16, 16, Tuner(GPU, tmp_path / favourite, clock))
        assert set(tried) == set(range(len(names)))
        assert len(choices) == 7 and {names[way] for *_, way in choices} == {favourite}
        engine._choices = choices
        engine.table = engine._make_table()
        assert torch.allclose(engine.forward(ids), wanted, atol=1e-2)
    for choice in choices:  # a way that is not there fails, so each choice is asked for
        engine._choices = [(*choice[:4], len(names))]
        engine.table = engine._make_table()
        with pytest.raises(CudaExtError):
            engine.forward(ids)
