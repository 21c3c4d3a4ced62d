"""NVTX ranges: around each call where they are asked for, and the very function where they are not."""

import contextlib
from collections.abc import Iterator

import pytest
import torch

from cuda_ext.engine import Engine
from cuda_ext.ranges import NVTX, ranged


def double(x: int) -> int:
    """Twice."""
    if x < 0:
        raise ValueError("negative")
    return 2 * x


@pytest.mark.parametrize(("value", "cuda"), [(None, "13.0"), ("0", "13.0"), ("1", None)])
def test_off_it_is_the_function_itself(value: str | None, cuda: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.delenv(NVTX, raising=False) if value is None else monkeypatch.setenv(NVTX, value)
    assert ranged("x")(double) is double


def test_on_each_call_is_a_range(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []

    @contextlib.contextmanager
    def fake(name: str) -> Iterator[None]:
        said.append(name)
        try:
            yield
        finally:
            said.append("end")

    monkeypatch.setattr(torch.cuda.nvtx, "range", fake)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setenv(NVTX, "1")
    call = ranged("decode")(double)
    assert call(3) == 6 and call.__doc__ == "Twice." and said == ["headroom: decode", "end"]
    with pytest.raises(ValueError, match="negative"):
        call(-1)
    assert said == ["headroom: decode", "end"] * 2


def test_the_engine_costs_nothing_without() -> None:
    assert not hasattr(Engine._draw, "__wrapped__")
