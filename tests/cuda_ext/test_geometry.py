"""The engine at the geometry of real use: every length up to 1,024; shapes, batches and calls that hypothesis draws.

The reference is CompactGPT2 in FP32 on the same FP16 weights, which reads each text anew. Between any two calls
everything that the engine does not promise to keep is poisoned: see `poison`.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from cuda_ext import Engine
from pipeline.checkpoint import load_model
from pipeline.model import CompactGPT2Config, CompactGPT2LMHeadModel

MODES = ("eager", "graph", "persistent")
MOST_LENGTHS = 1024


@dataclass(frozen=True)
class Geometry:
    """A model's sizes, and an engine's."""

    width: int = 40
    head_dim: int = 32
    heads: tuple[int, ...] = (1,)
    inner: int = 52
    vocabulary: int = 37
    positions: int = MOST_LENGTHS
    groups: int | None = None  # key/value heads of a layer that is whole
    rope_share: float | None = None  # None: learned positions
    windows: tuple[int | None, ...] | None = None
    max_batch: int = 1
    max_context: int | None = None
    decode: str = "eager"

    @property
    def context(self) -> int:
        return self.max_context or self.positions

    def save(self, folder: Path) -> Path:
        config = CompactGPT2Config(
            vocab_size=self.vocabulary, n_positions=self.positions, n_embd=self.width, n_layer=len(self.heads),
            n_head=max(self.heads), head_dim=self.head_dim, n_inner=self.inner,
            # The last heads, so that a head's number is not its place.
            kept_heads=[list(range(max(self.heads) - heads, max(self.heads))) for heads in self.heads],
            n_kv_head=self.groups, window=None if self.windows is None else list(self.windows),
            position="learned" if self.rope_share is None else "rope", rope_share=self.rope_share or 1.0,
            initializer_range=0.15, bos_token_id=1, eos_token_id=1,
        )  # fmt: skip
        torch.manual_seed(self.width)
        model = CompactGPT2LMHeadModel(config).eval()
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.1)
        model.half().save_pretrained(folder)
        return folder


class Session:
    """An engine and the texts that it should hold; each call is followed by a comparison with the reference."""

    def __init__(self, geometry: Geometry, folder: Path) -> None:
        self.geometry = geometry
        self.models = {kind: load_model(folder, kind).eval() for kind in (torch.float32, torch.float16)}
        self.engine = Engine.from_checkpoint(
            folder, device="cpu", max_batch=geometry.max_batch, max_context=geometry.max_context, decode=geometry.decode
        )
        self.texts: list[list[int]] = []

    @property
    def room(self) -> int:
        """Tokens that the longest text may still get."""
        return self.geometry.context - max(map(len, self.texts), default=0)

    def read(self, texts: list[list[int]], kind: torch.dtype) -> torch.Tensor:
        """Logits FP32 [batch, length, vocabulary] of texts padded on the right."""
        padded = torch.zeros(len(texts), max(map(len, texts)), dtype=torch.long)
        for row, text in zip(padded, texts, strict=True):
            row[: len(text)] = torch.tensor(text)
        with torch.inference_mode():
            return self.models[kind](padded).logits.float()

    def bound(self, texts: list[list[int]], exact: torch.Tensor) -> float:
        """Twice the greatest error of eager FP16 on these texts."""
        rough = self.read(texts, torch.float16)
        return 2 * max(float((rough[b, : len(t)] - exact[b, : len(t)]).abs().max()) for b, t in enumerate(texts))

    def same(self, got: torch.Tensor, texts: list[list[int]]) -> None:
        """`got` [batch, vocabulary]: logits at the texts' ends."""
        exact = self.read(texts, torch.float32)
        ends = torch.stack([exact[b, len(text) - 1] for b, text in enumerate(texts)])
        error = (got - ends).abs().max()  # NaN where any is NaN, and then not at most anything
        assert error <= self.bound(texts, exact), f"{self.geometry}, lengths {[len(text) for text in texts]}"

    def prefill(self, texts: list[list[int]]) -> None:
        self.poison(held=False)
        padded = torch.full((len(texts), max(map(len, texts))), 1)
        for row, text in zip(padded, texts, strict=True):
            row[: len(text)] = torch.tensor(text)
        self.texts = [list(text) for text in texts]
        self.same(self.engine.prefill(padded, [len(text) for text in texts]), self.texts)

    def decode(self, tokens: list[int]) -> None:
        self.poison()
        for text, token in zip(self.texts, tokens, strict=True):
            text.append(token)
        self.same(self.engine.decode(torch.tensor(tokens)), self.texts)

    def extend(self, count: int, temperature: float = 0.0, top_k: int = 0, seed: int = 0) -> None:
        self.poison()
        drawn = self.engine.extend(count, temperature=temperature, top_k=top_k, seed=seed).tolist()
        assert all(len(row) == count for row in drawn)
        before = [len(text) for text in self.texts]
        for text, row in zip(self.texts, drawn, strict=True):
            text += row
        self.drawn(before, self.texts, top_k=top_k if temperature else 1)

    def generate(self, texts: list[list[int]], count: int, stop: list[int]) -> None:
        self.poison(held=False)
        padded = torch.full((len(texts), max(map(len, texts))), 1)
        for row, text in zip(padded, texts, strict=True):
            row[: len(text)] = torch.tensor(text)
        new = self.engine.generate(padded, count, lengths=[len(text) for text in texts], stop=stop)
        for row in new:
            assert len(row) == count or row[-1] in stop
            assert not set(row[:-1]) & set(stop)
        self.drawn([len(t) for t in texts], [text + row for text, row in zip(texts, new, strict=True)], top_k=1)
        self.texts = []

    def forward(self, texts: list[list[int]]) -> None:
        """Texts of one length: the logits of all positions."""
        self.poison(held=False)
        self.texts = []
        got, exact = self.engine.forward(torch.tensor(texts)), self.read(texts, torch.float32)
        assert (got - exact).abs().max() <= self.bound(texts, exact)
        self.engine.reset()

    def drawn(self, before: list[int], texts: list[list[int]], top_k: int) -> None:
        """Each token behind the first `before` is one of the `top_k` likeliest, as far as rounding tells them apart."""
        read = [text[:-1] for text in texts]  # the last one may be past the model's positions
        exact = self.read(read, torch.float32)
        slack = 2 * self.bound(read, exact)
        for b, text in enumerate(texts):
            for at in range(before[b], len(text)):
                logits = exact[b, at - 1]
                least = logits.topk(min(top_k or len(logits), len(logits))).values[-1]
                assert logits[text[at]] >= least - slack, f"{self.geometry}, sequence {b}, place {at}"

    def poison(self, held: bool = True) -> None:
        """NaN, or a number that would be seen, in all that the engine has not promised to keep.

        It keeps weights, the cached keys and values of what it holds, as far as the next token sees them, the state of
        these sequences, and the logits that it is drawn from. Not its workspaces, rows past the batch, nor the cache
        behind each sequence's end.
        """
        engine, batch = self.engine, len(self.texts) if held else 0
        engine.workspace.fill_(0xFF)
        if engine._persistent is not None:
            engine._persistent._workspace[8:].fill_(0xFF)  # counters come first
        engine._logits[batch:] = float("nan")
        for tensor in (
            engine._tokens,
            engine._position,
            engine._lengths,
            engine._drawn,
            engine._finished,
            engine._history,
        ):
            tensor[batch:] = -(2**30)
        at = 0
        for heads, window in zip(engine.shape.kv_heads, engine.shape.windows, strict=True):
            shape = (2, engine.max_batch, heads, engine.context, engine.shape.head_dim)
            cache = engine.cache[at : at + torch.Size(shape).numel()].view(shape)
            at += cache.numel()
            for b in range(engine.max_batch):
                length = len(self.texts[b]) if b < batch else 0
                cache[:, b, :, length:] = float("nan")
                if window:  # the next token sees the last window - 1, and itself
                    cache[:, b, :, : max(0, length + 1 - window)] = float("nan")


