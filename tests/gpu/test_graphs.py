"""Graphs, streams and memory: everything launches on the current stream, and nothing is allocated while decoding."""

from pathlib import Path

import pytest
import torch

from cuda_ext import Engine, ops
from cuda_ext.engine import DECODE
from cuda_ext.sampling import Sampling
from cuda_ext.tuning import by_graphs
from pipeline.model import CompactGPT2Config, CompactGPT2LMHeadModel

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible to torch"),
]
DEVICE = "cuda:0"
VOCABULARY = 521
LONG = 200_000_000  # clock cycles: about a tenth of a second


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(3)
    config = CompactGPT2Config(
        vocab_size=VOCABULARY, n_positions=160, n_embd=192, n_layer=3, n_head=3, head_dim=64,
        kept_heads=[[0, 2], [1], [0, 1, 2]], initializer_range=0.1, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("model")
    CompactGPT2LMHeadModel(config).half().save_pretrained(path)
    return path


def tokens(batch: int, length: int) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("batch", [1, 3, 16])
def test_a_replay_is_the_launches_it_holds(folder: Path, batch: int) -> None:
    ids = tokens(batch, 60)

    def run(mode: str) -> tuple[torch.Tensor, torch.Tensor]:
        engine = Engine.from_checkpoint(folder, device=DEVICE, max_batch=batch, decode=mode)
        engine.prefill(ids[:, :50])
        logits = torch.stack([engine.decode(ids[:, t]).clone() for t in range(50, 60)])
        return logits, engine.extend(30)

    by_graph, by_launches = run("graph"), run("eager")
    assert all(torch.equal(a, b) for a, b in zip(by_graph, by_launches, strict=True))


@pytest.mark.parametrize("mode", DECODE)
def test_one_graph_serves_any_length_and_any_prompt(folder: Path, mode: str) -> None:
    """As an engine of its own for each; batches in turn, so that a graph is met again after others."""
    engine = Engine.from_checkpoint(folder, device=DEVICE, max_batch=4, decode=mode)
    fresh = {}
    for batch, length in ((1, 3), (4, 70), (1, 120), (4, 2)):
        alone = Engine.from_checkpoint(folder, device=DEVICE, max_batch=4, decode=mode)
        alone.prefill(tokens(batch, length))
        fresh[batch, length] = alone.extend(20)
    for _ in range(2):
        for (batch, length), wanted in fresh.items():
            engine.prefill(tokens(batch, length))
            assert torch.equal(engine.extend(20), wanted)


@pytest.mark.parametrize("mode", DECODE)
def test_everything_waits_on_the_current_stream(folder: Path, mode: str) -> None:
    """On a stream held up by a long kernel, tokens that arrive behind it are the ones that are read."""
    engine = Engine.from_checkpoint(folder, device=DEVICE, max_batch=2, decode=mode)
    ids, more = tokens(2, 30).to(DEVICE), tokens(2, 33)[:, 30:].to(DEVICE)
    engine.prefill(ids)
    wanted = torch.stack([engine.decode(more[:, t]).clone() for t in range(3)])
    torch.cuda.synchronize()
    late_ids, late_more = torch.zeros_like(ids), torch.zeros_like(more)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(LONG)
        late_ids.copy_(ids)
        engine.prefill(late_ids)
        torch.cuda._sleep(LONG)
        late_more.copy_(more)
        got = torch.stack([engine.decode(late_more[:, t]).clone() for t in range(3)])
        late_more.zero_()
    side.synchronize()
    assert torch.equal(got, wanted)


def test_decoding_does_not_wait_for_the_device(folder: Path) -> None:
    """`extend` comes back while the stream it launched on is still held up."""
    engine = Engine.from_checkpoint(folder, device=DEVICE)
    engine.prefill(tokens(1, 10))
    engine.extend(5)  # what is captured at first use may wait
    engine.prefill(tokens(1, 10))
    torch.cuda.synchronize()
    held = torch.cuda.Event()
    torch.cuda._sleep(5 * LONG)
    held.record()
    engine.extend(20)
    assert not held.query()
    torch.cuda.synchronize()


@pytest.mark.parametrize("mode", DECODE)
def test_ten_thousand_tokens_take_no_memory(folder: Path, mode: str) -> None:
    engine = Engine.from_checkpoint(folder, device=DEVICE, max_batch=2, decode=mode)

    def hundred() -> None:
        engine.prefill(tokens(2, 20))
        engine.extend(70)
        for _ in range(30):
            engine.decode(torch.tensor([1, 2]))

    for _ in range(3):
        hundred()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated(), torch.cuda.mem_get_info()[0]
    torch.cuda.reset_peak_memory_stats()
    most = None
    for _ in range(100):
        hundred()
        most = most or torch.cuda.max_memory_allocated()
    torch.cuda.synchronize()
    assert (torch.cuda.memory_allocated(), torch.cuda.mem_get_info()[0]) == before
    assert torch.cuda.max_memory_allocated() == most


def test_memory_is_weights_cache_and_little_else(folder: Path) -> None:
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    engine = Engine.from_checkpoint(folder, device=DEVICE, max_batch=4)
    engine.generate(tokens(4, 100), 60)
    torch.cuda.synchronize()
    planned = engine.weights.nbytes + engine.cache.nbytes
    assert torch.cuda.max_memory_allocated() - before <= planned + 64 * 2**20


def sampling(batch: int = 3) -> tuple[torch.Tensor, ...]:
    logits = torch.randn(batch, VOCABULARY, device=DEVICE)
    step, drawn = (torch.zeros(batch, dtype=torch.int32, device=DEVICE) for _ in range(2))
    return logits, Sampling(0.7, 20, 0.9, 5).packed().to(DEVICE), step, drawn


def advancing(batch: int = 3) -> tuple[object, ...]:
    ints = [torch.zeros(batch, dtype=torch.int32, device=DEVICE) for _ in range(5)]
    ints[3] += 1
    history = torch.zeros(batch, 8, dtype=torch.int32, device=DEVICE)
    return *ints, history, Sampling(stop=(7,)).packed().to(DEVICE), 100


@pytest.mark.parametrize("name", ["sample", "advance"])
def test_opcheck(name: str) -> None:
    arguments = sampling() if name == "sample" else advancing()
    torch.library.opcheck(getattr(torch.ops.headroom, name).default, arguments)


def test_an_op_in_a_callers_own_graph() -> None:
    """Captured among torch's kernels on torch's capture stream, and replayed over new inputs."""
    logits, how, step, drawn = sampling()
    ops.sample(logits, how, step, drawn)
    graph = torch.cuda.CUDAGraph()
    step.zero_()
    with torch.cuda.graph(graph):
        scaled = logits * 2
        ops.sample(scaled, how, step, drawn)
    for seed in range(3):
        logits.copy_(torch.randn(logits.shape, generator=torch.Generator().manual_seed(seed)))
        step.zero_()
        graph.replay()
        got = drawn.clone()
        step.zero_()
        ops.sample(logits * 2, how, step, drawn)
        assert torch.equal(got, drawn)


@pytest.mark.parametrize("mode", DECODE)
def test_one_graph_of_a_batch_serves_every_request(folder: Path, mode: str) -> None:
    """Requests that differ in all their parameters draw what an engine of their own does, from two graphs at most."""
    engine = Engine.from_checkpoint(folder, device=DEVICE, max_batch=2, decode=mode)
    for how in ({"temperature": 0.9, "seed": 3}, {"temperature": 1.4, "top_k": 5, "seed": 2**63}, {}, {"stop": [7, 9]}):
        alone = Engine.from_checkpoint(folder, device=DEVICE, max_batch=2, decode=mode)
        wanted = alone.generate(tokens(2, 20), 30, **how)  # type: ignore[arg-type]
        assert engine.generate(tokens(2, 20), 30, **how) == wanted  # type: ignore[arg-type]
    assert len(engine._graphs) <= 1


def test_requests_that_wait_on_a_stream_keep_their_parameters(folder: Path) -> None:
    engine = Engine.from_checkpoint(folder, device=DEVICE, decode="graph")
    asked = [{"temperature": 1.3, "seed": seed} for seed in range(3)]

    def draw() -> list[torch.Tensor]:
        drawn = []
        for how in asked:
            engine.prefill(tokens(1, 9))
            drawn.append(engine.extend(12, **how))  # type: ignore[arg-type]
        return drawn

    wanted = draw()
    torch.cuda.synchronize()
    torch.cuda._sleep(LONG)  # the host is far ahead
    assert all(torch.equal(a, b) for a, b in zip(draw(), wanted, strict=True))
    assert not torch.equal(wanted[0], wanted[1])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
@pytest.mark.parametrize("mode", DECODE)
def test_another_device_than_the_current_one(folder: Path, mode: str) -> None:
    ids, found = tokens(2, 30), []
    for device in ("cuda:0", "cuda:1"):
        engine = Engine.from_checkpoint(folder, device=device, max_batch=2, decode=mode)
        found.append(engine.generate(ids, 40))
        assert torch.cuda.current_device() == 0
    assert found[0] == found[1]


def test_the_tuner_times_the_device_and_not_the_host() -> None:
    """A kernel of known length, however long the host takes to ask for it."""

    def short() -> None:
        for _ in range(20_000):
            pass
        torch.cuda._sleep(10_000)

    a, b = (by_graphs(lambda n=n: torch.cuda._sleep(n), 20)() for n in (10_000, 40_000))
    assert 2 < b / a < 6 and by_graphs(short, 20)() < 2 * a
