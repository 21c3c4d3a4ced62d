"""Train CompactGPT2 from scratch with the Hugging Face `Trainer`: tokenizer, shards, model, curve."""

import contextlib
import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from string import whitespace
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast, TrainingArguments, set_seed

from eval.errors import UserError, WorkError
from eval.results import save_json
from pipeline import hardware
from pipeline.artifacts import (
    RunFolder,
    disk_errors,
    named_hashes,
    refuse_other_choices,
    refuse_strangers,
    replace_folder,
)
from pipeline.checkpoint import save_model
from pipeline.data import TokenBlocks, encode_many, tokenize_dataset
from pipeline.model import CompactGPT2LMHeadModel
from pipeline.optim import MuonAdamW, adamw, pretraining_groups
from pipeline.parallel import PretrainTrainer, check_processes, lost_others, shard
from pipeline.prepare import MANIFEST, TOKENIZER, TOKENIZER_FILE, prepared_shards, read_manifest
from pipeline.reading import expanded, holds_json, read_rows
from pipeline.recipe import Pretrain
from pipeline.shards import ShardBlocks, ShuffledBlocks
from pipeline.tokenizer import load_tokenizer
from pipeline.tracking import Tracking
from pipeline.training import Diverged, Rollbacks, arguments, collate, is_main_process, rank, run, world_size
from pipeline.watching import Meter, Quiz, attention_kernel, learning_curve, training_flops
from pipeline.wikitext import DOCUMENT_MARK, styled_documents
from plots.pretraining import draw
from plots.style import save as save_figure

CHOICES = "pretrain.json"
"""What a training was begun with, written before all else: it tells its folder from any other."""
_WRITTEN = (
    *("model", "model.partial", "tokenizer", "tokenizer.partial", "tokens.npy", "tokens.partial.npy"),
    *("checkpoint-*", "rollbacks.json", "curve.json", "plots/pretraining.*"),
)


def pretrain(
    recipe: Pretrain,
    files: Sequence[Path],
    out: Path,
    validation_text: str | None,
    tracking: Tracking | None = None,
) -> Path:
    """Train on `files` or the recipe's shards, resuming from the last checkpoint in `out`; returns the model folder.

    Without a validation text the shards' held-out one is it. `out` receives `tokenizer/`, `tokens.npy`
    (uint16 blocks; neither for shards), `checkpoint-N/`, `curve.json`, `plots/pretraining.png` and `.svg` and, at
    the end, `model/` in Hub format.
    Raises `UserError` for unusable text or shards, a folder that was begun with other choices, or a recipe that
    does not go with the number of processes; `WorkError` where the training diverges or another process ends.

    Under `torchrun` or `accelerate launch`, all nodes see the same `out`, and the first process keeps it.
    """
    check_processes(recipe)
    if is_main_process() and not (out / CHOICES).exists():
        refuse_strangers(out, _WRITTEN, "training")
    with RunFolder(out).locked() if is_main_process() else contextlib.nullcontext():
        with disk_errors(out), lost_others("pretrain"), (tracking or Tracking()).training() as report_to:
            return _pretrain(recipe, files, out, validation_text, report_to)


def _pretrain(recipe: Pretrain, files: Sequence[Path], out: Path, validation_text: str | None, report_to: str) -> Path:
    shards = expanded(recipe.shards) if recipe.shards else None
    args = _arguments(recipe, out, report_to)
    with args.main_process_first(local=False):
        tokenizer, blocks = _data(recipe, files, out)
    if shards and validation_text is None:
        held_out = shard_blocks(recipe, shards, "val", len(tokenizer))
        validation = TokenBlocks(np.stack([held_out[i] for i in range(min(recipe.eval_blocks, len(held_out)))]))
    else:
        validation = tokenize_dataset(validation_text, tokenizer, recipe.model.n_positions)
        validation = TokenBlocks(validation.tokens[: recipe.eval_blocks])
    rollbacks = Rollbacks(out)
    while True:
        # Other text from the last checkpoint on, or it would diverge there again.
        args.data_seed = recipe.seed + len(rollbacks.steps)
        if isinstance(blocks, ShuffledBlocks):
            blocks.seed = recipe.seed + len(rollbacks.steps)
        trainer = _trainer(recipe, args, tokenizer, blocks, validation)
        try:
            run(trainer, "pretrain", recipe.spike)
            break
        except Diverged as error:
            if len(rollbacks.steps) >= recipe.rollbacks:
                raise WorkError(
                    f"pretrain: {error.what}; lower the learning rate and give another --out, which starts anew"
                ) from error
            step = trainer.state.global_step
            del trainer
            with args.main_process_first(local=False):
                rollbacks.add(step, error.what)
    whole = trainer.whole_model()
    if not is_main_process():
        return out / "model"
    curve = learning_curve(trainer.state.log_history)
    save_json(curve, out / "curve.json")
    if figure := draw(curve, recipe.reference):
        (out / "plots").mkdir(exist_ok=True)
        save_figure(figure, out / "plots", "pretraining")
    save_model(whole, tokenizer, out / "model.partial")
    replace_folder(out / "model.partial", out / "model")
    return out / "model"


