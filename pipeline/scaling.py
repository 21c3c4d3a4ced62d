"""A family of trainings from scratch, and the scaling law that they follow."""

import contextlib
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

import torch

from eval.errors import UserError, WorkError
from eval.results import save_json, save_text
from eval.scaling_law import FLOPS, enough, examine
from pipeline import hardware, launchers
from pipeline.artifacts import (
    RunFolder,
    disk_errors,
    git_commit,
    named_hashes,
    refuse_other_choices,
    refuse_strangers,
    versions,
)
from pipeline.data import sha256_text
from pipeline.prepare import TOKENIZER, prepare
from pipeline.pretrain import deciding_files, new_model, pretrain, shard_blocks, train_tokenizer
from pipeline.reading import expanded
from pipeline.recipe import Pretrain, PretrainModel, Scaling, Size, parse_recipe
from pipeline.texts import load_text
from pipeline.training import drop_checkpoints, world_size
from plots import scaling as drawing
from plots import style

RESULT, RECORD = "result.json", "scaling.json"
_SHARD_TOKENS = 100_000_000


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
    if recipe.pretrain.max_bytes is not None:
        raise UserError("recipe: pretrain.max_bytes has no meaning here: budgets say how much text is read")
    family_file = out / "family.json"
    if not family_file.exists():
        # Not its data: the family is not kept before they are there.
        refuse_strangers(out, ("runs", "scaling.*"), "family")
    with RunFolder(out).locked(), disk_errors(out):
        kept = _kept(recipe, files)
        refuse_other_choices(kept, family_file, "family")
        with _our_keys():
            template = recipe.pretrain if recipe.pretrain.shards else _prepared(recipe.pretrain, files, out / "data")
            at_hand = _tokens(template)
        family, left_out = expand(recipe.model_copy(update={"pretrain": template}), at_hand)
        save_json(kept, family_file)
        for why in left_out:
            print(f"scaling: left out: {why}", file=sys.stderr)
        failed = _train(family, out / "runs", workers)
        trainings = [
            _result(out / "runs" / member.name) | {"budget": member.budget}
            for member in family
            if member.name not in failed
        ]
        print("scaling: fitting, and again to resamples for the intervals", file=sys.stderr)
        try:
            found = examine(trainings, recipe.resamples)
        except ValueError as error:
            raise WorkError(f"{error}; {_failures(failed)}") from error
        record = {
            "name": recipe.name,
            "machine": {"cpu": hardware.cpu(), "gpu": hardware.gpu()},
            "versions": versions(),
            "git_commit": git_commit(),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "text": [path.name for path in files] or [recipe.pretrain.shards or "embedded:train"],
            "text_tokens": at_hand,
            "recipe": recipe.model_dump(mode="json"),
            "left_out": left_out + [f"{name}: {why}" for name, why in failed.items()],
            "trainings": trainings,
            **found,
        }
        save_json(record, out / RECORD)
        style.save(drawing.draw(record), out, "scaling")
        save_text(drawing.markdown(record), out / "scaling.md")
    if failed:
        raise WorkError(f"{_failures(failed)}; {out}/scaling.* are of the others")
    return record


