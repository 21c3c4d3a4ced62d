"""A family of trainings from scratch, and the scaling law that they follow."""

import json
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from eval.errors import UserError, WorkError
from eval.results import save_json, save_text
from eval.scaling_law import FLOPS, examine
from pipeline import hardware, launchers
from pipeline.artifacts import RunFolder, disk_errors, git_commit, sha256_file, versions
from pipeline.prepare import TOKENIZER, prepare, prepared_shards
from pipeline.pretrain import new_model, pretrain, train_tokenizer
from pipeline.recipe import Pretrain, Scaling, Size, parse_recipe
from pipeline.shards import ShardBlocks
from pipeline.texts import ASSETS, load_text
from pipeline.training import world_size
from plots import scaling as drawing
from plots import style

RESULT, RECORD = "result.json", "scaling.json"
EMBEDDED = ASSETS / "wikitext-2" / "train.txt"
_SHARD_TOKENS = 100_000_000
_HELD_OUT = 100
"""One document of so many is."""


@dataclass(frozen=True)
class Member:
    """One training of the family."""

    size: Size
    budget: float
    parameters: int
    """All that a token is multiplied with: not the table of learned positions."""
    tokens: int
    recipe: Pretrain

    @property
    def flops(self) -> int:
        """6 N D."""
        return FLOPS * self.parameters * self.tokens

    @property
    def name(self) -> str:
        """A folder name, the same for the same shape and length."""
        return f"L{self.size.n_layer}-H{self.size.n_head}x{self.size.head_dim}-s{self.recipe.steps}"


@dataclass(frozen=True)
class Training:
    """What a process is told: to train a member."""

    member: Member
    folder: Path
    threads: int


def scaling(recipe: Scaling, files: Sequence[Path], out: Path, *, workers: int = 1) -> dict[str, Any]:
    """Train the family below `out`, fit the law, draw both; what is trained already is not trained again.

    The text is `files`, else the recipe's shards, else the embedded one. `out/data/` has its tokens, `out/runs/NAME/`
    each training with its `log.txt`, and `scaling.json`, `.md`, `.png` and `.svg` what came out; the first is returned.
    Sizes and budgets may be added later. Raises `UserError` for a family too small to fit, unusable text or an `out`
    that holds another family, or under torchrun; `WorkError` where trainings failed.
    """
    if world_size() > 1:
        raise UserError("scaling: each training is one process; start it without torchrun, with --workers for several")
    with RunFolder(out).locked(), disk_errors(out):
        _same_family(recipe, files, out)
        template = recipe.pretrain if recipe.pretrain.shards else _prepared(recipe.pretrain, files, out / "data")
        at_hand = _tokens(template)
        family, left_out = expand(recipe.model_copy(update={"pretrain": template}), at_hand)
        for reason in left_out:
            print(f"scaling: left out: {reason}", file=sys.stderr)
        _train(family, out / "runs", workers)
        trainings = [_result(out / "runs" / member.name) | {"budget": member.budget} for member in family]
        print("scaling: fitting, and again to resamples for the intervals", file=sys.stderr)
        record = {
            "name": recipe.name,
            "machine": {"cpu": hardware.cpu(), "gpu": hardware.gpu()},
            "versions": versions(),
            "git_commit": git_commit(),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "text": [path.name for path in files] or [recipe.pretrain.shards or "embedded:train"],
            "text_tokens": at_hand,
            "recipe": recipe.model_dump(mode="json"),
            "left_out": left_out,
            "trainings": trainings,
            **examine(trainings, recipe.resamples),
        }
        save_json(record, out / RECORD)
        style.save(drawing.draw(record), out, "scaling")
        save_text(drawing.markdown(record), out / "scaling.md")
    return record


def expand(recipe: Scaling, at_hand: int) -> tuple[list[Member], list[str]]:
    """The trainings that sizes and budgets make, and a line on each combination that is left out.

    `at_hand` is how many tokens the text has. Raises `UserError` where too few are left for a fit.
    """
    family: dict[str, Member] = {}
    left_out = []
    for size in recipe.sizes:
        shape = recipe.pretrain.model.model_copy(update=size.model_dump())
        with torch.device("meta"):
            model = new_model(recipe.pretrain.model_copy(update={"model": shape}))
        table = getattr(model.transformer, "wpe", None)
        parameters = model.num_parameters() - (table.weight.numel() if table is not None else 0)
        a_step = recipe.pretrain.batch_size * recipe.pretrain.accumulation * shape.n_positions
        for budget in recipe.budgets:
            steps = round(budget / (FLOPS * parameters * a_step))
            tokens = steps * a_step
            why = _why_not(recipe, parameters, tokens, steps, at_hand)
            if why:
                left_out.append(f"{parameters:,} parameters at {budget:.3g} FLOPs: {why}")
                continue
            chosen = recipe.pretrain.model_dump(mode="json") | {
                "model": shape.model_dump(mode="json"),
                "steps": steps,
                "warmup_steps": round(recipe.warmup_share * steps),
                "decay_steps": round(recipe.decay_share * steps),
                "eval_steps": steps,
            }
            member = Member(size, budget, parameters, tokens, parse_recipe(Pretrain, chosen))
            family[member.name] = member
    members = list(family.values())
    sizes, lengths = {each.parameters for each in members}, {each.tokens for each in members}
    if len(members) < 6 or len(sizes) < 3 or len(lengths) < 3:
        reasons = f"; left out: {left_out[0]}" if left_out else ""
        raise UserError(
            f"recipe {recipe.name}: {len(members)} trainings of {len(sizes)} sizes, but a fit wants six or more, "
            f"of three sizes at least; give more sizes, budgets or text{reasons}"
        )
    return members, left_out


