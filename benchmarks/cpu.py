"""Headroom's INT8 beside what else one could run on a CPU: python -m benchmarks.cpu --out FILE.json

GPT-2 with two heads pruned in each layer and random weights, which time as trained ones do; an engine that cannot take
a pruned model gets the dense one, and its row says so. Each subject runs in a process of its own. All of a case's are
alive together and are stopped but for the one whose turn it is; every round has new prompts and another order.
Perplexity is that of the embedded model (dense, trained). FILE.json holds raw samples, machine, versions, command and
date, written after each case. `make bench-cpu` installs the peers of requirements-peers.txt into .venv-peers first.
"""

import argparse
import contextlib
import itertools
import os
import shlex
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from tqdm import tqdm
from transformers import GPT2Config

from benchmarks.checkpoints import write_checkpoints
from benchmarks.cpu_peers.table import FP32, OURS, SUBJECTS, Subject
from benchmarks.isolated import Child
from benchmarks.roofline import HALF, kv_bytes, weight_bytes_per_token
from benchmarks.timing import cpu_lap
from eval.errors import UserError, WorkError
from eval.latency import ratio, timing
from eval.memory import snapshot
from eval.results import latency_from, save_json
from pipeline import hardware
from pipeline.artifacts import git_commit, tree_bytes, versions
from pipeline.checkpoint import load_model
from pipeline.data import encode
from pipeline.model import CompactGPT2Config, CompactGPT2LMHeadModel
from pipeline.texts import load_text
from pipeline.tokenizer import load_tokenizer

SHAPES = {
    "quick": {"vocab_size": 512, "n_positions": 128, "n_embd": 128, "n_layer": 2, "n_head": 4},
    "gpt2": {},
    "gpt2-medium": {"n_embd": 1024, "n_layer": 24, "n_head": 16},
    "gpt2-large": {"n_embd": 1280, "n_layer": 36, "n_head": 20},
}
ROOT = Path(__file__).parents[1]
EMBEDDED = ROOT / "pipeline" / "assets" / "gpt2-mini"
PEERS = ROOT / ".venv-peers" / "bin" / "python"
_SECONDS = {"convert": 1800, "load": 300, "generate": 600, "perplexity": 1800}
_CHECKED_TOKENS = 8
_ALLOWED_REGRET = 1.0
_READ_BYTES = 2**30


class Worker:
    """A subject's process; see `benchmarks.cpu_worker`. Stopped while nothing is asked of it: idle threads may spin."""

    def __init__(self, subject: Subject, python: Path, threads: int):
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
        command = [str(python), "-m", "benchmarks.cpu_worker", subject.module, subject.variant, subject.package]
        self.child = Child(command, environment)

    def ask(self, do: str, **what: Any) -> dict[str, Any]:
        """Its answer. Raises `WorkError` where it fails, ends or takes too long."""
        try:
            self.child.process.send_signal(signal.SIGCONT)
            self.child.send({"do": do} | what)
            answer = self.child.receive(_SECONDS[do])
        except (TimeoutError, OSError) as error:
            raise WorkError(f"{do}: {error}") from error
        if answer is None:
            raise WorkError(f"{do}: {self.child.failure() or 'it ended'}")
        if "error" in answer:
            missing = answer["missing"]
            raise WorkError(f"not installed ({answer['error']}): make bench-cpu" if missing else answer["error"])
        self.child.process.send_signal(signal.SIGSTOP)
        return answer

    def memory(self) -> dict[str, int]:
        """Bytes; see `eval.memory.snapshot`."""
        found = asdict(snapshot(0, "cpu", self.child.process.pid))
        return {name: found[name] for name in ("peak_rss", "rss", "uss", "pss")}

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *error: object) -> None:
        self.child.kill()


