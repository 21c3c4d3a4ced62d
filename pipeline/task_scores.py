"""Tasks on one model folder, as the command line asks for them."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from eval.task_data import load_documents
from eval.tasks import EngineLM, evaluate
from pipeline.artifacts import disk_errors, fingerprint, sha256_tree, versions
from pipeline.data import encode
from pipeline.engines import default_engine, load_engine
from pipeline.reading import expanded
from pipeline.tokenizer import load_tokenizer
from plots.tasks import PUBLISHED


def score_folder(
    model: Path,
    tasks: Sequence[str],
    options: Mapping[str, str | None],
    *,
    data: Path | None,
    limit: int | None,
    cache: Path,
) -> dict[str, Any]:
    """`{"engine", "device", "compute", "tasks": {name: eval.results.Score as plain data}}`.

    `options` are `engine`, `device` and `precision`, or `None` for the folder's own. Answers are kept below `cache`
    by the content of the folder and how it is run. Raises `UserError` for unknown tasks, or what they need.
    """
    documents = {task: load_documents(task, expanded(data) if data else None) for task in tasks}
    engine = load_engine(
        options["engine"] or default_engine(model), model, device=options["device"], precision=options["precision"]
    )
    tokenizer = load_tokenizer(model, engine.vocab_size)
    about = {"engine": engine.name, "device": engine.device, "compute": engine.compute}
    mark = fingerprint([sha256_tree(model), about, versions()])
    with disk_errors(cache):
        scores = evaluate(
            EngineLM(engine, tokenizer, encode, responses=cache / f"{mark}.jsonl"), documents, limit=limit
        )
    return {**about, "tasks": {task: asdict(score) for task, score in scores.items()}}


def format_scores(outcome: dict[str, Any]) -> str:
    """What a person reads."""
    return "\n".join(
        [
            f"{task:<10} accuracy {score['accuracy']:.4f} ± {score['stderr']:.4f}  ({score['documents']:,} of "
            f"{score['of']:,} documents; {_published(task, score)})"
            for task, score in outcome["tasks"].items()
        ]
        + [f"{outcome['engine']} on {outcome['device']}: {outcome['compute']}"]
    )


def _published(task: str, score: dict[str, Any]) -> str:
    asked, all_of_them = score["documents"], PUBLISHED[task].documents
    if asked == all_of_them:
        return f"GPT-2 124M as published: {PUBLISHED[task].accuracy}"
    return f"no published score to compare with: those are of {all_of_them:,}"
