"""Agreement against sums written out by hand, and greedy continuations against Hugging Face's."""

import itertools

import numpy as np
import pytest
import torch

from eval import agreement
from eval.agreement import Answers, Questions, compare, listen
from eval.errors import UserError, WorkError

TEXT = np.random.default_rng(5).integers(0, 269, 53)
ASKED = Questions(TEXT, context=17, prompts=3, prompt_tokens=11, new_tokens=9)


@pytest.fixture
def pair(make_engine, tiny_model, uneven_model):
    return {name: listen(make_engine(model), ASKED) for name, model in (("dense", tiny_model), ("cut", uneven_model))}


def reference_logits(model) -> np.ndarray:
    """The windows of 17 one by one: 17, 17, 17, 2 tokens."""
    with torch.no_grad():
        parts = [model(torch.from_numpy(TEXT[i : i + 17])[None]).logits[0].numpy() for i in range(0, 53, 17)]
    return np.concatenate(parts).astype(np.float64)


def test_numbers_are_those_of_their_definitions(pair, tiny_model, uneven_model) -> None:
    found = compare(pair, ASKED, text_sha256="ab")
    a, b = reference_logits(tiny_model), reference_logits(uneven_model)
    p, q = (np.exp(x) / np.exp(x).sum(1, keepdims=True) for x in (a, b))
    assert (found.rows, found.tokens, found.context, found.text_sha256) == (["dense", "cut"], 53, 17, "ab")
    assert found.kl[0][1] == pytest.approx((p * np.log(p / q)).sum() / 53, rel=1e-5)
    assert found.kl[1][0] == pytest.approx((q * np.log(q / p)).sum() / 53, rel=1e-5)
    assert found.kl[0][1] != pytest.approx(found.kl[1][0], rel=1e-3)
    assert found.logit_mean[0][1] == pytest.approx(np.abs(a - b).mean(), rel=1e-5)
    assert found.logit_max[0][1] == pytest.approx(np.abs(a - b).max(), rel=1e-5)
    assert found.top1[0][1] == pytest.approx((a.argmax(1) == b.argmax(1)).mean())
    for matrix in (found.logit_mean, found.logit_max, found.top1, found.diverged):
        assert matrix[0][1] == matrix[1][0]


def test_all_agree_with_themselves(pair) -> None:
    found = compare(pair, ASKED, text_sha256="")
    for index in range(2):
        assert found.kl[index][index] == found.logit_mean[index][index] == found.logit_max[index][index] == 0
        assert found.top1[index][index] == 1
        assert found.diverged[index][index] == [None] * 3


