"""The report of a run, from its `results.json` alone: figures, `report.html` in one file, `report.md`; and of two."""

import base64
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eval.errors import UserError
from eval.results import Results, load_results, save_text
from pipeline.stale import stale_caveat
from plots import FIGURES, agreement, findings, quality, quantization, tasks, tradeoff, versus
from plots.numbers import NONE
from plots.rows import by_kind, count, measured
from plots.table import COLUMNS, legend, lines, markdown, markdown_line, markdown_table
from plots.table import text_table as table

__all__ = ["markdown_table", "table", "templates", "write_comparison", "write_report"]

REPORTS = ("report.md", "report.html")
_TEMPLATES = Path(__file__).parent / "templates"
_PARTS = ("recipe", "machine", "versions")
_CAPTIONS = {
    "tradeoff": (
        "Perplexity against decode latency",
        "Scatter plot: perplexity against decode time, marker area is bytes on disk, rows of the Pareto front ringed",
    ),
    "latency": ("Latency", "Horizontal bars: median prefill and decode time of each row in milliseconds"),
    "perplexity": ("Perplexity", "Horizontal bars: perplexity of each row, control arms hatched"),
    "memory": ("Memory", "Horizontal bars: memory of each row in megabytes, peak and unique resident size"),
    "size": ("Size on disk", "Horizontal bars: bytes on disk of each row in megabytes"),
    "agreement": (
        "Agreement",
        "Matrix: KL divergence in nats per token and top-1 agreement in percent of each row against each other",
    ),
    "tasks": ("Tasks", "Horizontal bars: accuracy of each row by task with 95 % intervals, GPT-2 124M's as a line"),
    "heads": ("Attention heads", "Heat map: score of each head by layer, crosses mark the pruned heads"),
    "learning_curves": ("Learning curves", "Lines: training loss in nats per token against the optimizer step"),
    "quantization": ("Weight error of quantisation", "Lines: error of each kind of weight matrix in percent by layer"),
}


def write_report(run_folder: Path) -> Path:
    """Draw the figures into `plots/`, write `report.md` and `report.html`, return the path of the latter.

    The same results give the same bytes.
    Raises `UserError` where results.json is missing, damaged or of another schema.
    """
    from plots import draw_all

    results = load_results(run_folder / "results.json")
    drawn = draw_all(results, run_folder / "plots")
    environment = templates()
    facts = _facts(results, {path.stem: path for path in drawn if path.suffix == ".svg"})
    facts["caveats"] = [*stale_caveat(run_folder, results), *facts["caveats"]]
    for name in REPORTS:
        save_text(environment.get_template(f"{name}.j2").render(facts), run_folder / name)
    return run_folder / "report.html"


def write_comparison(a: Path, b: Path, out: Path | None = None) -> tuple[Path, versus.Comparison]:
    """Write one page with the run folders `a` and `b` side by side; return its path and what it compares.

    By default the page is `against-A.html` in B. Raises `UserError` where a results.json is missing, damaged or of
    another schema, where both are one run, and where `out` is a folder or in none.
    """
    if a.resolve() == b.resolve():
        raise UserError(f"{a} and {b} are one run; give two")
    results = [load_results(folder / "results.json") for folder in (a, b)]
    path = out or b / f"against-{a.resolve().name}.html"
    if path.is_dir() or not path.parent.is_dir():
        raise UserError(f"--out {path}: give a file, such as comparison.html, in a folder that exists")
    found = versus.compare(*results)
    for name, folder, each in zip("BA", (b, a), results[::-1], strict=True):
        found.caveats[:0] = [f"In {name}, {line}" for line in stale_caveat(folder, each)]
    runs: list[Any] = [each.run for each in results]
    page = (
        templates()
        .get_template("comparison.html.j2")
        .render(
            title=f"Headroom: {b} against {a}",
            runs=[("A", a, runs[0]), ("B", b, runs[1])],
            summary=found.summary,
            drawn=_ratios(found),
            tables=found.tables,
            columns=versus.COLUMNS,
            lone=found.lone,
            caveats=found.caveats,
            differences={part: _differences(*(run.get(part) or {} for run in runs)) for part in _PARTS},
        )
    )
    save_text(page, path)
    return path, found


def _ratios(found: versus.Comparison) -> dict[str, str] | None:
    """The figure of a comparison; `None` where no ratio is."""
    from plots import style

    figure = versus.draw(found)
    if figure is None:
        return None
    shown = " and ".join(table.title.partition(" (")[0].lower() for table in found.tables)
    alt = f"Points: the ratio B/A of each row on a log scale, for {shown}; the numbers stand in the tables."
    with tempfile.TemporaryDirectory() as folder:
        *_, drawing = style.save(figure, Path(folder), "ratios")
        return {"name": "ratios", "title": "Ratios", "alt": alt, "data": _encoded(drawing)}


