"""`results.json`: one row for each stage, engine, device and precision, and what was seen on the way."""

import dataclasses
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eval.errors import UserError

SCHEMA = 1


@dataclass
class Quality:
    """Perplexity of a row. `nll` is the mean negative log-likelihood in nats a scored token."""

    perplexity: float
    nll: float
    tokens: int
    context: int
    stride: int
    text_sha256: str
    text_share: float
    """The share of the evaluation text that was scored, 0 to 1."""


@dataclass
class Timing:
    """Raw samples in seconds and what follows from them."""

    samples: list[float]
    count: int
    mean: float
    p50: float
    p90: float
    p99: float
    ci95: tuple[float, float]
    """Bootstrap 95 % interval of the median."""


@dataclass
class Latency:
    """Prefill is the time to the first token; decode is the time of one later token (both for the whole batch)."""

    prompt_tokens: int
    new_tokens: int
    batch: int
    prefill: Timing
    decode: Timing


@dataclass
class Memory:
    """Bytes, read in a fresh process after prompt and decode. GPU fields are `None` on a CPU."""

    peak_rss: int
    rss: int
    uss: int
    pss: int | None
    baseline_rss: int
    """Resident size before the model was loaded: what the libraries alone cost."""
    gpu_allocator_peak: int | None = None
    gpu_process: int | None = None


@dataclass
class Score:
    """Accuracy on a task, 0 to 1, and its standard error."""

    accuracy: float
    stderr: float
    documents: int
    """How many were asked, the first ones."""
    of: int
    """How many the task has."""
    data_sha256: str


@dataclass
class Row:
    """One line of the table."""

    stage: str
    engine: str
    device: str
    precision: str
    role: str = "chain"
    """`chain` for a step of the compression, `baseline` for an export to compare with, `control` for a control arm."""
    compute: str = ""
    """How it was computed, in words: hints, KV-cache precision, threads."""
    parameters: int | None = None
    bytes_on_disk: int | None = None
    quality: Quality | None = None
    latency: Latency | None = None
    memory: Memory | None = None
    tasks: dict[str, Score] = field(default_factory=dict)
    """By task: `hellaswag`, `lambada`."""
    skipped: str | None = None
    """Why the row was not measured here; `None` if it was."""

    @property
    def key(self) -> str:
        """What tells rows apart, as in `finetune/torch/cpu/fp32`."""
        return "/".join((self.stage, self.engine, self.device, self.precision))

    def numbers(self) -> dict[str, float]:
        """What was measured, as scalars to log: name with unit -> value; times are medians."""
        found = {"size_mb": self.bytes_on_disk / 1e6} if self.bytes_on_disk else {}
        if self.quality:
            found["perplexity"] = self.quality.perplexity
        if self.latency:
            prefill, decode = self.latency.prefill.p50, self.latency.decode.p50
            found |= {"prefill_ms": 1e3 * prefill, "decode_ms_per_token": 1e3 * decode}
        if self.memory:
            found["peak_rss_mb"] = self.memory.peak_rss / 1e6
            if self.memory.gpu_process is not None:
                found["gpu_process_mb"] = self.memory.gpu_process / 1e6
        return found


@dataclass
class Heads:
    """What a pruning decided. `scores[i][head]` and the kept heads `kept[i]` are those of layer `original[i]`."""

    method: str
    scope: str
    scores: list[list[float]]
    kept: list[list[int]]
    layers: list[int] = field(default_factory=list)
    """The original indices of the kept layers; empty in a file from before layers could go."""
    influence: list[float] = field(default_factory=list)
    """The score of each layer that there was; empty where none was to go."""
    n_inner: list[int] = field(default_factory=list)
    """The hidden neurons of each layer's MLP, and how many there were."""

    @property
    def original(self) -> list[int]:
        """The layers that `scores` and `kept` are about."""
        return self.layers or list(range(len(self.kept)))


