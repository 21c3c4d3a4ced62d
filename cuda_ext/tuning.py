"""The fastest of several ways, measured on this device and remembered in the user's cache.

$HEADROOM_CUDA_TUNE: "1" (the default) measures what it has not met, "0" takes the first way unmeasured, so that
results do not depend on what was measured: ways differ in the order of their sums.
"""

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from statistics import median

import torch

from cuda_ext import build
from cuda_ext.errors import CudaExtError

SWITCH = "HEADROOM_CUDA_TUNE"
_ROUNDS, _MICROSECONDS = 7, 300.0  # in which a way is repeated, each round

Clock = Callable[[Callable[[], None], int], float]
"""Microseconds that each of so many calls takes."""


class Tuner:
    """Remembers by name; a name says what was measured, as in "product 512 x 768 x 640, residual"."""

    def __init__(self, device: torch.device, file: Path | None = None, clock: Clock | None = None) -> None:
        self._device, self._file, self._clock = device, file, clock or _by_events
        self.active = device.type == "cuda" and os.environ.get(SWITCH, "1") != "0"

    def fastest(self, name: str, ways: Mapping[str, Callable[[], None]]) -> str:
        """The key of the fastest. A way that raises CudaExtError is left out; at least one must not."""
        if not self.active or len(ways) == 1:
            return next(iter(ways))
        if self._known.get(name) not in ways:
            self._known[name] = self._measure(ways)
            self._keep()
        return self._known[name]

    def _measure(self, ways: Mapping[str, Callable[[], None]]) -> str:
        counts = {}
        for name, run in ways.items():
            try:
                run()
                counts[name] = max(1, min(100, int(_MICROSECONDS / max(self._clock(run, 3), 1.0))))
            except CudaExtError:
                continue
        times: dict[str, list[float]] = {name: [] for name in counts}
        for _ in range(_ROUNDS):  # in turns, so that a change of clocks meets all
            for name, count in counts.items():
                times[name].append(self._clock(ways[name], count))
        return min(times, key=lambda name: median(times[name]))

    @cached_property
    def _path(self) -> Path:
        if self._file is not None:
            return self._file
        # Another build or another card may choose otherwise.
        card = torch.cuda.get_device_name(self._device).replace(" ", "-").replace("/", "-")
        return build.library().parent / f"choices-{card}.json"

    @cached_property
    def _known(self) -> dict[str, str]:
        try:
            known = json.loads(self._path.read_text(encoding="utf-8"))
        except (OSError, ValueError):  # not there yet, or damaged: measure anew
            return {}
        return known if isinstance(known, dict) else {}

    def _keep(self) -> None:
        with tempfile.NamedTemporaryFile("w", dir=self._path.parent, delete=False, encoding="utf-8") as file:
            json.dump(self._known, file, indent=1, sort_keys=True)
        Path(file.name).replace(self._path)


def _by_events(run: Callable[[], None], count: int) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(count):
        run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1000 / count
