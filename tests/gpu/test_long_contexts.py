"""The CUDA engine where attention is split over many blocks: prompts of any length, decoding across every boundary.

Between any two calls the workspace is poisoned: the engine does not promise to keep it.
"""

from pathlib import Path

import pytest
import torch
from test_cuda_engine import Reference, off

from cuda_ext import Engine
from cuda_ext.engine import DECODE
from pipeline.model import CompactGPT2Config, CompactGPT2LMHeadModel

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible to torch"),
]
DEVICE = "cuda:0"
VOCABULARY, CONTEXT = 211, 1024


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(5)
    config = CompactGPT2Config(
        vocab_size=VOCABULARY, n_positions=CONTEXT, n_embd=130, n_layer=2, n_head=3, head_dim=64, n_inner=450,
        kept_heads=[[0, 1, 2], [1]], initializer_range=0.1, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("model")
    CompactGPT2LMHeadModel(config).half().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def reference(folder: Path) -> Reference:
    return Reference(folder)


def tokens(batch: int, length: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def poison(engine: Engine) -> None:
    """NaN in whatever format."""
    engine.workspace.fill_(0xFF)
    engine._logits.fill_(float("nan"))


@pytest.mark.parametrize("mode", DECODE)
@pytest.mark.parametrize("batch", [1, 4, 8, 9, 32])
@pytest.mark.parametrize("prompt", [61, 121, 700])
def test_prefill_and_decode(folder: Path, reference: Reference, mode: str, batch: int, prompt: int) -> None:
    engine = Engine.from_checkpoint(folder, device=DEVICE, max_batch=batch, decode=mode)
    engine.cache.fill_(float("nan"))
    ids = tokens(batch, prompt + 12)
    wanted, allowed = reference.logits(ids), reference.allowed(ids)
    poison(engine)
    assert off(engine.prefill(ids[:, :prompt]), wanted[:, prompt - 1]) <= allowed
    for t in range(prompt, prompt + 12):
        poison(engine)
        assert off(engine.decode(ids[:, t]), wanted[:, t]) <= allowed


@pytest.mark.parametrize("mode", DECODE)
@pytest.mark.parametrize("batch", [1, 9])
def test_to_the_last_position(folder: Path, reference: Reference, mode: str, batch: int) -> None:
    """From a full prompt but one on, then from a short one; the same engine."""
    engine = Engine.from_checkpoint(folder, device=DEVICE, max_batch=batch, decode=mode)
    ids = tokens(batch, CONTEXT)
    wanted, allowed = reference.logits(ids), reference.allowed(ids)
    for prompt in (CONTEXT - 1, CONTEXT - 130, 1):
        poison(engine)
        assert off(engine.prefill(ids[:, :prompt]), wanted[:, prompt - 1]) <= allowed
        for t in range(prompt, min(prompt + 3, CONTEXT)):
            poison(engine)
            assert off(engine.decode(ids[:, t]), wanted[:, t]) <= allowed


@pytest.mark.parametrize("mode", DECODE)
def test_ragged(folder: Path, reference: Reference, mode: str) -> None:
    lengths = [1, 64, 127, 128, 129, 500, 999, 256, 65]
    engine = Engine.from_checkpoint(folder, device=DEVICE, max_batch=len(lengths), decode=mode)
    engine.cache.fill_(float("nan"))
    ids, more = tokens(len(lengths), 999), tokens(len(lengths), 3, seed=2)
    got = []
    poison(engine)
    got.append(engine.prefill(ids, lengths))
    for t in range(3):
        poison(engine)
        got.append(engine.decode(more[:, t]).clone())
    for b, length in enumerate(lengths):
        alone = torch.cat([ids[b, :length], more[b]])[None]
        wanted, allowed = reference.logits(alone)[0], reference.allowed(alone)
        for step, logits in enumerate(got):
            assert off(logits[b], wanted[length - 1 + step]) <= allowed


@pytest.mark.parametrize("batch", [1, 4, 8, 9, 32])
def test_all_modes_draw_good_tokens(folder: Path, reference: Reference, batch: int) -> None:
    """Across 128 and further, in one call: each token is the best, up to what eager FP16 could confuse."""
    ids = tokens(batch, 100)
    for mode in DECODE:
        engine = Engine.from_checkpoint(folder, device=DEVICE, max_batch=batch, decode=mode)
        chosen = torch.tensor(engine.generate(ids, 200))
        text = torch.cat([ids, chosen], 1)
        logits = reference.logits(text[:, :-1])[:, 99:].cpu()
        regret = logits.amax(-1) - logits.gather(-1, chosen[..., None])[..., 0]
        assert regret.max() <= 2 * reference.allowed(text)