def text_of(length: int, vocabulary: int, seed: int) -> list[int]:
    return torch.randint(0, vocabulary, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


# ---- every length ----


@pytest.mark.parametrize(
    ("decode", "head_dim"), [("eager", 64), ("persistent", 64), ("eager", 128), ("persistent", 32)]
)
def test_every_length_of_a_context(decode: str, head_dim: int, tmp_path: Path) -> None:
    """One token after another from 1 to 1,024: every boundary of a split, a tile and a round of keys is crossed."""
    every_length(Geometry(decode=decode, head_dim=head_dim), tmp_path)


def every_length(geometry: Geometry, tmp_path: Path) -> None:
    session = Session(geometry, geometry.save(tmp_path))
    text = text_of(geometry.positions, geometry.vocabulary, seed=geometry.head_dim)
    exact = session.read([text], torch.float32)
    bound = session.bound([text], exact)
    session.texts = [text[:1]]
    errors = [float((session.engine.prefill(torch.tensor([text[:1]])) - exact[:, 0]).abs().max())]
    for at in range(1, geometry.positions):
        session.poison()
        session.texts = [text[: at + 1]]
        errors.append(float((session.engine.decode(torch.tensor(text[at : at + 1])) - exact[:, at]).abs().max()))
    wrong = [at + 1 for at, error in enumerate(errors) if not error <= bound]
    assert not wrong, f"lengths {wrong[:10]} ..., {len(wrong)} in all"


@pytest.mark.parametrize("head_dim", [32, 64, 128])
def test_prompts_of_unequal_lengths_up_to_the_whole_context(head_dim: int, tmp_path: Path) -> None:
    """Lengths on both sides of tiles and of chunks, in one batch; some chunks are the end of no prompt, and 1,024
    leaves no room for a token.
    """
    geometry = Geometry(head_dim=head_dim, max_batch=8)
    session = Session(geometry, geometry.save(tmp_path))
    chunk = session.engine._chunk
    assert chunk < MOST_LENGTHS
    lengths = [1, 63, 65, chunk - 1, chunk, chunk + 1, 3 * chunk + 64, MOST_LENGTHS]
    session.prefill([text_of(length, geometry.vocabulary, length) for length in lengths])


def test_the_shape_of_gpt2(tmp_path: Path) -> None:
    """A layer of GPT-2 124M, ten heads of twelve: 130 tokens of prompt, then tokens by each way."""
    geometry = Geometry(width=768, head_dim=64, heads=(10,), inner=3072, vocabulary=503, positions=256, max_batch=2)
    folder = geometry.save(tmp_path)
    texts = [text_of(130, geometry.vocabulary, 1), text_of(77, geometry.vocabulary, 2)]
    for decode in ("eager", "persistent"):
        session = Session(replace(geometry, decode=decode), folder)
        session.prefill(texts)
        session.decode([5, 6])
        session.extend(3)


@pytest.mark.parametrize("decode", ["eager", "persistent"])
def test_every_length_of_a_context_by_windows(decode: str, tmp_path: Path) -> None:
    geometry = Geometry(decode=decode, heads=(2, 3), groups=1, rope_share=0.5, windows=(100, 7), positions=260)
    every_length(geometry, tmp_path)


# ---- drawn shapes and calls ----

BATCHES = (1, 2, 4, 5, 8, 9, 32)


def near(*boundaries: int, most: int) -> st.SearchStrategy[int]:
    """A number up to `most`, often beside a boundary."""
    beside = sorted({b + d for b in boundaries for d in (-1, 0, 1) if 1 <= b + d <= most} | {1, most})
    return st.one_of(st.sampled_from(beside), st.integers(1, most))


@st.composite
def geometries(draw: st.DrawFn) -> Geometry:
    decode = draw(st.sampled_from(MODES))
    head_dim = draw(st.sampled_from((32, 64, 128)))
    heads = tuple(draw(st.lists(near(1, 2, 12, 25, most=25), min_size=1, max_size=3)))
    max_batch = draw(st.sampled_from(BATCHES))
    positions = draw(near(64, 128, 192, 256, 512, 1024, most=MOST_LENGTHS))
    dividers = [n for n in range(1, max(heads) + 1) if max(heads) % n == 0]
    window = st.one_of(st.none(), near(2, 32, 64, 128, most=positions + 9).map(lambda tokens: max(2, tokens)))
    return Geometry(
        groups=draw(st.one_of(st.none(), st.sampled_from(dividers))),
        rope_share=draw(st.one_of(st.none(), st.sampled_from((1.0, 0.5, 0.3)))),
        windows=draw(st.one_of(st.none(), st.tuples(*(window for _ in heads)))),
        width=draw(near(8, 64, 256, most=300)), head_dim=head_dim, heads=heads,
        inner=draw(near(8, 128, 256, 450, most=600)), vocabulary=draw(st.integers(8, 150)), positions=positions,
        max_batch=max_batch, max_context=draw(st.one_of(st.none(), st.integers(1, positions))), decode=decode,
    )  # fmt: skip


WORK = 200_000
"""Of a call: heads x dimensions x query-key pairs / 64 of all layers, so that an example takes about a second."""


def longest(geometry: Geometry, batch: int) -> int:
    """A prompt length that this much work allows."""
    each = batch * sum(geometry.heads) * geometry.head_dim / 64
    length = int((WORK / each) ** 0.5)
    return max(1, min(geometry.context, length))


@st.composite
def calls(draw: st.DrawFn, geometry: Geometry) -> list[Callable[[Session], None]]:
    """A few calls, such as a user makes them one after another; what has no room is left out when it is its turn."""
    seed = draw(st.integers(0, 1000))

    def texts() -> list[list[int]]:
        batch = draw(st.sampled_from([b for b in BATCHES if b <= geometry.max_batch]))
        most = longest(geometry, batch)
        lengths = [draw(near(64, 128, 192, 256, 512, 960, 1023, most=most))]
        if batch > 1:
            lengths += draw(st.lists(near(32, 64, 128, most=most), min_size=batch - 1, max_size=batch - 1))
        return [text_of(length, geometry.vocabulary, seed + b) for b, length in enumerate(lengths)]

    def prefill() -> Callable[[Session], None]:
        prompts = texts()
        return lambda session: session.prefill(prompts)

    def decode() -> Callable[[Session], None]:
        token = draw(st.integers(0, geometry.vocabulary - 1))

        def call(session: Session) -> None:
            if session.texts and session.room:
                session.decode([(token + 7 * b) % geometry.vocabulary for b in range(len(session.texts))])

        return call

    def extend() -> Callable[[Session], None]:
        count, temperature = draw(st.integers(1, 6)), draw(st.sampled_from((0.0, 0.0, 0.9)))
        top_k = draw(st.sampled_from((0, 1, 5))) if temperature else 0

        def call(session: Session) -> None:
            if session.texts and session.room >= count:
                session.extend(count, temperature, top_k, seed)

        return call

    def generate() -> Callable[[Session], None]:
        prompts, count = texts(), draw(st.integers(1, 12))
        stop = draw(st.lists(st.integers(0, geometry.vocabulary - 1), max_size=3))

        def call(session: Session) -> None:
            room = geometry.context - max(map(len, prompts)) + 1
            session.generate(prompts, min(count, room), stop)

        return call

    def forward() -> Callable[[Session], None]:
        batch = draw(st.sampled_from([b for b in BATCHES if b <= geometry.max_batch]))
        length = draw(near(64, 128, most=longest(geometry, batch)))
        rows = [text_of(length, geometry.vocabulary, seed + b) for b in range(batch)]
        return lambda session: session.forward(rows)

    first = prefill()
    others = draw(
        st.lists(st.sampled_from((decode, decode, extend, prefill, generate, forward)), min_size=2, max_size=6)
    )
    return [first, *(make() for make in others)]


plans = geometries().flatmap(lambda geometry: st.tuples(st.just(geometry), calls(geometry)))
SETTINGS = settings(
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
    phases=(Phase.explicit, Phase.generate, Phase.shrink),
)


def run(plan: tuple[Geometry, list[Callable[[Session], None]]], tmp_path_factory: pytest.TempPathFactory) -> None:
    geometry, to_call = plan
    session = Session(geometry, geometry.save(tmp_path_factory.mktemp("geometry")))
    for call in to_call:
        call(session)


@settings(SETTINGS, max_examples=25, derandomize=True)
@given(plan=plans)
def test_any_shape_and_any_calls(plan, tmp_path_factory) -> None:  # type: ignore[no-untyped-def]
    run(plan, tmp_path_factory)


@pytest.mark.slow
@settings(SETTINGS, max_examples=int(os.environ.get("HEADROOM_EXAMPLES", "600")))
@given(plan=plans)
def test_many_shapes_and_calls(plan, tmp_path_factory) -> None:  # type: ignore[no-untyped-def]
    """Other ones each time; a failure prints how to make it again."""
    run(plan, tmp_path_factory)
