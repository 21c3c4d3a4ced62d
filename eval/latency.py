"""Latency of engines side by side: time to the first token, time of each later one, and ratios."""

import gc
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from tqdm import tqdm

from eval.engine import Engine
from eval.errors import UserError
from eval.results import Latency
from eval.statistics import Ratio, ratio, timing

__all__ = ["Ratio", "measure", "ratio", "timing"]


def measure(
    engines: Mapping[str, Engine],
    *,
    prompt_pool: np.ndarray | torch.Tensor,
    prompt_tokens: int,
    new_tokens: int,
    batch: int = 1,
    min_count: int,
    min_seconds: float,
    warmup: int = 2,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, Latency]:
    """Time the engines in turns, A B A B, so that all share what the machine does meanwhile.

    In each round every engine reads the same `batch` prompts, cut from `prompt_pool` (`[tokens]`, integer) at
    random places and new in each round, and writes `new_tokens` tokens greedily from its own logits. The
    time to the first token is the round's prefill sample; the mean time of the `new_tokens - 1` later
    ones is its decode sample. Both contain choosing the token and bringing it to the CPU, as a
    caller who streams text needs it. Sample i of every engine comes from round i.

    After `warmup` rounds that do not count, rounds go on until there are `min_count` of them and
    each engine was timed for `min_seconds`. A CUDA engine is timed by events on its current
    stream, any other by the clock.

    Raises `UserError` where the lengths do not fit an engine or the pool.
    """
    pool = np.asarray(prompt_pool)
    _check(engines, pool, prompt_tokens, new_tokens, batch, min_count)
    rng = np.random.default_rng(seed)
    prefill: dict[str, list[float]] = {name: [] for name in engines}
    decode: dict[str, list[float]] = {name: [] for name in engines}
    seconds = dict.fromkeys(engines, 0.0)

    def one_round() -> Iterator[tuple[str, float, float]]:
        starts = rng.integers(0, len(pool) - prompt_tokens + 1, batch)
        prompt = np.stack([pool[start : start + prompt_tokens] for start in starts])
        for name, engine in engines.items():
            yield name, *_generate(engine, torch.from_numpy(prompt.astype(np.int64)), new_tokens - 1)
        gc.collect()

    with (
        _garbage_collection_by_hand(),
        torch.no_grad(),
        tqdm(total=100, desc="latency", unit="%", disable=not progress) as bar,
    ):
        for _ in range(warmup):
            for _ in one_round():
                pass
        count = 0
        while count < min_count or min(seconds.values()) < min_seconds:
            for name, first, later in one_round():
                prefill[name].append(first)
                decode[name].append(later / (new_tokens - 1))
                seconds[name] += first + later
            count += 1
            by_time = min(seconds.values()) / min_seconds if min_seconds > 0 else 1.0
            bar.update(int(100 * min(1.0, count / min_count, by_time)) - bar.n)
    return {
        name: Latency(prompt_tokens, new_tokens, batch, timing(prefill[name]), timing(decode[name])) for name in engines
    }


def _check(
    engines: Mapping[str, Engine], pool: np.ndarray, prompt_tokens: int, new_tokens: int, batch: int, min_count: int
) -> None:
    if not engines:
        raise ValueError("there is no engine to measure")
    if pool.ndim != 1 or not np.issubdtype(pool.dtype, np.integer):
        raise ValueError(f"prompt_pool must be one row of integers, not {pool.dtype} of shape {pool.shape}")
    for value, least, what in (
        (prompt_tokens, 1, "the prompt's tokens"),
        (new_tokens, 2, "new tokens (the first is prefill's, the later ones are decode's)"),
        (batch, 1, "the batch"),
        (min_count, 1, "rounds"),
    ):
        if value < least:
            raise UserError(f"{value} is too few for {what}: give at least {least}")
    if len(pool) < prompt_tokens:
        raise UserError(f"the prompt text has {len(pool)} tokens; a prompt of {prompt_tokens} needs at least as many")
    for name, engine in engines.items():
        if prompt_tokens + new_tokens > engine.context:
            raise UserError(
                f"{prompt_tokens} prompt and {new_tokens} new tokens are {prompt_tokens + new_tokens}; "
                f"{name} takes at most {engine.context} together"
            )
        if not 0 <= pool.min() <= pool.max() < engine.vocab_size:
            raise UserError(
                f"the prompt text has token ids from {pool.min()} to {pool.max()}, those of {name} are "
                f"0 to {engine.vocab_size - 1}; tokenize it with the model's own tokenizer"
            )


def _generate(engine: Engine, prompt: torch.Tensor, steps: int) -> tuple[float, float]:
    """Seconds of a prefill and of `steps` greedy decode steps in a row."""
    engine.synchronize()
    clock = _CudaClock(engine) if engine.device.startswith("cuda") else _CpuClock(engine)
    clock.mark()
    token = engine.prefill(prompt).argmax(-1).cpu()
    clock.mark()
    for _ in range(steps):
        token = engine.decode(token).argmax(-1).cpu()
    clock.mark()
    first, later = clock.laps()
    return first, later


class _CpuClock:
    """Moments on the CPU's clock, each taken once the engine is idle."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self.moments: list[float] = []

    def mark(self) -> None:
        self.engine.synchronize()
        self.moments.append(time.perf_counter())

    def laps(self) -> list[float]:
        return [later - sooner for sooner, later in zip(self.moments, self.moments[1:], strict=False)]


class _CudaClock:
    """Moments on the GPU's clock: events in the stream, read after one synchronise."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self.events: list[torch.cuda.Event] = []

    def mark(self) -> None:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.engine.device))
        self.events.append(event)

    def laps(self) -> list[float]:
        self.engine.synchronize()
        milliseconds = [sooner.elapsed_time(later) for sooner, later in zip(self.events, self.events[1:], strict=False)]
        return [each / 1000 for each in milliseconds]


@contextmanager
def _garbage_collection_by_hand() -> Iterator[None]:
    """No collection but those asked for; what lives already is left out of these, which makes them quick."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
        if enabled:
            gc.enable()
