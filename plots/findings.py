"""What the rows say, in sentences: gains, costs, what did not help, and what to keep in mind. All from the data."""

from collections import Counter
from collections.abc import Callable

from eval.results import Heads, Results, Row, Timing
from plots.numbers import change, millions, perplexity, share, significant, times
from plots.pairs import finetuned_pair, int8_pair, quality_pair, step_before, unpruned
from plots.rows import (
    apart,
    by_kind,
    codes,
    count,
    fp32_ir,
    int8_row,
    kind,
    label,
    labels,
    measured,
    reference,
    same_load,
    same_text,
)

FINETUNE_AIM = 1.02
"""Perplexity after pruning and fine-tuning, at most this times the control arm's."""
INT8_AIM = 1.005
"""INT8 perplexity, at most this times its FP32 IR's."""
INT8_SIZE_AIM = 0.27
"""INT8 bytes on disk, at most this times its FP32 IR's."""

_DISTURBED = 1.5


def summary(results: Results) -> list[str]:
    """Three sentences: what was gained, what it cost, what did not help or was not measured."""
    return [gains(results), costs(results), shortfalls(results)]


def gains(results: Results) -> str:
    """Size, decode and prefill at the end of the chain against its start, for each kind of device."""
    parts = []
    for name, rows in by_kind(measured(results, lambda row: row.latency or row.bytes_on_disk)).items():
        chain = [row for row in rows if row.role == "chain"]
        if len(chain) > 1 and (found := _against(chain[-1], reference(results, chain[-1]) or chain[0])):
            parts.append(f"on the {name}, {found}{_same_engine(results, chain[-1])}")
    if not parts:
        return "What the chain gained cannot be told: no two of its rows were measured on one device."
    return _sentence("; ".join(parts))


def _against(row: Row, base: Row) -> str:
    """`A against B: 0.26 × the bytes on disk, decode 1.92 × as fast, ...`; empty where nothing can be compared."""
    facts = []
    if row.bytes_on_disk and base.bytes_on_disk:
        facts.append(f"{times(row.bytes_on_disk / base.bytes_on_disk)} the bytes on disk")
    if row is not base and row.latency and base.latency and same_load(row, base):
        facts.append(f"decode {speed(row.latency.decode, base.latency.decode)}")
        facts.append(f"prefill {speed(row.latency.prefill, base.latency.prefill)}")
    names = labels([row, base])  # the device was said before
    return f"{names[0]} against {names[1]}: {', '.join(facts)}" if facts and row is not base else ""


def _same_engine(results: Results, row: Row) -> str:
    """How much of a quantized row's gain is left on its own engine."""
    ir = fp32_ir(results, row, lambda r: r.latency)
    if ir is None or ir is row or not row.latency or not ir.latency or not same_load(row, ir):
        return ""
    decode, prefill = speed(row.latency.decode, ir.latency.decode), speed(row.latency.prefill, ir.latency.prefill)
    return f" (against its own FP32 IR: decode {decode}, prefill {prefill})"


def speed(timing: Timing, base: Timing) -> str:
    """How fast against `base`; no claim where the 95 % intervals touch."""
    if not apart(timing, base):
        return "not measurably different"
    return f"{times(base.p50 / timing.p50)} as fast"


def costs(results: Results) -> str:
    """The perplexity that pruning with fine-tuning, and INT8, cost, each against its control."""
    return _sentence(f"{_cost_of_pruning(results)}; {_cost_of_int8(results)}")


def _cost_of_pruning(results: Results) -> str:
    pair = finetuned_pair(results)
    if pair is None:
        return "what pruning cost is not known, for no fine-tuned control arm was measured on the same text"
    ours, control = (row.perplexity for row in pair)
    return (
        f"pruning with fine-tuning changed perplexity by {change(ours, control)} against the dense model "
        f"fine-tuned alike ({perplexity(ours)} against {perplexity(control)})"
    )


def _cost_of_int8(results: Results) -> str:
    row, pair = int8_row(results), int8_pair(results)
    if row is None or pair is None:
        return (
            "what quantisation cost is not known, for its row and the FP32 IR were not both measured on the same text"
        )
    ours, base = (quality.perplexity for quality in pair)
    numbers = f"({perplexity(ours)} against {perplexity(base)})"
    return f"{codes(row)} changed it by {change(ours, base)} against its FP32 IR {numbers}"


def shortfalls(results: Results) -> str:
    """What did not help, and how much was not measured."""
    verdicts = judgements(results)
    failed = [why for helps, why in verdicts if not helps]
    if failed:
        helped = f"did not help: {'; '.join(failed)}"
    else:
        helped = (
            "every step that could be compared helped" if verdicts else "no step can be compared with the one before"
        )
    missing = [row for row in results.rows if row.skipped is not None]
    if not missing:
        return _sentence(f"{helped}; no row of {len(results.rows)} was left unmeasured")
    reasons = "; ".join(Counter(row.skipped or "" for row in missing))
    return _sentence(f"{helped}; not measured: {len(missing)} of {count(len(results.rows), 'row')} ({reasons})")


