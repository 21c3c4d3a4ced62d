"""The variants of CompactGPT2, trained with one budget on one text: python -m benchmarks.variants --out FILE.json

Each is trained from scratch on WikiText-2's embedded train part by `pretrain`, with one seed, tokenizer and number of
steps, and judged on its test part. Decoding is timed by the torch engine, all variants in turns, with most of the
context filled; KV bytes are counted in the caches at a full context, as FP16. FILE.json holds raw samples, machine,
versions, command and date. --table FILE.json prints the table again.
"""

import argparse
import json
import math
import shlex
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from eval.errors import UserError
from eval.latency import measure
from eval.perplexity import perplexity
from eval.results import save_json
from pipeline import hardware
from pipeline.artifacts import git_commit, versions
from pipeline.data import encode, sha256_text
from pipeline.engines.torch import TorchEngine
from pipeline.prepare import prepare
from pipeline.pretrain import pretrain, train_tokenizer
from pipeline.recipe import Pretrain, parse_recipe
from pipeline.texts import load_text

VARIANTS: dict[str, dict[str, Any]] = {
    "GPT-2": {},
    "rope": {"position": "rope"},
    "rope, half of each head": {"position": "rope", "rope_share": 0.5},
    "2 key/value heads for 6": {"n_kv_head": 2},
    "1 key/value head for 6": {"n_kv_head": 1},
    "window 64": {"window": 64},
    "window 64, last layer all": {"window": [64, 64, 64, None]},
    "rope, 2 for 6, window 64": {"position": "rope", "n_kv_head": 2, "window": [64, 64, 64, None]},
}
SHAPE = {"n_layer": 4, "n_head": 6, "head_dim": 32, "n_positions": 256, "vocab_size": 2048}
_HALF = 2
_NEW_TOKENS = 32


def train(fields: Mapping[str, Any], steps: int, shards: Path, out: Path) -> tuple[Path, float]:
    """The model folder and the tokens a second of its training on `shards`."""
    phases = {"steps": steps, "warmup_steps": steps // 10, "decay_steps": steps // 3}
    budget = {"batch_size": 8, "save_steps": steps, "eval_steps": steps, "eval_blocks": 8}
    recipe = parse_recipe(Pretrain, {"model": {**SHAPE, **fields}, "shards": str(shards)} | phases | budget)
    began = time.perf_counter()
    folder = pretrain(recipe, [], out, load_text("embedded:valid"))
    return folder, steps * recipe.batch_size * SHAPE["n_positions"] / (time.perf_counter() - began)


@torch.inference_mode()
def kv_bytes(engine: TorchEngine) -> float:
    """FP16 bytes of cached keys and values for each token of a full context."""
    engine.prefill(torch.zeros(1, engine.context - 1, dtype=torch.int64))
    engine.decode(torch.zeros(1, dtype=torch.int64))
    numbers = sum(layer.keys.numel() + layer.values.numel() for layer in engine.cache.layers)
    return _HALF * numbers / engine.context


def table(record: Mapping[str, Any]) -> str:
    """Markdown."""
    lines = ["| variant | parameters | perplexity | trained tokens/s | decoded tokens/s | KV bytes a token |"]
    lines.append("|---|---:|---:|---:|---:|---:|")
    for name, row in record["variants"].items():
        decoded = 1 / row["latency"]["decode"]["p50"]
        lines.append(
            f"| {name} | {row['parameters']:,} | {row['quality']['perplexity']:.1f} | {row['trained_a_second']:,.0f} "
            f"| {decoded:,.0f} | {row['kv_bytes_a_token']:,.0f} |"
        )
    return "\n".join(lines)


def run(choices: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Train, judge and time all variants."""
    text, judged = scratch / "train.txt", load_text("embedded:test")
    text.write_text(load_text("embedded:train"), encoding="utf-8")
    shards = scratch / "shards"
    tokenizer = train_tokenizer(parse_recipe(Pretrain, {"model": SHAPE}), [text], scratch)
    prepare([str(text)], shards, scratch / "tokenizer", workers=1, shard_tokens=10**9, validation_share=0)
    ids = encode(judged, tokenizer)
    ids = ids[: int(choices.text_share * len(ids))]
    rows: dict[str, dict[str, Any]] = {}
    engines: dict[str, TorchEngine] = {}
    for number, (name, fields) in enumerate(VARIANTS.items()):
        print(f"variants: {name}", file=sys.stderr)
        folder, speed = train(fields, choices.steps, shards, scratch / str(number))
        engine = engines[name] = TorchEngine.from_folder(folder)
        quality = perplexity(
            engine,
            ids,
            context=engine.context,
            stride=engine.context,
            text_sha256=sha256_text(judged),
            text_share=choices.text_share,
        )
        rows[name] = {
            "fields": fields,
            "parameters": engine.model.num_parameters(),
            "trained_a_second": speed,
            "quality": asdict(quality),
            "kv_bytes_a_token": kv_bytes(engine),
        }
    latencies = measure(
        engines,
        prompt_pool=ids,
        prompt_tokens=SHAPE["n_positions"] - _NEW_TOKENS,
        new_tokens=_NEW_TOKENS,
        min_count=choices.rounds,
        min_seconds=0,
    )
    for name, latency in latencies.items():
        rows[name]["latency"] = asdict(latency)
    return {
        "machine": {"cpu": hardware.cpu(), "gpu": hardware.gpu()},
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "git_commit": git_commit(),
        "command": f"python -m benchmarks.variants {shlex.join(sys.argv[1:])}",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "shape": SHAPE,
        "steps": choices.steps,
        "variants": rows,
    }


def read_choices(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked. Raises `UserError`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60, help="of 8 blocks of 256 tokens, each (default: 60)")
    parser.add_argument("--text-share", type=float, default=0.1, help="of the test text that is scored (default: 0.1)")
    parser.add_argument("--rounds", type=int, default=10, help="timings of each (default: 10)")
    parser.add_argument("--out", type=Path, default=Path("runs/variants.json"), help="the record")
    parser.add_argument("--table", type=Path, help="print the table of this record, and do nothing else")
    choices = parser.parse_args(arguments)
    for name in ("steps", "rounds"):
        if getattr(choices, name) < 1:
            raise UserError(f"--{name} {getattr(choices, name)}: give at least 1")
    if not 0 < choices.text_share <= 1 or math.isnan(choices.text_share):
        raise UserError(f"--text-share {choices.text_share}: give more than 0, up to 1")
    return choices


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all, write the record, print the table."""
    try:
        choices = read_choices(arguments)
        if choices.table:
            print(table(json.loads(choices.table.read_text(encoding="utf-8"))))
            return 0
        choices.out.parent.mkdir(parents=True, exist_ok=True)
    except (UserError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="headroom-variants-") as scratch:
        record = run(choices, Path(scratch))
    save_json(record, choices.out)
    print(table(record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
