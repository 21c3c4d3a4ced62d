"""The whole engine, its kernels running on the CPU, against CompactGPT2 in FP32 on the same FP16 weights."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from recorded import by_graphs

from cuda_ext import CheckpointError, CudaExtError, Engine, memory, ops
from cuda_ext.engine import _dependent
from cuda_ext.products import bucket, choose, measuring_bytes
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


def test_trying_ways_to_decode_leaves_what_is_held(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cuda_ext.tuning._ROUNDS", 2)
    ids = torch.randint(2, VOCABULARY, (2, 6))
    plain, tried = (Engine.from_checkpoint(folder, device="cpu", max_batch=2) for _ in range(2))
    calls: list[str] = []

    def clock(run: Callable[[], None], together: int) -> Callable[[], float]:
        def measure() -> float:
            run()
            calls.append(tried._ways[2])
            return 1.0 if tried._ways[2] == "persistent" else 2.0

        return measure

    tried._tuner = Tuner(torch.device("cuda"), tmp_path / "choices", clock)
    tried._tune = lambda rows, head_rows: None  # type: ignore[method-assign]
    for engine in (plain, tried):
        engine.prefill(ids)
    assert torch.allclose(plain.extend(8), tried.extend(8))
    assert set(calls) == {"eager", "persistent"} and tried._ways == {2: "persistent"}


def test_a_persistent_launch_that_was_broken_off_leaves_no_trace(folder: Path) -> None:
    ids = torch.randint(2, VOCABULARY, (1, 6))
    engine = Engine.from_checkpoint(folder, device="cpu", decode="persistent")
    wanted = engine.generate(ids, 5)
    assert engine._persistent is not None
    engine._persistent._workspace[:8] = 3
    assert engine.generate(ids, 5) == wanted


ASKED: list[dict[str, Any]] = [
    {"temperature": 0.9, "seed": 3},
    {"temperature": 0.9, "seed": 2**63 + 3},
    {"temperature": 1.4, "top_k": 5, "seed": 3},
    {"temperature": 1.4, "top_p": 0.6, "seed": 4, "stop": range(40)},
    {"stop": [7, 9]},
    {},
]


def test_one_graph_of_a_batch_serves_every_request(folder: Path) -> None:
    """Temperature, filters, seed and stop tokens are not captured; batches have a graph each."""
    engine = Engine.from_checkpoint(folder, device="cpu", max_batch=2, decode="eager")
    plain = Engine.from_checkpoint(folder, device="cpu", max_batch=2, decode="eager")
    captured = by_graphs(engine)
    ids = torch.randint(2, VOCABULARY, (2, 6))
    drawn = []
    for how in ASKED:
        for batch in (2, 1)[: 1 + (how in ASKED[:2])]:
            got = engine.generate(ids[:batch], 5, **how)
            assert got == plain.generate(ids[:batch], 5, **how), how
            drawn.append(got)
    for _ in range(2):
        logits = [(e.prefill(ids), e.decode(ids[:, 0]))[1].clone() for e in (engine, plain)]
        assert torch.equal(*logits)
    assert sorted(engine._graphs) == [("forward", 2), ("step", 1), ("step", 2)]
    assert len(captured) == 3 and all(graph.launches for graph in captured)
    assert len({str(tokens) for tokens in drawn}) > 5  # the requests do differ


@pytest.mark.parametrize(("decode", "how"), [("eager", ASKED[3]), ("eager", ASKED[4]), ("persistent", ASKED[4])])
def test_stop_tokens_end_a_sequence(folder: Path, decode: str, how: dict[str, Any]) -> None:
    ids = torch.randint(2, VOCABULARY, (2, 6))
    engine = Engine.from_checkpoint(folder, device="cpu", max_batch=2, decode=decode)
    free = engine.generate(ids, 9, **{**how, "stop": ()})
    stop = [free[0][3], *range(VOCABULARY, VOCABULARY + 63)]  # 64 are the most
    for got, all_tokens in zip(engine.generate(ids, 9, **{**how, "stop": stop}), free, strict=True):
        end = all_tokens.index(stop[0]) + 1 if stop[0] in all_tokens else 9
        assert got == all_tokens[:end]


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"temperature": -1.0}, "temperature is -1.0; give 0"),
        ({"temperature": float("nan")}, "temperature is nan; give 0"),
        ({"temperature": float("inf")}, "temperature is inf; give 0"),
        ({"temperature": 1e300}, "temperature is 1e"),
        ({"top_k": -2}, "top_k is -2; give 0"),
        ({"top_p": 0.0}, "top_p is 0.0; give more than 0"),
        ({"top_p": 1.5}, "top_p is 1.5; give more than 0"),
        ({"stop": range(65)}, "65 stop tokens; 64 are the most"),
        ({"stop": ["a"]}, "stop holds 'a', which is no token"),
        ({"lengths": [2.5, 3]}, r"lengths are \[2.5, 3\]; give integers"),
        ({"max_new_tokens": 10**6}, "tokens are over the context of"),
        ({"stop": [2**31]}, "stop holds 2147483648"),
    ],
)
def test_requests_that_cannot_be(folder: Path, how: dict[str, Any], said: str) -> None:
    engine = Engine.from_checkpoint(folder, device="cpu")
    with pytest.raises(CudaExtError, match=said):
        engine.generate(torch.ones(1, 3, dtype=torch.long), **{"max_new_tokens": 2, **how})
    with pytest.raises(CudaExtError, match="nothing to go on from"):  # nothing was read
        engine.extend(1)


def test_requests_at_the_edge(folder: Path) -> None:
    engine = Engine.from_checkpoint(folder, device="cpu")
    ids = torch.ones(1, 3, dtype=torch.long)
    assert engine.generate(ids, 3, stop=[5] * 100) == engine.generate(ids, 3, stop=[5])
    draw = {"temperature": 1.0, "seed": 3}
    assert engine.generate(ids, 3, top_k=10**12, **draw) == engine.generate(ids, 3, **draw)


def test_counts_that_cannot_be(folder: Path) -> None:
    engine = Engine.from_checkpoint(folder, device="cpu", max_context=8)
    with pytest.raises(CudaExtError, match="nothing to go on from"):
        engine.extend(1)
    engine.prefill(torch.ones(1, 3, dtype=torch.long))
    for count in (0, -1):
        with pytest.raises(CudaExtError, match=f"count is {count}; give 1 or more"):
            engine.extend(count)
        with pytest.raises(CudaExtError, match=f"max_new_tokens is {count}; give 1 or more"):
            engine.generate(torch.ones(1, 3, dtype=torch.long), count)
    with pytest.raises(CudaExtError, match="over the context of 8"):
        engine.extend(6)
    assert engine.extend(5).shape == (1, 5)


def test_the_smallest_temperatures_take_the_likeliest_token(folder: Path) -> None:
    engine = Engine.from_checkpoint(folder, device="cpu")
    ids = torch.randint(2, VOCABULARY, (1, 6))
    wanted = engine.generate(ids, 4)
    assert all(engine.generate(ids, 4, temperature=t, top_p=p) == wanted for t, p in ((1e-45, 1.0), (1e-30, 1e-60)))


def test_a_switch_turns_dependent_launches_off(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda:0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert _dependent(gpu, None) and _dependent(gpu, True) and not _dependent(gpu, False)
    assert _dependent(torch.device("cpu"), None) and not _dependent(torch.device("cpu"), False)
    monkeypatch.setenv("HEADROOM_CUDA_DEPENDENT", "0")
    assert not _dependent(gpu, None) and _dependent(gpu, True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert not _dependent(gpu, None)
    with pytest.raises(CudaExtError, match=r"dependent is True, but cuda:0 has no dependent launches"):
        _dependent(gpu, True)


def test_products_are_tuned_for_the_rows_that_they_have(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine.from_checkpoint(folder, device="cpu", max_batch=10)
    tuned: list[tuple[int, int]] = []

    def choose(packed: object, weights: object, rows: int, head_rows: int, *_: object) -> list[object]:
        tuned.append((rows, head_rows))
        return []

    monkeypatch.setattr("cuda_ext.engine.choose", choose)
    engine._tuner.active = True
    engine.forward(torch.ones(2, 20, dtype=torch.long))
    engine.prefill(torch.ones(2, 20, dtype=torch.long))
    engine.prefill(torch.ones(2, 3, dtype=torch.long))
    engine.prefill(torch.ones(10, 3, dtype=torch.long))
    assert tuned == [(64, 64), (64, 0), (32, 16)]


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
    with pytest.raises(CudaExtError, match="max_context is 0; the model's positions end at 96"):
        Engine.from_checkpoint(folder, device="cpu", max_context=0)
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


@pytest.mark.parametrize(("decode", "batch"), [("persistent", 3), ("eager", 9)])
def test_memory_is_what_was_planned(folder: Path, decode: str, batch: int) -> None:
    """All that an engine holds on its device is weights, cache, and what memory.plan counts."""
    engine = Engine.from_checkpoint(folder, device="cpu", max_batch=batch, max_context=40, decode=decode)
    engine.generate(torch.ones(batch, 3, dtype=torch.long), 4)
    holders = [engine, engine._persistent]
    tensors = [
        value for holder in holders if holder for value in vars(holder).values() if isinstance(value, torch.Tensor)
    ]
    own = [tensor for tensor in tensors if tensor is not engine.table and tensor is not engine.weights]
    packed = replace(engine._packed, weights=engine.weights.to("meta"))
    planned = memory.plan(packed, batch, 40, engine.device, persistent=decode == "persistent")
    assert memory.held(own) == engine.cache.nbytes + sum(planned.values())


def test_memory_of_measuring_is_bounded(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In the workspace, if it is large enough, and else in as much memory as is said."""
    engine = Engine.from_checkpoint(folder, device="cpu", max_batch=12)
    seen: list[tuple[int, int]] = []

    def product(a: torch.Tensor, weight: object, bias: object, out: torch.Tensor, *_: Any) -> None:
        storage = a.untyped_storage()
        assert storage.data_ptr() == out.untyped_storage().data_ptr()
        assert a.data_ptr() % 256 == out.data_ptr() % 256 == 0 or storage.data_ptr() % 256
        seen.append((storage.data_ptr(), storage.nbytes()))

    monkeypatch.setattr(ops, "product", product)
    for room in (engine.workspace, engine.workspace[:100].clone()):
        tuner = Tuner(torch.device("cuda"), tmp_path / str(room.numel()), lambda run, together: (run(), lambda: 1.0)[1])
        choose(engine._packed, engine.weights, bucket(12 * CONTEXT), bucket(12), tuner, room)
        if room is engine.workspace:
            assert {place for place, _ in seen} == {room.data_ptr()}
            assert memory.measuring(engine._packed, 12, CONTEXT, engine.device) == 0
            seen.clear()
    assert max(size for _, size in seen) == measuring_bytes(engine._packed, 12 * CONTEXT, 12, "cpu")
