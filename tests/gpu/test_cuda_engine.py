"""The CUDA engine on a GPU: as exact as eager FP16, whatever the shape, and it says what it cannot do."""

from pathlib import Path

import pytest
import torch
from transformers import GPT2LMHeadModel

from cuda_ext import CudaExtError, Engine
from cuda_ext.engine import DECODE
from eval.perplexity import perplexity
from pipeline.checkpoint import load_model
from pipeline.engines.cuda import CudaEngine
from pipeline.engines.torch import TorchEngine
from pipeline.model import CompactGPT2Config, CompactGPT2LMHeadModel, slice_heads, to_gpt2
from pipeline.tokenizer import load_tokenizer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible to torch"),
]
DEVICE = "cuda:0"
ASSETS = Path(__file__).parents[2] / "pipeline" / "assets"
VOCABULARY, CONTEXT = 307, 131
SHAPES = {
    # width, head_dim, inner, heads of each layer
    "uneven": (320, 64, 1280, (3, 1, 5, 2)),
    "odd widths": (111, 32, 450, (2, 3, 1)),
    "1 to 12 heads": (768, 64, 3072, tuple(range(1, 13))),
    "wide heads": (256, 128, 1000, (2, 1)),
    "dense": (128, 64, 512, (2, 2)),
    "rotary": (128, 64, 512, (2, 2), {"position": "rope", "rope_share": 0.5}),
    "grouped": (192, 64, 768, (4, 3), {"n_kv_head": 2}),
    "windows": (96, 32, 384, (2, 3), {"window": [70, None]}),
    "rotary, grouped, windows": (111, 32, 450, (6, 5), {"position": "rope", "n_kv_head": 3, "window": 33}),
}


@pytest.fixture(scope="module", params=SHAPES, ids=lambda name: name.replace(" ", "-"))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random FP16 weights, biases and norms among them, large enough for rounding to matter."""
    width, head_dim, inner, heads, *variant = SHAPES[request.param]
    torch.manual_seed(5)
    config = CompactGPT2Config(
        vocab_size=VOCABULARY, n_positions=CONTEXT, n_embd=width, n_layer=len(heads), n_head=max(heads),
        head_dim=head_dim, n_inner=inner, kept_heads=[list(range(count)) for count in heads],
        initializer_range=1.5 / width**0.5, bos_token_id=0, eos_token_id=0, **(variant[0] if variant else {}),
    )  # fmt: skip
    model = CompactGPT2LMHeadModel(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    path = tmp_path_factory.mktemp("model")
    model.half().save_pretrained(path)
    return path


class Reference:
    """FP64 logits of the same FP16 weights, and what eager FP16 makes of them."""

    def __init__(self, folder: Path):
        self.exact = load_model(folder, torch.float32).double().to(DEVICE).eval()
        self.eager = load_model(folder, torch.float16).to(DEVICE).eval()

    @torch.inference_mode()
    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        return self.exact(ids.to(DEVICE), use_cache=False).logits

    @torch.inference_mode()
    def allowed(self, ids: torch.Tensor) -> float:
        """Twice the greatest error of eager FP16 on this text."""
        eager = self.eager(ids.to(DEVICE), use_cache=False).logits.double()
        return 2 * float((eager - self.logits(ids)).abs().max())


@pytest.fixture(scope="module")
def reference(folder: Path) -> Reference:
    return Reference(folder)


def tokens(batch: int, length: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def off(got: torch.Tensor, wanted: torch.Tensor) -> float:
    assert torch.isfinite(got).all()
    return float((got.double() - wanted).abs().max())


@pytest.mark.parametrize(("batch", "length"), [(1, 1), (1, 131), (3, 77), (8, 64), (33, 9)])
def test_logits_of_all_positions(folder: Path, reference: Reference, batch: int, length: int) -> None:
    engine = Engine.from_checkpoint(folder, device=DEVICE, max_batch=batch)
    engine.cache.fill_(float("nan"))
    ids = tokens(batch, length)
    assert off(engine.forward(ids), reference.logits(ids)) <= reference.allowed(ids)


@pytest.mark.parametrize("mode", DECODE)
@pytest.mark.parametrize("batch", [1, 2, 5, 8, 9, 32])
def test_prefill_and_decode(folder: Path, reference: Reference, mode: str, batch: int) -> None:
    """Batches on both sides of the matrix-vector limit; what nobody wrote is NaN, in the cache and in the outputs."""
    engine = Engine.from_checkpoint(folder, device=DEVICE, max_batch=batch, decode=mode)
    engine.cache.fill_(float("nan"))
    ids = tokens(batch, 80)
    wanted, allowed = reference.logits(ids), reference.allowed(ids)
    assert off(engine.prefill(ids[:, :61]), wanted[:, 60]) <= allowed
    for t in range(61, 80):
        engine._logits.fill_(float("nan"))
        assert off(engine.decode(ids[:, t]), wanted[:, t]) <= allowed


@pytest.mark.parametrize("mode", DECODE)
def test_ragged_prompts(folder: Path, reference: Reference, mode: str) -> None:
    lengths = [1, 64, 17, 65, 100]
    engine = Engine.from_checkpoint(folder, device=DEVICE, max_batch=5, decode=mode)
    engine.cache.fill_(float("nan"))
    ids, more = tokens(5, 100), tokens(5, 4, seed=2)
    got = [engine.prefill(ids, lengths)] + [engine.decode(more[:, t]).clone() for t in range(4)]
    for b, length in enumerate(lengths):
        alone = torch.cat([ids[b, :length], more[b]])[None]
        wanted, allowed = reference.logits(alone)[0], reference.allowed(alone)
        for step, logits in enumerate(got):
            assert off(logits[b], wanted[length - 1 + step]) <= allowed


@pytest.mark.parametrize("mode", DECODE)
@pytest.mark.parametrize("batch", [1, 6])
def test_greedy_tokens(folder: Path, reference: Reference, mode: str, batch: int) -> None:
    """Each token is the exact model's choice, up to what eager FP16 could confuse; all roads give the same."""
    engine = Engine.from_checkpoint(folder, device=DEVICE, max_batch=batch, decode=mode)
    ids = tokens(batch, 40)
    streamed: list[list[int]] = []
    chosen = torch.tensor(engine.generate(ids, 60, on_tokens=streamed.append))
    assert chosen.T.tolist() == streamed
    text = torch.cat([ids, chosen], 1)
    logits = reference.logits(text[:, :-1])[:, 39:].cpu()
    regret = logits.amax(-1) - logits.gather(-1, chosen[..., None])[..., 0]
    assert regret.max() <= 2 * reference.allowed(text)  # both the chosen and the best may be off
    assert (regret == 0).float().mean() > 0.9
    engine.prefill(ids)
    assert torch.equal(engine.extend(60).cpu().long(), chosen)