def judgements(results: Results) -> list[tuple[bool, str]]:
    """For each step that can be compared: whether it did what it is for, and what to say if it did not."""
    found = []
    for row in measured(results, lambda r: r.latency):
        if (base := step_before(results, row)) and row.latency and base.latency and same_load(row, base):
            mine, theirs = row.latency.decode, base.latency.decode
            faster = mine.p50 < theirs.p50 and apart(mine, theirs)
            found.append((faster, f"{label(row)} decodes no faster than {label(base)}"))
    for stage, other, why in (
        ("finetune", "prune", "fine-tuning left perplexity no lower than pruning had"),
        ("prune", "control-random", "pruning by score left perplexity no lower than pruning at random"),
        (
            "finetune",
            "control-plain",
            "the dense teacher gave no more than plain fine-tuning at equal time",
        ),
    ):
        if pair := quality_pair(results, stage, other):
            found.append((pair[0].perplexity < pair[1].perplexity, why))
    return found


def caveats(results: Results) -> list[str]:
    """What a reader must know before quoting a number."""
    found = [*_missed_aims(results), *_text_caveats(results), *_gaps(results)]
    if (row := int8_row(results)) and kind(row) == "CPU":
        found.append(
            "INT8 rows run on the CPU and are compared with CPU rows only; no CPU row is compared with a GPU row."
        )
    if busy := measured(results, _disturbed):
        names = ", ".join(map(label, busy))
        found.append(
            f"The machine was not quiet: a tenth of the samples took over {_DISTURBED} × the median ({names}). "
            "The medians stand, single samples and means do not."
        )
    if finetuned_pair(results) is None:
        found.append("There is no control arm to compare with: fine-tuning and pruning cannot be told apart.")
    return found


def _disturbed(row: Row) -> bool | None:
    """True where something else took the machine's time in many samples; else `None`."""
    timings = (row.latency.prefill, row.latency.decode) if row.latency else ()
    return any(timing.p90 > _DISTURBED * timing.p50 for timing in timings) or None


def _missed_aims(results: Results) -> list[str]:
    found = []
    row = int8_row(results)
    held = codes(row) if row else ""
    aims = (
        ("Pruned and fine-tuned, the model's perplexity", "the control arm's", finetuned_pair(results), FINETUNE_AIM),
        (f"{held} perplexity", "its FP32 IR's", int8_pair(results), INT8_AIM),
    )
    for what, whose, pair, aim in aims:
        if pair and pair[0].perplexity > aim * pair[1].perplexity:
            ratio = pair[0].perplexity / pair[1].perplexity
            found.append(f"An aim was missed: {what} is {ratio:.4f} × {whose}, above {aim}.")
    ir = fp32_ir(results, row, lambda r: r.bytes_on_disk) if row else None
    if row and ir and row.bytes_on_disk and ir.bytes_on_disk and row.bytes_on_disk > INT8_SIZE_AIM * ir.bytes_on_disk:
        ratio = row.bytes_on_disk / ir.bytes_on_disk
        found.append(f"An aim was missed: {held} on disk is {ratio:.4f} × its FP32 IR, above {INT8_SIZE_AIM}.")
    return found


def _text_caveats(results: Results) -> list[str]:
    scored = [row.quality for row in measured(results, lambda r: r.quality) if row.quality]
    found = []
    if scored and min(quality.text_share for quality in scored) < 1:
        smallest = min(scored, key=lambda quality: quality.text_share)
        found.append(
            f"Only {share(smallest.text_share)} of the evaluation text was scored ({count(smallest.tokens, 'token')}): "
            "these perplexities compare with each other, not with published ones."
        )
    if any(not same_text(scored[0], quality) for quality in scored[1:]):
        found.append("Rows were scored on different texts or windows: their perplexities do not all compare.")
    loads = {(r.latency.prompt_tokens, r.latency.new_tokens, r.latency.batch) for r in results.rows if r.latency}
    if len(loads) > 1:
        found.append("Rows were timed with different prompts or batches: only those with the same compare.")
    return found


def _gaps(results: Results) -> list[str]:
    """Rows that are absent, wholly or in part, and why."""
    found = []
    reasons: dict[str, list[str]] = {}
    for row in results.rows:
        if row.skipped is not None:
            reasons.setdefault(row.skipped, []).append(label(row))
    for reason, names in reasons.items():
        found.append(f"{count(len(names), 'row')} not measured: {reason} ({', '.join(names)}).")
    parts: tuple[tuple[str, Callable[[Row], object]], ...] = (
        ("perplexity", lambda row: row.quality),
        ("latency", lambda row: row.latency),
        ("memory", lambda row: row.memory),
    )
    partial: dict[str, list[str]] = {}
    for row in results.rows:
        absent = [what for what, value in parts if row.skipped is None and value(row) is None]
        if absent:
            partial.setdefault(" and ".join(absent), []).append(_with_compute(row))
    return found + [f"Without {absent}: {'; '.join(names)}." for absent, names in partial.items()]


