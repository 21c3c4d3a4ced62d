"""`results.json`: one row for each stage, engine, device and precision, and what was seen on the way.

The dataclasses are the file's schema: types by their annotations, which pydantic holds a file against, the rest by
`__post_init__`. A field with a default may be absent from a file where `_LATER` names it.
"""

import dataclasses
import json
import math
import os
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from eval.errors import UserError

SCHEMA = 1
_LONGEST_NAME = 200


class _Strict:
    """No type is taken for another, no key passed over, no number infinite."""

    __pydantic_config__ = {"strict": True, "extra": "forbid", "allow_inf_nan": False}

    def _bounds(self, low: float, high: float, *names: str) -> None:
        """Raise `ValueError` where one of these fields, or an item of it, is no number from `low` to `high`."""
        for name in names:
            value = getattr(self, name)
            for item in value if isinstance(value, list | tuple) else [value]:
                if item is not None and not low <= item <= high:
                    raise ValueError(f"{name} holds {str(item)[:40]}, which is not from {low:g} to {high:g}")

    def _names(self, *names: str) -> None:
        for name in names:
            _check_name(name, getattr(self, name))


def _check_name(what: str, value: str) -> None:
    if not value.strip() or len(value) > _LONGEST_NAME or _unprintable(value):
        raise ValueError(f"{what} is no name of one printable line of at most {_LONGEST_NAME} characters")


def _unprintable(text: str) -> bool:
    """Whether a text holds what XML, and so a figure or a report, cannot hold."""
    return any(unicodedata.category(char) in ("Cc", "Cs") or char in "\ufffe\uffff" for char in text)


_LINES = dict.fromkeys(map(ord, "\n\r\t"))
FEWEST_PARTS = 10
"""Of fewer parts of a text there is no standard error."""
_TINY, _MOST, _COUNT = 1e-12, 1e30, 2**62
"""No clock tells less, nothing measured is more, nothing counted is."""


@dataclass
class Quality(_Strict):
    """Perplexity of a row. `nll` is the mean negative log-likelihood in nats a scored token."""

    perplexity: float
    nll: float
    tokens: int
    context: int
    stride: int
    text_sha256: str
    text_share: float
    """The share of the evaluation text that was scored, 0 to 1."""
    stderr: float | None = None
    """Standard error of the perplexity; `None` where the text is too short for one, or the file is from before it."""
    parts: list[float] = field(default_factory=list)
    """The mean NLL of each of the runs of tokens, of like length, that the text is cut into (`eval.statistics`)."""

    def __post_init__(self) -> None:
        self._bounds(0, math.inf, "perplexity", "stderr")
        self._bounds(0, _MOST, "nll", "parts")
        self._bounds(1, _COUNT, "tokens", "context", "stride")
        self._bounds(0, 1, "text_share")
        if not self.perplexity:
            raise ValueError("perplexity is 0")
        if (self.stderr is None) != (not self.parts):
            raise ValueError("stderr and parts: one is there without the other")
        if self.parts and not FEWEST_PARTS <= len(self.parts) <= self.tokens:
            raise ValueError(f"parts are {len(self.parts)}, not {FEWEST_PARTS} to {self.tokens}, the tokens")


@dataclass
class Timing(_Strict):
    """Raw samples in seconds and what follows from them."""

    samples: list[float]
    count: int
    mean: float
    p50: float
    p90: float
    p99: float
    ci95: tuple[float, float]
    """Bootstrap 95 % interval of the median."""

    def __post_init__(self) -> None:
        self._bounds(_TINY, _MOST, "samples", "mean", "p50", "p90", "p99", "ci95")
        if not self.samples or self.count != len(self.samples):
            raise ValueError(f"{len(self.samples)} samples, where count is {self.count}; it takes at least 1")
        if self.ci95[0] > self.ci95[1]:
            raise ValueError("ci95 ends before it begins")


@dataclass
class Latency(_Strict):
    """Prefill is the time to the first token; decode is the time of one later token (both for the whole batch)."""

    prompt_tokens: int
    new_tokens: int
    batch: int
    prefill: Timing
    decode: Timing

    def __post_init__(self) -> None:
        self._bounds(1, _COUNT, "prompt_tokens", "new_tokens", "batch")


@dataclass
class Memory(_Strict):
    """Bytes, read in a fresh process after prompt and decode. GPU fields are `None` on a CPU."""

    peak_rss: int
    rss: int
    uss: int
    pss: int | None
    baseline_rss: int
    """Resident size before the model was loaded: what the libraries alone cost."""
    gpu_allocator_peak: int | None = None
    gpu_process: int | None = None

    def __post_init__(self) -> None:
        self._bounds(0, _COUNT, *(each.name for each in dataclasses.fields(self)))


