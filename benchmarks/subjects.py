"""What the GPU benchmark compares, and the check that each must pass before it is timed."""

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import DynamicCache, GPT2LMHeadModel, PreTrainedModel

from benchmarks.compiled_peer import CompiledPeer, attend_plain, attend_sdpa
from cuda_ext import Engine
from cuda_ext.engine import DECODE
from eval.errors import WorkError
from pipeline.model import CompactGPT2LMHeadModel

CHECKED_TOKENS = 8
DEPENDENT = "HEADROOM_CUDA_DEPENDENT"
"""Set to 0, no kernel of the engine begins before the one before it has ended."""
SAMPLINGS: dict[str, dict[str, float]] = {
    "": {},
    "top-p 0.95": {"temperature": 0.8, "top_p": 0.95},
    "top-k 40": {"temperature": 0.8, "top_k": 40},
}


@dataclass(frozen=True)
class Case:
    """`batch` prompts of `length` tokens; then, for kind "decode", `tokens` more, else none.

    `sampling`: how tokens are drawn, as `SAMPLINGS` names it; "" takes the likeliest.
    """

    kind: str
    batch: int
    length: int
    tokens: int
    sampling: str = ""

    @property
    def name(self) -> str:
        return f"{self.kind} {self.batch} x {self.length}" + (f", {self.sampling}" if self.sampling else "")

    @property
    def capacity(self) -> int:
        """Room in a cache for all of it, as a multiple of 16."""
        return (self.length + self.tokens + 15) // 16 * 16


class Subject(Protocol):
    """One way to run the model. Token ids are int64 on its device."""

    def prefill(self, ids: torch.Tensor) -> torch.Tensor:
        """Forget the past, read `[batch, length]`, return the last position's logits, `[batch, vocab]`."""
        ...

    def burst(self, count: int) -> torch.Tensor:
        """After a prefill, `count` times: take the likeliest token and decode it; nothing waits for the host.

        Returns these tokens, `[batch, count]`, on the device.
        """
        ...


class EagerSubject:
    """Hugging Face's way: eager, SDPA, a cache that grows."""

    def __init__(self, model: PreTrainedModel):
        self.model, self.cache = model, DynamicCache()
        self.logits = torch.empty(0)

    @torch.inference_mode()
    def prefill(self, ids: torch.Tensor) -> torch.Tensor:
        """See `Subject`."""
        self.cache = DynamicCache()
        return self._step(ids)

    @torch.inference_mode()
    def burst(self, count: int) -> torch.Tensor:
        """See `Subject`."""
        chosen = []
        for _ in range(count):
            chosen.append(self.logits.argmax(-1, keepdim=True))
            self._step(chosen[-1])
        return torch.cat(chosen, 1)

    def _step(self, ids: torch.Tensor) -> torch.Tensor:
        self.logits = self.model(ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1).logits[:, -1]
        return self.logits


class CudaSubject:
    """The engine of cuda_ext in one of its decode modes."""

    def __init__(self, folder: Path, case: Case, device: str, mode: str, dependent: bool = True):
        with without_dependent_launch(not dependent):
            self.engine = Engine.from_checkpoint(
                folder, device=device, max_batch=case.batch, max_context=case.capacity, decode=mode
            )
        self.drawn: dict[str, Any] = SAMPLINGS[case.sampling]

    def prefill(self, ids: torch.Tensor) -> torch.Tensor:
        """See `Subject`."""
        return self.engine.prefill(ids)

    def burst(self, count: int) -> torch.Tensor:
        """See `Subject`."""
        return self.engine.extend(count, **self.drawn).long()


@contextlib.contextmanager
def without_dependent_launch(off: bool = True) -> Iterator[None]:
    """Engines made inside launch each kernel only after the last one has ended, if `off`."""
    before = os.environ.get(DEPENDENT)
    if off:
        os.environ[DEPENDENT] = "0"
    try:
        yield
    finally:
        if off:
            os.environ.pop(DEPENDENT)
            if before is not None:
                os.environ[DEPENDENT] = before


@dataclass(frozen=True)
class Kind:
    """How a subject is made, which checkpoint it reads, and how many seconds that may take."""

    make: Callable[[Path, Case, str], Subject]
    model: str
    seconds: float


def _eager(folder: Path, case: Case, device: str) -> Subject:
    return EagerSubject(CompactGPT2LMHeadModel.from_pretrained(folder, dtype=torch.float16).to(device).eval())


def _stock(folder: Path, case: Case, device: str) -> Subject:
    model = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float16, attn_implementation="sdpa")
    return EagerSubject(model.to(device).eval())


def _compiled(plain: bool) -> Callable[[Path, Case, str], Subject]:
    def make(folder: Path, case: Case, device: str) -> Subject:
        model = CompactGPT2LMHeadModel.from_pretrained(folder, dtype=torch.float16).to(device).eval()
        attend = attend_plain if plain else attend_sdpa
        return CompiledPeer(
            model, batch=case.batch, length=case.length, capacity=case.capacity, part=case.kind, attend=attend
        )

    return make


