"""Decoding in one launch, on the CPU: logits, cache and tokens against PyTorch in FP64, step by step.

Whatever the kernel may not read is NaN before it starts: the cache behind each sequence, the workspace, columns
that pad a row of a bias or a LayerNorm to the next tensor.
"""

import ctypes
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from heads import angles_of, kv_head_of, turned
from torch.nn.functional import gelu, layer_norm, linear

from cuda_ext.host_build import host_library
from cuda_ext.sampling import Sampling

SHIM = Path(__file__).parent / "shims" / "persistent.cpp"
SOURCES: list[str | Path] = ["kernels/decode_persistent.cu", SHIM]
NAN, EPSILON, PAD = float("nan"), 1e-5, 7
ALL, COPIES, BARRIERS = range(3)


@dataclass(frozen=True)
class Sizes:
    width: int = 72
    inner: int = 290
    vocabulary: int = 101
    head_dim: int = 32
    readers: tuple[tuple[int, ...], ...] = ((1, 1), (1,))  # of each layer: query heads of each key/value head
    windows: tuple[int, ...] = (0, 0)  # 0: all
    dims: int = 0  # numbers of a head that turn with the position
    capacity: int = 80

    @property
    def ld_width(self) -> int:
        return (self.width + 7) // 8 * 8

    @property
    def ld_inner(self) -> int:
        return (self.inner + 7) // 8 * 8


@dataclass(frozen=True)
class Shape:
    """Of the launch. The default ring is 2 or 3 stages a warp deep: it turns in every phase."""

    blocks: int = 3
    threads: int = 64
    splits: int = 0
    shared_bytes: int = 8 * 1024
    work: int = ALL


