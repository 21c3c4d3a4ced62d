"""csrc/cublaslt.cpp on the CPU, over shims/fake_cublaslt.cpp's library: what is chosen, and what is refused."""

import ctypes
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from cuda_ext import CudaExtError, Engine, build, host_build, ops
from cuda_ext.host_build import host_library
from cuda_ext.packing import pack
from cuda_ext.products import choose
from cuda_ext.tuning import Tuner
from pipeline.model import CompactGPT2Config, CompactGPT2LMHeadModel

SHIM = Path(__file__).parent / "shims" / "fake_cublaslt.cpp"
HALF, GELU, RESIDUAL, FLOAT = range(4)
ROOM = torch.empty(0, dtype=torch.uint8)
ANY, EVEN_ROWS, TOO_MUCH_MEMORY, TAKEN_BACK, ANY_TOO = range(1, 6)


def shim() -> Path:
    """The shim under a name that changes with what it includes: a build knows a source by its own text."""
    text = SHIM.read_text()
    included = hashlib.sha256((text + (host_build.CSRC / "cublaslt.cpp").read_text()).encode()).hexdigest()
    path = host_build.cache_folder() / f"fake-{included[:24]}.cpp"
    path.write_text(text)
    return path


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[ctypes.CDLL]:
    library = host_library([*(source for source in build.SOURCES if source != "cublaslt.cpp"), shim()])
    library.hr_host_seed(0)
    library.fake_refuse(0)
    library.fake_devices_agree.restype = ctypes.c_bool
    monkeypatch.setattr(ops, "library", lambda device: library)
    ops._function.cache_clear()
    yield library
    assert library.fake_living() == 0  # all that was made was freed
    ops._function.cache_clear()


def operands(m: int, n: int, k: int, epilogue: int) -> tuple[Any, ...]:
    a, weight, bias = torch.randn(m, k).half(), (torch.randn(n, k) / k**0.5).half(), torch.randn(n).half()
    out = torch.randn(m, n + 8)[:, :n]
    return a, weight, None if epilogue == FLOAT else bias, out.half() if epilogue in (HALF, GELU) else out


def words(algorithm: int) -> list[int]:
    return [algorithm, -1, 0, 0, 0, 0, 0, algorithm]


@pytest.mark.parametrize("epilogue", [HALF, GELU, RESIDUAL, FLOAT])
def test_products(fake: ctypes.CDLL, epilogue: int) -> None:
    a, weight, bias, out = operands(5, 12, 24, epilogue)
    wanted = F.linear(a.double(), weight.double(), None if bias is None else bias.double())
    wanted = F.gelu(wanted, approximate="tanh") if epilogue == GELU else wanted
    wanted = wanted + out.double() if epilogue == RESIDUAL else wanted
    scratch = torch.empty(ops.product_scratch_bytes("cpu"), dtype=torch.uint8)
    ops.product(a, weight, bias, out, scratch, epilogue, ops.BY_CUBLASLT, words(ANY))
    assert (out.double() - wanted).abs().max() < (4e-3 if out.dtype == torch.float16 else 1e-5)


@pytest.mark.parametrize("epilogue", [HALF, GELU, RESIDUAL, FLOAT])
def test_a_refusal_leaves_what_was_there(fake: ctypes.CDLL, epilogue: int) -> None:
    """The bias above all: it must not be added where the product was not."""
    a, weight, bias, out = operands(5, 12, 24, epilogue)
    before, scratch = out.clone(), torch.empty(0, dtype=torch.uint8)
    fake.fake_refuse(ANY)
    for algorithm in (words(ANY), words(EVEN_ROWS), words(TOO_MUCH_MEMORY)[:1] + [0] * 7):
        with pytest.raises(CudaExtError, match="product: cuBLASLt refused"):
            ops.product(a, weight, bias, out, scratch, epilogue, ops.BY_CUBLASLT, algorithm)
        assert torch.equal(out, before)


def test_algorithms_are_for_the_whole_bucket(fake: ctypes.CDLL) -> None:
    """One that is good at 16 rows but not at 15 is left out; so are those that the library itself takes back."""
    a, weight, bias, out = operands(16, 12, 24, HALF)
    assert ops.cublaslt_algorithms(a, weight, bias, out, HALF, 16) == [tuple(words(i)) for i in (EVEN_ROWS, ANY)]
    assert ops.cublaslt_algorithms(a, weight, bias, out, HALF, 9) == [tuple(words(ANY))]


def test_each_device_has_its_handle(fake: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    two = ctypes.c_int * 2
    fake.hr_host_devices(2, two(132, 80), two(227 * 1024, 99 * 1024))
    a, weight, bias, out = operands(4, 12, 24, RESIDUAL)
    try:
        for device in (1, 0, 1, 0):
            monkeypatch.setattr(ops, "_place", lambda _, device=device: (device, None))
            ops.product(a, weight, bias, out, torch.empty(0), RESIDUAL, ops.BY_CUBLASLT, words(ANY))
            assert fake.fake_devices_agree() and fake.hr_host_device() == 0
        assert fake.fake_handles(0) == fake.fake_handles(1) == 1
    finally:
        fake.hr_host_devices(0, None, None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = CompactGPT2Config(
        vocab_size=51, n_positions=16, n_embd=40, n_layer=2, n_head=2, head_dim=32, kept_heads=[[0, 1], [1]],
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("model")
    CompactGPT2LMHeadModel(config).half().save_pretrained(path)
    return path


def test_prefill_goes_on_by_our_tiles_where_cublaslt_refuses(fake: ctypes.CDLL, folder: Path, tmp_path: Path) -> None:
    """A choice made in a file, or for another card, may not work now: never an error, and the same numbers."""
    ids = torch.randint(0, 51, (1, 12))
    engine = Engine.from_checkpoint(folder, device="cpu")
    wanted = engine.forward(ids)

    def clock(run: Callable[[], None], together: int) -> Callable[[], float]:
        before = fake.fake_products()
        run()
        cost = 1.0 if fake.fake_products() > before else 2.0
        return lambda: cost

    tuner = Tuner(torch.device("cuda"), tmp_path / "choices.json", clock)
    packed = pack(folder)
    choices = choose(packed, packed.weights, 16, 16, tuner, ROOM)
    text = (tmp_path / "choices.json").read_text()
    assert len(choices) == 7 and {choice[4:6] for choice in choices} == {(ops.BY_CUBLASLT, ANY)}
    assert "cuBLASLt 130100: 1 ffffffffffffffff 0 0 0 0 0 1" in text
    engine._choices = choices
    engine.table = engine._make_table()
    done = fake.fake_products()
    assert torch.allclose(engine.forward(ids), wanted, atol=1e-2)
    assert fake.fake_products() - done == 9  # four in each of two layers, and the LM head
    fake.fake_refuse(ANY)
    done = fake.fake_products()
    assert torch.equal(engine.forward(ids), wanted) and fake.fake_products() == done