def _encoded(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode("ascii")


def _differences(a: dict[str, Any], b: dict[str, Any]) -> list[tuple[str, str, str]]:
    """The keys that the two hold different values for, with both values; a dash where one has no such key."""
    ours, theirs = dict(flat(a)), dict(flat(b))
    pairs = ((key, ours.get(key, NONE), theirs.get(key, NONE)) for key in dict.fromkeys([*ours, *theirs]))
    return [pair for pair in pairs if pair[1] != pair[2]]


def templates() -> Any:
    """The Jinja environment of `templates/`, with the filters `markdown`, `rows` and `fence`."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=select_autoescape(enabled_extensions=("html.j2",), default=False),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["markdown"] = markdown
    environment.filters["rows"] = _rows
    environment.filters["fence"] = fence
    return environment


def _facts(results: Results, drawings: dict[str, Path]) -> dict[str, Any]:
    """All that the templates show."""
    run = results.run
    at = f" at commit {run['git_commit']}" if run.get("git_commit") else ""
    return {
        "title": f"Headroom: {run.get('name', 'run')}",
        "date": run.get("date"),
        "summary": findings.summary(results),
        "columns": COLUMNS,
        "lines": lines(results),
        "markdown_table": markdown_table(results),
        "legend": legend(results),
        "figures": {name: _figure(name, drawings[name], results) for name in FIGURES if name in drawings},
        "fronts": tradeoff.front(results),
        "agreement": agreement.against_first(results),
        "agreement_columns": agreement.COLUMNS,
        "task_columns": tasks.columns(results),
        "task_lines": tasks.lines(results),
        "task_note": tasks.note(results),
        "quantization": quantization.by_layer(results),
        "quantization_columns": quantization.COLUMNS,
        "heads": quality.heads_by_layer(results),
        "arithmetic": findings.pruning_arithmetic(results),
        "distillation": findings.distillation(results),
        "caveats": findings.caveats(results),
        "protocol": findings.protocol(results),
        "machine": flat(run.get("machine") or {}),
        "versions": flat(run.get("versions") or {}),
        "commit": run.get("git_commit"),
        "seconds": run.get("seconds") or {},
        "recipe": _yaml(run.get("recipe") or {}),
        "command": run.get("command"),
        "again": f"Save the recipe below under the name that this command gives, and run it with Headroom{at}:",
    }


def _figure(name: str, path: Path, results: Results) -> dict[str, str]:
    title, alt = _CAPTIONS[name]
    return {
        "name": name,
        "title": title,
        "alt": f"{alt}{_extent(name, results)}.",
        "data": _encoded(path),
    }


def _extent(name: str, results: Results) -> str:
    """How much a figure shows, for those who cannot see it."""
    if name == "quantization":
        return f"; {len(results.quantization)} matrices, whose numbers stand in a table"
    if name == "agreement":
        return f"; {count(len(results.agreement.rows) if results.agreement else 0, 'row')}"
    if name == "heads":
        return "".join(f"; {stage}: {heads.method}, {heads.scope} scope" for stage, heads in results.heads.items())
    if name == "learning_curves":
        ends = (
            f"{stage} from {curve[0].loss:.3f} to {curve[-1].loss:.3f}"
            for stage, curve in results.curves.items()
            if curve
        )
        return f"; {', '.join(ends)}"
    value = {
        "latency": lambda row: row.latency,
        "perplexity": lambda row: row.quality,
        "memory": lambda row: row.memory,
        "size": lambda row: row.bytes_on_disk,
        "tradeoff": lambda row: row.latency and row.quality,
        "tasks": lambda row: row.tasks or None,
    }[name]
    groups = by_kind(measured(results, value))
    shown = " and ".join(count(len(rows), f"{kind} row") for kind, rows in groups.items())
    return f"; {shown}, whose numbers stand in the table"


def flat(tree: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested data as `(dotted key, text)` pairs."""
    pairs: list[tuple[str, str]] = []
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            pairs += flat(value, f"{name}.")
        elif isinstance(value, list):
            pairs.append((name, ", ".join(map(str, value)) or "none"))
        else:
            pairs.append((name, "none" if value is None else str(value)))
    return pairs


def _rows(lines: Sequence[Sequence[str]], columns: Sequence[str]) -> str:
    """A Markdown table."""
    return "\n".join(markdown_line(map(markdown, line)) for line in (columns, ["---"] * len(columns), *lines))


def fence(text: str, language: str = "") -> str:
    """A Markdown code block that no run of backticks within can end."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    marks = "`" * max(3, longest + 1)
    return f"{marks}{language}\n{text.rstrip()}\n{marks}"


def _yaml(recipe: dict[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True, width=100)