class Model:
    """Random FP16 weights as the kernel wants them, and a reference in any dtype over the same numbers."""

    def __init__(self, sizes: Sizes, batch: int, seed: int) -> None:
        self.sizes, self.batch = sizes, batch
        make = torch.Generator().manual_seed(seed)

        def matrix(rows: int, columns: int, scale: float = 1.5) -> torch.Tensor:
            padded = torch.zeros(rows, (columns + 7) // 8 * 8)
            padded[:, :columns] = torch.randn(rows, columns, generator=make) * scale / columns**0.5
            return padded.half()

        def vector(count: int, mean: float = 0.0) -> torch.Tensor:
            return (mean + 0.2 * torch.randn(count, generator=make)).half()

        s = sizes
        self.wte, self.wpe = matrix(s.vocabulary, s.width, 8.0), matrix(s.capacity, s.width, 4.0)
        self.lnf = (vector(s.width, 1.0), vector(s.width))
        self.layers = []
        for readers in s.readers:
            all_heads = sum(readers) * s.head_dim
            qkv_rows = all_heads + 2 * len(readers) * s.head_dim
            shapes = [(qkv_rows, s.width), (s.width, all_heads), (s.inner, s.width), (s.width, s.inner)]
            (qkv, out, fc, proj) = ([matrix(*shape), vector(shape[0])] for shape in shapes)
            norms = [[vector(s.width, 1.0), vector(s.width)] for _ in range(2)]
            self.layers.append([*norms[0], *qkv, *out, *norms[1], *fc, *proj])
        self.caches = [torch.full((2, batch, len(r), s.capacity, s.head_dim), NAN).half() for r in s.readers]
        self.kv_heads = [kv_head_of(list(readers)) for readers in s.readers]
        self.angles = angles_of(s.capacity, s.dims)

    def fill(self, lengths: list[int], seed: int) -> None:
        """A random past of `lengths` keys and values, NaN behind it."""
        make = torch.Generator().manual_seed(seed)
        for cache in self.caches:
            cache.fill_(NAN)
            for b, length in enumerate(lengths):
                past = cache[:, b, :, :length]
                past.copy_(torch.randn(past.shape, generator=make).half())

    def reference(self, tokens: list[int], positions: list[int], caches: list[torch.Tensor], dtype: torch.dtype) -> Any:
        """Logits [batch, vocabulary] of one more token a sequence; `caches` in `dtype` are appended to."""
        s = self.sizes
        wide = [position if position < s.capacity else -1 for position in positions]
        x = (self.wte[tokens].to(dtype) + self.wpe[wide].to(dtype))[:, : s.width]
        for readers, window, layer, cache in zip(s.readers, s.windows, self.layers, caches, strict=True):
            ln1, ln1b, qkv, qkvb, out, outb, ln2, ln2b, fc, fcb, proj, projb = (part.to(dtype) for part in layer)
            norm = layer_norm(x, (s.width,), ln1, ln1b, EPSILON)
            projected = linear(norm, qkv[:, : s.width], qkvb).view(self.batch, -1, s.head_dim)
            q, k, v = projected.split((sum(readers), len(readers), len(readers)), 1)
            q, k = (
                torch.stack([turned(of[b], self.angles, at).to(dtype) for b, at in enumerate(positions)])
                for of in (q, k)
            )
            attention = torch.empty_like(q)
            for b, position in enumerate(positions):
                cache[0, b, :, position], cache[1, b, :, position] = k[b], v[b]
                begin = max(0, position + 1 - window) if window else 0
                repeats = torch.tensor(readers)
                keys, values = cache[:, b, :, begin : position + 1].repeat_interleave(repeats, 1)
                scores = (keys @ q[b, :, :, None])[..., 0] * s.head_dim**-0.5
                attention[b] = (scores.softmax(-1)[:, None] @ values)[:, 0]
            x = x + linear(attention.flatten(1), out, outb)
            norm = layer_norm(x, (s.width,), ln2, ln2b, EPSILON)
            x = x + linear(gelu(linear(norm, fc[:, : s.width], fcb), approximate="tanh"), proj[:, : s.inner], projb)
        x = layer_norm(x, (s.width,), self.lnf[0].to(dtype), self.lnf[1].to(dtype), EPSILON)
        return linear(x, self.wte[:, : s.width].to(dtype)).double()


class Decoder:
    """The kernel with its state: what an engine holds on the device."""

    def __init__(
        self, library: ctypes.CDLL, model: Model, shape: Shape, greedy: bool, stop: tuple[int, ...] = ()
    ) -> None:
        self.library, self.model, self.shape, self.greedy = library, model, shape, greedy
        batch, vocabulary = model.batch, model.sizes.vocabulary
        self.tokens, self.position, self.lengths, self.step, self.finished = torch.zeros(5, batch, dtype=torch.int32)
        self.history = torch.full((batch, 6), -1, dtype=torch.int32)
        self.how = Sampling(stop=stop, pad=PAD).packed()
        self.logits = torch.full((batch, vocabulary + 3), NAN)
        library.hr_test_persistent_workspace.restype = ctypes.c_int64
        library.hr_test_persistent_layer_bytes.restype = ctypes.c_int64
        table_bytes = len(model.layers) * library.hr_test_persistent_layer_bytes()
        self.table = torch.full((table_bytes,), 0xFF, dtype=torch.uint8)  # of layers, as the kernel reads it
        self.stamps: torch.Tensor | None = None
        self.workspace = torch.empty(0, dtype=torch.uint8)
        self.workspace = torch.full((library.hr_test_persistent_workspace(self._numbers()),), 0xFF, dtype=torch.uint8)
        self.workspace[:8] = 0  # the counters

    def start(self, tokens: list[int], lengths: list[int]) -> None:
        self.tokens[:], self.position[:] = torch.tensor(tokens), torch.tensor(lengths)
        self.lengths[:] = self.position + 1

    def run(self, steps: int) -> int:
        code = self.library.hr_test_persistent(self._numbers(), ctypes.c_float(EPSILON), steps)
        if code == 0:
            assert not self.workspace[:8].any()  # ready for the next launch
            assert torch.isnan(self.logits[:, self.model.sizes.vocabulary :]).all()
        return int(code)

    def max_blocks(self) -> int:
        return int(self.library.hr_test_persistent_max_blocks(self._numbers()))

    def _numbers(self) -> Any:
        model, shape, s = self.model, self.shape, self.model.sizes
        numbers = [s.width, s.inner, s.vocabulary, s.capacity]
        numbers += [0 if model.angles is None else model.angles.data_ptr(), s.dims, s.capacity]
        numbers += [s.head_dim, s.ld_width, s.ld_inner]
        numbers += [part.data_ptr() for part in (model.wte, model.wpe, *model.lnf)]
        numbers += [model.batch, s.capacity]
        state = (self.tokens, self.position, self.lengths, self.step, self.finished, self.history)
        numbers += [part.data_ptr() if self.greedy or i < 2 else 0 for i, part in enumerate(state)]
        numbers += [self.history.shape[1], self.how.data_ptr(), self.greedy]
        numbers += [self.logits.data_ptr(), self.logits.shape[1], self.workspace.data_ptr()]
        numbers += [shape.blocks, shape.threads, shape.splits, shape.shared_bytes, shape.work]
        numbers += [0, 0] if self.stamps is None else [self.stamps.data_ptr(), self.stamps.shape[1]]
        numbers += [self.table.data_ptr(), len(model.layers)]
        for readers, window, kv_head, layer, cache in zip(
            s.readers, s.windows, model.kv_heads, model.layers, model.caches, strict=True
        ):
            numbers += [sum(readers), len(readers), 0 if kv_head is None else kv_head.data_ptr(), window]
            numbers += [*(part.data_ptr() for part in layer), cache[0].data_ptr(), cache[1].data_ptr()]
        self._kept = torch.tensor(numbers, dtype=torch.int64)
        return ctypes.c_void_p(self._kept.data_ptr())


def check(
    library: ctypes.CDLL, sizes: Sizes, shape: Shape, batch: int, steps: int = 3, seed: int = 0, past: int = 40
) -> None:
    """Several launches of a token each: logits and cache at most twice eager FP16's error."""
    model = Model(sizes, batch, seed)
    lengths = [max(0, past - 17 * b) for b in range(batch)]
    model.fill(lengths, seed)
    caches = {dtype: [cache.to(dtype) for cache in model.caches] for dtype in (torch.float64, torch.float16)}
    decoder = Decoder(library, model, shape, greedy=False)
    ours = eager = 0.0
    for step in range(steps):
        tokens = [(31 * step + 7 * b + seed) % sizes.vocabulary for b in range(batch)]
        decoder.start(tokens, lengths)
        decoder.logits.fill_(NAN)
        assert decoder.run(1) == 0, library.hr_host_error()
        exact = model.reference(tokens, lengths, caches[torch.float64], torch.float64)
        rough = model.reference(tokens, lengths, caches[torch.float16], torch.float16)
        got = decoder.logits[:, : sizes.vocabulary].double()
        assert torch.isfinite(got).all()
        ours, eager = max(ours, float((got - exact).abs().max())), max(eager, float((rough - exact).abs().max()))
        lengths = [length + 1 for length in lengths]
    assert ours <= 2 * eager
    for mine, exact, rough in zip(model.caches, *caches.values(), strict=True):
        assert torch.equal(mine.isnan(), exact.isnan())  # written where it should be, and nowhere else
        error = (mine.double() - exact).nan_to_num().abs().max()
        assert error <= 2 * (rough.double() - exact).nan_to_num().abs().max()


@pytest.fixture(scope="module", params=[1, 0], ids=["bulk", "cp_async"])
def library(request: pytest.FixtureRequest) -> ctypes.CDLL:
    """Both ways of fetching weights."""
    built = host_library(SOURCES, defines={"HEADROOM_BULK_COPY": request.param})
    built.hr_host_seed(0)
    return built


@pytest.mark.parametrize("blocks", [1, 2, 4])
@pytest.mark.parametrize("batch", [1, 2, 3])
def test_tokens(library: ctypes.CDLL, blocks: int, batch: int) -> None:
    library.hr_host_seed(0)
    check(library, Sizes(), Shape(blocks), batch, seed=blocks)


@pytest.mark.parametrize(
    "sizes",
    [
        Sizes(width=64, inner=256, head_dim=64, vocabulary=50),
        Sizes(width=111, inner=445, head_dim=128, readers=((1,), (1, 1, 1))),
        # Rows of several tiles, and several passes.
        Sizes(width=600, inner=1300, head_dim=32, readers=((1, 1, 1),), windows=(0,)),
        Sizes(dims=32, readers=((2,), (1, 2))),
        Sizes(width=111, head_dim=64, dims=26, readers=((1, 3), (2, 1)), windows=(30, 0)),
        Sizes(head_dim=128, dims=100, windows=(2, 33)),
    ],
    ids=["even", "odd", "long", "rotary and grouped", "uneven groups", "windows"],
)
def test_sizes(library: ctypes.CDLL, sizes: Sizes) -> None:
    library.hr_host_seed(1)
    check(library, sizes, Shape(2, threads=96, shared_bytes=32 * 1024), 4, steps=2)


@pytest.mark.parametrize("splits", [1, 2, 3])
def test_splits_of_the_keys(library: ctypes.CDLL, splits: int) -> None:
    library.hr_host_seed(0)
    check(library, Sizes(), Shape(4, splits=splits), 2, past=70)


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_any_order_of_threads(library: ctypes.CDLL, each_seed: Any, batch: int) -> None:
    """Each batch is a kernel of its own, for 1, 2 and 4 rows."""
    for seed in each_seed(library):
        check(library, Sizes(), Shape(2 + seed // 3), batch, steps=2, seed=seed)


@pytest.mark.slow
@pytest.mark.parametrize(("batch", "threads", "seed"), [(1, 256, 0), (2, 384, 4), (4, 256, 8)])
def test_gpt2s_width(library: ctypes.CDLL, batch: int, threads: int, seed: int) -> None:
    """All of the shared memory, and the engine's own counts of threads."""
    library.hr_host_seed(seed)
    sizes = Sizes(width=768, inner=3072, vocabulary=503, head_dim=64, readers=((1,) * 12, (1,) * 9), capacity=300)
    check(library, sizes, Shape(7, threads=threads, shared_bytes=0), batch, steps=1, past=257, seed=seed)


def test_variants_in_any_order_of_threads(library: ctypes.CDLL, each_seed: Any) -> None:
    sizes = Sizes(dims=26, readers=((2, 1), (1,)), windows=(17, 0))  # three blocks would part a pair of row 149
    for seed in each_seed(library):
        check(library, sizes, Shape(2 + seed % 3), 1 + seed % 3, steps=2, seed=seed)


def test_what_lies_before_a_window_is_not_read(library: ctypes.CDLL) -> None:
    library.hr_host_seed(0)
    model = Model(Sizes(windows=(9, 9)), 2, seed=0)
    lengths = [40, 11]
    model.fill(lengths, seed=0)
    for cache in model.caches:
        for b, length in enumerate(lengths):
            cache[:, b, :, : length + 1 - 9] = NAN
    decoder = Decoder(library, model, Shape(), greedy=False)
    decoder.start([5, 6], lengths)
    assert decoder.run(1) == 0, library.hr_host_error()
    assert torch.isfinite(decoder.logits[:, : model.sizes.vocabulary]).all()


def greedy_reference(model: Model, token: list[int], lengths: list[int], steps: int) -> torch.Tensor:
    """The likeliest tokens [batch, steps], with the margin asserted that makes them unambiguous."""
    caches = [cache.double() for cache in model.caches]
    found = []
    for step in range(steps):
        logits = model.reference(token, [length + step for length in lengths], caches, torch.float64)
        top = logits.topk(2).values
        assert (top[:, 0] - top[:, 1]).min() > 0.05, "too close to call: choose another seed"
        token = logits.argmax(1).tolist()
        found.append(token)
    return torch.tensor(found, dtype=torch.int32).T


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_many_tokens_in_one_launch(library: ctypes.CDLL, batch: int) -> None:
    """Greedy tokens are the reference's; and logits and caches are, bit for bit, those of one launch a token."""
    steps = 4
    results = []
    for launches in ([steps], [1] * steps, [3, 1]):
        for seed in range(3):
            model = Model(Sizes(), batch, seed=3)
            lengths, tokens = [21, 34, 9][:batch], [5, 50, 100][:batch]
            model.fill(lengths, seed=2)
            expected = greedy_reference(model, tokens, lengths, steps)
            library.hr_host_seed(seed)
            decoder = Decoder(library, model, Shape(3), greedy=True)
            decoder.start(tokens, lengths)
            for count in launches:
                assert decoder.run(count) == 0, library.hr_host_error()
            assert torch.equal(decoder.history[:, :steps], expected)
            assert (decoder.history[:, steps:] == -1).all()
            assert torch.equal(decoder.tokens, expected[:, -1])
            assert decoder.position.tolist() == [length + steps for length in lengths]
            assert decoder.lengths.tolist() == [length + steps + 1 for length in lengths]
            assert decoder.step.tolist() == [steps] * batch and not decoder.finished.any()
            results.append([decoder.logits.clone(), *model.caches])
    for other in results[1:]:
        for ours, theirs in zip(results[0], other, strict=True):
            assert torch.equal(ours.nan_to_num(), theirs.nan_to_num())


def test_stop_tokens_and_a_full_cache_end_it(library: ctypes.CDLL) -> None:
    library.hr_host_seed(0)
    model = Model(Sizes(), 2, seed=3)
    lengths, tokens = [21, 77], [5, 50]
    model.fill(lengths, seed=2)
    expected = greedy_reference(model, tokens, lengths, 3).tolist()
    decoder = Decoder(library, model, Shape(3), greedy=True, stop=(expected[0][0],))
    decoder.start(tokens, lengths)
    assert decoder.run(6) == 0, library.hr_host_error()
    assert decoder.history[0].tolist()[:3] == [expected[0][0], PAD, PAD]
    assert decoder.history[1].tolist()[:3] == expected[1]
    assert decoder.finished.all() and decoder.position.tolist() == [22, 79]
    assert decoder.step.tolist() == [3, 3]  # both are over: the launch ends before its six steps


@pytest.mark.parametrize("away", [-1, 40])
def test_ties_go_to_the_lower_token_and_nan_loses(library: ctypes.CDLL, away: int) -> None:
    library.hr_host_seed(0)
    model = Model(Sizes(), 1, seed=3)
    model.fill([21], seed=2)
    winner = int(greedy_reference(model, [5], [21], 1)[0, 0])
    model.wte[winner + away] = model.wte[winner]
    model.wte[2] = NAN
    decoder = Decoder(library, model, Shape(4), greedy=True)
    decoder.start([5], [21])
    assert decoder.run(1) == 0, library.hr_host_error()
    assert decoder.tokens.tolist() == [min(winner, winner + away)]


@pytest.mark.parametrize("work", [COPIES, BARRIERS])
def test_modes_that_measure_overhead(library: ctypes.CDLL, work: int) -> None:
    """They meet the same barriers, and write nothing."""
    library.hr_host_seed(0)
    model = Model(Sizes(), 1, seed=0)
    decoder = Decoder(library, model, Shape(work=work), greedy=True)
    assert decoder.run(3) == 0, library.hr_host_error()
    assert torch.isnan(decoder.logits).all() and (decoder.history == -1).all()
    assert all(torch.isnan(cache).all() for cache in model.caches)


@pytest.mark.parametrize("work", [ALL, BARRIERS])
def test_stamps_are_in_order_and_change_nothing(library: ctypes.CDLL, work: int) -> None:
    """Of each block: its begin, two of each barrier, its end. Nobody leaves a barrier before all have come."""
    steps, barriers = 3, 5 * 2 + 1
    stamps = torch.zeros(3, 2 * steps * barriers + 2 + 5, dtype=torch.int64)
    results = []
    for given in (None, stamps):
        library.hr_host_seed(1)
        model = Model(Sizes(), 1, seed=3)
        model.fill([21], seed=2)
        decoder = Decoder(library, model, Shape(3, work=work), greedy=True)
        decoder.stamps = given
        decoder.start([5], [21])
        assert decoder.run(steps) == 0, library.hr_host_error()
        results.append([decoder.logits, decoder.history, *model.caches])
    for plain, stamped in zip(*results, strict=True):
        assert torch.equal(plain.nan_to_num(), stamped.nan_to_num())
    written = stamps[:, : 2 * steps * barriers + 2]
    assert (written.diff() > 0).all() and (written[:, 0] > 0).all() and not stamps[:, written.shape[1] :].any()
    assert (written[:, 1:-1:2].amax(0) < written[:, 2:-1:2].amin(0)).all()
    decoder.stamps = stamps[:, : written.shape[1] - 1].contiguous()
    assert decoder.run(steps) != 0  # no room


def test_what_does_not_fit_is_refused(library: ctypes.CDLL) -> None:
    library.hr_host_seed(0)
    model = Model(Sizes(), 1, seed=0)
    fits = Shape()
    assert Decoder(library, model, fits, greedy=False).max_blocks() > 0
    wide = Model(replace(Sizes(), width=520), 1, seed=0)
    for decoder in (
        Decoder(library, model, replace(fits, shared_bytes=4096), greedy=False),
        Decoder(library, model, replace(fits, threads=80), greedy=False),
        Decoder(library, model, replace(fits, threads=1024), greedy=False),
        Decoder(library, Model(Sizes(), 5, seed=0), replace(fits, shared_bytes=0), greedy=False),
        Decoder(library, wide, replace(fits, shared_bytes=0), greedy=False),
    ):
        assert decoder.max_blocks() == 0 and decoder.run(1) != 0
    assert Decoder(library, model, fits, greedy=False).run(2) != 0  # nothing would choose the second token