def test_sampling_depends_on_seed_and_row_alone(folder: Path) -> None:
    small, large = (Engine.from_checkpoint(folder, device=DEVICE, max_batch=batch) for batch in (2, 4))
    ids = tokens(1, 12).repeat(4, 1)
    how = {"temperature": 1.0, "top_k": 50, "top_p": 0.95}
    first = small.generate(ids[:2], 20, **how, seed=3)
    assert first == small.generate(ids[:2], 20, **how, seed=3) and first[0] != first[1]
    assert first != small.generate(ids[:2], 20, **how, seed=4)
    assert large.generate(ids, 1, **how, seed=3)[:2] == [row[:1] for row in first]


@pytest.mark.parametrize("mode", DECODE)
def test_modes_are_the_same_function(folder: Path, reference: Reference, mode: str) -> None:
    """Twice what eager FP16 errs; and the same run twice gives the same bits."""
    ids, more = tokens(3, 50), tokens(3, 10, seed=9)

    def logits(decode: str) -> torch.Tensor:
        engine = Engine.from_checkpoint(folder, device=DEVICE, max_batch=3, decode=decode)
        engine.prefill(ids)
        return torch.stack([engine.decode(more[:, t]).clone() for t in range(10)])

    first = logits(mode)
    assert torch.equal(first, logits(mode))
    assert off(first, logits("eager").double()) <= reference.allowed(torch.cat([ids, more], 1))


@pytest.fixture(scope="module")
def text() -> torch.Tensor:
    tokenizer = load_tokenizer(ASSETS / "gpt2-mini")
    words = (ASSETS / "wikitext-2" / "test.txt").read_text(encoding="utf-8")[:120_000]
    return torch.tensor(tokenizer(words)["input_ids"])


@pytest.mark.parametrize("pruned", [False, True])
def test_perplexity_is_hugging_faces(tmp_path: Path, text: torch.Tensor, pruned: bool) -> None:
    """On the trained model that ships with this repository; pruned, where Hugging Face has no form, CompactGPT2's."""
    model = load_model(ASSETS / "gpt2-mini", torch.float32)
    if pruned:
        model = slice_heads(model, [[0, 1, 2, 3], [0, 1, 2], [0, 2, 3, 4], [4]])
    model.half().save_pretrained(tmp_path)
    stock: GPT2LMHeadModel | CompactGPT2LMHeadModel = model if pruned else to_gpt2(model)
    hugging_face = TorchEngine(stock, device=DEVICE, precision="fp16")  # type: ignore[arg-type]
    ours = CudaEngine.from_folder(tmp_path, device=DEVICE)
    wanted, got = (
        perplexity(engine, text, context=512, stride=256, text_sha256="", text_share=1.0, progress=False).perplexity
        for engine in (hugging_face, ours)
    )
    assert wanted < 1000  # a trained model's
    assert abs(got - wanted) <= 0.02


def test_errors_name_what_is_wrong(folder: Path) -> None:
    engine = Engine.from_checkpoint(folder, device=DEVICE, max_batch=2, max_context=20)
    with pytest.raises(CudaExtError, match="planned 2"):
        engine.prefill(tokens(3, 4))
    with pytest.raises(CudaExtError, match="context of 20"):
        engine.prefill(tokens(1, 21))
    with pytest.raises(CudaExtError, match="give integers"):
        engine.prefill(torch.zeros(1, 4, device=DEVICE))
    engine.prefill(tokens(2, 19))
    engine.decode(torch.tensor([1, 2]))
    with pytest.raises(CudaExtError, match="context of 20"):
        engine.decode(torch.tensor([1, 2]))
    with pytest.raises(CudaExtError, match="decode is 'fast'"):
        Engine.from_checkpoint(folder, device=DEVICE, decode="fast")
