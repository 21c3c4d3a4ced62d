"""What the rows say, in sentences: gains, costs, what did not help, and what to keep in mind. All from the data."""

from collections import Counter
from collections.abc import Callable
from typing import Literal, NamedTuple

from eval.results import Heads, Results, Row
from eval.statistics import Ratio, part_sizes
from plots.numbers import change, millions, perplexity, share, significant, span, times
from plots.pairs import (
    Pair,
    base_name,
    finetuned_pair,
    int8_files,
    int8_pair,
    int8_row,
    paired,
    quality_pair,
    settings,
    steps,
    timed_before,
    unpruned,
)
from plots.rows import by_kind, codes, count, kind, label, labels, measured, reference, same_load, same_text

FINETUNE_AIM = 1.02
"""Perplexity after pruning and fine-tuning, at most this times the control arm's."""
INT8_AIM = 1.005
"""INT8 perplexity, at most this times that of the FP32 weights run with the same arithmetic."""
INT8_SIZE_AIM = 0.27
"""INT8 bytes on disk, at most this times its FP32 IR's."""

_DISTURBED = 1.5


def summary(results: Results) -> list[str]:
    """Three sentences: what was gained, what it cost, what did not help or was not measured."""
    return [gains(results), costs(results), shortfalls(results)]


def gains(results: Results) -> str:
    """Size, decode and prefill at the end of the chain against its start, for each kind of device, and by steps."""
    parts = []
    for name, rows in by_kind(measured(results, lambda row: row.latency or row.bytes_on_disk)).items():
        chain = [row for row in rows if row.role == "chain"]
        if len(chain) > 1 and (found := _against(chain[-1], reference(results, chain[-1]) or chain[0])):
            parts.append(f"on the {name}, {found}{_by_steps(results, chain[-1])}")
    if not parts:
        return "What the chain gained cannot be told: no two of its rows were measured on one device."
    return _sentence("; ".join(parts))


def _against(row: Row, base: Row) -> str:
    """`A against B: 0.26 × the bytes on disk, decode 1.92 × as fast, ...`; empty where nothing can be compared."""
    facts = []
    if row.bytes_on_disk and base.bytes_on_disk:
        facts.append(f"{times(row.bytes_on_disk / base.bytes_on_disk)} the bytes on disk")
    if row is not base and row.latency and base.latency and same_load(row, base):
        facts.append(_speeds(Pair(row, base, [])))
    names = labels([row, base])  # the device was said before
    return f"{names[0]} against {names[1]}: {', '.join(facts)}" if facts and row is not base else ""


def _by_steps(results: Results, row: Row) -> str:
    """What each step has of a gain that several made together."""
    found = steps(results, row)
    if not row.latency or len(found) < 2:
        return ""
    return f" (step by step: {'; '.join(f'{_and(each.differs)}: {_speeds(each)}' for each in found)})"


def _speeds(found: Pair) -> str:
    return f"decode {speed(found.speed('decode'))}, prefill {speed(found.speed('prefill'))}"


def speed(found: Ratio) -> str:
    """How fast against a base; no claim where the 95 % interval holds 1."""
    return f"{times(found.value)} as fast" if found.lower or found.higher else "not measurably different"


def costs(results: Results) -> str:
    """The perplexity that pruning with fine-tuning, and INT8, cost, each against its control."""
    return _sentence(f"{_cost_of_pruning(results)}; {_cost_of_int8(results)}")


def _cost_of_pruning(results: Results) -> str:
    found = finetuned_pair(results)
    if found is None:
        return "what pruning cost is not known, for no fine-tuned control arm was measured on the same text"
    return (
        f"pruning with fine-tuning changed perplexity by {_changed(found)} against the dense model fine-tuned alike"
        f"{_besides(found)}"
    )


