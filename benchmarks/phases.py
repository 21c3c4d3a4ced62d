"""Where a token's time goes inside the persistent launch: python -m benchmarks.phases --out DIR

Of GPT-2 124M's shape, two of twelve heads pruned in each layer: DIR/phases.json is a trace of `TOKENS` tokens for
Perfetto (ui.perfetto.dev), a row a block, from the stamps that the kernel leaves at its barriers. Printed beside it:
the price of a token, of its barriers alone, and of barriers and weights without arithmetic.
"""

import argparse
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config

from benchmarks.checkpoints import write_checkpoints
from benchmarks.timing import gpu_lap
from cuda_ext import Engine
from cuda_ext.persistent import WORK
from eval.results import save_json
from pipeline import hardware

TOKENS = 4
CONTEXT, SHORT, LONG, REPEATS = 480, 17, 49, 15
PHASES = ("LayerNorm, q, k, v", "attention", "its projection", "LayerNorm, fc, GELU", "its projection back")


def phase(index: int, layers: int) -> str:
    """The name of what a block does before its barrier number `index`, from 0 on."""
    place = index % (len(PHASES) * layers + 1)
    return "LM head" if place == len(PHASES) * layers else f"{place // len(PHASES)}: {PHASES[place % len(PHASES)]}"


def spans(stamps: torch.Tensor, layers: int) -> Iterator[tuple[int, str, int, int]]:
    """Block, name, begin and end in ns of every phase and every wait: stamps int64 [blocks, 2 x barriers + 2].

    A phase of a block ends where its first warp comes to the barrier; others may be at work until the wait begins.
    """
    for block, times in enumerate(stamps.tolist()):
        reached = sum(time > 0 for time in times)
        for place in range(reached - 2):  # what comes after the last barrier is no phase
            name = "wait" if place % 2 else phase(place // 2, layers)
            yield block, name, times[place], times[place + 1]


def trace(stamps: torch.Tensor, layers: int) -> dict[str, Any]:
    """Chrome's trace format (Trace Event Format, complete events): times in microseconds from the first stamp."""
    first = int(stamps[stamps > 0].min())
    events: list[dict[str, Any]] = [
        {"name": "thread_name", "ph": "M", "pid": 0, "tid": block, "args": {"name": f"block {block}"}}
        for block in range(stamps.shape[0])
    ]
    events += [
        {"name": name, "ph": "X", "pid": 0, "tid": block, "ts": (begin - first) / 1e3, "dur": (end - begin) / 1e3}
        for block, name, begin, end in spans(stamps, layers)
    ]
    return {"traceEvents": events, "displayTimeUnit": "ns"}


def summary(stamps: torch.Tensor, layers: int) -> dict[str, float]:
    """Microseconds a token in phases of each kind and in waits, a mean over blocks; layers are added up."""
    tokens = max(1, (stamps.shape[1] - 2) // (2 * (len(PHASES) * layers + 1)))
    found: dict[str, float] = {}
    for _, name, begin, end in spans(stamps, layers):
        kind = name.partition(": ")[2] or name
        found[kind] = found.get(kind, 0.0) + (end - begin) / 1e3 / tokens / stamps.shape[0]
    return found


def prices(engine: Engine, ids: torch.Tensor) -> dict[str, float]:
    """Microseconds a token of each of persistent.WORK: how much longer LONG tokens take than SHORT ones."""
    assert engine._persistent is not None
    found = {}
    for work in WORK:
        engine._persistent.work = work

        def seconds(count: int) -> float:
            engine.prefill(ids)
            return gpu_lap(lambda: engine.extend(count))

        seconds(SHORT)
        laps = [seconds(LONG) - seconds(SHORT) for _ in range(REPEATS)]
        found[work] = 1e6 * statistics.median(laps) / (LONG - SHORT)
    engine._persistent.work = "all"
    return found


def stamped(engine: Engine, ids: torch.Tensor, tokens: int) -> torch.Tensor:
    """The stamps of one launch of `tokens` tokens behind `ids`, on the CPU; warmed up before."""
    persistent = engine._persistent
    assert persistent is not None
    for _ in range(2):
        persistent.stamps = persistent.room_for_stamps(ids.shape[0], tokens)
        engine.prefill(ids)
        engine.extend(tokens + 1)
    stamps, persistent.stamps = persistent.stamps, None
    assert stamps is not None
    return stamps.cpu()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu/traces"))
    choices = parser.parse_args(arguments)
    reason = hardware.why_no_gpu()
    if reason is not None:
        print(f"error: {reason}; run this on a machine with a GPU", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as scratch:
        config = write_checkpoints(GPT2Config(), Path(scratch))
        engine = Engine.from_checkpoint(Path(scratch) / "pruned", max_context=CONTEXT + 64, decode="persistent")
    ids = torch.randint(0, config.vocab_size, (1, CONTEXT), generator=torch.Generator().manual_seed(1))
    if engine._persistent is None or not engine._persistent.fits(1):
        print("error: this GPU does not hold the persistent launch", file=sys.stderr)
        return 1
    stamps = stamped(engine, ids, TOKENS)
    found: dict[str, Any] = {"prices": prices(engine, ids), "phases": summary(stamps, config.n_layer)}
    found["barriers"] = len(PHASES) * config.n_layer + 1
    choices.out.mkdir(parents=True, exist_ok=True)
    save_json(trace(stamps, config.n_layer) | {"otherData": found}, choices.out / "phases.json")
    print("\n".join(lines(found)))
    return 0


def lines(found: Mapping[str, Any]) -> list[str]:
    """Prices and phases for people, as phases.json's `otherData` holds them."""
    told = found["prices"]
    barrier = told["barriers"] / found["barriers"]
    return [
        *(f"{name:<24} {time:8.2f} us a token" for name, time in found["phases"].items()),
        f"a token {told['all']:.1f} us; weights and barriers alone {told['copies']:.1f}; barriers alone "
        f"{told['barriers']:.1f}, {barrier:.2f} each",
    ]


if __name__ == "__main__":
    sys.exit(main())
