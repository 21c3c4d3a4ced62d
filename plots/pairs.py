"""Which row is judged against which, and what differs between the two: one thing, or it is named."""

import itertools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from eval.results import Latency, Results, Row
from eval.statistics import Ratio, perplexity_ratio, ratio
from plots.rows import kind, measured, reference, same_load, same_text

Value = Callable[[Row], object]

_MADE = {
    "load": ("dense", "none"),
    "half": ("dense", "none"),
    "prune": ("by score", "none"),
    "finetune": ("by score", "with the teacher"),
    "quantize": ("by score", "with the teacher"),
    "control-finetune": ("dense", "with the teacher"),
    "control-plain": ("by score", "alone"),
    "control-random": ("at random", "none"),
}
"""How a stage's model was pruned, and how it was fine-tuned (where the recipe has no teacher, all are alone)."""

_WORDS = {
    "KV_CACHE_PRECISION": "keys and values in",
    "DYNAMIC_QUANTIZATION_GROUP_SIZE": "dynamic quantisation in groups of",
    "INFERENCE_NUM_THREADS": "threads",
}
"""OpenVINO's settings, as they are said."""


class Pair(NamedTuple):
    """Two rows that compare. `differs` names all in which they differ: the step in question, and what else does."""

    row: Row
    base: Row
    differs: list[str]

    @property
    def step(self) -> str:
        """What is in question."""
        return self.differs[0] if self.differs else "nothing"

    @property
    def besides(self) -> str:
        """What else differs; empty where nothing does."""
        return ", ".join(self.differs[1:])

    @property
    def perplexity(self) -> Ratio | None:
        """The row's perplexity over the base's; `None` where one has no interval."""
        assert self.row.quality and self.base.quality
        return perplexity_ratio(self.row.quality, self.base.quality)

    @property
    def change(self) -> float:
        """The same without an interval."""
        assert self.row.quality and self.base.quality
        return self.row.quality.perplexity / self.base.quality.perplexity

    def speed(self, phase: Literal["prefill", "decode"]) -> Ratio:
        """How fast the row is, times the base: over 1 is faster. Both were timed in one interleaved run."""
        assert self.row.latency and self.base.latency
        return ratio(getattr(self.base.latency, phase), getattr(self.row.latency, phase))


def paired(row: Row | None, base: Row | None) -> Pair | None:
    """Two rows with all that differs between them; `None` without either."""
    return Pair(row, base, _differences(row, base)) if row and base else None


def _differences(row: Row, base: Row) -> list[str]:
    """What differs, the model first, then how it is run."""
    (pruned, tuned), (was_pruned, was_tuned) = (_MADE.get(each.stage, (each.stage, "none")) for each in (row, base))
    found = []
    if pruned != was_pruned:
        found.append("pruning" if was_pruned == "dense" else "which heads were pruned")
    if tuned != was_tuned:
        found.append("fine-tuning" if was_tuned == "none" else "the teacher")
    if kind(row) != kind(base):
        found.append(f"the {kind(row)} instead of the {kind(base)}")
    if row.engine != base.engine:
        found.append(f"{row.engine} instead of {base.engine}")
    both = ("weights", "arithmetic")
    ours, theirs = ([settings(each)[key] for key in both] for each in (row, base))
    if ours[0] != theirs[0] and len(set(ours)) == len(set(theirs)) == 1:
        found.append(f"{ours[0]} instead of {theirs[0]}")
    else:
        changed = zip(both, ours, theirs, strict=True)
        found += [f"{here} {what} instead of {there}" for what, here, there in changed if here != there]
    if row.engine == base.engine:
        found += _settings_that_differ(row, base)
    return found


def _settings_that_differ(row: Row, base: Row) -> list[str]:
    """Beyond weights and arithmetic."""
    if bool(row.compute) != bool(base.compute):
        return ["settings that one row does not tell"]
    ours, theirs = settings(row), settings(base)
    keys = [key for key in dict.fromkeys([*ours, *theirs]) if ours.get(key) != theirs.get(key)]
    if not {_held(each)[:3] for each in (row, base)} & {"INT", "W8A"}:
        keys = [key for key in keys if key != "DYNAMIC_QUANTIZATION_GROUP_SIZE"]  # it is for integer weights alone
    return [
        f"{_WORDS.get(key, key)} {ours.get(key, 'not told')} instead of {theirs.get(key, 'not told')}"
        for key in keys
        if key not in ("weights", "arithmetic")
    ]


def settings(row: Row) -> dict[str, str]:
    """How a row was computed: `weights` and `arithmetic`, and what else its `compute` tells."""
    told: dict[str, str] = {}
    for part in row.compute.split(", "):
        if "=" in part:
            key, _, value = part.partition("=")
        else:
            start, _, end = part.rpartition(" ")
            key, value = (start, end) if end.isdigit() else (end, start)
        if key:
            told[key] = value
    hint = told.pop("INFERENCE_PRECISION_HINT", None)
    arithmetic = told.pop("arithmetic", None) or {"f32": "FP32", "f16": "FP16", "bf16": "BF16"}.get(hint or "", hint)
    if row.engine == "cuda":  # whose words on weights and sums are no settings
        told = {}
    return told | {"weights": _held(row), "arithmetic": arithmetic or _usual_arithmetic(row)}


def _held(row: Row) -> str:
    """What the weights are stored as."""
    if row.engine == "openvino":
        return {"bf16": "FP32", "auto": "FP32"}.get(row.precision, row.precision.upper())
    return row.precision.upper()


def _usual_arithmetic(row: Row) -> str:
    """That of a row that does not tell: a CPU computes in FP32 what is stored in FP16 or integers."""
    return "FP32" if kind(row) == "CPU" and row.precision != "bf16" else row.precision.upper()