@dataclass
class QuantizedLayer:
    """What became of one weight matrix."""

    name: str
    method: str
    bits: int
    scheme: str
    scale_min: float
    scale_max: float
    error: float
    """The norm of the weight's change over that of the weight."""
    kernel: str | None = None
    """What multiplied it on this machine: node type and kernel, as the compiled graph names them."""


@dataclass
class CurvePoint:
    """One logged moment of a training; `loss` in nats a token, `rate` the learning rate."""

    step: int
    epoch: float
    loss: float
    rate: float | None = None


@dataclass
class Agreement:
    """How alike rows answer on the same text: matrices `[a][b]` over `rows`, named by their keys."""

    rows: list[str]
    tokens: int
    """Positions compared."""
    context: int
    text_sha256: str
    logit_mean: list[list[float]]
    """Mean absolute difference of the logits."""
    logit_max: list[list[float]]
    kl: list[list[float]]
    """KL(a || b) in nats a token."""
    top1: list[list[float]]
    """The share of positions at which both hold the same token for the likeliest."""
    prompt_tokens: int
    new_tokens: int
    diverged: list[list[list[int | None]]]
    """For each prompt, how many new tokens two greedy continuations share before they part; `None`: all of them."""


@dataclass
class Results:
    """The whole file. `run` tells machine, versions, recipe, date, seconds a stage and a training."""

    run: dict[str, Any]
    rows: list[Row]
    heads: dict[str, Heads] = field(default_factory=dict)
    """By stage: `prune`, `control-random`."""
    curves: dict[str, list[CurvePoint]] = field(default_factory=dict)
    """By stage: `finetune`, `control-finetune`, `control-plain`."""
    quantization: list[QuantizedLayer] = field(default_factory=list)
    agreement: Agreement | None = None
    """`None` where fewer than two rows were measured, or the recipe does not ask for it."""
    schema: int = SCHEMA


def save_results(results: Results, path: Path) -> None:
    """Write `results.json` atomically: a reader sees the old file or the new one."""
    save_json(dataclasses.asdict(results), path)


def save_json(value: Any, path: Path) -> None:
    """Write plain data as JSON atomically; NaN and infinity are refused with `ValueError`."""
    save_text(json.dumps(value, indent=1, allow_nan=False), path)


def save_text(text: str, path: Path) -> None:
    """Write a file atomically: a kill or a full disk leaves the old one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def load_results(path: Path) -> Results:
    """Read and check a results file. Raises `UserError` where it is missing, damaged or of another schema."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; run the pipeline first") from error
    except ValueError as error:
        raise UserError(f"{path}: damaged JSON ({error}); run the pipeline again") from error
    schema = raw.get("schema") if isinstance(raw, dict) else None
    if schema != SCHEMA:
        raise UserError(f"{path}: schema {schema}, this version reads {SCHEMA}; run the pipeline again")
    try:
        return Results(
            run=raw["run"],
            rows=[_row(row) for row in raw["rows"]],
            heads={stage: Heads(**heads) for stage, heads in raw["heads"].items()},
            curves={stage: [CurvePoint(**point) for point in curve] for stage, curve in raw["curves"].items()},
            quantization=[QuantizedLayer(**layer) for layer in raw.get("quantization", [])],
            agreement=Agreement(**raw["agreement"]) if raw.get("agreement") else None,
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: does not follow schema {SCHEMA} ({error}); run the pipeline again") from error


def _row(raw: dict[str, Any]) -> Row:
    row = Row(**raw)
    if raw["quality"] is not None:
        row.quality = Quality(**raw["quality"])
    if raw["latency"] is not None:
        row.latency = latency_from(raw["latency"])
    if raw["memory"] is not None:
        row.memory = Memory(**raw["memory"])
    row.tasks = {name: Score(**score) for name, score in raw.get("tasks", {}).items()}
    return row


def latency_from(raw: dict[str, Any]) -> Latency:
    """A `Latency` from its plain form."""
    return Latency(**{**raw, "prefill": _timing(raw["prefill"]), "decode": _timing(raw["decode"])})


def _timing(raw: dict[str, Any]) -> Timing:
    return Timing(**{**raw, "ci95": tuple(raw["ci95"])})
