"""Whether engines say the same: logits, distributions, likeliest tokens and greedy continuations on one text."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, Self

import numpy as np
import torch
from tqdm import tqdm

from eval.engine import Engine
from eval.errors import UserError, WorkError
from eval.results import Agreement
from eval.statistics import part_sizes, standard_error

BLOCK_BYTES = 16 * 2**20
"""About the most that one block of FP64 logits takes while answers are compared."""


@dataclass(frozen=True)
class Questions:
    """What every engine is asked: a text's next tokens, and to go on from a few places in it."""

    token_ids: np.ndarray
    """The text, `[tokens]`, integer."""
    context: int
    """Tokens a window; the windows follow each other without overlap, the last may be shorter."""
    prompts: int = 4
    """How many continuations, from places at even distances."""
    prompt_tokens: int = 64
    new_tokens: int = 64

    def __post_init__(self) -> None:
        """Raise `UserError` where a length is too small or the text too short for a prompt."""
        for name in ("context", "prompts", "prompt_tokens", "new_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"{name.replace('_', ' ')}: {getattr(self, name)}; give at least 1")
        if len(self.token_ids) < self.prompt_tokens:
            raise UserError(f"the text has {len(self.token_ids)} tokens; a prompt takes {self.prompt_tokens}")

    @classmethod
    def fitting(cls, token_ids: np.ndarray, context: int) -> Self:
        """The usual questions; prompts and continuations shorter where context or text are."""
        prompt = min(cls.prompt_tokens, max(1, context // 2), max(1, len(token_ids)))
        return cls(token_ids, context, prompt_tokens=prompt, new_tokens=max(1, min(cls.new_tokens, context - prompt)))

    def windows(self) -> list[torch.Tensor]:
        """The text cut into `[1, length]` int64."""
        return list(torch.from_numpy(self.token_ids.astype(np.int64))[None].split(self.context, dim=1))

    def prompt_ids(self) -> torch.Tensor:
        """`[prompts, prompt_tokens]` int64."""
        starts = np.linspace(0, len(self.token_ids) - self.prompt_tokens, self.prompts).astype(int)
        cut = [self.token_ids[start : start + self.prompt_tokens] for start in starts]
        return torch.from_numpy(np.stack(cut).astype(np.int64))


class Answers(NamedTuple):
    """What one engine said, on the CPU."""

    logits: torch.Tensor
    """`[tokens, vocab]` FP32: of the token after each position of the text."""
    greedy: torch.Tensor
    """`[prompts, new_tokens]` int64."""


@torch.no_grad()
def listen(engine: Engine, questions: Questions, *, progress: bool = True) -> Answers:
    """Ask one engine. Keeps `4 * tokens * vocab` bytes, so that engines need not be loaded side by side.

    Raises `UserError` where the questions do not fit the engine, `WorkError` where its logits are not finite.
    """
    label = f"{engine.name} {engine.device} {engine.precision}"
    longest = max(questions.context, questions.prompt_tokens + questions.new_tokens)
    if longest > engine.context:
        raise UserError(f"{longest} tokens at once are more than {label} takes: give at most {engine.context}")
    low, high = int(questions.token_ids.min()), int(questions.token_ids.max())
    if low < 0 or high >= engine.vocab_size:
        raise UserError(
            f"the text has token ids from {low} to {high}, those of {label} are 0 to {engine.vocab_size - 1}; "
            "tokenize it with the model's own tokenizer"
        )
    heard = []
    for window in tqdm(questions.windows(), desc=f"agreement {label}", unit="window", disable=not progress):
        logits = engine.logits(window)[0].float().cpu()
        if not logits.isfinite().all():
            raise WorkError(f"the logits of {label} are not finite: nothing can be compared")
        heard.append(logits)
    token = engine.prefill(questions.prompt_ids()).argmax(-1).cpu()
    written = [token]
    for _ in range(questions.new_tokens - 1):
        token = engine.decode(token).argmax(-1).cpu()
        written.append(token)
    return Answers(torch.cat(heard), torch.stack(written, dim=1))


def compare(answers: Mapping[str, Answers], questions: Questions, *, text_sha256: str) -> Agreement:
    """Compare what engines, by name, said to the same questions, each with each.

    KL(a || b) is the mean over positions of sum p_a (log p_a - log p_b) in nats, from FP64 log-softmax of the FP32
    logits: what is lost a token by taking b for a (Kullback and Leibler 1951).
    Raises `UserError` where vocabularies differ.
    """
    names, said = list(answers), [answer.logits for answer in answers.values()]
    for name, logits in zip(names, said, strict=True):
        if logits.shape[1] != said[0].shape[1]:
            raise UserError(
                f"{names[0]} knows {said[0].shape[1]} tokens and {name} {logits.shape[1]}: "
                "compare models of one vocabulary"
            )
    (tokens, vocabulary), size = said[0].shape, len(names)
    sizes = torch.from_numpy(part_sizes(tokens))
    part_of = torch.repeat_interleave(torch.arange(len(sizes)), sizes) if len(sizes) else torch.zeros(tokens).long()
    gaps, most = (torch.zeros(size, size, dtype=torch.float64) for _ in range(2))
    losses, same = (torch.zeros(max(1, len(sizes)), size, size, dtype=torch.float64) for _ in range(2))
    step = max(1, BLOCK_BYTES // (8 * size * vocabulary))
    for begin in range(0, tokens, step):
        block = torch.stack([logits[begin : begin + step] for logits in said])
        for a, b in itertools.combinations(range(size), 2):
            distance = (block[a] - block[b]).abs_()
            gaps[a, b] += distance.sum(dtype=torch.float64)
            most[a, b] = max(most[a, b], distance.max())
        log_p = block.double().log_softmax(-1)
        cross = torch.einsum("atv,btv->tab", log_p.exp(), log_p)
        losses.index_add_(0, part_of[begin : begin + step], torch.einsum("taa->ta", cross)[..., None] - cross)
        top = block.argmax(-1).T
        same.index_add_(0, part_of[begin : begin + step], (top[:, :, None] == top[:, None]).double())
    return Agreement(
        rows=names,
        tokens=tokens,
        context=questions.context,
        text_sha256=text_sha256,
        logit_mean=((gaps + gaps.T) / (tokens * vocabulary)).tolist(),
        logit_max=(most + most.T).tolist(),
        kl=(losses.sum(0) / tokens).clamp(min=0).tolist(),  # rounding leaves the like of -1e-16
        top1=(same.sum(0) / tokens).tolist(),
        prompt_tokens=questions.prompt_tokens,
        new_tokens=questions.new_tokens,
        diverged=[[_common(one.greedy, two.greedy) for two in answers.values()] for one in answers.values()],
        kl_stderr=_errors(losses, sizes),
        top1_stderr=_errors(same, sizes),
    )


def _errors(sums: torch.Tensor, sizes: torch.Tensor) -> list[list[float]] | None:
    """The standard errors of means over the text, from the sums of its parts: `[parts, a, b]` -> `[a][b]`."""
    if not len(sizes):
        return None
    tokens, means = int(sizes.sum()), (sums / sizes[:, None, None]).numpy()
    return [[standard_error(parts, tokens) or 0.0 for parts in line.T] for line in means.transpose(1, 0, 2)]


def _common(one: torch.Tensor, two: torch.Tensor) -> list[int | None]:
    """For each prompt, how many tokens two continuations share from the start; `None` where they share all."""
    return [None if row.all() else int(row.long().argmin()) for row in one == two]
