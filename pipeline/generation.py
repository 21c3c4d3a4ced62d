"""Text generation on any engine: prefill, then one token at a time, sampled and streamed."""

from collections.abc import Iterator
from typing import Any

import torch

from eval.engine import Engine
from eval.errors import UserError
from pipeline.data import encode


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
) -> Iterator[str]:
    """Pieces of text as they come, until the end-of-text token or `max_new_tokens`.

    Temperature 0 is greedy. Raises `UserError` for an empty prompt, settings out of range, or a
    prompt that leaves no room in the engine's context.
    """
    if temperature < 0 or (top_k is not None and top_k < 1) or (top_p is not None and not 0 < top_p <= 1):
        raise UserError("sampling: give temperature >= 0, top_k >= 1 and 0 < top_p <= 1")
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
        token = _sample(logits[0], temperature, top_k, top_p, generator)
        if token == tokenizer.eos_token_id:
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


def _sample(
    logits: torch.Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator
) -> int:
    """One token id from `[vocab]` logits."""
    if temperature == 0:
        return int(logits.argmax())
    values, ids = (logits / temperature).sort(descending=True)
    probabilities = values.softmax(-1)
    if top_k is not None:
        probabilities[top_k:] = 0
    if top_p is not None:
        # Nucleus sampling (Holtzman et al. 2020): the fewest tokens that reach top_p.
        probabilities[probabilities.cumsum(-1) - probabilities >= top_p] = 0
    return int(ids[torch.multinomial(probabilities, 1, generator=generator)])