@contextlib.contextmanager
def _our_keys() -> Iterator[None]:
    """Let what `pretrain` advises to set name our keys, below `pretrain`."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error).replace("--set ", "--set pretrain.")) from error


def expand(recipe: Scaling, at_hand: int) -> tuple[list[Member], list[str]]:
    """The trainings that sizes and budgets make, and a line on each combination that is left out.

    `at_hand` is how many tokens the text has. Raises `UserError` where too few are left for a fit.
    """
    family: dict[str, Member] = {}
    left_out = []
    for size in recipe.sizes:
        where = f"recipe {recipe.name}, size {size.n_layer} x {size.n_head} x {size.head_dim}"
        shape = parse_recipe(PretrainModel, recipe.pretrain.model.model_dump() | size.model_dump(), where)
        with torch.device("meta"):
            model = new_model(recipe.pretrain.model_copy(update={"model": shape}))
        table = getattr(model.transformer, "wpe", None)
        parameters = model.num_parameters() - (table.weight.numel() if table is not None else 0)
        a_step = recipe.pretrain.batch_size * recipe.pretrain.accumulation * shape.n_positions
        for budget in recipe.budgets:
            steps = round(budget / (FLOPS * parameters * a_step))
            tokens = steps * a_step
            why = _why_not(recipe, parameters, tokens, steps, at_hand)
            warmup = round(recipe.warmup_share * steps)
            if why:
                left_out.append(f"{parameters:,} parameters at {budget:.3g} FLOPs: {why}")
                continue
            chosen = recipe.pretrain.model_dump(mode="json") | {
                "model": shape.model_dump(mode="json"),
                "steps": steps,
                "warmup_steps": warmup,
                "decay_steps": min(round(recipe.decay_share * steps), steps - warmup),
                "eval_steps": steps,
            }
            member = Member(size, budget, parameters, tokens, parse_recipe(Pretrain, chosen, where))
            if member.name in family:
                left_out.append(f"{parameters:,} parameters at {budget:.3g} FLOPs: as many steps as at another budget")
            family.setdefault(member.name, member)
    members = list(family.values())
    sizes = [each.parameters for each in members]
    if not enough(sizes, [each.tokens for each in members]):
        reasons = f"; left out: {left_out[0]}" if left_out else ""
        raise UserError(
            f"recipe {recipe.name}: {len(members)} trainings of {len(set(sizes))} sizes, but a fit wants six or more, "
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


def _kept(recipe: Scaling, files: Sequence[Path]) -> dict[str, Any]:
    """What all trainings of a family have in common; sizes, budgets and what is left out may change."""
    shards, validation = recipe.pretrain.shards, recipe.pretrain.validation
    texts = [*files, *(deciding_files(Path(shards)) if shards else [])]
    return recipe.model_dump(mode="json", include={"pretrain", "warmup_share", "decay_share"}) | {
        "files": named_hashes(texts),
        "validation": sha256_text(load_text(validation)) if validation else None,
    }


def _prepared(template: Pretrain, files: Sequence[Path], folder: Path) -> Pretrain:
    """The template on shards of the text, made by a tokenizer of the text; the embedded text if there is no other."""
    folder.mkdir(exist_ok=True)
    validation = template.validation or (None if files else "embedded:valid")
    texts = list(files)
    if not texts:
        # As it is judged: with rows joined WikiText's way.
        texts = [folder / "embedded.txt"]
        if texts[0].exists() and texts[0].read_bytes() != load_text("embedded:train").encode():
            refuse_strangers(folder, [texts[0].name], "text")
        save_text(load_text("embedded:train"), texts[0])
    train_tokenizer(template, texts, folder)
    prepare(
        [str(path.absolute()) for path in texts],
        folder / "shards",
        folder / TOKENIZER,
        workers=hardware.cpu()["cores"],
        shard_tokens=_SHARD_TOKENS,
        validation_share=0 if validation else None,
        style=template.style,
    )
    return template.model_copy(update={"shards": str((folder / "shards").absolute()), "validation": validation})


def _tokens(template: Pretrain) -> int:
    """How many tokens there are to train on. Raises `UserError` where they, or those to judge by, fill no block."""
    shards, vocab_size = expanded(str(template.shards)), template.model.vocab_size
    if template.validation is None:
        shard_blocks(template, shards, "val", vocab_size)
    return len(shard_blocks(template, shards, "train", vocab_size)) * template.model.n_positions


def _train(family: Sequence[Member], runs: Path, workers: int) -> dict[str, str]:
    """Train what is not trained, the longest first, so that none is left alone at the end; why some failed, by name."""
    done = [member for member in family if (runs / member.name / RESULT).exists()]
    for member in done:
        _result(runs / member.name)  # which says so now if it was damaged
        drop_checkpoints(runs / member.name)  # a kill may have come before they went
    waiting = sorted((member for member in family if member not in done), key=lambda each: -each.flops)
    if done:
        print(f"scaling: {len(done)} of {len(family)} trainings are there", file=sys.stderr)
    threads = max(1, hardware.cpu()["cores"] // workers)
    tasks = [Training(member, runs / member.name, threads) for member in waiting]
    began, all_flops = time.monotonic(), sum(member.flops for member in waiting)
    done_flops = 0
    failed: dict[str, str] = {}

    def note(number: int, failure: str | None) -> None:
        nonlocal done_flops
        member = waiting[number]
        done_flops += member.flops
        if failure is not None:
            failed[member.name] = failure
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
    return failed


def _failures(failed: Mapping[str, str]) -> str:
    first = "".join(f", first {name}: {why}" for name, why in list(failed.items())[:1])
    return f"{len(failed)} trainings failed{first}; the same command tries them again"


def train(task: Training) -> str | None:
    """Train a member in this process; `None`, or what went wrong."""
    return launchers.attempt(task.folder, task.threads, lambda: _one(task))


def _one(task: Training) -> None:
    member = task.member
    recipe = member.recipe
    with _our_keys():
        pretrain(recipe, [], task.folder, load_text(recipe.validation) if recipe.validation else None)
    curve = json.loads((task.folder / "curve.json").read_text(encoding="utf-8"))
    result = {
        **member.size.model_dump(),
        "parameters": member.parameters,
        "tokens": member.tokens,
        "loss": curve[-1]["validation_loss"],
        "seconds": _seconds(curve, member.tokens // recipe.steps),
    }
    save_json(result, task.folder / RESULT)
    drop_checkpoints(task.folder)


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
        result = json.loads(path.read_text(encoding="utf-8"))
        return result if {"parameters", "tokens", "loss", "seconds"} <= result.keys() else _damaged(path)
    except (OSError, ValueError, AttributeError):
        return _damaged(path)


def _damaged(path: Path) -> NoReturn:
    raise UserError(f"{path}: damaged; delete {path.parent}, and it is trained again")