def _with_compute(row: Row) -> str:
    return f"{label(row)} ({row.compute})" if row.compute else label(row)


def pruning_arithmetic(results: Results) -> str | None:
    """What pruning can give at best, from the share of parameters it removed, beside what was measured."""
    sized = measured(results, lambda row: row.parameters)
    pruned = next((row for row in sized if row.stage == "prune"), None)
    dense = next((row for row in sized if row.stage == "load"), None)
    if not pruned or not dense or not pruned.parameters or not dense.parameters:
        return None
    removed = dense.parameters - pruned.parameters
    heads = results.heads.get("prune")
    gone = f"{_removed(heads)}, that is " if heads else ""
    whole = f"{millions(dense.parameters)} parameters ({share(removed / dense.parameters)})"
    text = (
        f"Pruning removed {gone}{removed:,} of {whole}. "
        "Where reading the weights is what bounds decoding, that alone can make it about "
        f"{times(dense.parameters / pruned.parameters)} as fast at best"
    )
    timed = [row for row in measured(results, lambda r: r.latency) if row.stage == "prune"]
    pairs = [(row, unpruned(results, row)) for row in timed]
    seen = [
        f"{speed(row.latency.decode, base.latency.decode)} on {row.device}"
        for row, base in pairs
        if row.latency and base and base.latency and same_load(row, base)
    ]
    return f"{text}; measured: {', '.join(seen)}." if seen else f"{text}; how much it made of that was not measured."


def _removed(heads: Heads) -> str:
    """How many layers, heads and hidden neurons went, of how many."""
    parts = []
    if heads.influence:
        parts.append(f"{len(heads.influence) - len(heads.original)} of {count(len(heads.influence), 'layer')}")
    total = sum(len(layer) for layer in heads.scores)
    left = " in the others" if heads.influence else ""
    parts.append(f"{total - sum(len(kept) for kept in heads.kept)} of {count(total, 'attention head')}{left}")
    if heads.n_inner and heads.n_inner[0] < heads.n_inner[1]:
        stay, were = heads.n_inner
        parts.append(f"{were - stay:,} of {count(were, 'hidden neuron')} in each layer")
    return ", ".join(parts)


def distillation(results: Results) -> str | None:
    """What the dense teacher gave, against as long a training without it; `None` without that control arm."""
    pair = quality_pair(results, "finetune", "control-plain")
    if pair is None:
        return None
    taught, plain = (row.perplexity for row in pair)
    verdict = "the teacher was the better use of it" if taught < plain else "plain fine-tuning was the better use of it"
    return (
        f"With the dense teacher, fine-tuning came to perplexity {perplexity(taught)}{_effort(results, 'finetune')}; "
        f"plain fine-tuning at equal time, counted in FLOPs, to {perplexity(plain)}"
        f"{_effort(results, 'control-plain')}: {verdict if taught != plain else 'neither was better'}."
    )


def _effort(results: Results, stage: str) -> str:
    """` (60 steps, 41 s)`, as far as known."""
    facts = [count(results.curves[stage][-1].step, "step")] if results.curves.get(stage) else []
    if seconds := results.run.get("training_seconds", {}).get(stage):
        facts.append(f"{significant(seconds)} s")
    return f" ({', '.join(facts)})" if facts else ""


def protocol(results: Results) -> list[str]:
    """How the numbers were taken: one sentence for each way that occurs."""
    found: list[str] = []
    for row in results.rows:
        if q := row.quality:
            found.append(
                f"Perplexity: sliding windows of {count(q.context, 'token')} with stride {q.stride:,}, "
                f"each target scored once; {share(q.text_share)} of the text, {count(q.tokens, 'scored token')}; "
                f"text SHA-256 {q.text_sha256}."
            )
    for row in results.rows:
        if lat := row.latency:
            found.append(
                f"Latency: prompt of {count(lat.prompt_tokens, 'token')}, then {count(lat.new_tokens, 'new token')}, "
                f"batch {lat.batch}; prefill is the time to the first token, "
                "decode the time of one later token for the batch."
            )
    timings = [t for row in results.rows if row.latency for t in (row.latency.prefill, row.latency.decode)]
    if timings:
        counts = sorted(timing.count for timing in timings)
        span = f"{counts[0]:,}" if counts[0] == counts[-1] else f"{counts[0]:,} to {counts[-1]:,}"
        found.append(
            f"Each time is the median of {span} samples; the interval is the bootstrap 95 % interval of that median."
        )
    if any(row.memory for row in results.rows):
        found.append("Memory: read in a fresh process for each row, apart from the timing, after prompt and decode.")
    return list(dict.fromkeys(found))


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."
