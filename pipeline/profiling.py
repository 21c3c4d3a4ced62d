"""What `profile` covers: model folders on the engines asked for, or all rows of a run with what the run measured."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from eval.errors import UserError
from eval.profiling import profile, tensorboard_run
from eval.results import Results, Row, load_results
from pipeline.artifacts import MANIFEST, RunFolder
from pipeline.data import encode
from pipeline.engines import default_engine, load_engine
from pipeline.engines.cuda import why_not_model
from pipeline.measure import subjects
from pipeline.runner import RESULTS
from pipeline.stages import BY_NAME
from pipeline.stale import stale_caveat, stale_stages
from pipeline.texts import load_text
from pipeline.tokenizer import load_tokenizer

_TEXT = "embedded:test"


@dataclass(frozen=True)
class _Subject:
    """One profile to be. `device` and `precision` are the engine's choice where they are `None`."""

    stem: str
    folder: Path
    engine: str
    device: str | None
    precision: str | None
    scalars: dict[str, float] = field(default_factory=dict)


def profile_all(
    models: Sequence[Path],
    out: Path | None = None,
    *,
    engines: Sequence[str] = (),
    device: str | None = None,
    precision: str | None = None,
    prompt_tokens: int = 128,
    new_tokens: int = 8,
) -> tuple[Path, list[Path]]:
    """Profile model folders and run folders; return the TensorBoard log folder and the runs in it, one a profile.

    A model folder is profiled on each engine named, by default on the one that fits it. A run folder stands for
    every row that its finished stages have (stage, engine, device, precision) and that can run here; `engines`,
    `device` and `precision` narrow them. Its own figures, table and learning curves become the runs `summary` and
    `STAGE-training`. `out` defaults to `traces` in the run folder, or `runs/profile`.

    Raises `UserError` for a folder or choice that cannot be profiled, or if two profiles would have the same name.
    """
    runs = [given for given in models if _stages(given)]
    if len(runs) > 1:
        raise UserError(f"{runs[0]} and {runs[1]} are runs; profile one run at a time, each has its own --out")
    out = out or (runs[0] / "traces" if runs else Path("runs/profile"))
    wanted: list[_Subject] = []
    for given in models:
        if given in runs:
            wanted += _rows(given, engines, device, precision)
        else:
            names = engines or [default_engine(given)]
            wanted += [_Subject(_stem(given), given, name, device, precision) for name in names]
    text, folders = load_text(_TEXT)[: 40 * prompt_tokens], []
    for subject in wanted:
        engine = load_engine(subject.engine, subject.folder, device=subject.device, precision=subject.precision)
        name = "-".join((subject.stem, engine.name, engine.device.replace(":", ""), engine.precision))
        if out / name in folders:
            raise UserError(f"two of these profiles would be {out / name}; give each an --out of its own")
        folders.append(
            profile(
                engine,
                encode(text, load_tokenizer(subject.folder, engine.vocab_size)),
                out,
                name=name,
                prompt_tokens=prompt_tokens,
                new_tokens=new_tokens,
                scalars=subject.scalars,
            )
        )
        print(f"Traces: {folders[-1]}", file=sys.stderr)
    for run in runs:
        if (run / RESULTS).exists():
            folders += _add_run(run, load_results(run / RESULTS), out)
    return out, folders


def _stages(folder: Path) -> list[str]:
    """The finished stages of a run folder; none in any other folder."""
    return [name for name in BY_NAME if (folder / name / MANIFEST).is_file()]


def _rows(run: Path, engines: Sequence[str], device: str | None, precision: str | None) -> list[_Subject]:
    """The run's rows that are asked for and can run here; what cannot is said."""
    measured = {}
    if (run / RESULTS).exists():
        results = load_results(run / RESULTS)
        for line in stale_caveat(run, results):
            print(f"note: {run}: {line}", file=sys.stderr)
        changed, _ = stale_stages(run, results)
        measured = {row.key: row for row in results.rows if row.stage not in changed}
    found = []
    for row in subjects({name: RunFolder(run).verify(name).details for name in _stages(run)}):
        if row.engine not in (engines or [row.engine]) or (device or row.device, precision or row.precision) != (
            row.device,
            row.precision,
        ):
            continue
        folder = run / row.stage / row.folder
        why = (why_not_model(folder) if row.engine == "cuda" else None) or row.skipped
        if why:
            print(f"left out: {row.key}: {why}", file=sys.stderr)
        else:
            scalars = _measured(measured[row.key]) if row.key in measured else {}
            found.append(_Subject(row.stage, folder, row.engine, row.device, row.precision, scalars))
    if not found:
        raise UserError(f"{run}: none of its rows is such and can run here; give other --engine, --device, --precision")
    return found


def _measured(row: Row) -> dict[str, float]:
    """What the run measured properly, of which the profile's own numbers are a glimpse."""
    return {f"measured/{name}": value for name, value in row.numbers().items()}


def _add_run(run: Path, results: Results, out: Path) -> list[Path]:
    """The run's own numbers: its table and figures, and loss and learning rate of each training."""
    from matplotlib.image import imread

    from pipeline.report import markdown_table

    with tensorboard_run(out, "summary") as (writer, _):
        writer.add_text("stages", "\n\n".join((*stale_caveat(run, results), markdown_table(results))))
        for figure in sorted((run / "plots").glob("*.png")):
            writer.add_image(f"run/{figure.stem}", imread(figure)[..., :3], dataformats="HWC")
    for stage, curve in results.curves.items():
        with tensorboard_run(out, f"{stage}-training") as (writer, _):
            for point in curve:
                writer.add_scalar("training/loss", point.loss, point.step)
                if point.rate is not None:
                    writer.add_scalar("training/learning_rate", point.rate, point.step)
    return [out / "summary", *(out / f"{stage}-training" for stage in results.curves)]


def _stem(model: Path) -> str:
    """`prune` for prune/model, `quantize-ir_fp32` for quantize/ir_fp32."""
    folder = model.resolve()
    return folder.parent.name if folder.name == "model" else f"{folder.parent.name}-{folder.name}".strip("-")
