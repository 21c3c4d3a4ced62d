"""`--engine cuda`, its kernels running on the CPU, against the torch engine on the same FP16 weights."""

import json
from pathlib import Path

import pytest
import torch

from eval.engine import Engine
from eval.errors import UserError
from pipeline.engines import load_engine
from pipeline.model import CompactGPT2Config, CompactGPT2LMHeadModel


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer) -> Path:  # type: ignore[no-untyped-def]
    """A pruned model whose heads the kernels know: 32 wide."""
    torch.manual_seed(2)
    config = CompactGPT2Config(
        vocab_size=len(tiny_tokenizer), n_positions=40, n_embd=64, n_layer=2, n_head=2, head_dim=32,
        kept_heads=[[1], [0, 1]], initializer_range=0.1, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("cuda") / "model"
    CompactGPT2LMHeadModel(config).half().save_pretrained(path)
    tiny_tokenizer.save_pretrained(path)
    return path


def test_it_is_an_engine_and_agrees_with_torch(folder: Path) -> None:
    ours = load_engine("cuda", folder, device="cpu")
    torchs = load_engine("torch", folder, device="cpu", precision="fp16")
    assert isinstance(ours, Engine) and ours.precision == "fp16" and "own kernels" in ours.compute
    ids = torch.randint(1, ours.vocab_size, (3, 20), generator=torch.Generator().manual_seed(0))
    for got, wanted in [
        (ours.logits(ids), torchs.logits(ids)),
        (ours.prefill(ids[:, :15]), torchs.prefill(ids[:, :15])),
        *((ours.decode(ids[:, t]), torchs.decode(ids[:, t])) for t in (15, 16)),
    ]:
        assert got.shape == wanted.shape and got.dtype == torch.float32
        assert (got - wanted).abs().max() < 0.01 * wanted.abs().max()


def test_mistakes(folder: Path, tiny_folder: Path) -> None:
    with pytest.raises(UserError, match="fp16 alone"):
        load_engine("cuda", folder, device="cpu", precision="fp32")
    with pytest.raises(UserError, match="head_dim is 8; the kernels know 32, 64, 128"):
        load_engine("cuda", tiny_folder, device="cpu")
    with pytest.raises(UserError, match="head_dim is 8; the kernels know 32, 64, 128"):  # whatever the machine
        load_engine("cuda", tiny_folder)
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="--engine torch"):
            load_engine("cuda", folder)
    engine = load_engine("cuda", folder, device="cpu")
    with pytest.raises(UserError, match="41 tokens, the model 40 positions"):
        engine.prefill(torch.ones(1, 41, dtype=torch.long))


def test_the_verbs_take_it(folder: Path, cli, tiny_texts: dict[str, Path], tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    text = tmp_path / "text.txt"
    text.write_text(tiny_texts["evaluation"].read_text()[:400])
    scores = {}
    for engine in ("cuda", "torch"):
        code, out, err = cli("evaluate", folder, "--engine", engine, "--device", "cpu", "--text", text, "--json")
        assert code == 0, err
        scores[engine] = json.loads(out)["perplexity"]
    assert scores["cuda"] == pytest.approx(scores["torch"], rel=1e-3)
    words = ["--device", "cpu", "--prompt", "the cat", "--max-new-tokens", "3", "--temperature", "0"]
    written = [cli("generate", folder, "--engine", engine, *words) for engine in ("cuda", "torch")]
    assert written[0][:2] == written[1][:2] and written[0][0] == 0
    code, _, err = cli("evaluate", folder, "--engine", "cuda", "--precision", "int8")
    assert code == 2 and "fp16 alone" in err.splitlines()[-1]
