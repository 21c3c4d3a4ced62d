"""Which row is judged against which: the two differ by the one step in question."""

import dataclasses

from eval.results import Quality, Results, Row
from plots.rows import fp32_ir, int8_row, kind, measured, same_text, twin


def step_before(results: Results, row: Row) -> Row | None:
    """The row that differs by the one step that is to make `row` faster; `None` where speed is not its aim."""
    if row.stage == "half":
        return next(
            (r for r in measured(results, lambda r: r.latency) if (r.stage, r.device) == ("load", row.device)), None
        )
    if row.stage == "prune":
        return unpruned(results, row)
    return fp32_ir(results, row, lambda r: r.latency) if row is int8_row(results) else None


def unpruned(results: Results, row: Row) -> Row | None:
    """The dense model timed on the same engine, device and arithmetic."""
    if row.engine == "torch" and kind(row) == "CPU":  # which computes FP16 weights in FP32
        row = dataclasses.replace(row, precision="fp32")
    return twin(results, row, "load", lambda r: r.latency) or twin(results, row, "half", lambda r: r.latency)


def finetuned_pair(results: Results) -> tuple[Quality, Quality] | None:
    """Pruned and fine-tuned, and the control arm: the first pair on one engine, device and precision."""
    return quality_pair(results, "finetune", "control-finetune")


def int8_pair(results: Results) -> tuple[Quality, Quality] | None:
    """INT8 and its FP32 IR."""
    row = int8_row(results)
    base = fp32_ir(results, row, lambda r: r.quality) if row else None
    return _comparable(row, base)


def quality_pair(results: Results, stage: str, other: str) -> tuple[Quality, Quality] | None:
    for row in measured(results, lambda r: r.quality):
        if row.stage == stage and (pair := _comparable(row, twin(results, row, other, lambda r: r.quality))):
            return pair
    return None


def _comparable(row: Row | None, base: Row | None) -> tuple[Quality, Quality] | None:
    if row is None or base is None or row.quality is None or base.quality is None:
        return None
    return (row.quality, base.quality) if same_text(row.quality, base.quality) else None