def _why_not(recipe: Scaling, parameters: int, tokens: int, steps: int, at_hand: int) -> str | None:
    low, high = recipe.tokens_per_parameter
    if steps < recipe.min_steps:
        return f"{steps} steps, under min_steps {recipe.min_steps}"
    if not low <= tokens / parameters <= high:
        return f"{tokens / parameters:.3g} tokens a parameter, outside {low:g} to {high:g}"
    if tokens > recipe.passes * at_hand:
        return f"{tokens / at_hand:.3g} passes over the text of {at_hand:,} tokens, over {recipe.passes:g}"
    return None


def _same_family(recipe: Scaling, files: Sequence[Path], out: Path) -> None:
    """Refuse to mix two families in one folder; sizes, budgets and what is left out may change."""
    try:
        texts = {path.name: sha256_file(path) for path in files}
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}; give a readable text file") from error
    kept = recipe.model_dump(mode="json", include={"pretrain", "warmup_share", "decay_share"}) | {"files": texts}
    path = out / "family.json"
    try:
        begun = json.loads(path.read_text(encoding="utf-8")) if path.exists() else kept
    except ValueError as error:
        raise UserError(f"{path}: damaged; give another --out or delete the family") from error
    if begun != kept:
        raise UserError(f"{out}: holds a family with another recipe or text; give another --out or delete it")
    save_json(kept, path)


def _prepared(template: Pretrain, files: Sequence[Path], folder: Path) -> Pretrain:
    """The template on shards of the text, made by a tokenizer of the text; the embedded text if there is no other."""
    texts = list(files) or [EMBEDDED]
    folder.mkdir(exist_ok=True)
    train_tokenizer(template, texts, folder)
    prepare(
        [str(path) for path in texts],
        folder / "shards",
        folder / TOKENIZER,
        workers=hardware.cpu()["cores"],
        shard_tokens=_SHARD_TOKENS,
        validation_every=_HELD_OUT if files else 0,
        style=template.style,
    )
    judged = template.validation or (None if files else "embedded:valid")
    return template.model_copy(update={"shards": str((folder / "shards").absolute()), "validation": judged})


def _tokens(template: Pretrain) -> int:
    shards = prepared_shards(Path(str(template.shards)), "train")
    blocks = ShardBlocks(shards, template.model.n_positions, template.model.vocab_size)
    return len(blocks) * template.model.n_positions


def _train(family: Sequence[Member], runs: Path, workers: int) -> None:
    """Train what is not trained, the longest first, so that none is left alone at the end."""
    waiting = sorted(
        (member for member in family if not (runs / member.name / RESULT).exists()), key=lambda each: -each.flops
    )
    if len(waiting) < len(family):
        print(f"scaling: {len(family) - len(waiting)} of {len(family)} trainings are there", file=sys.stderr)
    threads = max(1, hardware.cpu()["cores"] // workers)
    tasks = [Training(member, runs / member.name, threads) for member in waiting]
    began, all_flops = time.monotonic(), sum(member.flops for member in waiting)
    done_flops, failures = 0, []

    def note(number: int, failure: str | None) -> None:
        nonlocal done_flops
        member = waiting[number]
        done_flops += member.flops
        if failure is not None:
            failures.append(failure)
            ended = f"failed: {failure}"
        else:
            ended = f"loss {_result(runs / member.name)['loss']:.4f}"
        left = (time.monotonic() - began) * (all_flops / done_flops - 1)
        print(
            f"scaling: {member.parameters:,} parameters, {member.tokens:,} tokens: {ended}  "
            f"({done_flops / all_flops:.0%} of the FLOPs done, {left / 60:.0f} min left)",
            file=sys.stderr,
            flush=True,
        )

    if waiting:
        print(f"scaling: {len(waiting)} trainings, {all_flops:.3g} FLOPs, {workers} at a time", file=sys.stderr)
        launchers.each(launchers.Local(train, "pipeline.scaling"), tasks, workers, note)
    if failures:
        raise WorkError(
            f"{len(failures)} of {len(waiting)} trainings, first: {failures[0]}; run again to try them again"
        )


def train(task: Training) -> str | None:
    """Train a member in this process; `None`, or what went wrong."""
    return launchers.attempt(task.folder, task.threads, lambda: _one(task))


def _one(task: Training) -> None:
    member = task.member
    recipe = member.recipe
    pretrain(recipe, [], task.folder, load_text(recipe.validation) if recipe.validation else None)
    curve = json.loads((task.folder / "curve.json").read_text(encoding="utf-8"))
    for checkpoint in task.folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    result = {
        **member.size.model_dump(),
        "parameters": member.parameters,
        "tokens": member.tokens,
        "loss": curve[-1]["validation_loss"],
        "seconds": _seconds(curve, member.tokens // recipe.steps),
    }
    save_json(result, task.folder / RESULT)


def _seconds(curve: Sequence[Mapping[str, float]], a_step: int) -> float:
    """Of training alone, those before an interruption too."""
    steps = [0, *(point["step"] for point in curve)]
    return sum(
        (point["step"] - before) * a_step / point["tokens_per_second"]
        for before, point in zip(steps, curve, strict=False)
    )


def _result(folder: Path) -> dict[str, Any]:
    path = folder / RESULT
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: damaged; delete {folder}") from error