def new_model(recipe: Pretrain, end: int | None = None) -> CompactGPT2LMHeadModel:
    """The recipe's shape with random weights; `end` is the end-of-text token."""
    return CompactGPT2LMHeadModel(
        recipe.model.config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=end, eos_token_id=end)
    )


def _trainer(
    recipe: Pretrain,
    args: TrainingArguments,
    tokenizer: Any,
    blocks: TokenBlocks | ShuffledBlocks,
    validation: TokenBlocks,
) -> PretrainTrainer:
    """A fresh model and all that trains it."""
    set_seed(recipe.seed)
    model = new_model(recipe, tokenizer.eos_token_id)
    dtype = hardware.autocast_dtype(args.device.type) if recipe.autocast else None
    kernel = attention_kernel(model.to(args.device), dtype)
    if recipe.attention == "flash" and "flash" not in kernel:
        raise UserError(f"attention is flash, but SDPA chose {kernel} on {args.device}; --set attention=any")
    at_hand = len(blocks) * (world_size() if recipe.shards else 1)
    wanted = recipe.batch_size * recipe.accumulation
    tokens_per_step = min(wanted, at_hand) * recipe.model.n_positions
    if is_main_process():
        fewer = f" (batch_size x accumulation are {wanted} blocks, of which there are {at_hand})"
        print(
            f"pretrain: {model.num_parameters():,} parameters, {at_hand * recipe.model.n_positions:,} tokens at hand, "
            f"{recipe.steps} steps of {tokens_per_step:,} tokens{fewer if at_hand < wanted else ''}; "
            f"attention by {kernel}",
            file=sys.stderr,
        )
    if recipe.compile:
        for block in model.transformer.h:
            block.compile()
    if recipe.parallel == "fsdp" and world_size() > 1:
        shard(model, dtype)
    gpu = hardware.gpu()
    named = 1e12 * recipe.peak_tflops if recipe.peak_tflops else None
    peak = named or (hardware.peak_flops(gpu["name"]) if gpu else None)
    meter = Meter(tokens_per_step, training_flops(model.config), peak * world_size() if peak else None)
    trainer = PretrainTrainer(
        meter,
        model=model,
        args=args,
        train_dataset=blocks,
        data_collator=collate,
        eval_dataset=validation,
        optimizers=(_optimizer(recipe, model), None),
    )
    if recipe.hellaswag:
        trainer.add_callback(Quiz(trainer, meter, tokenizer, recipe.hellaswag))
    return trainer


def _arguments(recipe: Pretrain, out: Path, report_to: str) -> TrainingArguments:
    """What the trainer is told; where there are several processes, they meet here."""
    stable = recipe.schedule == "stable"
    return arguments(
        out,
        hardware.default_device(),
        recipe.seed,
        autocast=recipe.autocast,
        report_to=report_to,
        max_steps=recipe.steps,
        per_device_train_batch_size=recipe.batch_size,
        per_device_eval_batch_size=recipe.batch_size,
        gradient_accumulation_steps=recipe.accumulation // world_size(),
        lr_scheduler_type="warmup_stable_decay" if stable else "cosine",
        lr_scheduler_kwargs={"num_decay_steps": recipe.decay_steps, "decay_type": "linear"} if stable else {},
        warmup_steps=recipe.warmup_steps,
        max_grad_norm=recipe.clip,
        ddp_find_unused_parameters=False,
        gradient_checkpointing=recipe.checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        eval_strategy="steps",
        eval_steps=recipe.eval_steps,
        save_steps=recipe.save_steps,
        logging_steps=recipe.log_steps,
        # Shards come shuffled; torch's sampler would hold a number for each of their blocks.
        train_sampling_strategy="sequential" if recipe.shards else "random",
    )


