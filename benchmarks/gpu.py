"""GPU latencies side by side, on GPT-2 124M's shape: python -m benchmarks.gpu --out DIR

Stock Hugging Face GPT-2 and CompactGPT2, FP32 and FP16, dense and with two of twelve heads pruned in
each layer; random weights, which time as real ones do. Writes DIR/gpu.json with raw samples, machine,
versions, command and date, and prints a table.
"""

import argparse
import dataclasses
import shlex
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from eval.latency import measure, ratio
from eval.results import save_json
from pipeline import hardware
from pipeline.artifacts import git_commit, versions
from pipeline.engines.torch import TorchEngine
from pipeline.model import from_gpt2, slice_heads


def engines(shape: GPT2Config) -> dict[str, TorchEngine]:
    """What is compared; the first one is what the others are measured against."""
    torch.manual_seed(0)
    stock = GPT2LMHeadModel(shape).eval()
    kept = [[head for head in range(shape.n_head) if head not in (0, shape.n_head - 1)]] * shape.n_layer

    def engine(model: Any, precision: str) -> TorchEngine:
        return TorchEngine(model, device="cuda:0", precision=precision)

    return {
        "transformers GPT-2 fp32": engine(GPT2LMHeadModel(shape).eval(), "fp32"),
        "transformers GPT-2 fp16": engine(GPT2LMHeadModel(shape).eval(), "fp16"),
        "CompactGPT2 fp32": engine(from_gpt2(stock), "fp32"),
        "CompactGPT2 fp16": engine(from_gpt2(stock), "fp16"),
        "CompactGPT2 fp16 pruned": engine(slice_heads(from_gpt2(stock), kept), "fp16"),
    }


def main() -> None:
    """Measure on each prompt length and batch, write the JSON, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--min-count", type=int, default=20)
    arguments = parser.parse_args()
    reason = hardware.why_no_gpu()
    if reason is not None:
        print(f"error: {reason}; run this on a machine with a GPU", file=sys.stderr)
        sys.exit(2)
    shape = GPT2Config()
    subjects = engines(shape)
    pool = torch.randint(0, shape.vocab_size, (20_000,), generator=torch.Generator().manual_seed(0))
    record: dict[str, Any] = {
        "machine": {"cpu": hardware.cpu(), "gpu": hardware.gpu()},
        "versions": versions(),
        "git_commit": git_commit(),
        "command": f"python -m benchmarks.gpu {shlex.join(sys.argv[1:])}",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cases": [],
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "gpu.json"
    for prompt_tokens, batch in ((32, 1), (512, 1), (512, 8)):
        latencies = measure(
            subjects,
            prompt_pool=pool,
            prompt_tokens=prompt_tokens,
            new_tokens=64,
            batch=batch,
            min_count=arguments.min_count,
            min_seconds=1.0,
        )
        first = next(iter(latencies.values()))
        print(f"\nprompt {prompt_tokens}, batch {batch}: medians; speed-up over the first row, 95 % interval")
        case = []
        for name, latency in latencies.items():
            gains = {part: ratio(getattr(first, part), getattr(latency, part)) for part in ("prefill", "decode")}
            cells = [
                f"{part} {1000 * getattr(latency, part).p50:8.3f} ms {g.value:5.2f} [{g.low:.2f}, {g.high:.2f}]"
                for part, g in gains.items()
            ]
            print(f"{name:<26} {'   '.join(cells)}")
            speedup = {part: gain._asdict() for part, gain in gains.items()}
            case.append({"name": name, "latency": dataclasses.asdict(latency), "speedup": speedup})
        record["cases"] += [case]
        save_json(record, path)  # after each case: a time limit costs only what was not yet measured
    print(f"\n{path}")


if __name__ == "__main__":
    main()
