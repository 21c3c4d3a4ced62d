"""The whole engine, its kernels running on the CPU, against CompactGPT2 in FP32 on the same FP16 weights."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cuda_ext import CheckpointError, CudaExtError, Engine
from cuda_ext.tuning import Tuner
from pipeline.checkpoint import load_model
from pipeline.model import CompactGPT2Config, CompactGPT2LMHeadModel

VOCABULARY, CONTEXT = 101, 96


@pytest.fixture(scope="module", params=[(72, 32, 290), (64, 64, 256)], ids=["odd", "even"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny pruned model: uneven heads, and once a width and an inner width that no vector divides."""
    width, head_dim, inner = request.param
    torch.manual_seed(1)
    config = CompactGPT2Config(
        vocab_size=VOCABULARY, n_positions=CONTEXT, n_embd=width, n_layer=3, n_head=4, head_dim=head_dim, n_inner=inner,
        kept_heads=[[0, 2], [3], [0, 1, 2]], initializer_range=0.15, bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    model = CompactGPT2LMHeadModel(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    path = tmp_path_factory.mktemp("model")
    model.half().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def reference(folder: Path) -> CompactGPT2LMHeadModel:
    return load_model(folder, torch.float32).eval()


def close(got: torch.Tensor, wanted: torch.Tensor, folder: Path, input_ids: torch.Tensor) -> None:
    """At most twice the error of eager FP16."""
    with torch.inference_mode():
        eager = load_model(folder, torch.float16).eval()(input_ids).logits.float()
    eager_error = (eager - load_model(folder, torch.float32).eval()(input_ids).logits).abs().max()
    assert (got - wanted).abs().max() <= 2 * eager_error


def test_forward(folder: Path, reference: CompactGPT2LMHeadModel) -> None:
    engine = Engine.from_checkpoint(folder, device="cpu", max_batch=2)
    ids = torch.randint(0, VOCABULARY, (2, 70))
    with torch.inference_mode():
        close(engine.forward(ids), reference(ids).logits, folder, ids)


@pytest.mark.parametrize(
    ("batch", "decode"), [(1, "auto"), (3, "eager"), (9, "eager"), (1, "persistent"), (3, "persistent")]
)
def test_prefill_and_decode(folder: Path, reference: CompactGPT2LMHeadModel, batch: int, decode: str) -> None:
    """Nine sequences take the path of matrix products, fewer that of matrix-vector products."""
    engine = Engine.from_checkpoint(folder, device="cpu", max_batch=batch, decode=decode)
    engine.cache.fill_(float("nan"))  # nothing that was not written may be read
    ids = torch.randint(0, VOCABULARY, (batch, 12))
    with torch.inference_mode():
        wanted = reference(ids).logits
    close(engine.prefill(ids[:, :9]), wanted[:, 8], folder, ids)
    for t in (9, 10, 11):
        close(engine.decode(ids[:, t]), wanted[:, t], folder, ids)


@pytest.fixture(scope="module", params=[(96, 384), (111, 450)], ids=["even", "odd"])
def long(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 300 positions, whose decoding spreads the keys of a head over four blocks."""
    width, inner = request.param
    torch.manual_seed(2)
    config = CompactGPT2Config(
        vocab_size=VOCABULARY, n_positions=300, n_embd=width, n_layer=2, n_head=3, head_dim=32, n_inner=inner,
        kept_heads=[[0, 2], [1]], initializer_range=0.1,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("long")
    CompactGPT2LMHeadModel(config).half().save_pretrained(path)
    return path


@pytest.mark.parametrize(
    ("batch", "decode", "prompt"),
    [(1, "eager", 250), (1, "persistent", 250), (4, "persistent", 66), (5, "eager", 127), (8, "eager", 64),
     (9, "eager", 129)],
)  # fmt: skip
def test_decoding_behind_a_long_prompt(long: Path, batch: int, decode: str, prompt: int) -> None:
    """Prefill and decode lay one workspace out each its own way: nothing that one left may matter to the other."""
    engine = Engine.from_checkpoint(long, device="cpu", max_batch=batch, decode=decode)
    ids = torch.randint(0, VOCABULARY, (batch, prompt + 3), generator=torch.Generator().manual_seed(prompt))
    with torch.inference_mode():
        wanted = load_model(long, torch.float32)(ids).logits
    for step in range(4):
        engine.workspace.fill_(0xFF)  # NaN, in FP16 as in FP32
        got = engine.decode(ids[:, prompt + step - 1]) if step else engine.prefill(ids[:, :prompt])
        close(got, wanted[:, prompt + step - 1], long, ids)


def test_a_decode_that_was_broken_off_leaves_no_trace(long: Path) -> None:
    engine = Engine.from_checkpoint(long, device="cpu", decode="eager")
    ids = torch.randint(0, VOCABULARY, (1, 140))
    engine.prefill(ids[:, :139])
    wanted = engine.decode(ids[:, 139]).clone()
    engine._counters.fill_(3)
    engine.prefill(ids[:, :139])
    assert torch.equal(engine.decode(ids[:, 139]), wanted)


def test_prompts_in_chunks_and_of_unequal_lengths(folder: Path, reference: CompactGPT2LMHeadModel) -> None:
    engine = Engine.from_checkpoint(folder, device="cpu", max_batch=3)
    engine._chunk = 5
    lengths = [3, 12, 10]
    ids = torch.randint(0, VOCABULARY, (3, 12))
    got = engine.prefill(ids, lengths)
    more = engine.decode(torch.tensor([4, 5, 6]))
    for b, length in enumerate(lengths):
        alone = torch.cat([ids[b, :length], torch.tensor([4 + b])])[None]
        with torch.inference_mode():
            wanted = reference(alone).logits[0]
        close(got[b], wanted[-2], folder, alone)
        close(more[b], wanted[-1], folder, alone)
    whole, in_chunks = Engine.from_checkpoint(folder, device="cpu", max_batch=3).forward(ids), engine.forward(ids)
    assert torch.allclose(whole, in_chunks, atol=2e-2)


@pytest.mark.parametrize("decode", ["eager", "persistent"])
def test_greedy_tokens_are_the_references(folder: Path, reference: CompactGPT2LMHeadModel, decode: str) -> None:
    engine = Engine.from_checkpoint(folder, device="cpu", max_batch=2, decode=decode)
    ids = torch.randint(2, VOCABULARY, (2, 6))
    with torch.inference_mode():
        wanted = reference.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)[:, 6:]
    streamed: list[list[int]] = []
    got = engine.generate(ids, 12, on_tokens=streamed.append)
    assert got == wanted.tolist() == torch.tensor(streamed).T.tolist()
    stop = got[0][4]
    cut = engine.generate(ids, 12, stop=[stop])
    assert cut == [row[: row.index(stop) + 1] if stop in row else row for row in got]


@pytest.mark.parametrize("decode", ["eager", "persistent"])
def test_extend_goes_on_from_what_is_held(folder: Path, decode: str) -> None:
    engine = Engine.from_checkpoint(folder, device="cpu", max_batch=2, decode=decode)
    ids = torch.randint(2, VOCABULARY, (2, 6))
    wanted = engine.generate(ids, 9)
    with pytest.raises(CudaExtError, match="prefill first"):
        engine.extend(1)
    engine.prefill(ids)
    first = engine.extend(3)
    engine.decode(torch.tensor([row[3] for row in wanted]))
    assert torch.cat([first, engine.extend(5)], 1).tolist() == [row[:3] + row[4:] for row in wanted]


@pytest.mark.parametrize("decode", ["eager", "persistent"])
def test_a_seed_draws_the_same_tokens_again(folder: Path, decode: str) -> None:
    engine = Engine.from_checkpoint(folder, device="cpu", max_batch=2, decode=decode)
    ids = torch.randint(0, VOCABULARY, (1, 4)).repeat(2, 1)
    first = engine.generate(ids, 8, temperature=1.0, top_k=40, top_p=0.9, seed=3)
    assert first == engine.generate(ids, 8, temperature=1.0, top_k=40, top_p=0.9, seed=3)
    assert first[0] != first[1] and first != engine.generate(ids, 8, temperature=1.0, top_k=40, top_p=0.9, seed=4)


def test_trying_ways_to_decode_leaves_what_is_held(folder: Path, tmp_path: Path) -> None:
    ids = torch.randint(2, VOCABULARY, (2, 6))
    plain, tried = (Engine.from_checkpoint(folder, device="cpu", max_batch=2) for _ in range(2))
    calls: list[str] = []

    def clock(run: Callable[[], None], count: int) -> float:
        run()
        calls.append(tried._ways[2])
        return 1.0 if tried._ways[2] == "persistent" else 2.0

    tried._tuner = Tuner(torch.device("cuda"), tmp_path / "choices", clock)
    tried._tune = lambda rows, head_rows: None  # type: ignore[method-assign]
    for engine in (plain, tried):
        engine.prefill(ids)
    assert torch.allclose(plain.extend(8), tried.extend(8))
    assert set(calls) == {"eager", "persistent"} and tried._ways == {2: "persistent"}


def test_mistakes_are_one_sentence(folder: Path) -> None:
    engine = Engine.from_checkpoint(folder, device="cpu", max_context=8)
    with pytest.raises(CudaExtError, match="over the planned 1"):
        engine.forward(torch.zeros(2, 3, dtype=torch.long))
    with pytest.raises(CudaExtError, match="9 tokens are over the context of 8"):
        engine.prefill(torch.zeros(1, 9, dtype=torch.long))
    with pytest.raises(CudaExtError, match=r"outside 0\.\.100"):
        engine.prefill(torch.full((1, 2), 101))
    with pytest.raises(CudaExtError, match="give integers"):
        engine.prefill(torch.zeros(1, 2))
    engine.prefill(torch.zeros(1, 8, dtype=torch.long))
    with pytest.raises(CudaExtError, match="context of 8"):
        engine.decode(torch.zeros(1, dtype=torch.long))
    with pytest.raises(CudaExtError, match="max_context is 97"):
        Engine.from_checkpoint(folder, device="cpu", max_context=97)
    with pytest.raises(CudaExtError, match="decode is 'fast'; give one of auto, graph, persistent, eager"):
        Engine.from_checkpoint(folder, device="cpu", decode="fast")
    if not torch.cuda.is_available():
        with pytest.raises(CudaExtError, match="cannot run"):
            Engine.from_checkpoint(folder)


def test_damaged_checkpoints(folder: Path, tmp_path: Path) -> None:
    def copy(name: str) -> Path:
        path = tmp_path / name
        path.mkdir()
        for file in folder.iterdir():
            (path / file.name).write_bytes(file.read_bytes())
        return path

    cut = copy("cut")
    weights = cut / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    heads = copy("heads")
    config = (heads / "config.json").read_text()
    changed = json.loads(config)
    changed["kept_heads"][1] = [0, 1]
    (heads / "config.json").write_text(json.dumps(changed))
    kind = copy("kind")
    (kind / "config.json").write_text(json.dumps(changed | {"model_type": "llama"}))
    for path, said in [
        (cut, "damaged"),
        (heads, "h.1.attn.c_attn.weight is "),
        (kind, "llama"),
        (tmp_path, "config.json"),
    ]:
        with pytest.raises(CheckpointError, match=said):
            Engine.from_checkpoint(path, device="cpu")
