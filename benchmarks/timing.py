"""Time on the GPU's own clock, subjects in turns: A B A B."""

import gc
import statistics
import time
from collections.abc import Callable, Mapping

import torch

from eval.latency import timing
from eval.results import Timing


def event_seconds(work: Callable[[], object], repeats: int, warmup: int = 3) -> float:
    """Median seconds of `work` on the current stream."""
    for _ in range(warmup):
        work()
    return statistics.median(gpu_lap(work) for _ in range(repeats))


def gpu_lap(work: Callable[[], object]) -> float:
    """Seconds of `work` on the current stream, which is idle before and after."""
    torch.cuda.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000


def cpu_lap(work: Callable[[], object]) -> float:
    """Seconds of `work` by the clock; for trying the benchmark without a GPU."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def in_turns(
    subjects: Mapping[str, tuple[Callable[[], object], Callable[[], object]]],
    *,
    per: int,
    min_count: int,
    min_seconds: float,
    deadline: float,
    lap: Callable[[Callable[[], object]], float] = gpu_lap,
    turn: Callable[[str], None] = lambda name: None,
    warmup: int = 3,
) -> dict[str, Timing]:
    """Time each subject's work, all subjects in each round.

    A subject is `(prepare, work)`: `prepare` runs before each `work` and is not timed. A sample is the seconds
    of `work`, by `lap`, over `per`. After `warmup` rounds, rounds go on until there are `min_count` of them and
    every subject ran for `min_seconds`, or until `deadline` (of `time.monotonic`) has passed and there are two.
    `turn` hears whose turn it is: an error or a hang is that subject's, since each turn ends with a synchronise.
    """
    samples: dict[str, list[float]] = {name: [] for name in subjects}
    seconds = dict.fromkeys(subjects, 0.0)

    def one_round() -> dict[str, float]:
        laps = {}
        for name, (prepare, work) in subjects.items():
            turn(name)
            prepare()
            laps[name] = lap(work)
        return laps

    gc.collect()
    gc.disable()
    try:
        for _ in range(warmup):
            one_round()
        count = 0
        while count < min_count or min(seconds.values()) < min_seconds:
            if count >= 2 and time.monotonic() > deadline:
                break
            for name, each in one_round().items():
                samples[name].append(each / per)
                seconds[name] += each
            count += 1
    finally:
        gc.enable()
    return {name: timing(values) for name, values in samples.items()}