def _optimizer(recipe: Pretrain, model: CompactGPT2LMHeadModel) -> torch.optim.Optimizer:
    if recipe.optimizer == "adamw":
        split = recipe.parallel == "zero1" and world_size() > 1
        return adamw(model, lr=recipe.adam_learning_rate, weight_decay=recipe.weight_decay, split=split)
    return MuonAdamW(
        pretraining_groups(
            model,
            muon_lr=recipe.muon_learning_rate,
            adam_lr=recipe.adam_learning_rate,
            weight_decay=recipe.weight_decay,
        )
    )


def _data(recipe: Pretrain, files: Sequence[Path], out: Path) -> tuple[Any, TokenBlocks | ShuffledBlocks]:
    """Tokenizer and training blocks: this process's share of shards, or all of the text."""
    if not recipe.shards:
        _same_choices(recipe, files, out)
        tokenizer = train_tokenizer(recipe, files, out)
        return tokenizer, _blocks(recipe, files, tokenizer, out)
    shards = expanded(recipe.shards)
    tokenizer = _shard_tokenizer(recipe, shards)
    train = shard_blocks(recipe, shards, "train", len(tokenizer))
    if len(train) < world_size():
        raise UserError(f"{shards}: {len(train)} blocks for {world_size()} processes; prepare more text or start fewer")
    _same_choices(recipe, deciding_files(shards), out)
    return tokenizer, ShuffledBlocks(train, recipe.seed, rank(), world_size())


def _same_choices(recipe: Pretrain, files: Sequence[Path], out: Path) -> None:
    """Refuse to mix two trainings in one folder; the length of the schedule and how work is shared may change.

    Where a training was refused or cut off before its first checkpoint, other choices begin anew.
    """
    free = {"steps", "decay_steps", "save_steps", "eval_steps", "log_steps"}
    free |= {
        "parallel",
        "checkpointing",
        "compile",
        "attention",
        "hellaswag",
        "reference",
        "peak_tflops",
        "spike",
        "rollbacks",
    }
    free |= {"autocast"} if recipe.autocast else set()  # it came after others had begun trainings, which go on
    choices = recipe.model_dump(mode="json", exclude=free | {"shards"}) | {"files": named_hashes(files)}
    path = out / CHOICES
    try:
        refuse_other_choices(choices, path, "training")
    except UserError:
        if _begun(out):
            raise
        if is_main_process():
            shutil.rmtree(out / TOKENIZER, ignore_errors=True)
            for name in ("tokens.npy", "rollbacks.json"):
                (out / name).unlink(missing_ok=True)
    if is_main_process():
        save_json(choices, path)


def _begun(out: Path) -> bool:
    """Whether the training in `out` has a checkpoint or model, or its choices cannot be read."""
    try:
        json.loads((out / CHOICES).read_text(encoding="utf-8"))
    except ValueError:
        return True
    return (out / "model").exists() or next(out.glob("checkpoint-*"), None) is not None


def deciding_files(shards: Path) -> list[Path]:
    """The files that tell shards from others: their manifest, or all, if they are another's."""
    if read_manifest(shards) is not None:
        return [shards / MANIFEST]
    return [shards / TOKENIZER / TOKENIZER_FILE, *sorted(shards.glob("*.bin"))]


def _shard_tokenizer(recipe: Pretrain, shards: Path) -> Any:
    """The tokenizer that lies beside shards, if it and they are what the recipe wants."""
    manifest = read_manifest(shards)
    if manifest and manifest["style"] != recipe.style:
        raise UserError(
            f"{shards}: prepared with --style {manifest['style']}, but the recipe's style is {recipe.style}; "
            f"--set style={manifest['style']}"
        )
    tokenizer = load_tokenizer(shards / TOKENIZER)
    if len(tokenizer) > recipe.model.vocab_size:
        raise UserError(
            f"{shards}: its tokenizer has {len(tokenizer)} tokens, model.vocab_size is {recipe.model.vocab_size}; "
            f"--set model.vocab_size={len(tokenizer)}"
        )
    return tokenizer


def shard_blocks(recipe: Pretrain, shards: Path, split: str, vocab_size: int) -> ShardBlocks:
    """The blocks of a folder's `train` or `val` shards.

    Raises `UserError` where they hold none, or the first or last of a shard has a token beyond the vocabulary: others
    are found as they are read.
    """
    blocks = ShardBlocks(prepared_shards(shards, split), recipe.model.n_positions, vocab_size)
    if not len(blocks):
        raise UserError(
            f"{shards}: no {split} shard holds a block of {blocks.length} tokens; "
            + ("prepare more text" if split == "train" else "--set validation=FILE, or embedded:valid")
        )
    for first, end in pairwise([0, *blocks.ends]):
        for place in {first, end - 1} if end > first else ():
            blocks[place]
    return blocks


