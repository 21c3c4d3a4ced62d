"""Perplexity against a NumPy forward pass by hand, against transformers, and its window plan."""

import itertools
import math
import random

import numpy as np
import pytest
import torch

from eval import perplexity as module
from eval.errors import UserError, WorkError
from eval.perplexity import perplexity, windows

TEXT = {"text_sha256": "0" * 64, "text_share": 0.25, "progress": False}


def random_plans(count: int) -> list[tuple[int, int, int]]:
    draw = random.Random(0)
    contexts = [draw.randint(2, 40) for _ in range(count)]
    return [(draw.randint(2, 300), context, draw.randint(1, context)) for context in contexts]


@pytest.mark.parametrize(
    ("tokens", "context", "stride"),
    [(2, 2, 1), (2, 16, 16), (17, 16, 16), (18, 16, 16), (33, 16, 16), (17, 16, 1), (101, 7, 7), *random_plans(60)],
)
def test_every_token_but_the_first_is_scored_once(tokens: int, context: int, stride: int) -> None:
    plan = list(windows(tokens, context, stride))
    scored = [target for w in plan for target in range(w.end + 1 - w.scored, w.end + 1)]
    assert scored == list(range(1, tokens))
    assert all(1 <= w.scored <= w.end - w.begin <= context for w in plan)
    assert all(w.end - w.begin == context for w in plan[:-1])
    assert [w.begin for w in plan] == [i * stride for i in range(len(plan))]
    # What a later window scores has at least the overlap as context.
    assert all(w.end - w.begin - w.scored >= context - stride for w in plan[1:])


def test_a_plan_written_out() -> None:
    assert list(windows(11, 4, 3)) == [(0, 4, 4), (3, 7, 3), (6, 10, 3)]
    assert list(windows(12, 4, 3)) == [(0, 4, 4), (3, 7, 3), (6, 10, 3), (9, 11, 1)]
    assert list(windows(9, 4, 4)) == [(0, 4, 4), (4, 8, 4)]


@pytest.mark.parametrize(
    ("tokens", "context", "stride", "told"),
    [
        (9, 1, 1, "context is 1"),
        (9, 0, 1, "context is 0"),
        (9, 4, 0, "stride is 0 tokens; give 1 to 4"),
        (9, 4, 5, "stride is 5"),
        (1, 4, 4, "has 1 token;"),
        (0, 4, 4, "has 0 tokens;"),
    ],
)
def test_bad_plans(tokens: int, context: int, stride: int, told: str) -> None:
    with pytest.raises(UserError, match=told):
        windows(tokens, context, stride)


def by_numpy(model, tokens: np.ndarray) -> np.ndarray:
    """CompactGPT2's logits in float64, from its weights alone: `[length]` -> `[length, vocab]`."""
    weights = {name: value.double().numpy() for name, value in model.state_dict().items()}
    config = model.config

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        return x @ weights[name + ".weight"].T + weights[name + ".bias"]

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        centred = x - x.mean(-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + config.layer_norm_epsilon)
        return scaled * weights[name + ".weight"] + weights[name + ".bias"]

    x = weights["transformer.wte.weight"][tokens] + weights["transformer.wpe.weight"][: len(tokens)]
    for layer, heads in enumerate(config.kept_heads):
        block = f"transformer.h.{layer}."
        qkv = linear(norm(x, block + "ln_1"), block + "attn.c_attn")
        size, width = config.head_dim, len(heads) * config.head_dim
        mixed = np.empty((len(tokens), width))
        for head in range(len(heads)):
            q, k, v = (qkv[:, part * width + head * size :][:, :size] for part in range(3))
            score = np.where(np.tri(len(tokens), dtype=bool), q @ k.T / math.sqrt(size), -np.inf)
            share = np.exp(score - score.max(-1, keepdims=True))
            mixed[:, head * size :][:, :size] = share / share.sum(-1, keepdims=True) @ v
        x = x + linear(mixed, block + "attn.c_proj")
        inner = linear(norm(x, block + "ln_2"), block + "mlp.c_fc")
        inner = 0.5 * inner * (1 + np.tanh(math.sqrt(2 / math.pi) * (inner + 0.044715 * inner**3)))
        x = x + linear(inner, block + "mlp.c_proj")
    return norm(x, "transformer.ln_f") @ weights["transformer.wte.weight"].T


def nll_by_hand(forward, tokens: np.ndarray, context: int, stride: int) -> float:
    """Summed NLL: each target from the first window that holds it, one target at a time."""
    total, target, begin = 0.0, 1, 0
    while target < len(tokens):
        inputs = tokens[begin : begin + context][: len(tokens) - 1 - begin]
        rows = forward(inputs)
        while target <= begin + len(inputs):
            row = rows[target - 1 - begin]
            total += np.log(np.exp(row - row.max()).sum()) + row.max() - row[tokens[target]]
            target += 1
        begin += stride
    return total


CASES = [
    (tokens, context, stride)
    for tokens, context in [(2, 7), (2, 16), (17, 7), (17, 16), (101, 7), (101, 16), (101, 67)]
    for stride in sorted({1, 3, 7, context})
    if stride <= context and not (tokens == 101 and context > 7 and stride == 1)
]


