"""The torch engine on a GPU: as exact as eager FP16 can be, and its memory told."""

import sys
from pathlib import Path

import pytest
import torch
from transformers import GPT2LMHeadModel

from eval.engine import Engine
from eval.memory import memory_in_fresh_process
from pipeline.engines.torch import TorchEngine
from pipeline.model import from_gpt2, slice_heads

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible to torch"),
]
DEVICE = "cuda:0"


@pytest.fixture
def gpt2(make_gpt2) -> GPT2LMHeadModel:
    """Wide enough for rounding to matter, with odd sizes."""
    return make_gpt2(7, n_embd=320, n_head=5, n_layer=4, n_positions=131)


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(1, 269, (3, 113), generator=torch.Generator().manual_seed(8))


@torch.no_grad()
def test_fp16_is_as_exact_as_eager_fp16(gpt2: GPT2LMHeadModel, ids: torch.Tensor) -> None:
    for parameter in gpt2.parameters():  # both start from the same FP16 weights
        parameter.copy_(parameter.half().float())
    exact = gpt2.double()(ids).logits.float()
    engine = TorchEngine(from_gpt2(gpt2.float()), device=DEVICE, precision="fp16")
    assert isinstance(engine, Engine) and engine.model.dtype == torch.float16
    assert engine.compute == "FP16 weights, FP16 arithmetic, eager, SDPA"
    logits = engine.logits(ids)
    assert logits.device.type == "cuda" and logits.dtype == torch.float32
    gpt2.set_attn_implementation("eager")
    plain = gpt2.half().to(DEVICE)(ids.to(DEVICE)).logits.float().cpu()
    allowed = 2 * (plain - exact).abs()
    error = (logits.cpu() - exact).abs()
    assert error.max() <= allowed.max() and error.mean() <= allowed.mean()


@torch.no_grad()
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-3), ("fp16", 2e-2), ("bf16", 2e-1)])
@pytest.mark.parametrize("pruned", [False, True])
def test_decode_is_the_full_forward(
    precision: str, tolerance: float, pruned: bool, gpt2: GPT2LMHeadModel, ids: torch.Tensor
) -> None:
    model = from_gpt2(gpt2)
    if pruned:
        model = slice_heads(model, [[0, 3], [4], [0, 1, 2, 3, 4], [1, 2, 3]])
    engine = TorchEngine(model, device=DEVICE, precision=precision)
    full = engine.logits(ids)
    scale = full.abs().max()
    steps = [engine.prefill(ids[:, :101])] + [engine.decode(ids[:, position]) for position in range(101, 113)]
    engine.synchronize()
    for logits, wanted in zip(steps, full[:, 100:].unbind(1), strict=True):
        assert (logits - wanted).abs().max() <= tolerance * scale


def test_the_memory_probe_tells_of_the_gpu(tiny_folder: Path) -> None:
    command = [sys.executable, "-m", "pipeline", "probe", str(tiny_folder), "--device", DEVICE, "--precision", "fp16"]
    memory = memory_in_fresh_process([*command, "--prompt-tokens", "8", "--new-tokens", "4"], timeout=300)
    weights = sum(path.stat().st_size for path in tiny_folder.glob("*.safetensors")) // 2
    assert memory.gpu_allocator_peak is not None and memory.gpu_allocator_peak > weights
    # The driver's number has the CUDA context in it; some containers hide it.
    assert memory.gpu_process is None or memory.gpu_process > memory.gpu_allocator_peak
    assert 0 < memory.baseline_rss <= memory.peak_rss
