"""A CUDA graph as far as a CPU has one: launches, replayed with the very arguments that they were captured with."""

from collections.abc import Callable
from unittest.mock import patch

from cuda_ext import Engine, ops


class Recorded:
    """The launches of `step`, which are noted and not made."""

    def __init__(self, step: Callable[[], None]) -> None:
        self.launches: list[tuple[Callable[..., int], tuple[object, ...]]] = []
        found = ops._function

        def recording(device: str, name: str) -> Callable[..., int]:
            def note(*arguments: object) -> int:
                self.launches.append((found(device, name), arguments))
                return 0

            return note

        with patch.object(ops, "_function", recording):
            step()

    def replay(self) -> None:
        for launch, arguments in self.launches:
            assert launch(*arguments) == 0


def by_graphs(engine: Engine) -> list[Recorded]:
    """Lets an engine on the CPU decode by graphs; returns the list that gets those that it captures."""
    captured: list[Recorded] = []

    def capture(step: Callable[[], None]) -> Recorded:
        captured.append(Recorded(step))
        return captured[-1]

    engine._capture = capture  # type: ignore[assignment,method-assign]
    engine._ways = dict.fromkeys(range(1, engine.max_batch + 1), "graph")
    return captured
