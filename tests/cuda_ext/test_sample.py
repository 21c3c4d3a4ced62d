"""Sampling on the CPU: transformers' own warpers say which tokens may come and how often."""

from typing import Any

import pytest
import torch
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from cuda_ext.sampling import Sampling

NAN = float("nan")


def draw(
    ops: Any, logits: torch.Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0, seed: int = 0, step: int = 0
) -> torch.Tensor:
    batch, vocabulary = logits.shape
    padded = torch.full((batch, vocabulary + 3), NAN)
    padded[:, :vocabulary] = logits
    steps, tokens = torch.full((batch,), step, dtype=torch.int32), torch.full((batch,), -1, dtype=torch.int32)
    how = Sampling(temperature, top_k, top_p, seed).packed()
    ops.sample(padded, vocabulary + 3, vocabulary, batch, how, steps, tokens)
    assert (steps == step + 1).all()
    return tokens.long()


def probabilities(logits: torch.Tensor, temperature: float, top_k: int, top_p: float) -> torch.Tensor:
    warpers: list[Any] = [TemperatureLogitsWarper(temperature)]
    warpers += [TopKLogitsWarper(top_k)] if top_k else []
    warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    return LogitsProcessorList(warpers)(torch.zeros(1, 1, dtype=torch.long), logits[None])[0].softmax(-1)


@pytest.mark.parametrize("vocabulary", [1, 7, 513, 5003])
def test_greedy_is_the_argmax_and_ties_go_to_the_lower_token(ops: Any, vocabulary: int) -> None:
    logits = torch.randn(4, vocabulary) - 5
    assert torch.equal(draw(ops, logits, 0.0), logits.argmax(-1))
    logits[:, vocabulary // 2 :] = 9.0
    assert (draw(ops, logits, 0.0) == vocabulary // 2).all()


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), [(0.0, 0, 1.0), (0.8, 40, 0.9), (1.0, 0, 0.95)])
def test_gpt2s_vocabulary(ops: Any, temperature: float, top_k: int, top_p: float) -> None:
    logits = torch.randn(2, 50257) * 3
    tokens = draw(ops, logits, temperature, top_k, top_p, seed=3)
    if temperature == 0:
        assert torch.equal(tokens, logits.argmax(-1))
    else:
        for row, token in zip(logits, tokens, strict=True):
            assert probabilities(row, temperature, top_k, top_p)[token] > 0


def test_nan_and_infinities_are_never_drawn(ops: Any) -> None:
    logits = torch.tensor([[NAN, -torch.inf, 1.0, NAN, 0.5]]).repeat(32, 1)
    assert (draw(ops, logits, 0.0) == 2).all()
    assert set(draw(ops, logits, 1.5).tolist()) == {2, 4}


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.7, 0, 1.0), (1.3, 5, 1.0), (1.0, 0, 0.8), (0.9, 9, 0.6)]
)
def test_frequencies(ops: Any, temperature: float, top_k: int, top_p: float) -> None:
    """Pearson's chi-square over 250 draws; the seeds are fixed, so it cannot fail by chance."""
    logits = torch.randn(23) * 2
    wanted = probabilities(logits, temperature, top_k, top_p)
    draws = 250
    tokens = draw(ops, logits.repeat(draws, 1), temperature, top_k, top_p, seed=11)
    counts = torch.bincount(tokens, minlength=23)
    assert (counts[wanted == 0] == 0).all()
    likely = wanted * draws >= 5
    chi2 = ((counts - wanted * draws) ** 2 / (wanted * draws))[likely].sum()
    degrees = int(likely.sum()) - 1
    assert chi2 < degrees + 4 * (2 * degrees) ** 0.5


@pytest.mark.parametrize(("top_k", "top_p"), [(1, 1.0), (50, 1.0), (0, 0.3), (0, 0.95), (100, 0.9)])
def test_only_kept_tokens_come(ops: Any, top_k: int, top_p: float) -> None:
    logits = torch.randn(2003) * 3
    kept = probabilities(logits, 1.0, top_k, top_p) > 0
    tokens = draw(ops, logits.repeat(40, 1), 1.0, top_k, top_p, seed=3)
    assert kept[tokens].all()
    assert len(set(tokens.tolist())) > 1 or kept.sum() == 1


def test_tokens_that_tie_with_the_last_kept_are_kept(ops: Any) -> None:
    logits = torch.tensor([2.0, 1.0, 1.0, 1.0, 0.0]).repeat(60, 1)
    assert set(draw(ops, logits, 1.0, top_k=2).tolist()) == {0, 1, 2, 3}


def test_a_draw_depends_on_seed_row_and_step_alone(ops: Any, each_seed: Any) -> None:
    logits = torch.randn(1, 400).repeat(4, 1)
    alone = draw(ops, logits, 1.0, seed=5, step=2)
    for _ in each_seed(ops.library):
        more = torch.cat([logits, torch.randn(3, 400)])
        assert torch.equal(draw(ops, more, 1.0, seed=5, step=2)[:4], alone)
    assert len({tuple(draw(ops, logits, 1.0, seed=s, step=t).tolist()) for s in (5, 2**40) for t in (2, 3)}) == 4
    assert len(set(alone.tolist())) > 1


def test_the_generator_is_philox(ops: Any) -> None:
    """Known answer of Random123 for counter 0 and key 0: 6627e8d5. Over equal logits it names the token."""
    vocabulary = 4096
    token = draw(ops, torch.zeros(1, vocabulary), 1.0, seed=0, step=0)
    assert token == int((0x6627E8D5 >> 8) / 2**24 * vocabulary)


def test_after_a_token(ops: Any) -> None:
    def ints(*values: int) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32)

    tokens, position, lengths = ints(5, 7, 9, 1), ints(3, 4, 5, 9), ints(4, 5, 6, 10)
    step, finished, history = ints(1, 2, 2, 1), ints(0, 0, 1, 0), torch.full((4, 3), -1, dtype=torch.int32)
    how = Sampling(stop=(8, 7)).packed()
    ops.advance(tokens, position, lengths, step, finished, history, how, 4, 3, 10)
    assert tokens.tolist() == [5, 7, 0, 1]  # a finished sequence goes on with padding
    assert finished.tolist() == [0, 1, 1, 1]  # as before, a stop token, long since, no room
    assert position.tolist() == [4, 5, 5, 9] and lengths.tolist() == [5, 6, 6, 10]
    assert history.tolist() == [[5, -1, -1], [-1, 7, -1], [-1, 0, -1], [1, -1, -1]]