def test_blocks_change_nothing(pair, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = compare(pair, ASKED, text_sha256="")
    monkeypatch.setattr(agreement, "BLOCK_BYTES", 8 * 2 * 269 * 7)  # seven positions at a time, four in the last block
    cut = compare(pair, ASKED, text_sha256="")
    for name in ("kl", "logit_mean", "logit_max", "top1"):
        assert np.allclose(getattr(whole, name), getattr(cut, name), rtol=1e-12, atol=1e-15), name


def test_continuations_are_greedy_from_places_all_over_the_text(pair, tiny_gpt2) -> None:
    for row, start in zip(pair["dense"].greedy, (0, 21, 42), strict=True):
        prompt = torch.from_numpy(TEXT[start : start + 11])[None]
        wanted = tiny_gpt2.generate(prompt, max_new_tokens=9, do_sample=False, eos_token_id=-1, pad_token_id=0)
        assert row.tolist() == wanted[0, 11:].tolist()


def test_where_continuations_part() -> None:
    logits = torch.zeros(53, 5)
    one = Answers(logits, torch.tensor([[1, 2, 3], [1, 2, 3], [1, 2, 3], [4, 2, 3]]))
    two = Answers(logits, torch.tensor([[1, 2, 3], [4, 2, 3], [1, 2, 4], [1, 4, 3]]))
    assert compare({"1": one, "2": two}, ASKED, text_sha256="").diverged[0][1] == [None, 0, 2, 0]


def test_errors_are_those_of_parts() -> None:
    """KL and agreement of each of 353 positions by hand, in ten parts."""
    draw = torch.Generator().manual_seed(0)
    one, two = (torch.randn(353, 7, generator=draw) for _ in range(2))
    greedy = torch.zeros(1, 1, dtype=torch.long)
    found = compare({"a": Answers(one, greedy), "b": Answers(two, greedy)}, ASKED, text_sha256="")
    p, q = (np.exp(x.double().numpy()) for x in (one, two))
    p, q = p / p.sum(1, keepdims=True), q / q.sum(1, keepdims=True)
    same = (p.argmax(1) == q.argmax(1)).astype(float)
    for values, errors in (((p * np.log(p / q)).sum(1), found.kl_stderr), (same, found.top1_stderr)):
        cuts = [353 * part // 10 for part in range(11)]
        off = [values[a:b].sum() - (b - a) * values.mean() for a, b in itertools.pairwise(cuts)]
        assert errors[0][1] == pytest.approx((10 / 9 * np.square(off).sum()) ** 0.5 / 353, rel=1e-6)
        assert errors[0][0] == errors[1][1] == 0
    short = compare({"a": Answers(one[:319], greedy), "b": Answers(two[:319], greedy)}, ASKED, text_sha256="")
    assert short.kl_stderr is None and short.top1_stderr is None


def test_known_divergence() -> None:
    """Fair against biased coin: KL is 0.5 log(0.5 / 0.9) + 0.5 log(0.5 / 0.1); a shift of all logits is none."""
    greedy = torch.zeros(1, 1, dtype=torch.long)
    fair, biased = torch.full((1, 2), 7.0), torch.tensor([[0.9, 0.1]]).log()
    found = compare({"f": Answers(fair, greedy), "b": Answers(biased, greedy)}, ASKED, text_sha256="")
    assert found.kl[0][1] == pytest.approx(0.5108256, rel=1e-6)
    shifted = compare({"f": Answers(fair, greedy), "g": Answers(fair - 9, greedy)}, ASKED, text_sha256="")
    assert (shifted.kl[0][1], shifted.logit_mean[0][1]) == (pytest.approx(0, abs=1e-12), 9)


def test_questions_shrink_to_fit() -> None:
    asked = Questions.fitting(np.arange(300), 48)
    assert (asked.prompt_tokens, asked.new_tokens, [w.shape[1] for w in asked.windows()]) == (24, 24, [48] * 6 + [12])
    assert (Questions.fitting(np.arange(7), 512).prompt_tokens, Questions.fitting(np.arange(900), 512).new_tokens) == (
        7,
        64,
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"context": 0}, "context: 0; give at least 1"),
        ({"new_tokens": 0}, "new tokens: 0"),
        ({"prompt_tokens": 54}, "the text has 53 tokens; a prompt takes 54"),
        ({"context": 68}, "68 tokens at once are more than torch cpu fp32 takes: give at most 67"),
        ({"new_tokens": 57}, "68 tokens at once"),
        ({"token_ids": TEXT + 99}, "tokenize it with the model's own tokenizer"),
    ],
)
def test_questions_that_cannot_be_answered(change: dict, said: str, engine) -> None:
    with pytest.raises(UserError, match=said):
        listen(engine, Questions(**(vars(ASKED) | change)))


def test_broken_engines_and_other_vocabularies(pair, engine, monkeypatch: pytest.MonkeyPatch) -> None:
    other = Answers(torch.zeros(53, 7), pair["cut"].greedy)
    with pytest.raises(UserError, match="dense knows 269 tokens and other 7: compare models of one vocabulary"):
        compare({"dense": pair["dense"], "other": other}, ASKED, text_sha256="")
    monkeypatch.setattr(engine, "logits", lambda ids: torch.full((1, ids.shape[1], 269), float("nan")))
    with pytest.raises(WorkError, match="not finite"):
        listen(engine, ASKED)
