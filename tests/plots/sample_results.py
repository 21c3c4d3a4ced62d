"""Full results made up for the tests: odd sizes, skipped GPU rows, control arms, uneven heads, curves."""

import math
import random

import numpy as np

from eval.results import (
    Agreement,
    CurvePoint,
    Heads,
    Latency,
    Memory,
    Quality,
    QuantizedLayer,
    Results,
    Row,
    Score,
    Timing,
)
from eval.statistics import part_sizes, standard_error

NO_GPU = "this torch build has no CUDA support"
HOSTILE = "<script>alert('x')</script> & \"quotes\" | pipe"


def timing(median: float, spread: float = 0.02, count: int = 23, seed: int = 0) -> Timing:
    """Samples whose median is `median`, in seconds, scattered by `spread`, each of them apart."""
    draw = random.Random(f"{median} {seed}")
    half = [spread * draw.random() for _ in range(count // 2)]
    samples = [median, *(median * (1 - part) for part in half), *(median * (1 + part) for part in half)]
    draw.shuffle(samples)
    ordered = sorted(samples)
    interval = (median * (1 - spread / 2), median * (1 + spread))
    return Timing(samples, count, sum(samples) / count, median, ordered[-3], ordered[-1], interval)


def quality(perplexity: float, share: float = 0.125, noise: float = 0.002, tokens: int = 35_937) -> Quality:
    """A text whose parts differ much, for all rows alike, and by `noise` nats for this one alone."""
    sizes, nll = part_sizes(tokens), math.log(perplexity)
    parts = 0.3 * np.random.default_rng(1).normal(size=len(sizes))
    parts += noise * np.random.default_rng(round(1e4 * perplexity)).normal(size=len(sizes))
    parts += nll - np.average(parts, weights=sizes)
    error = perplexity * standard_error(parts, tokens)
    return Quality(perplexity, nll, tokens, 512, 256, "ab" * 32, share, error, parts.tolist())


def latency(prefill_ms: float, decode_ms: float, spread: float = 0.02, prompt: int = 128) -> Latency:
    return Latency(prompt, 32, 1, timing(prefill_ms / 1e3, spread), timing(decode_ms / 1e3, spread, seed=1))


def memory(peak_mb: float, base_mb: float = 318.5, gpu: bool = False) -> Memory:
    peak = int(peak_mb * 1e6)
    rest = (int(peak * 0.2), int(peak * 0.5)) if gpu else (None, None)
    return Memory(peak, peak - 9_000_001, peak - 61_000_003, peak - 40_000_007, int(base_mb * 1e6), *rest)


def row(
    stage: str, engine: str, device: str, precision: str, ppl: float | None = None, role: str = "chain", **rest
) -> Row:
    return Row(stage, engine, device, precision, role, quality=quality(ppl) if ppl else None, **rest)


FP32 = "FP32 weights, FP32 arithmetic, eager, SDPA, threads 2"
DENSE, PRUNED = 8_600_001, 8_272_327


def hints(precision: str, cache: str, group: int) -> str:
    """What OpenVINO says of how it computes."""
    names = ("INFERENCE_PRECISION_HINT", "KV_CACHE_PRECISION", "DYNAMIC_QUANTIZATION_GROUP_SIZE")
    said = [f"{name}={value}" for name, value in zip(names, (precision, cache, group), strict=True)]
    return ", ".join([*said, "INFERENCE_NUM_THREADS=2"])


def full(gpu: bool = False, bf16: bool = False) -> Results:
    """Fourteen rows as a run leaves them; `gpu` measures the GPU rows instead of skipping them.

    With `bf16`, the CPU has bf16 units, which OpenVINO uses for INT8 rows unasked.
    """

    def on_gpu(
        stage: str, precision: str, ppl: float, parameters: int, size: int, ms: float, role: str = "chain"
    ) -> Row:
        if not gpu:
            return row(stage, "torch", "cuda:0", precision, role=role, skipped=NO_GPU)
        rest = {"latency": latency(3 * ms, ms), "memory": memory(900, gpu=True)}
        return row(stage, "torch", "cuda:0", precision, ppl, role, parameters=parameters, bytes_on_disk=size, **rest)

    def on_cpu(stage, engine, precision, ppl, parameters, size, pre, dec, peak, role="chain", compute=""):
        rest = {"parameters": parameters, "bytes_on_disk": size, "compute": compute}
        if pre:
            rest |= {"latency": latency(pre, dec), "memory": memory(peak)}
        return row(stage, engine, "cpu", precision, ppl, role, **rest)

    exact = hints("f32", "f32", 0)
    auto = hints("bf16" if bf16 else "f32", "f16", 32)
    rows = [
        on_cpu("load", "torch", "fp32", 61.27, DENSE, 34_413_127, 21.4, 5.13, 611.2, compute=FP32),
        on_gpu("load", "fp32", 61.27, DENSE, 34_413_127, 1.91),
        on_cpu(
            "half", "torch", "fp16", 61.28, DENSE, 17_213_009, None, None, None, compute=FP32.replace("32", "16", 1)
        ),
        on_gpu("half", "fp16", 61.29, DENSE, 17_213_009, 1.83),
        on_cpu("prune", "torch", "fp32", 66.93, PRUNED, 33_102_431, 20.6, 5.08, 608.4, compute=FP32),
        on_gpu("prune", "fp16", 66.95, PRUNED, 16_557_611, 1.79),
        on_cpu("finetune", "torch", "fp32", 59.90, PRUNED, 33_102_431, 20.7, 5.09, 607.9, compute=FP32),
        on_gpu("finetune", "fp16", 59.92, PRUNED, 16_557_611, 1.79),
        on_cpu("quantize", "openvino", "fp32", 59.90, PRUNED, 33_300_411, 15.2, 3.31, 655.5, "baseline", exact),
        on_cpu(
            "quantize",
            "openvino",
            "bf16",
            59.97,
            PRUNED,
            33_300_411,
            9.1,
            2.97,
            661.0,
            "baseline",
            hints("bf16", "f16", 32),
        ),
        on_cpu("quantize", "openvino", "fp16", 59.91, PRUNED, 16_751_003, 15.3, 3.30, 641.7, "baseline", exact),
        on_cpu("quantize", "openvino", "int8", 60.02, PRUNED, 8_612_777, 12.7, 2.06, 598.1, compute=auto),
        on_cpu("control-finetune", "torch", "fp32", 59.21, DENSE, 34_413_127, 21.5, 5.14, 612.0, "control", FP32),
        on_cpu("control-random", "torch", "fp32", 88.41, PRUNED, 33_102_431, 20.6, 5.07, 609.0, "control", FP32),
    ]
    for found in rows:
        if found.skipped is None and found.stage in ("load", "finetune", "quantize"):
            found.tasks = scores(found.quality.perplexity)
    return Results(
        run={
            "name": "sample",
            "recipe": {"name": "demo", "seed": 3, "prune": {"ratio": 0.2, "scope": "global"}, "note": HOSTILE},
            "machine": {"cpu": {"model": "Some CPU", "isa": ["avx2", "amx_int8"], "cores": 2}, "gpu": None},
            "versions": {"torch": "2.13.0+cpu", "openvino": "2026.4.1"},
            "git_commit": "0123abc",
            "date": "2026-01-02T03:04:05+00:00",
            "seconds": {"load": 1.25, "finetune": 181.0},
            "command": "python -m pipeline run --recipe demo --out runs/sample",
        },
        rows=rows,
        heads={
            "prune": heads("taylor", [[0, 2, 3, 4], [0, 1, 2, 3, 4], [1], [0, 1, 2, 3, 4]]),
            "control-random": heads("random", [[0, 1, 2, 3], [0, 1, 3, 4], [0, 2, 3], [0, 1, 2, 4]], seed=5),
        },
        curves={"finetune": curve(67.0, 60.0), "control-finetune": curve(61.0, 59.0, seed=2)},
        quantization=[
            QuantizedLayer("transformer.h.0.mlp.c_fc", "gptq", 8, "symmetric", 1e-4, 0.01, 0.007, "Dense avx_f32"),
            QuantizedLayer("lm_head", "rtn", 8, "symmetric", 3.4e-5, 0.2, 0.0093, None),
        ],
        agreement=agreement([row for row in rows if row.device == "cpu" and row.role != "control"]),
    )


def scores(perplexity: float) -> dict[str, Score]:
    """Somewhat worse than GPT-2 124M, the more so the higher the perplexity."""
    accuracy = 17 / perplexity
    return {
        "hellaswag": Score(accuracy, (accuracy * (1 - accuracy) / 10_041) ** 0.5, 10_042, 10_042, "ab" * 32),
        "lambada": Score(accuracy / 2, (accuracy / 2 / 199) ** 0.5, 200, 5_153, "cd" * 32),
    }


def agreement(rows: list[Row], seed: int = 7) -> Agreement:
    """Made-up matrices over these rows: divergences from rounding to half a nat, every row at one with itself."""
    draw, size = random.Random(seed), len(rows)

    def matrix(value, itself):
        return [[itself if a == b else value() for b in range(size)] for a in range(size)]

    return Agreement(
        rows=[row.key for row in rows],
        tokens=1_023,
        context=512,
        text_sha256="ab" * 32,
        logit_mean=matrix(lambda: 0.3 * draw.random(), 0.0),
        logit_max=matrix(lambda: 4 * draw.random(), 0.0),
        kl=matrix(lambda: 0.5 * 10 ** (-8 * draw.random()), 0.0),
        top1=matrix(lambda: 0.8 + 0.2 * draw.random(), 1.0),
        prompt_tokens=64,
        new_tokens=64,
        diverged=matrix(lambda: [draw.choice([None, 0, 17, 63]) for _ in range(4)], [None] * 4),
        kl_stderr=matrix(lambda: 1e-3 * draw.random(), 0.0),
        top1_stderr=matrix(lambda: 0.01 * draw.random(), 0.0),
    )


def heads(method: str, kept: list[list[int]], width: int = 5, seed: int = 4) -> Heads:
    draw = random.Random(seed)
    return Heads(method, "global", [[draw.random() for _ in range(width)] for _ in kept], kept)


def curve(first: float, last: float, points: int = 47, seed: int = 1) -> list[CurvePoint]:
    draw = random.Random(seed)
    return [
        CurvePoint(
            5 * i + 5,
            (i + 1) / points,
            math.log(last + (first - last) * math.exp(-i / 9)) + 0.05 * draw.gauss(0, 1),
            5e-5 * (1 - i / points),
        )
        for i in range(points)
    ]


def empty() -> Results:
    """A run in which nothing could be measured."""
    rows = [
        row("load", "torch", "cuda:0", "fp32", skipped=NO_GPU),
        row("prune", "torch", "cuda:0", "fp16", skipped=NO_GPU),
    ]
    return Results(run={"name": "empty", "recipe": {}, "machine": {}, "versions": {}}, rows=rows)


def single() -> Results:
    """One measured row."""
    return Results(run=full().run, rows=full().rows[:1])


def many(count: int = 20) -> Results:
    """`count` measured rows in a cluster of near-equal values, the hard case for labels."""
    draw = random.Random(9)
    stages = ("load", "half", "prune", "finetune", "quantize", "control-finetune", "control-random")
    roles = {"control-finetune": "control", "control-random": "control"}
    rows = []
    for index in range(count):
        stage, precision = stages[index % 7], ("fp32", "fp16", "int8")[index // 7]
        rows.append(
            row(
                stage,
                "torch",
                "cpu",
                precision,
                60 + draw.random(),
                roles.get(stage, "chain"),
                parameters=DENSE,
                bytes_on_disk=8_000_000 + 1_300_000 * index,
                latency=latency(20 + draw.random(), 5 + 0.2 * draw.random()),
                memory=memory(600 + index),
            )
        )
    return Results(run=full().run, rows=rows, agreement=agreement(rows))
