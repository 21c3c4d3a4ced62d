"""The torch engine against the model it runs, and Hugging Face's."""

import contextlib
import re
from pathlib import Path

import pytest
import torch
from transformers import GPT2LMHeadModel

from eval.engine import Engine
from eval.errors import UserError
from pipeline.checkpoint import load_model, save_model
from pipeline.engines import ENGINES, default_engine, load_engine
from pipeline.engines.torch import TorchEngine
from pipeline.model import CompactGPT2Config, CompactGPT2LMHeadModel, slice_heads
from pipeline.openvino_export import export_openvino


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(1, 269, (3, 29), generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("pruned", [False, True])
def test_prefill_and_decode_are_the_full_forward(
    pruned: bool, tiny_gpt2: GPT2LMHeadModel, tiny_model: CompactGPT2LMHeadModel, ids: torch.Tensor
) -> None:
    model = slice_heads(tiny_model, [[0, 3], [4], [0, 1, 2, 3, 4]]) if pruned else tiny_model
    engine = TorchEngine(model)
    assert isinstance(engine, Engine)
    with torch.no_grad():
        full = model(ids).logits if pruned else tiny_gpt2(ids).logits
    torch.testing.assert_close(engine.logits(ids), full, atol=1e-5, rtol=1e-5)
    for start in (1, 17):  # the second prefill forgets the first one's past
        torch.testing.assert_close(engine.prefill(ids[:, :start]), full[:, start - 1], atol=1e-5, rtol=1e-5)
        for position in range(start, 29):
            logits = engine.decode(ids[:, position])
            torch.testing.assert_close(logits, full[:, position], atol=1e-5, rtol=1e-5)
    engine.synchronize()


def test_fp16_weights_on_a_cpu_are_rounded_and_computed_in_fp32(
    tiny_model: CompactGPT2LMHeadModel, ids: torch.Tensor
) -> None:
    with torch.no_grad():
        exact = tiny_model(ids).logits
        for parameter in tiny_model.parameters():
            parameter.copy_(parameter.half().float())
        rounded = tiny_model(ids).logits
    engine = TorchEngine(tiny_model, precision="fp16")
    assert engine.model.dtype == torch.float32
    assert engine.compute.startswith("FP16 weights, FP32 arithmetic, eager, SDPA, ")
    torch.testing.assert_close(engine.logits(ids), rounded, atol=1e-6, rtol=1e-6)
    assert (engine.logits(ids) - exact).abs().max() > 1e-4


def test_bf16_computes_in_bf16(tiny_model: CompactGPT2LMHeadModel, ids: torch.Tensor) -> None:
    with torch.no_grad():
        exact = tiny_model(ids).logits
    engine = TorchEngine(tiny_model, precision="bf16")
    logits = engine.logits(ids)
    assert engine.compute.startswith("BF16 weights, BF16 arithmetic") and logits.dtype == torch.float32
    assert 0 < (logits - exact).abs().max() < 0.2 * exact.abs().max()


def test_the_context_is_the_limit(tiny_model: CompactGPT2LMHeadModel) -> None:
    engine = TorchEngine(tiny_model)
    assert (engine.context, engine.vocab_size) == (67, 269)
    engine.prefill(torch.ones(1, 67, dtype=torch.long))
    with pytest.raises(UserError, match="the text has 68 tokens, the model 67 positions; give a shorter one"):
        engine.decode(torch.tensor([1]))
    with pytest.raises(UserError, match="the text has 68 tokens, the model 67 positions; give a shorter one"):
        engine.prefill(torch.ones(1, 68, dtype=torch.long))


def test_a_folder_runs_at_the_precision_it_holds(tiny_folder: Path, tiny_tokenizer, tmp_path: Path) -> None:
    save_model(load_model(tiny_folder).half(), tiny_tokenizer, tmp_path / "half")
    assert TorchEngine.from_folder(tiny_folder, device="cpu").precision == "fp32"
    assert TorchEngine.from_folder(tmp_path / "half", device="cpu").precision == "fp16"
    assert TorchEngine.from_folder(tmp_path / "half", device="cpu", precision="fp32").precision == "fp32"
    assert default_engine(tmp_path / "half") == "torch"
    assert load_engine("torch", tiny_folder, device="cpu", precision="bf16").precision == "bf16"


def test_every_engine_refuses_in_the_same_words(tiny_tokenizer, tmp_path: Path) -> None:
    """As the model does, which has no engine around it; then each goes on working."""
    vocab = len(tiny_tokenizer)
    config = CompactGPT2Config(
        vocab_size=vocab, n_positions=24, n_embd=64, n_layer=1, n_head=2, head_dim=32, bos_token_id=0, eos_token_id=0
    )
    model = CompactGPT2LMHeadModel(config)
    save_model(model.half(), tiny_tokenizer, tmp_path)
    engines = [load_engine(name, tmp_path, device="cpu") for name in ("torch", "cuda")]
    with contextlib.suppress(UserError):  # where openvino is not installed
        engines.append(load_engine("openvino", export_openvino(model, tmp_path / "ir")))
    ids = torch.ones(2, 25, dtype=torch.int64)
    words = "the text has 25 tokens, the model 24 positions; give a shorter one"
    for call in (model, model.transformer, lambda ids: model.generate(ids[:, :9], max_new_tokens=17, eos_token_id=-1)):
        with pytest.raises(ValueError, match=f"^{words}$"):
            call(ids)
    empty = "the tokens have shape [2, 0]; give [batch, length], one or more each"
    for engine in engines:
        for method, given, said in (
            ("logits", ids, words),
            ("prefill", ids, words),
            ("decode", ids[:, 0], "decode got tokens of shape [2] for 0 sequences; prefill first"),
            ("prefill", ids[:, :24], None),
            ("decode", ids[:, 0], words),
            ("decode", ids[:1, 0], "decode got tokens of shape [1] for 2 sequences; prefill first"),
            ("logits", ids[:, :0], empty),
            ("logits", ids[0], empty.replace("[2, 0]", "[25]")),
            ("logits", ids[:, :3].float(), "the tokens are torch.float32; give integers"),
            ("logits", ids[:, :3] * vocab, f"token {vocab} is none of the model's {vocab}; "),
            ("prefill", ids[:, :3] - 2, f"token -1 is none of the model's {vocab}; give the model's own tokenizer"),
        ):
            if said is None:
                getattr(engine, method)(given)
                continue
            with pytest.raises(UserError) as refused:
                getattr(engine, method)(given)
            assert str(refused.value).startswith(said), (engine.name, method)
        assert engine.prefill(ids[:, :23]).shape == engine.decode(ids[:, 0]).shape == (2, vocab)


@pytest.mark.parametrize(
    ("engine", "choices", "said"),
    [
        ("torch", {"precision": "int8"}, "precision 'int8'; give one of fp32, fp16, bf16"),
        ("onnx", {}, f"'onnx': unknown; give one of {', '.join(ENGINES)}"),
        ("openvino", {"device": "cuda:0"}, "runs on the CPU here; leave out the device cuda:0"),
    ],
)
def test_what_an_engine_cannot_do(tiny_folder: Path, engine: str, choices: dict[str, str], said: str) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        load_engine(engine, tiny_folder, **choices)


@pytest.mark.parametrize("device", ["cuda:0", "cuda", "tpu", "cuda:99"])
def test_a_device_that_is_not_there(tiny_folder: Path, device: str) -> None:
    if device in ("cuda:0", "cuda") and torch.cuda.is_available():
        pytest.skip("this machine has that device")
    with pytest.raises(UserError, match=f"device {device}"):
        load_engine("torch", tiny_folder, device=device)