@dataclass
class Score(_Strict):
    """Accuracy on a task, 0 to 1, and its standard error."""

    accuracy: float
    stderr: float
    documents: int
    """How many were asked, the first ones."""
    of: int
    """How many the task has."""
    data_sha256: str

    def __post_init__(self) -> None:
        self._bounds(0, 1, "accuracy", "stderr")
        self._bounds(1, self.of, "documents")


@dataclass
class Row(_Strict):
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

    def __post_init__(self) -> None:
        self._names("stage", "engine", "device", "precision")
        self._bounds(1, _COUNT, "parameters")
        self._bounds(0, _COUNT, "bytes_on_disk")
        if self.role not in ("chain", "baseline", "control"):
            raise ValueError(f"role is {self.role[:40]!r}, not chain, baseline or control")
        if self.key.count("/") != 3:
            raise ValueError("stage, engine, device and precision hold no slash")

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
class Heads(_Strict):
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

    def __post_init__(self) -> None:
        self._names("method", "scope")
        if len(self.scores) != len(self.kept):
            raise ValueError(f"scores of {len(self.scores)} layers, where kept has {len(self.kept)}")
        for layer, (scores, kept) in enumerate(zip(self.scores, self.kept, strict=True)):
            if not all(abs(score) <= _MOST for score in scores):
                raise ValueError(f"scores.{layer} holds a number beyond {_MOST:g}")
            if len(set(kept)) != len(kept) or not set(kept) <= set(range(len(scores))):
                raise ValueError(f"kept.{layer} names heads that scores does not have, or one twice")
        there = len(self.influence) or _COUNT
        if self.layers and (len(self.layers) != len(self.kept) or len(set(self.layers)) != len(self.layers)):
            raise ValueError(f"layers names {len(self.layers)}, where kept has {len(self.kept)}, or one twice")
        self._bounds(0, there - 1, "layers")
        self._bounds(0, _COUNT, "n_inner")
        self._bounds(-_MOST, _MOST, "influence")
        if len(self.n_inner) not in (0, 2) or len(self.kept) > there:
            raise ValueError("n_inner holds two numbers or none, and influence one for each layer that there was")

    @property
    def original(self) -> list[int]:
        """The layers that `scores` and `kept` are about."""
        return self.layers or list(range(len(self.kept)))


@dataclass
class QuantizedLayer(_Strict):
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

    def __post_init__(self) -> None:
        self._names("name", "method", "scheme")
        self._bounds(1, 64, "bits")
        self._bounds(0, _MOST, "scale_min", "scale_max", "error")


@dataclass
class CurvePoint(_Strict):
    """One logged moment of a training; `loss` in nats a token, `rate` the learning rate."""

    step: int
    epoch: float
    loss: float
    rate: float | None = None

    def __post_init__(self) -> None:
        self._bounds(0, _COUNT, "step", "epoch")
        self._bounds(-_MOST, _MOST, "loss", "rate")


@dataclass
class Agreement(_Strict):
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
    kl_stderr: list[list[float]] | None = None
    """Standard errors; `None` where the text is too short for them, or the file is from before them."""
    top1_stderr: list[list[float]] | None = None

    def __post_init__(self) -> None:
        if not self.rows or len(set(self.rows)) != len(self.rows):
            raise ValueError("rows are none, or one stands twice")
        for key in self.rows:
            _check_name("a row", key)
        self._bounds(1, _COUNT, "tokens", "context", "prompt_tokens", "new_tokens")
        matrices = ("logit_mean", "logit_max", "kl", "top1", "kl_stderr", "top1_stderr", "diverged")
        for name in matrices:
            matrix = getattr(self, name)
            if matrix is not None and {len(line) for line in (matrix, *matrix)} != {len(self.rows)}:
                raise ValueError(f"{name} is no square matrix of {len(self.rows)} rows")
        for name in matrices[:-1]:
            most = 1 if name == "top1" else _MOST
            if not all(0 <= value <= most for line in getattr(self, name) or [] for value in line):
                raise ValueError(f"{name} holds a number that is not from 0 to {most:g}")
        cells = [cell for line in self.diverged for cell in line]
        if len({len(cell) for cell in cells}) != 1 or not cells[0]:
            raise ValueError("diverged does not hold as many prompts in each cell, or holds none")
        if not all(shared is None or 0 <= shared <= self.new_tokens for cell in cells for shared in cell):
            raise ValueError(f"diverged holds a number that is not from 0 to {self.new_tokens}")


class Run(TypedDict, total=False):
    """What is told of a run; it may hold more."""

    __pydantic_config__ = {"strict": True, "extra": "allow", "allow_inf_nan": False}  # type: ignore[misc]

    name: str
    recipe: dict[str, Any]
    machine: dict[str, Any]
    versions: dict[str, str]
    git_commit: str | None
    date: str | None
    command: str | None
    stages: dict[str, str]
    """The content of each stage that was measured: a hash of all its files."""
    seconds: dict[str, float]
    training_seconds: dict[str, float]