def _documents(recipe: Pretrain, files: Sequence[Path]) -> Iterator[str]:
    """The documents of all files. Raises `UserError` where the style leaves none."""
    found = _styled(recipe, files)
    first = next(found, None)
    if first is None:
        names = ", ".join(map(str, files[:3]))
        raise UserError(
            f"{names}: style wikitext keeps no document, since the first line of each is taken for its title and none "
            "has a second; --set style=plain takes the text as it is"
            if recipe.style == "wikitext"
            else f"{names}: holds no document; give text"
        )
    yield first
    yield from found


def _styled(recipe: Pretrain, files: Iterable[Path]) -> Iterator[str]:
    for path in files:
        for text in read_rows(path):
            if recipe.style == "wikitext":
                yield from styled_documents(text)
            else:
                # As in `data prepare`: as it is, but for the space around marks.
                parts = [text] if holds_json(path) else text.split(DOCUMENT_MARK)
                parts = [part.strip(whitespace) for part in parts] if len(parts) > 1 else parts
                yield from filter(str.strip, parts)


def _limited(documents: Iterator[str], limit: int | None) -> Iterator[str]:
    seen = 0
    for document in documents:
        if limit is not None and seen >= limit:
            return
        seen += len(document.encode())
        yield document


def train_tokenizer(recipe: Pretrain, files: Sequence[Path], out: Path) -> PreTrainedTokenizerFast:
    """A byte-level BPE (Sennrich et al. 2016; GPT-2's bytes) trained on the head of the text."""
    folder = out / "tokenizer"
    kept = load_tokenizer(folder) if (folder / TOKENIZER_FILE).exists() else ()
    if len(kept) != recipe.model.vocab_size:
        if not kept:
            refuse_strangers(out, [TOKENIZER], "tokenizer")
        from tokenizers import ByteLevelBPETokenizer

        print(f"pretrain: training a byte-level BPE of {recipe.model.vocab_size} tokens", file=sys.stderr)
        bpe = ByteLevelBPETokenizer()
        bpe.train_from_iterator(
            _limited(_documents(recipe, files), recipe.tokenizer_bytes),
            vocab_size=recipe.model.vocab_size,
            special_tokens=[DOCUMENT_MARK],
            show_progress=False,  # it would go to stdout
            length=None,
        )
        if bpe.get_vocab_size() != recipe.model.vocab_size:
            raise UserError(
                f"the text yields a vocabulary of {bpe.get_vocab_size()} tokens only; give more text, or "
                f"--set model.vocab_size={bpe.get_vocab_size()}"
            )
        partial = out / "tokenizer.partial"
        PreTrainedTokenizerFast(
            tokenizer_object=bpe._tokenizer,
            bos_token=DOCUMENT_MARK,
            eos_token=DOCUMENT_MARK,
            unk_token=DOCUMENT_MARK,
            model_max_length=recipe.model.n_positions,
        ).save_pretrained(partial)
        replace_folder(partial, folder)
    return load_tokenizer(folder)


def _blocks(recipe: Pretrain, files: Sequence[Path], tokenizer: Any, out: Path) -> TokenBlocks:
    """The text as `[blocks, n_positions]` uint16, tokenised once and memory-mapped after."""
    path = out / "tokens.npy"
    if not path.exists():
        print("pretrain: tokenising", file=sys.stderr)
        documents = _limited(_documents(recipe, files), recipe.max_bytes)
        ids = np.concatenate([part.astype(np.uint16) for part in encode_many(documents, tokenizer)])
        length = recipe.model.n_positions
        count = len(ids) // length
        if not count:
            raise UserError(
                f"the text has {len(ids)} tokens, fewer than one block of {length}; give more text, or "
                f"--set model.n_positions={max(1, len(ids))}"
            )
        partial = path.with_suffix(".partial.npy")
        np.save(partial, ids[: count * length].reshape(count, length))
        os.replace(partial, path)
    try:
        return TokenBlocks(np.load(path, mmap_mode="r"))
    except (ValueError, EOFError) as error:
        raise UserError(f"{path}: damaged; delete it, and the text is tokenised again") from error
