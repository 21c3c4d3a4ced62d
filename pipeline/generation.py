"""Text generation on any engine: prefill, then one token at a time, sampled and streamed."""

import json
import math
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch

from eval.engine import Engine
from eval.errors import UserError, WorkError
from pipeline.data import encode
from pipeline.reading import is_unicode


def generate(
    engine: Engine,
    tokenizer: Any,
    prompt: str,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    ends: Collection[int] | None = None,
) -> Iterator[str]:
    """Pieces of text as they come, until a token of `ends` (`None`: the tokenizer's end of text) or `max_new_tokens`.

    Temperature 0 is greedy. Raises `UserError` for what `check_sampling` refuses, or a prompt that leaves no room in
    the engine's context; `WorkError` where the engine gives no numbers.
    """
    check_sampling(prompt, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    ends = {tokenizer.eos_token_id} if ends is None else ends
    ids = torch.from_numpy(encode(prompt, tokenizer))
    if not len(ids):
        raise UserError("the prompt is empty; give some text")
    if len(ids) + max_new_tokens > engine.context:
        raise UserError(
            f"{len(ids)} prompt and {max_new_tokens} new tokens exceed the context of {engine.context}; ask for fewer"
        )
    generator = torch.Generator(device=engine.device).manual_seed(seed)
    logits = engine.prefill(ids[None])
    produced: list[int] = []
    shown = ""
    for step in range(max_new_tokens):
        if not logits.isfinite().all():
            raise WorkError(f"generate: {engine.name} gives NaN or infinity for token {len(ids) + step}")
        token = _sample(logits[0], temperature, top_k, top_p, generator)
        if token in ends:
            break
        produced.append(token)
        text = tokenizer.decode(produced, clean_up_tokenization_spaces=False)
        # A byte-level token may end inside a character: wait for the rest of it.
        if not text.endswith("\ufffd"):
            yield text[len(shown) :]
            shown = text
        if step + 1 < max_new_tokens:
            logits = engine.decode(torch.tensor([token]))
    if produced:
        yield text[len(shown) :]


def check_sampling(prompt: str, *, temperature: float, top_k: int | None, top_p: float | None, seed: int) -> None:
    """What can be told before a model is loaded. Raises `UserError` for settings out of range, or no prompt."""
    if (
        not 0 <= temperature < math.inf
        or (top_k is not None and top_k < 1)
        or (top_p is not None and not 0 < top_p <= 1)
    ):
        raise UserError("sampling: give a finite temperature >= 0, top_k >= 1 and 0 < top_p <= 1")
    if not -(1 << 63) <= seed < 1 << 64:
        raise UserError("sampling: the seed has more than 64 bits; give one from 0 to 18446744073709551615")
    if not prompt:
        raise UserError("the prompt is empty; give some text")
    if not is_unicode(prompt):
        raise UserError("the prompt is not UTF-8 text; give plain text")


def end_tokens(folder: Path, tokenizer: Any) -> frozenset[int]:
    """The tokens that end a text of this model: as generation_config.json says, else config.json, else the tokenizer.

    Raises `UserError` where a file says something else than a token, several, or nothing.
    """
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        try:
            config = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{path}: no readable JSON; copy the checkpoint again") from error
        said = config.get("eos_token_id") if isinstance(config, dict) else None
        ends = said if isinstance(said, list) else [said]
        if said is not None:
            if any(type(token) is not int for token in ends):
                raise UserError(f"{path}: eos_token_id is {str(said)[:60]}; give a token's number, or a list of them")
            return frozenset(ends)
    return frozenset() if tokenizer.eos_token_id is None else frozenset([tokenizer.eos_token_id])


def _sample(
    logits: torch.Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator
) -> int:
    """One token id from `[vocab]` logits."""
    if temperature == 0:
        return int(logits.argmax())
    values, ids = logits.sort(descending=True)
    # In FP64 from the likeliest on, so that no temperature, however small, makes a quotient that is no number.
    values = (values.double() - values[0].double()) / temperature
    probabilities = values.float().softmax(-1)
    if top_k is not None:
        probabilities[min(top_k, len(ids)) :] = 0
    if top_p is not None:
        # Nucleus sampling (Holtzman et al. 2020): the fewest tokens that reach top_p, the likeliest in any case.
        probabilities[1:][(probabilities.cumsum(-1) - probabilities)[1:] >= top_p] = 0
    return int(ids[torch.multinomial(probabilities, 1, generator=generator)])
