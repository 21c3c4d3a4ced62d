"""Engines on another device than the current one: the CPU's runtime has several, with limits of their own."""

import ctypes
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from cuda_ext import CudaExtError, Engine, ops
from pipeline.model import CompactGPT2Config, CompactGPT2LMHeadModel

PROCESSORS, SHARED = (7, 5), (227 * 1024, 96 * 1024)
VOCABULARY = 50


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = CompactGPT2Config(
        vocab_size=VOCABULARY, n_positions=32, n_embd=40, n_layer=2, n_head=2, head_dim=32, kept_heads=[[0, 1], [1]],
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("model")
    CompactGPT2LMHeadModel(config).half().save_pretrained(path)
    return path


@pytest.fixture
def kernels() -> Iterator[ctypes.CDLL]:
    """Two devices, the first of which is current."""
    library = ops.library("cpu")
    library.hr_host_stream.restype = ctypes.c_void_p
    two = ctypes.c_int * 2
    library.hr_host_seed(0)
    library.hr_host_devices(2, two(*PROCESSORS), two(*SHARED))
    yield library
    library.hr_host_devices(0, None, None)
    library.hr_host_seed(0)


def place(kernels: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch, device: int, stream: int) -> None:
    """Tensors count as `device`'s, and a stream of the device `stream` is current there."""
    monkeypatch.setattr(ops, "_place", lambda _: (device, kernels.hr_host_stream(stream)))


@pytest.mark.parametrize("decode", ["eager", "persistent"])
def test_an_engine_on_the_second_device(
    folder: Path, kernels: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch, decode: str
) -> None:
    """Its launches are on its own streams, its questions about its own limits, and the first stays current."""
    ids = torch.randint(0, VOCABULARY, (2, 9))
    wanted = Engine.from_checkpoint(folder, device="cpu", max_batch=2, decode=decode).generate(ids, 5)
    place(kernels, monkeypatch, 1, 1)
    engine = Engine.from_checkpoint(folder, device="cpu", max_batch=2, decode=decode)
    assert engine.generate(ids, 5) == wanted
    engine.generate(ids, 3, temperature=0.8, top_k=5)
    engine.forward(ids)
    assert kernels.hr_host_device() == 0 and kernels.hr_host_error() == b""


def test_how_many_blocks_fit_is_asked_of_the_engines_device(
    folder: Path, kernels: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine.from_checkpoint(folder, device="cpu")
    for device, wanted in ((0, PROCESSORS[0]), (1, PROCESSORS[1])):
        place(kernels, monkeypatch, device, device)
        assert ops.persistent_blocks(engine.table, 1, 64, engine.device) == wanted
        assert kernels.hr_host_device() == 0


def test_devices_and_streams_that_do_not_fit(
    folder: Path, kernels: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine.from_checkpoint(folder, device="cpu")
    ids = torch.zeros(1, 3, dtype=torch.long)
    place(kernels, monkeypatch, 0, 1)
    with pytest.raises(CudaExtError, match="another device's stream while device 0 is current"):
        engine.prefill(ids)
    kernels.hr_host_seed(0)
    place(kernels, monkeypatch, 2, 0)
    with pytest.raises(CudaExtError, match="there is no device 2"):
        engine.prefill(ids)
    assert kernels.hr_host_device() == 0


def test_a_launch_that_the_devices_shared_memory_cannot_hold(
    folder: Path, kernels: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planned for the first, launched on the second: refused, as a GPU would."""
    engine = Engine.from_checkpoint(folder, device="cpu", decode="persistent")
    engine.prefill(torch.zeros(1, 3, dtype=torch.long))
    place(kernels, monkeypatch, 1, 1)
    two = ctypes.c_int * 2
    kernels.hr_host_devices(2, two(*PROCESSORS), two(SHARED[0], 4096))
    with pytest.raises(CudaExtError, match="decode_persistent"):
        engine.decode(torch.zeros(1, dtype=torch.long))


def test_calls_that_torch_makes_are_guarded_too(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Captures, events and streams belong to the current device: each public call makes the engine's current."""
    engine = Engine.from_checkpoint(folder, device="cpu")
    entered: list[torch.device] = []

    class Guard:
        def __enter__(self) -> None:
            entered.append(engine.device)

        def __exit__(self, *_: object) -> None:
            pass

    monkeypatch.setattr("cuda_ext.engine._guard", lambda device: Guard())
    ids = torch.zeros(1, 3, dtype=torch.long)
    calls = [
        lambda: engine.forward(ids),
        lambda: engine.prefill(ids),
        lambda: engine.decode(ids[:, 0]),
        lambda: engine.extend(2),
        lambda: engine.generate(ids, 2),
    ]
    for count, call in enumerate(calls, 1):
        call()
        assert len(entered) == count
    public = {name for name, value in vars(Engine).items() if callable(value) and not name.startswith("_")}
    assert public == {"forward", "prefill", "decode", "extend", "generate", "reset"}