@pytest.mark.parametrize(("tokens", "context", "stride"), CASES)
def test_against_numpy(engine, tokens: int, context: int, stride: int) -> None:
    text = np.random.default_rng(tokens).integers(0, engine.vocab_size, tokens)
    wanted = nll_by_hand(lambda ids: by_numpy(engine.model, ids), text, context, stride)
    got = perplexity(engine, text, context=context, stride=stride, batch=3, **TEXT)
    assert got.tokens == tokens - 1
    assert got.nll == pytest.approx(wanted / (tokens - 1), rel=1e-5)
    assert got.perplexity == pytest.approx(math.exp(wanted / (tokens - 1)), rel=1e-4)
    assert (got.context, got.stride, got.text_sha256, got.text_share) == (context, stride, "0" * 64, 0.25)


@pytest.mark.parametrize(("tokens", "context", "stride"), [(101, 16, 7), (101, 16, 16), (17, 7, 1), (2, 7, 7)])
def test_against_transformers(tiny_gpt2, tiny_model, make_engine, tokens: int, context: int, stride: int) -> None:
    text = np.random.default_rng(tokens).integers(0, tiny_gpt2.config.vocab_size, tokens)

    @torch.no_grad()
    def forward(ids: np.ndarray) -> np.ndarray:
        return tiny_gpt2(torch.from_numpy(ids)[None]).logits[0].double().numpy()

    wanted = nll_by_hand(forward, text, context, stride) / (tokens - 1)
    got = perplexity(make_engine(tiny_model), torch.from_numpy(text), context=context, stride=stride, **TEXT)
    assert got.nll == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize(("context", "stride"), [(16, 16), (16, 5), (67, 67)])
def test_parts_are_runs_of_targets_whatever_the_windows(engine, context: int, stride: int) -> None:
    """Each target's NLL by hand; their means over successive runs of targets, and the error that follows."""
    text = np.random.default_rng(5).integers(0, engine.vocab_size, 354)
    losses = np.empty(353)
    for window in windows(354, context, stride):
        logits = (
            engine.model(torch.from_numpy(text[window.begin : window.end])[None]).logits[0].detach().double().numpy()
        )
        rows = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        for at in range(window.length - window.scored, window.length):
            losses[window.begin + at] = -rows[at, text[window.begin + at + 1]]
    got = perplexity(engine, text, context=context, stride=stride, **TEXT)
    cuts = [353 * part // 10 for part in range(11)]
    assert got.parts == pytest.approx([losses[a:b].mean() for a, b in itertools.pairwise(cuts)], rel=1e-5)
    sizes = np.diff(cuts)
    off = sizes * (np.array(got.parts) - losses.mean())
    assert got.stderr == pytest.approx(got.perplexity * (10 / 9 * (off**2).sum()) ** 0.5 / 353, rel=1e-4)
    assert (perplexity(engine, text[:320], context=context, stride=stride, **TEXT).stderr) is None  # 319 targets


def test_full_windows_run_together_and_the_short_one_alone(engine) -> None:
    perplexity(engine, np.arange(99) % 50, context=16, stride=7, batch=5, **TEXT)
    shapes = [tuple(ids.shape) for _, _, ids in engine.calls]
    assert shapes == [(5, 16), (5, 16), (2, 16), (1, 14)]


def test_batch_gives_way_to_the_logits_size(engine, monkeypatch: pytest.MonkeyPatch) -> None:
    text = np.arange(65) % 50
    together = perplexity(engine, text, context=8, stride=8, batch=8, **TEXT)
    engine.calls.clear()
    monkeypatch.setattr(module, "LOGITS_BYTES", 3 * 8 * 4 * engine.vocab_size)
    apart = perplexity(engine, text, context=8, stride=8, batch=8, **TEXT)
    assert [len(ids) for _, _, ids in engine.calls] == [3, 3, 2]
    assert apart.nll == pytest.approx(together.nll, rel=1e-6)


def test_text_that_does_not_fit(engine) -> None:
    sizes = {"context": 16, "stride": 16, **TEXT}
    for bad in (engine.vocab_size, -1):
        with pytest.raises(UserError, match=r"token ids from .* own tokenizer"):
            perplexity(engine, np.array([1, 2, bad]), **sizes)
    with pytest.raises(UserError, match="at most 67"):
        perplexity(engine, np.arange(9), context=68, stride=1, **TEXT)
    with pytest.raises(UserError, match="has 0 tokens"):
        perplexity(engine, np.array([], dtype=np.int64), **sizes)
    for shape in (np.zeros((3, 3), dtype=np.int64), np.zeros(9)):
        with pytest.raises(ValueError, match="one row of integers"):
            perplexity(engine, shape, **sizes)
    assert not engine.calls


def test_read_only_and_narrow_integers(engine) -> None:
    text = np.arange(33, dtype=np.uint16)
    text.flags.writeable = False
    assert perplexity(engine, text, context=16, stride=16, **TEXT).tokens == 32


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_broken_weights_are_told(engine, poison: float) -> None:
    with torch.no_grad():
        engine.model.transformer.wte.weight[40] = poison
    text = np.arange(5, 38)  # token 40 enters as an input at position 35; as an output everywhere
    with pytest.raises(WorkError, match="tokens 1 to 8 is nan"):
        perplexity(engine, text, context=8, stride=8, **TEXT)


def test_a_likelihood_beyond_floats_is_told(engine) -> None:
    with torch.no_grad():
        engine.model.transformer.ln_f.weight.mul_(1e6)
    with pytest.raises(WorkError, match="no finite perplexity"):
        perplexity(engine, np.arange(33), context=8, stride=8, **TEXT)


def test_progress_stays_off_stdout(engine, capsys: pytest.CaptureFixture[str]) -> None:
    perplexity(engine, np.arange(33), context=8, stride=8, **{**TEXT, "progress": True})
    out, err = capsys.readouterr()
    assert out == "" and "perplexity torch cpu fp32" in err