def _cost_of_int8(results: Results) -> str:
    row, found = int8_row(results), int8_pair(results)
    if row is None:
        return "what quantisation cost is not known, for its row was not measured"
    if found is None:
        arithmetic = settings(row)["arithmetic"]
        return (
            f"what quantisation cost is not known, for no IR was measured in {arithmetic}, as its row, on the same text"
        )
    return f"{codes(row)} changed it by {_changed(found)} against its {base_name(found)}{_besides(found)}"


def _changed(found: Pair) -> str:
    """`+1.17 % (95 % interval +1.02 to +1.32 %; 59.90 against 59.21)`."""
    assert found.row.quality and found.base.quality
    ours, base = found.row.quality.perplexity, found.base.quality.perplexity
    between = found.perplexity
    low, high = (change(end, 1).removesuffix(" %") for end in (between.low, between.high)) if between else ("", "")
    interval = f"95 % interval {low} to {high} %" if between else "no interval"
    return f"{change(ours, base)} ({interval}; {perplexity(ours)} against {perplexity(base)})"


def _besides(found: Pair) -> str:
    return f" (besides: {found.besides})" if found.besides else ""


def shortfalls(results: Results) -> str:
    """What helped, what did not, what cannot be told or was not judged, and how much was not measured."""
    found = judgements(results)
    groups = {verdict: [each.why for each in found if each.verdict == verdict] for verdict in VERDICTS}
    parts = [f"{verdict}: {'; '.join(whys)}" for verdict, whys in groups.items() if whys]
    if not parts:
        parts = ["no step can be compared with the one before"]
    missing = [row for row in results.rows if row.skipped is not None]
    reasons = "; ".join(Counter(row.skipped or "" for row in missing))
    of = count(len(results.rows), "row")
    parts.append(
        f"not measured: {len(missing)} of {of} ({reasons})" if missing else f"no row of {of} was left unmeasured"
    )
    return ". ".join(map(_capital, parts)) + "."


class Judgement(NamedTuple):
    """Whether a step did what it is for, by the 95 % interval of a pair."""

    verdict: Literal["helped", "did not help", "cannot be told whether it helped", "not judged"]
    why: str
    pair: Pair | None = None


VERDICTS = ("helped", "did not help", "cannot be told whether it helped", "not judged")

_QUALITY_STEPS = (
    ("fine-tuning", "finetune", "prune"),
    ("pruning by score instead of at random", "prune", "control-random"),
    ("the dense teacher instead of plain fine-tuning at equal FLOPs", "finetune", "control-plain"),
)


def judgements(results: Results) -> list[Judgement]:
    """Each step that there is: judged against the row without it, or why it was not."""
    return [*_judged_speeds(results), *_judged_perplexities(results)]


def _judged_speeds(results: Results) -> list[Judgement]:
    found = []
    for row in measured(results, lambda r: r.latency):
        if row.role != "chain" or row.stage not in ("half", "prune", "quantize"):
            continue
        pair = timed_before(results, row)
        if pair is None:
            why = f"decoding of {label(row)}, for no row without its step was timed alike"
            found.append(Judgement("not judged", why))
            continue
        decode = pair.speed("decode")
        what = (
            f"{pair.step} for decoding ({label(row)} against {label(pair.base)}: {times(decode.value)} as fast, "
            f"{_interval(decode, 3)}{_also(pair)})"
        )
        found.append(Judgement(_verdict(decode.higher, decode.lower), what, pair))
    return found


def _judged_perplexities(results: Results) -> list[Judgement]:
    found = []
    stages = {row.stage for row in results.rows}
    recipe = results.run.get("recipe") or {}
    asked = bool((recipe.get("finetune") or {}).get("distill"))
    for name, stage, other in _QUALITY_STEPS:
        pair = quality_pair(results, stage, other)
        if pair is not None:
            between = pair.perplexity
            verdict = _verdict(between.lower, between.higher) if between else VERDICTS[2]
            interval = _interval(between) if between else "no interval"
            why = f"{name} (perplexity {pair.change:.4f} ×, {interval}{_also(pair)})"
            found.append(Judgement(verdict, why, pair))  # type: ignore[arg-type]
        elif stage in stages and (other != "control-plain" or asked or other in stages):
            found.append(Judgement("not judged", f"{name}, for {stage} and {other} were not both measured alike"))
    return found


