"""Side-by-side latency of model folders: interleaved in one run, compared by ratio."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from eval.errors import UserError
from eval.latency import measure, ratio
from pipeline import hardware
from pipeline.data import encode
from pipeline.engines import default_engine, load_engine
from pipeline.texts import load_text
from pipeline.tokenizer import load_tokenizer

_PROMPT_TEXT = "embedded:test"


def bench(
    models: Sequence[Path],
    engines: Sequence[str],
    *,
    prompt_tokens: int,
    new_tokens: int,
    batch: int = 1,
    device: str | None = None,
    precision: str | None = None,
    min_count: int = 20,
    min_seconds: float = 3.0,
) -> dict[str, Any]:
    """Latency of each folder, and ratios to the first: `{"machine", "subjects": [...]}`.

    One engine name serves all folders; none means what each folder holds. A ratio above 1 says how
    many times faster than the first folder a row is, with a paired bootstrap 95 % interval.
    """
    if len(engines) not in (0, 1, len(models)):
        raise UserError(f"{len(engines)} engines for {len(models)} folders; give one for all or one for each")
    names = list(engines) * (len(models) if len(engines) == 1 else 1) or [default_engine(model) for model in models]
    loaded = {
        f"{model} ({name})": load_engine(name, model, device=device, precision=precision)
        for model, name in zip(models, names, strict=True)
    }
    if len(loaded) < len(models):
        raise UserError("the same folder with the same engine is named twice; name each once")
    smallest = min(loaded, key=lambda name: loaded[name].vocab_size)
    pool = encode(load_text(_PROMPT_TEXT), load_tokenizer(models[0], next(iter(loaded.values())).vocab_size))
    if pool.max() >= loaded[smallest].vocab_size:
        raise UserError(
            f"{smallest}: has no token {pool.max()}, which the prompt has by {models[0]}'s tokenizer; "
            "bench models of one tokenizer"
        )
    latencies = measure(
        loaded,
        prompt_pool=pool,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        batch=batch,
        min_count=min_count,
        min_seconds=min_seconds,
    )
    first = next(iter(latencies.values()))
    return {
        "machine": {"cpu": hardware.cpu(), "gpu": hardware.gpu()},
        "subjects": [
            {
                "name": name,
                "device": loaded[name].device,
                "precision": loaded[name].precision,
                "compute": loaded[name].compute,
                "latency": asdict(latency),
                "speedup": {
                    "prefill": ratio(first.prefill, latency.prefill)._asdict(),
                    "decode": ratio(first.decode, latency.decode)._asdict(),
                },
            }
            for name, latency in latencies.items()
        ],
    }


def format_bench(outcome: dict[str, Any]) -> str:
    """The table that a person reads."""
    first = outcome["subjects"][0]["latency"]
    lines = [
        f"prompt {first['prompt_tokens']}, new {first['new_tokens']}, batch {first['batch']}; "
        "medians; speed-up over the first row with its 95 % interval",
        f"{'model':<44} {'prefill ms':>10} {'speed-up':>20} {'decode ms':>10} {'speed-up':>20}",
    ]
    for subject in outcome["subjects"]:
        cells = []
        for part in ("prefill", "decode"):
            gain = subject["speedup"][part]
            cells += [
                f"{1000 * subject['latency'][part]['p50']:>10.2f}",
                f"{gain['value']:>6.2f} [{gain['low']:.2f}, {gain['high']:.2f}]".rjust(20),
            ]
        lines.append(f"{subject['name'][-44:]:<44} {' '.join(cells)}")
    return "\n".join(lines)
