"""Perplexity by sliding window: every token of a text but the first is scored exactly once."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm

from eval.engine import Engine
from eval.errors import UserError, WorkError
from eval.results import Quality
from eval.statistics import part_means, standard_error

LOGITS_BYTES = 512 * 2**20
"""The most that one batch's logits may take: a GPT-2 window of 1,024 tokens alone has 196 MiB of them."""


class Window(NamedTuple):
    """Inputs `tokens[begin:end]`, targets `tokens[begin + 1 : end + 1]`, of which the last `scored` count."""

    begin: int
    end: int
    scored: int

    @property
    def length(self) -> int:
        """How many tokens the engine reads."""
        return self.end - self.begin


def windows(tokens: int, context: int, stride: int) -> Iterator[Window]:
    """The windows over a text of `tokens` tokens, in order.

    A window's last input predicts the token right after the window, as in the rolling windows of
    EleutherAI's lm-evaluation-harness. So the tokens 1 to `tokens - 1` are each scored exactly once
    for any stride, `stride == context` included. (Where labels are shifted inside the window, each
    window loses a target: at `stride == context` the first token of every window goes unscored.)
    The text's first token has no context and is no target. The first window scores all its targets;
    each later one begins `stride` tokens further on and scores what lies past its predecessor's end,
    which is `stride` targets, with at least `context - stride` tokens of context. The last window ends
    with the text and may be shorter.

    Raises `UserError` where context, stride or text cannot be used.
    """
    if context < 2:
        raise UserError(f"context is {context} tokens; give at least 2")
    if not 1 <= stride <= context:
        raise UserError(f"stride is {stride} tokens; give 1 to {context}, the context")
    if tokens < 2:
        raise UserError(f"the text has {tokens} token{'s' * (tokens != 1)}; perplexity needs at least 2")
    return _windows(tokens - 1, context, stride)


def _windows(inputs: int, context: int, stride: int) -> Iterator[Window]:
    begin = previous = 0
    while previous < inputs:
        end = min(begin + context, inputs)
        yield Window(begin, end, end - previous)
        begin, previous = begin + stride, end


@torch.no_grad()
def perplexity(
    engine: Engine,
    token_ids: np.ndarray | torch.Tensor,
    *,
    context: int,
    stride: int,
    batch: int = 8,
    text_sha256: str,
    text_share: float,
    progress: bool = True,
) -> Quality:
    """The engine's perplexity on a text: exp of the mean negative log-likelihood over all targets of `windows`.

    `token_ids` is the whole text, `[tokens]`, integer. `context` and `stride` are in tokens. Windows of
    full size run `batch` at a time, fewer where their logits would pass `LOGITS_BYTES`. Each
    target's NLL comes from FP32 logits on their own device; sums over targets are FP64. The standard
    error is that of the mean NLL by the text's parts (`eval.statistics.part_sizes`), times the
    perplexity (delta method).
    `text_sha256` and `text_share` (0 to 1) say which text this is and go into the result as they are.

    Raises `UserError` where text, context or stride do not fit the engine, `WorkError` where
    the engine's numbers give no finite likelihood.
    """
    ids = _checked(token_ids, engine, context)
    plan = list(windows(len(ids), context, stride))
    batch = max(1, min(batch, LOGITS_BYTES // (4 * context * engine.vocab_size)))
    losses = np.empty(len(ids) - 1)
    label = f"perplexity {engine.name} {engine.device} {engine.precision}"
    with tqdm(total=len(ids) - 1, desc=label, unit="tok", unit_scale=True, disable=not progress) as bar:
        for group in _groups(plan, batch):
            for window, nll in zip(group, _nll(engine, ids, group), strict=True):
                if not np.isfinite(nll).all():
                    raise WorkError(f"the NLL of tokens {window.begin + 1} to {window.end} is {nll.sum()}: {label}")
                losses[window.end - window.scored : window.end] = nll
                bar.update(window.scored)
    mean, parts = float(losses.mean()), part_means(losses)
    try:
        value = math.exp(mean)
    except OverflowError as error:
        raise WorkError(f"a mean NLL of {mean:.6g} nats has no finite perplexity: {label}") from error
    spread = standard_error(parts, len(losses))
    return Quality(
        perplexity=value,
        nll=mean,
        tokens=len(losses),
        context=context,
        stride=stride,
        text_sha256=text_sha256,
        text_share=text_share,
        stderr=None if spread is None else value * spread,
        parts=parts.tolist(),
    )


def _checked(token_ids: np.ndarray | torch.Tensor, engine: Engine, context: int) -> torch.Tensor:
    """The text as an int64 tensor on the CPU, known to fit the engine."""
    array = token_ids.cpu().numpy() if isinstance(token_ids, torch.Tensor) else np.asarray(token_ids)
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"token_ids must be one row of integers, not {array.dtype} of shape {array.shape}")
    if context > engine.context:
        raise UserError(f"context is {context} tokens; this model takes at most {engine.context}")
    if array.size and not 0 <= array.min() <= array.max() < engine.vocab_size:
        raise UserError(
            f"the text has token ids from {array.min()} to {array.max()}, the model's are 0 to "
            f"{engine.vocab_size - 1}; tokenize it with the model's own tokenizer"
        )
    return torch.from_numpy(array.astype(np.int64))  # a copy: memory-mapped text is read-only


def _groups(plan: list[Window], batch: int) -> Iterator[list[Window]]:
    """Up to `batch` neighbouring windows at a time; a shorter last one stands alone."""
    group: list[Window] = []
    for window in plan:
        if group and (len(group) == batch or group[0].length != window.length):
            yield group
            group = []
        group.append(window)
    yield group


def _nll(engine: Engine, ids: torch.Tensor, group: list[Window]) -> list[np.ndarray]:
    """NLL in nats of each window's scored targets, `[scored]` FP32; waits for the device once."""
    logits = engine.logits(torch.stack([ids[window.begin : window.end] for window in group]))
    found = []
    for row, window in zip(logits, group, strict=True):  # row by row: log-softmax makes a copy of its input
        targets = ids[window.end + 1 - window.scored : window.end + 1].to(row.device)
        found.append(F.cross_entropy(row[-window.scored :].float(), targets, reduction="none"))
    return np.split(torch.cat(found).cpu().numpy(), np.cumsum([window.scored for window in group])[:-1])