def _verdict(good: bool, bad: bool) -> Literal["helped", "did not help", "cannot be told whether it helped"]:
    return "helped" if good else "did not help" if bad else "cannot be told whether it helped"


def _interval(found: Ratio, digits: int = 4, bound: float = 1.0) -> str:
    return span(found.low, found.high, digits, bound)


def _also(found: Pair) -> str:
    return f"; besides: {found.besides}" if found.besides else ""


def caveats(results: Results) -> list[str]:
    """What a reader must know before quoting a number."""
    found = [*_aims(results), *_text_caveats(results), *_gaps(results)]
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


def _aims(results: Results) -> list[str]:
    """Aims that were missed, or of which it cannot be told."""
    found = []
    row, int8 = int8_row(results), int8_pair(results)
    held = codes(row) if row else ""
    aims = (
        ("Pruned and fine-tuned, the model's perplexity", "the control arm's", finetuned_pair(results), FINETUNE_AIM),
        (f"{held} perplexity", f"its {base_name(int8)}'s" if int8 else "", int8, INT8_AIM),
    )
    for what, whose, pair, aim in aims:
        between = pair.perplexity if pair else None
        if pair is None or (between and between.high <= aim):
            continue
        interval = _interval(between, bound=aim) if between else "no interval"
        says = f"{what} is {pair.change:.4f} × {whose} ({interval})"
        if between and between.low > aim:
            found.append(f"An aim was missed: {says}, above {aim}.")
        else:
            found.append(f"Whether an aim was met cannot be told: {says}, where at most {aim} is wanted.")
    files = int8_files(results)
    if files and files.row.bytes_on_disk and files.base.bytes_on_disk:
        ratio = files.row.bytes_on_disk / files.base.bytes_on_disk
        if ratio > INT8_SIZE_AIM:
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
    bare = [row for row in measured(results, lambda r: r.quality) if row.quality and row.quality.stderr is None]
    if bare:
        short = min(row.quality.tokens for row in bare if row.quality)
        why = "the text is too short" if not len(part_sizes(short)) else "the results are from a version without"
        found.append(
            f"Perplexities of {count(len(bare), 'row')} have no interval, for {why}: how they differ cannot be "
            "told from chance."
        )
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
    found = (paired(row, unpruned(results, row)) for row in timed)
    pairs = [each for each in found if each and same_load(each.row, each.base)]
    seen = [f"{speed(each.speed('decode'))} on {each.row.device}" for each in pairs]
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
    found = quality_pair(results, "finetune", "control-plain")
    if found is None or not found.row.quality or not found.base.quality:
        return None
    between = found.perplexity
    if between and between.lower:
        verdict = "the teacher was the better use of it"
    elif between and between.higher:
        verdict = "plain fine-tuning was the better use of it"
    else:
        verdict = "which was the better use of it cannot be told"
    return (
        f"With the dense teacher, fine-tuning came to perplexity {perplexity(found.row.quality.perplexity)}"
        f"{_effort(results, 'finetune')}; plain fine-tuning at equal FLOPs to "
        f"{perplexity(found.base.quality.perplexity)}{_effort(results, 'control-plain')}: {verdict} "
        f"({found.change:.4f} ×, {f'95 % interval {_interval(between)}' if between else 'no interval'})."
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
        if row.quality and row.quality.parts:
            found.append(
                f"Intervals of perplexities: the text is cut into {len(row.quality.parts)} parts of "
                f"{count(row.quality.tokens // len(row.quality.parts), 'token')} or one more, whose mean NLLs give the "
                "standard error (batch means, Student's t); two rows are compared part by part, so a difference "
                "between rows is surer than their own intervals tell. They are of text like this: on other subjects "
                "rows may differ by more."
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
    return f"{_capital(text)}."


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _and(items: list[str]) -> str:
    return " and ".join(items)