@dataclass
class Results(_Strict):
    """The whole file. `run` tells machine, versions, recipe, date, seconds a stage and a training."""

    run: Run
    rows: list[Row]
    heads: dict[str, Heads] = field(default_factory=dict)
    """By stage: `prune`, `control-random`."""
    curves: dict[str, list[CurvePoint]] = field(default_factory=dict)
    """By stage: `finetune`, `control-finetune`, `control-plain`."""
    quantization: list[QuantizedLayer] = field(default_factory=list)
    agreement: Agreement | None = None
    """`None` where fewer than two rows were measured, or the recipe does not ask for it."""
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        keys = [row.key for row in self.rows]
        if twice := next((key for key in keys if keys.count(key) > 1), None):
            raise ValueError(f"rows holds {twice} twice")
        if odd := [key for key in (self.agreement.rows if self.agreement else []) if key.count("/") != 3]:
            raise ValueError(f"agreement: a row, {odd[0]}, is no STAGE/ENGINE/DEVICE/PRECISION")
        for stage in (*self.heads, *self.curves):
            _check_name("a stage", stage)
        _check_choices(self.run.get("recipe", {}))


def _check_choices(recipe: dict[str, Any]) -> None:
    """Of a recipe, what reports and model cards read of it."""
    for part in ("load", "data", "finetune"):
        if not isinstance(recipe.get(part, {}), dict):
            raise ValueError(f"run.recipe.{part} holds no keys")
    sources = {"load.source": recipe.get("load", {}).get("source", "")}
    sources |= {f"data.{key}": text for key, text in recipe.get("data", {}).items()}
    if wrong := [key for key, source in sources.items() if not isinstance(source, str)]:
        raise ValueError(f"run.recipe.{wrong[0]} is no text")


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


_LATER = {
    Results: ("quantization", "agreement", "schema"),
    Row: ("tasks",),
}
"""Fields that files from before them do not hold; all others of a dataclass with defaults are always written."""


def load_results(path: Path) -> Results:
    """Read a results file and hold it against the schema.

    A file from before perplexities had standard errors loads; what it lacks is said where it is judged. Raises
    `UserError`, which names the first wrong place, where the file is missing, damaged, of another schema or wrong.
    """
    try:
        text = path.read_text(encoding="utf-8")
        raw = json.loads(text)
    except OSError as error:
        missing = isinstance(error, FileNotFoundError)
        advice = "run the pipeline first" if missing else "give the folder of a run that you may read"
        raise UserError(f"{path}: {error.strerror}; {advice}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: damaged JSON ({error}); run the pipeline again") from error
    schema = raw.get("schema") if isinstance(raw, dict) else None
    if schema != SCHEMA or isinstance(schema, bool):
        raise UserError(f"{path}: schema {str(schema)[:40]}, this version reads {SCHEMA}; run the pipeline again")
    try:
        return _checked(text, raw)
    except ValueError as error:
        raise UserError(f"{path}: does not follow schema {SCHEMA} ({_first(error)}); run the pipeline again") from error


def _checked(text: str, raw: dict[str, Any]) -> Results:
    """The results in a file's text. Raises `ValueError` (pydantic's is one) where it does not follow the schema."""
    from pydantic import TypeAdapter

    results = TypeAdapter(Results).validate_json(text)
    for where, found, kind in [("", raw, Results), *((f"rows.{at}.", row, Row) for at, row in enumerate(raw["rows"]))]:
        for each in dataclasses.fields(kind):
            if each.name not in (*found, *_LATER[kind]):
                raise ValueError(f"{where}{each.name}: missing")
    for where, words in _texts(raw):
        if _unprintable(words.translate(_LINES)):
            raise ValueError(f"{where}: holds control characters")
    return results


def _first(error: ValueError) -> str:
    """Where a file is wrong first, and what is wrong there, in one line."""
    from pydantic import ValidationError

    if not isinstance(error, ValidationError):
        return str(error)
    first = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(map(str, first["loc"]))
    return " ".join(f"{where[:200]}: {first['msg'].removeprefix('Value error, ')[:400]}".split())


def _texts(value: Any, where: str = "") -> Iterator[tuple[str, str]]:
    """All texts, keys too, with their places."""
    if isinstance(value, str):
        yield where, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield where or "the file", key
            yield from _texts(item, f"{where}.{key}".lstrip("."))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _texts(item, f"{where}.{index}")


def latency_from(raw: dict[str, Any]) -> Latency:
    """A `Latency` from its plain form."""
    return Latency(**{**raw, "prefill": _timing(raw["prefill"]), "decode": _timing(raw["decode"])})


def _timing(raw: dict[str, Any]) -> Timing:
    return Timing(**{**raw, "ci95": tuple(raw["ci95"])})
