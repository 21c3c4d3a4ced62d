"""One piece of the GPU benchmark, in a process of its own, which `benchmarks.gpu` starts: see `benchmarks.isolated`.

`python -m benchmarks.gpu_case REQUEST`, with REQUEST a JSON object: `{"do": "ceilings"}`, `{"do": "case", ...}`,
`{"do": "memory", ...}` or `{"do": "trace", ...}`. Answers are JSON objects, one a line.
"""

import dataclasses
import gc
import itertools
import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.roofline import HALF, kv_bytes, measure_ceilings, weight_bytes_per_token
from benchmarks.subjects import Case, Check, Subject, kinds
from benchmarks.timing import cpu_lap, gpu_lap, in_turns
from eval.errors import reason
from pipeline.model import CompactGPT2Config

_PROMPTS = 8
_TURN_SECONDS = 20
_MIB = 2**20


def say(**what: Any) -> None:
    """One line for the parent."""
    print(json.dumps(what), flush=True)


def measure_case(request: Mapping[str, Any]) -> None:
    """Load, check and time the subjects of a case that `request["without"]` does not name.

    A subject that raises is left out with its reason; one that brings down the process, or hangs, is named by
    the last "start".
    """
    case, folder, device = Case(**request["case"]), Path(request["folder"]), request["device"]
    deadline = time.monotonic() + request["seconds"]
    say(start="the FP32 reference", seconds=90)
    check = Check(folder / "pruned", case, device)
    subjects: dict[str, Subject] = {}
    for name, kind in kinds(case).items():
        if name in request["without"]:
            continue
        left = deadline - time.monotonic() - request["min_seconds"] * (len(subjects) + 1) * 2
        if left < min(30, kind.seconds):
            say(subject=name, skipped="out of time")
            continue
        say(start=name, seconds=min(kind.seconds, left))
        began = time.monotonic()
        try:
            subject = kind.make(folder / kind.model, case, device)
            errors = check(subject) if kind.model == "pruned" else {}  # the dense model is Hugging Face's own
        except Exception as error:
            say(subject=name, skipped=f"{type(error).__name__}: {reason(error)[:500]}")
            if device != "cpu":
                torch.cuda.synchronize()  # raises where the device is lost, and ends this process
            continue
        subjects[name] = subject
        say(subject=name, checked=errors, seconds_to_load=round(time.monotonic() - began, 1))
    del check
    gc.collect()
    if not subjects:
        return
    vocabulary = CompactGPT2Config.from_pretrained(folder / "pruned").vocab_size
    prompts = torch.randint(0, vocabulary, (_PROMPTS, case.batch, case.length), device=device)
    timings = in_turns(
        {name: _work(subject, case, prompts) for name, subject in subjects.items()},
        per=case.tokens or 1,
        min_count=request["min_count"],
        min_seconds=request["min_seconds"],
        deadline=deadline,
        lap=cpu_lap if device == "cpu" else gpu_lap,
        turn=lambda name: say(start=name, seconds=_TURN_SECONDS),
    )
    say(timings={name: dataclasses.asdict(value) for name, value in timings.items()})


def _work(subject: Subject, case: Case, prompts: torch.Tensor) -> tuple[Callable[[], object], Callable[[], object]]:
    """What is not timed, and what is. Each subject reads the same prompts in the same order."""
    turn = itertools.cycle(prompts)
    if case.kind == "prefill":
        held: list[torch.Tensor] = [prompts[0]]

        def choose() -> None:
            held[0] = next(turn)

        return choose, lambda: subject.prefill(held[0])
    return lambda: subject.prefill(next(turn)), lambda: subject.burst(case.tokens)


def measure_memory(request: Mapping[str, Any]) -> None:
    """Bytes that one subject takes, weights and KV cache apart, from loading to the end of a case.

    `taken` is what the device has less than before the subject was loaded: every allocation is in it, whoever
    made it, with the allocator's slack and lazily loaded kernels. `allocated` is the most that torch's
    allocator had handed out.
    """
    case, folder, device = Case(**request["case"]), Path(request["folder"]), request["device"]
    name = request["subject"]
    kind = kinds(case)[name]
    say(start=name, seconds=kind.seconds)
    config = CompactGPT2Config.from_pretrained(folder / "pruned")
    torch.zeros(1, device=device)
    torch.cuda.synchronize()
    before = torch.cuda.mem_get_info(device)[0]
    subject = kind.make(folder / kind.model, case, device)
    ids = torch.randint(0, config.vocab_size, (case.batch, case.length), device=device)
    subject.prefill(ids)
    subject.burst(case.tokens)
    torch.cuda.synchronize()
    after = torch.cuda.mem_get_info(device)[0]
    weights = weight_bytes_per_token(config) + HALF * config.n_embd * (config.n_positions - 1)
    kv = kv_bytes(config, case.batch, case.capacity)
    peak = torch.cuda.max_memory_allocated(device)
    say(
        memory={"weights": weights, "kv": kv, "allocated": peak, "taken": before - after},
        rest_mib=round((peak - weights - kv) / _MIB, 1),
    )


def trace(request: Mapping[str, Any]) -> None:
    """For ncu with `--profile-from-start off`: a prefill, and one decoded token, between profiler marks."""
    case, folder = Case(**request["case"]), Path(request["folder"])
    kind = kinds(case)[request["subject"]]
    subject = kind.make(folder / kind.model, case, request["device"])
    vocabulary = CompactGPT2Config.from_pretrained(folder / "pruned").vocab_size
    ids = torch.randint(0, vocabulary, (case.batch, case.length), device=request["device"])
    subject.prefill(ids)
    if case.kind == "decode":
        subject.burst(2)
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStart()
    if case.kind == "decode":
        subject.burst(1)
    else:
        subject.prefill(ids)
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStop()


def main() -> None:
    request = json.loads(sys.argv[1])
    if request["do"] == "ceilings":
        say(start="ceilings", seconds=60)
        say(ceilings=dataclasses.asdict(measure_ceilings(request["device"])))
    else:
        {"case": measure_case, "memory": measure_memory, "trace": trace}[request["do"]](request)


if __name__ == "__main__":
    main()