class Benchmark:
    """Converts, judges and times subjects, and keeps what it finds in `record`."""

    def __init__(self, choices: argparse.Namespace, scratch: Path):
        self.choices, self.scratch = choices, scratch
        shape = GPT2Config(**SHAPES[choices.shape])
        self.vocabulary = shape.vocab_size
        write_checkpoints(shape, scratch, choices.seed)
        self.models: dict[str, CompactGPT2LMHeadModel] = {}
        self.ready: dict[str, Path] = {}
        self.record: dict[str, Any] = {
            "machine": {"cpu": hardware.cpu(), "memory": psutil.virtual_memory().total},
            "threads": choices.threads,
            "note": choices.note,
            "shape": choices.shape,
            "versions": versions(),
            "git_commit": git_commit(),
            "command": f"python -m benchmarks.cpu {shlex.join(sys.argv[1:])}",
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "subjects": {},
            "cases": [],
        }

    def worker(self, name: str) -> Worker:
        subject = SUBJECTS[name]
        python = PEERS if subject.peer and PEERS.exists() else Path(sys.executable)
        return Worker(subject, python, self.choices.threads)

    def prepare(self, name: str) -> None:
        """Convert the pruned model, or else the dense one, and judge the embedded one."""
        row: dict[str, Any] = {"skipped": SUBJECTS[name].why_not(), "why_dense": None}
        self.record["subjects"][name] = row
        if row["skipped"] is not None:
            return
        for kind in ("pruned", "dense"):
            out = self.scratch / f"{name} {kind}"
            with self.worker(name) as worker:
                try:
                    row |= worker.ask("convert", source=str(self.scratch / kind), out=str(out))
                except WorkError as error:
                    row["why_dense"] = row["why_dense"] or str(error)
                    continue
                row |= {"model": kind, "bytes_on_disk": tree_bytes(out, SUBJECTS[name].files)}
                self.ready[name] = out
                if self.choices.quality_tokens:
                    row["perplexity"] = self.perplexity(name, worker)
                return
        row["skipped"] = row["why_dense"]

    def perplexity(self, name: str, worker: Worker) -> dict[str, Any]:
        """On the first tokens of the embedded test text."""
        config = CompactGPT2Config.from_pretrained(EMBEDDED)
        text = self.scratch / "text.npy"
        if not text.exists():
            ids = encode(load_text("embedded:test"), load_tokenizer(EMBEDDED))
            np.save(text, ids[: self.choices.quality_tokens])
        out, context = str(self.scratch / f"{name} embedded"), config.n_positions
        try:
            worker.ask("convert", source=str(EMBEDDED), out=out)
            worker.ask("load", folder=out, threads=self.choices.threads, batch=1, capacity=context)
            return worker.ask("perplexity", text=str(text), vocab_size=config.vocab_size, context=context)
        except WorkError as error:
            return {"skipped": str(error)}

    def case(self, length: int, batch: int) -> None:
        """Load, check and time what is ready."""
        entry: dict[str, Any] = {"prompt_tokens": length, "batch": batch, "new_tokens": self.choices.new_tokens}
        entry |= {"load_average": os.getloadavg()[0], "read_bandwidth": read_bandwidth(self.choices.threads)}
        entry["subjects"] = {}
        self.record["cases"].append(entry)
        prompts = self.prompts(length, batch)
        first = next(prompts)
        with contextlib.ExitStack() as alive:
            workers: dict[str, Worker] = {}
            for name in tqdm(self.ready, desc=f"load {length} x {batch}", leave=False):
                worker = alive.enter_context(self.worker(name))
                found: dict[str, Any] = {}
                entry["subjects"][name] = found
                try:
                    found |= self.start(name, worker, first)
                    workers[name] = worker
                except WorkError as error:
                    found["skipped"] = str(error)
                    worker.child.kill()
            samples = self.rounds(workers, prompts, entry["subjects"])
        for name, parts in samples.items():
            shape = {key: entry[key] for key in ("prompt_tokens", "new_tokens", "batch")}
            times = {part: asdict(timing(values)) for part, values in parts.items()}
            entry["subjects"][name]["latency"] = shape | times
        self.figures(entry)

    def start(self, name: str, worker: Worker, prompts: np.ndarray) -> dict[str, Any]:
        """Load it, let it generate once, read its memory, look at its tokens."""
        (batch, length), count = prompts.shape, self.choices.new_tokens
        limits = {"threads": self.choices.threads, "batch": batch, "capacity": (length + count + 31) // 32 * 32}
        found = worker.ask("load", folder=str(self.ready[name]), **limits)
        answer = worker.ask("generate", prompts=prompts.tolist(), count=count)
        found["memory"] = worker.memory()
        found["regret"] = self.check(name, prompts, answer["tokens"])
        return found

    def rounds(
        self, workers: dict[str, Worker], prompts: Iterator[np.ndarray], found: dict[str, Any]
    ) -> dict[str, dict[str, list[float]]]:
        """Seconds of prefill and of one decoded token, round by round; one that fails is left out."""
        samples: dict[str, dict[str, list[float]]] = {name: {"prefill": [], "decode": []} for name in workers}
        end = time.monotonic() + self.choices.seconds
        for turn, ids in zip(tqdm(range(self.choices.rounds), desc="rounds", leave=False), prompts, strict=False):
            if turn >= 2 and time.monotonic() > end:
                break
            names = list(samples)
            start = turn % max(1, len(names))
            for name in names[start:] + names[:start]:
                try:
                    answer = workers[name].ask("generate", prompts=ids.tolist(), count=self.choices.new_tokens)
                except WorkError as error:
                    found[name]["skipped"] = str(error)
                    del samples[name]
                    continue
                for part, values in samples[name].items():
                    values.append(answer[part])
        return samples

    def prompts(self, length: int, batch: int) -> Iterator[np.ndarray]:
        rng = np.random.default_rng(self.choices.seed)
        while True:
            yield rng.integers(0, self.vocabulary, (batch, length))

    @torch.inference_mode()
    def check(self, name: str, prompts: np.ndarray, tokens: list[list[int]]) -> float:
        """How far the last row's first tokens lie below the best ones in FP32's eyes, in deviations of the logits.

        Raises `WorkError` where that says that another model is running.
        """
        model = self.record["subjects"][name]["model"]
        if model not in self.models:
            self.models[model] = load_model(self.scratch / model)
        chosen = torch.tensor(tokens[-1][:_CHECKED_TOKENS])
        text = torch.cat([torch.from_numpy(prompts[-1]), chosen[:-1]])
        logits = self.models[model](text[None], use_cache=False, logits_to_keep=len(chosen)).logits[0]
        below = logits.amax(-1) - logits.gather(-1, chosen[:, None])[:, 0]
        regret = float((below / logits.std(-1)).max())
        if not regret <= _ALLOWED_REGRET:
            raise WorkError(f"wrong tokens: {regret:.2f} deviations below the best, allowed {_ALLOWED_REGRET}")
        return regret

    def figures(self, entry: dict[str, Any]) -> None:
        """Tokens a second, ratios to ours, and percent of the read bandwidth, into each timed subject."""
        timed = {
            name: latency_from(found["latency"]) for name, found in entry["subjects"].items() if "latency" in found
        }
        mine = timed.get(OURS)
        for name, latency in timed.items():
            found = entry["subjects"][name]
            config = self.models[self.record["subjects"][name]["model"]].config
            context = latency.prompt_tokens + latency.new_tokens // 2
            moved = found["weight_bytes"] * weight_bytes_per_token(config) / HALF
            moved += found["kv_bytes"] * kv_bytes(config, latency.batch, context) / HALF
            found["tokens_a_second"] = {
                "prefill": latency.batch * latency.prompt_tokens / latency.prefill.p50,
                "decode": latency.batch / latency.decode.p50,
            }
            found["percent_of_bandwidth"] = 100 * moved / latency.decode.p50 / entry["read_bandwidth"]["best"]
            if mine is not None:
                found["over_ours"] = {
                    "prefill": ratio(latency.prefill, mine.prefill)._asdict(),
                    "decode": ratio(latency.decode, mine.decode)._asdict(),
                }


def read_bandwidth(threads: int) -> dict[str, float]:
    """Bytes a second of a sum over 1 GiB on `threads` threads: the best of ten and their median."""
    torch.set_num_threads(threads)
    values = torch.ones(_READ_BYTES // 4)
    laps = [cpu_lap(values.sum) for _ in range(11)][1:]
    return {"best": _READ_BYTES / min(laps), "median": _READ_BYTES / statistics.median(laps)}


def report(record: Mapping[str, Any]) -> str:
    """The tables that a person reads."""
    rows = record["subjects"]
    lines = [f"{record['shape']}, {record['threads']} threads, {record['machine']['cpu']['model']}"]
    lines.append(f"\n{'':<24} {'disk MB':>8} {'perplexity':>10} {'over FP32':>9}  model")
    exact = rows.get(FP32, {}).get("perplexity", {}).get("perplexity")
    for name, row in rows.items():
        if row["skipped"]:
            lines.append(f"{name:<24} not measured: {row['skipped']}")
            continue
        quality = row.get("perplexity", {})
        value = quality.get("perplexity")
        judged = f"{value:>10.3f}" if value else f"{'-':>10}"
        judged += f" {value / exact:>9.4f}" if value and exact else f" {'-':>9}"
        model = f"dense: {row['why_dense']}" if row["why_dense"] else row["model"]
        lines.append(f"{name:<24} {row['bytes_on_disk'] / 1e6:>8.1f} {judged}  {model}")
        if "skipped" in quality:
            lines.append(f"{'':<24} no perplexity: {quality['skipped']}")
    for entry in record["cases"]:
        lines.append(
            f"\nprompt {entry['prompt_tokens']}, batch {entry['batch']}, {entry['new_tokens']} new tokens; "
            f"load before {entry['load_average']:.1f}, "
            f"reading {entry['read_bandwidth']['best'] / 1e9:.1f} GB/s; over ours: above 1 is slower than ours\n"
            f"{'':<24} {'prefill ms':>24} {'over ours':>17} {'decode ms':>22} {'over ours':>17} "
            f"{'tokens/s':>8} {'% read':>6} {'RSS MB':>7} {'USS MB':>7}"
        )
        for name, found in entry["subjects"].items():
            if "latency" not in found:
                lines.append(f"{name:<24} not measured: {found['skipped']}")
                continue
            cells = [f"{name + ' (dense)' * (rows[name]['model'] == 'dense'):<24}"]
            for part, width in (("prefill", 24), ("decode", 22)):
                taken = found["latency"][part]
                low, high = (1000 * bound for bound in taken["ci95"])
                cells.append(f"{1000 * taken['p50']:.2f} [{low:.2f}, {high:.2f}]".rjust(width))
                over = found.get("over_ours", {}).get(part)
                cells.append(
                    (f"{over['value']:.2f} [{over['low']:.2f}, {over['high']:.2f}]" if over else "-").rjust(17)
                )
            cells.append(f"{found['tokens_a_second']['decode']:>8.1f} {found['percent_of_bandwidth']:>6.0f}")
            cells.append(f"{found['memory']['peak_rss'] / 1e6:>7.0f} {found['memory']['uss'] / 1e6:>7.0f}")
            lines.append(" ".join(cells))
    return "\n".join(lines)


def chosen(words: Sequence[str]) -> list[str]:
    """The subjects whose names contain one of `words`, in the table's order; all without words."""
    for word in words:
        if not any(word.lower() in name.lower() for name in SUBJECTS):
            raise UserError(f"--subjects {word}: no such subject; give parts of {', '.join(SUBJECTS)}")
    return [name for name in SUBJECTS if not words or any(word.lower() in name.lower() for word in words)]


def read_choices(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked. Raises `UserError`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="gpt2", help="gpt2 is the 124M one (default)")
    parser.add_argument("--prompts", type=int, nargs="+", help="prompt lengths in tokens (default: 32 512)")
    parser.add_argument("--batches", type=int, nargs="+", help="sequences at a time (default: 1 4)")
    parser.add_argument("--new-tokens", type=int, help="tokens to write; the first one is prefill's (default: 128)")
    parser.add_argument("--rounds", type=int, help="timings a subject and case, besides one to warm up (default: 10)")
    parser.add_argument(
        "--seconds", type=float, default=1800, help="no round of a case begins later, but for two (default: 1800)"
    )
    parser.add_argument("--subjects", nargs="+", default=[], metavar="PART", help="rows whose names contain a PART")
    parser.add_argument("--threads", type=int, help="for every subject (default: physical cores)")
    parser.add_argument("--quality-tokens", type=int, help="of the test text, for perplexity; 0: none (default: 20000)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and prompts")
    parser.add_argument("--note", default="", help="goes into the record, as in: 'machine busy'")
    parser.add_argument("--quick", action="store_true", help="a tiny model, few tokens: seconds, to try the benchmark")
    parser.add_argument("--out", type=Path, default=Path("runs/cpu.json"), help="the record (default: runs/cpu.json)")
    choices = parser.parse_args(arguments)
    if choices.quick:
        choices.shape = "quick"
    defaults = {"prompts": [32, 512], "batches": [1, 4], "new_tokens": 128, "rounds": 10, "quality_tokens": 20000}
    if choices.quick:
        defaults = {"prompts": [9], "batches": [3], "new_tokens": 9, "rounds": 2, "quality_tokens": 700}
    cores = hardware.cpu()["cores"]
    defaults["threads"] = min(cores, psutil.cpu_count(logical=False) or cores)
    for name, value in defaults.items():
        if getattr(choices, name) is None:
            setattr(choices, name, value)
    choices.subjects = chosen(choices.subjects)
    for name, least in (("new_tokens", 2), ("rounds", 1), ("threads", 1), ("quality_tokens", 0)):
        if getattr(choices, name) < least:
            raise UserError(f"--{name.replace('_', '-')} {getattr(choices, name)}: give at least {least}")
    if min(*choices.prompts, *choices.batches, 1) < 1:
        raise UserError("--prompts and --batches: give numbers from 1 on")
    room = GPT2Config(**SHAPES[choices.shape]).n_positions
    if max(choices.prompts) + choices.new_tokens > room:
        total = f"{max(choices.prompts)} + {choices.new_tokens}"
        raise UserError(f"--prompts and --new-tokens: {total} tokens; {choices.shape} has {room} positions")
    return choices


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all; the code is 0 where every subject that this machine can run was timed in every case."""
    try:
        choices = read_choices(arguments)
        choices.out.parent.mkdir(parents=True, exist_ok=True)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # stopped workers end with us
    with tempfile.TemporaryDirectory(prefix="headroom-cpu-") as scratch:
        bench = Benchmark(choices, Path(scratch))
        for name in tqdm(choices.subjects, desc="convert and judge", leave=False):
            bench.prepare(name)
        for length, batch in itertools.product(choices.prompts, choices.batches):
            bench.case(length, batch)
            save_json(bench.record, choices.out)
    print(f"{report(bench.record)}\n\n{choices.out}")
    whole = all("latency" in found for entry in bench.record["cases"] for found in entry["subjects"].values())
    return 0 if whole and bench.ready else 1


if __name__ == "__main__":
    sys.exit(main())