def twin(results: Results, row: Row, stages: tuple[str, ...], value: Value) -> Row | None:
    """The measured row of the first of `stages` that has `value`, on the same engine and device, with the same
    arithmetic; one with the same weights first."""
    found = [
        other
        for stage in stages
        for other in measured(results, value)
        if (other.stage, other.engine, other.device) == (stage, row.engine, row.device)
        and settings(other)["arithmetic"] == settings(row)["arithmetic"]
    ]
    return min(found, key=lambda other: other.precision != row.precision, default=None)


def quality_pair(results: Results, stage: str, other: str) -> Pair | None:
    """The first row of `stage` with its twin of `other`, on the same text."""
    for row in measured(results, _quality):
        if row.stage == stage and (found := _on_one_text(row, twin(results, row, (other,), _quality))):
            return found
    return None


def _quality(row: Row) -> Any:
    return row.quality


def _latency(row: Row) -> Latency | None:
    return row.latency


def _on_one_text(row: Row | None, base: Row | None) -> Pair | None:
    if row is None or base is None or row.quality is None or base.quality is None:
        return None
    return paired(row, base) if same_text(row.quality, base.quality) else None


def finetuned_pair(results: Results) -> Pair | None:
    """Pruned and fine-tuned, and the control arm that was fine-tuned alike."""
    return quality_pair(results, "finetune", "control-finetune")


def int8_row(results: Results) -> Row | None:
    """The measured INT8 row of the chain."""
    rows = measured(results, lambda row: row.quality or row.latency or row.bytes_on_disk)
    return next((row for row in rows if row.stage == "quantize" and row.role == "chain"), None)


def int8_pair(results: Results, value: Value = _quality) -> Pair | None:
    """The quantised row and the FP32 weights run with the same arithmetic, as many other settings alike as can be.

    `None` where no such row has `value`: on a CPU that computes in bf16, one in FP32 would lend quantisation what
    bf16 gains and costs.
    """
    row = int8_row(results)
    if row is None or not value(row):
        return None
    found = [
        base
        for base in measured(results, value)
        if (base.stage, base.engine, base.device) == (row.stage, row.engine, row.device)
        and _held(base) == "FP32"
        and settings(base)["arithmetic"] == settings(row)["arithmetic"]
    ]
    base = min(found, key=lambda base: len(_differences(row, base)), default=None)
    return _on_one_text(row, base) if value is _quality else paired(row, base)


def int8_files(results: Results) -> Pair | None:
    """The quantised row and the FP32 IR, of which only the files are compared."""
    row = int8_row(results)
    rows = measured(results, lambda r: r.bytes_on_disk)
    base = next((r for r in rows if r.stage == "quantize" and _held(r) == "FP32"), None)
    return paired(row, base) if row and row.bytes_on_disk else None


def base_name(found: Pair) -> str:
    """`FP32 IR`: the export that a quantised row is judged against, by its arithmetic."""
    return f"{settings(found.base)['arithmetic']} IR"


def timed_before(results: Results, row: Row) -> Pair | None:
    """A row with the step that is to make `row` faster and the one without; `None` where none had the same load.

    A pruned model takes the same time before and after fine-tuning, so the one whose weights are held as the dense
    model's stands for both.
    """
    if row.stage == "half":
        base = next((r for r in measured(results, _latency) if (r.stage, r.device) == ("load", row.device)), None)
        return _timed(row, base)
    if row.stage == "prune":
        pruned = (twin(results, row, ("finetune",), _latency), row)
        pairs = [found for each in pruned if each and (found := _timed(each, _unpruned(results, each)))]
        return min(pairs, key=lambda found: len(found.differs), default=None)
    quantized = int8_pair(results, _latency) if row is int8_row(results) else None
    return _timed(row, quantized.base) if quantized else None


def _timed(row: Row, base: Row | None) -> Pair | None:
    """Two rows with the same load. Fine-tuning is no difference: the values of weights do not change how long they
    take."""
    if base is None or not same_load(row, base):
        return None
    return Pair(row, base, [each for each in _differences(row, base) if each not in ("fine-tuning", "the teacher")])


def _unpruned(results: Results, row: Row) -> Row | None:
    """The dense model timed on the same engine, device and arithmetic."""
    return twin(results, row, ("load", "half"), _latency)


def steps(results: Results, row: Row) -> list[Pair]:
    """From the device's first timed row to `row`, one thing at a time: each pair's row is the next one's base."""
    start = reference(results, row)
    if start is None:
        return []
    quantized = int8_pair(results, _latency) if row is int8_row(results) else None
    exact = [r for r in measured(results, _latency) if (r.engine, r.precision) == ("openvino", "fp32")]
    stops = [
        *(r for r in measured(results, _latency) if (r.stage, r.device) == ("half", start.device)),
        _pruned(results, row, start),
        *(exact if row.engine == "openvino" else []),
        quantized.base if quantized else None,
        row,
    ]
    path = [start]
    for stop in stops:
        if stop is not None and stop not in path and same_load(stop, start):
            path.append(stop)
    found = (_timed(stop, base) for base, stop in itertools.pairwise(path))
    return [each for each in found if each and each.differs]


def _pruned(results: Results, row: Row, start: Row) -> Row | None:
    """The pruned model on the first row's engine, at the arithmetic of `row` where it is on that engine too."""
    rows = [r for r in measured(results, _latency) if (r.engine, r.device) == (start.engine, start.device)]
    rows = [r for r in rows if r.stage in ("finetune", "prune")]
    return max(rows, key=lambda r: (r.stage == "finetune", r.precision == row.precision), default=None)