def _cuda(mode: str, dependent: bool = True) -> Callable[[Path, Case, str], Subject]:
    return lambda folder, case, device: CudaSubject(folder, case, device, mode, dependent)


NO_DEPENDENT = "cuda graph, no dependent launch"
PEER, PEER_PLAIN, EAGER, STOCK = "torch.compile", "torch.compile, plain attention", "eager", "eager, dense"


def kinds(case: Case) -> dict[str, Kind]:
    """The subjects of a case, those that may fail in new ways first: a hang of theirs costs least then.

    Prefill does not depend on how tokens are decoded, so there the engine stands once; nor on how one
    query attends. Sampled, only the engine draws on the device, by its own sampler.
    """
    modes = DECODE if case.kind == "decode" else DECODE[:1]
    found = {f"cuda {mode}" if case.kind == "decode" else "cuda": Kind(_cuda(mode), "pruned", 60) for mode in modes}
    if case.sampling:
        return found
    if case.kind == "decode":
        found[NO_DEPENDENT] = Kind(_cuda("graph", dependent=False), "pruned", 60)
    found |= {EAGER: Kind(_eager, "pruned", 40), STOCK: Kind(_stock, "dense", 40)}
    found[PEER] = Kind(_compiled(False), "pruned", 200)
    if case.kind == "decode" and case.batch <= 8:  # torch's own kernel gives one block to each sequence and head
        found[PEER_PLAIN] = Kind(_compiled(True), "pruned", 120)
    return found


def least_drawn(logits: torch.Tensor, temperature: float = 0.0, top_k: float = 0, top_p: float = 1.0) -> torch.Tensor:
    """The least logit whose token may be drawn: [..., vocabulary] -> [...].

    Top-p keeps the likeliest tokens up to the one that makes their sum reach p (Holtzman et al. 2020, section 3.1).
    """
    if temperature == 0:
        return logits.amax(-1)
    kept = logits.topk(int(top_k) or logits.shape[-1]).values
    before = (kept / temperature).softmax(-1).cumsum(-1).roll(1, -1)
    before[..., 0] = 0
    return kept.masked_fill(before >= top_p, torch.inf).amin(-1)


class Check:
    """Compares a subject with FP32 arithmetic on the same FP16 weights.

    The allowance is twice the error of eager FP16: for prefill's logits in the 2-norm, and for tokens in how far, in
    FP32's eyes, a chosen token lies below the best, or below the least that may be drawn.
    """

    def __init__(self, folder: Path, case: Case, device: str):
        self.case = case
        self.exact = CompactGPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32).to(device).eval()
        vocabulary = self.exact.config.vocab_size
        generator = torch.Generator().manual_seed(1)
        self.ids = torch.randint(0, vocabulary, (case.batch, case.length), generator=generator).to(device)
        wanted = self._exact_logits(self.ids, 1)[:, 0]
        eager = _eager(folder, case, device).prefill(self.ids).float()
        self.wanted = wanted
        self.allowed = 2 * float((eager - wanted).norm() / wanted.norm())
        self.allowed_regret = 4 * float((eager - wanted).abs().max())  # two logits, each off by twice eager's

    def __call__(self, subject: Subject) -> dict[str, float]:
        """The errors, beside what is allowed. Raises `WorkError` where they are larger, or not numbers."""
        got = subject.prefill(self.ids).float().to(self.wanted.device)
        error = float((got - self.wanted).norm() / self.wanted.norm())
        found = {"error": error, "allowed": self.allowed}
        if not error <= self.allowed:
            raise WorkError(f"wrong logits after prefill: relative error {error:.2e}, allowed {self.allowed:.2e}")
        if self.case.kind == "decode":
            tokens = subject.burst(CHECKED_TOKENS)
            logits = self._exact_logits(torch.cat([self.ids, tokens[:, :-1]], 1), CHECKED_TOKENS)
            least = least_drawn(logits, **SAMPLINGS[self.case.sampling])
            regret = float((least - logits.gather(-1, tokens[..., None])[..., 0]).clamp(min=0).max())
            found |= {"regret": regret, "allowed_regret": self.allowed_regret}
            if not regret <= self.allowed_regret:
                raise WorkError(
                    f"wrong tokens: {regret:.3g} below what may be chosen, allowed {self.allowed_regret:.3g}"
                )
        return found

    @torch.inference_mode()
    def _exact_logits(self, ids: torch.Tensor, keep: int) -> torch.Tensor:
        """FP32 logits of the last `keep` positions, a few sequences at a time."""
        parts = [self.exact(part, use_cache=False, logits_to_keep=keep).logits for part in ids.split(8)]
        return torch.cat(parts)
