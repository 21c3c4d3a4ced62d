"""The fastest of several ways, measured on this device and remembered in the user's cache.

The host takes longer to ask for a small kernel than the GPU takes to run it, so calls are not timed one by one: many
of one way are captured in a CUDA graph, and its replays are timed by events. Ways that are equally fast within the
noise of the measurement go the first, fixed way: then a choice means something, and is the same tomorrow.

$HEADROOM_CUDA_TUNE: "1" (the default) measures what it has not met, "0" takes the fixed way unmeasured, so that
results do not depend on what was measured: ways differ in the order of their sums.
"""

import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from statistics import median, quantiles

import torch

from cuda_ext import build
from cuda_ext.errors import CudaExtError
from cuda_ext.graphs import capture

SWITCH = "HEADROOM_CUDA_TUNE"
_ROUNDS, _MICROSECONDS = 9, 300.0  # that a way is replayed for in each round
_MARGIN = 0.03  # a way must be faster by more than this to be taken instead of the fixed one

Stopwatch = Callable[[], float]
"""Measures once: microseconds that a call takes on the device."""
Clock = Callable[[Callable[[], None], int], Stopwatch]
"""A way's stopwatch; the number says how many calls are to be timed together. Raises CudaExtError if a call does."""


class Tuner:
    """Remembers by name; a name says what was measured, as in "product 512 x 768 x 640, epilogue 2"."""

    def __init__(self, device: torch.device, file: Path | None = None, clock: Clock | None = None) -> None:
        self._device, self._file, self._clock = device, file, clock or by_graphs
        self.active = device.type == "cuda" and os.environ.get(SWITCH, "1") != "0"

    def fastest(self, name: str, ways: Mapping[str, Callable[[], None]], together: int = 24) -> str:
        """The key of the fastest, or of the first, the fixed choice, if none is clearly faster.

        A way launches on the current stream, the same each time; `together`: how many calls are timed as one. One that
        raises CudaExtError is left out; at least one must not.
        """
        if not self.active or len(ways) == 1:
            return next(iter(ways))
        if self._known.get(name) not in ways:
            self._known[name] = self._measure(ways, together)
            self._keep()
        return self._known[name]

    def _measure(self, ways: Mapping[str, Callable[[], None]], together: int) -> str:
        stopwatches = {}
        for name, run in ways.items():
            try:
                stopwatches[name] = self._clock(run, together)
            except CudaExtError:
                continue
        fixed = next(iter(ways))
        best = decide(_rounds(stopwatches), fixed)
        if best == fixed or fixed not in stopwatches:
            return best
        # The best of many owes some of its lead to luck: once more, the two alone.
        return decide(_rounds({name: stopwatches[name] for name in (fixed, best)}), fixed)

    @cached_property
    def _path(self) -> Path:
        if self._file is not None:
            return self._file
        # Another build or another card may choose otherwise.
        card = torch.cuda.get_device_name(self._device).replace(" ", "-").replace("/", "-")
        built = hashlib.sha256(build.library().read_bytes()).hexdigest()[:24]
        return build.cache_folder() / f"choices-{card}-{built}.json"

    @cached_property
    def _known(self) -> dict[str, str]:
        return self._read()

    def _read(self) -> dict[str, str]:
        try:
            known = json.loads(self._path.read_text(encoding="utf-8"))
        except (OSError, ValueError):  # not there yet, or damaged: measure anew
            return {}
        return known if isinstance(known, dict) else {}

    def _keep(self) -> None:
        """In the file too, beside what other processes have written; where it cannot be written, in memory alone."""
        everything = self._read() | self._known
        try:
            with tempfile.NamedTemporaryFile("w", dir=self._path.parent, delete=False, encoding="utf-8") as file:
                json.dump(everything, file, indent=1, sort_keys=True)
            Path(file.name).replace(self._path)
        except OSError as error:
            if not self._told:
                print(f"measured choices are not kept for the next process: {error}", file=sys.stderr, flush=True)
            self._told = True

    _told = False


def decide(times: Mapping[str, Sequence[float]], fixed: str) -> str:
    """The way of the lowest median, if it beats `fixed` by more than the noise; otherwise `fixed`.

    `times`: microseconds of each round. The noise is 3 % of the fixed way's median, or what the quartiles of either
    way's rounds are apart, if that is more.
    """
    best = min(times, key=lambda name: median(times[name]))
    if fixed not in times:
        return best
    noise = max(_MARGIN * median(times[fixed]), _spread(times[fixed]), _spread(times[best]))
    return best if median(times[fixed]) - median(times[best]) > noise else fixed


def _rounds(stopwatches: Mapping[str, Stopwatch]) -> dict[str, list[float]]:
    """What each way took in each round; in turns, so that a change of clocks meets all."""
    rounds = [{name: measure() for name, measure in stopwatches.items()} for _ in range(_ROUNDS)]
    return {name: [times[name] for times in rounds] for name in stopwatches}


def _spread(times: Sequence[float]) -> float:
    low, _, high = quantiles(times, n=4)
    return high - low


def by_graphs(run: Callable[[], None], together: int) -> Stopwatch:
    """Times a CUDA graph of `together` calls, replayed on the current device's current stream."""
    graph = capture(run, together)

    def replay(times: int) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(times):
            graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1000 / times

    replay(1)  # the first uploads the graph
    enough = max(1, min(100, round(_MICROSECONDS / max(replay(2), 1.0))))
    return lambda: replay(enough) / together
