"""Timing statistics against NumPy, and real engines timed in turns. No test asserts how long something takes."""

import gc

import numpy as np
import pytest
import torch

from eval.errors import UserError
from eval.latency import measure, ratio, timing
from pipeline.model import from_gpt2

POOL = np.random.default_rng(5).integers(0, 269, 211)
SHORT = {"prompt_pool": POOL, "prompt_tokens": 7, "new_tokens": 4, "min_seconds": 0.0, "progress": False}


@pytest.mark.parametrize("count", [1, 2, 5, 100, 5001])
def test_statistics(count: int) -> None:
    samples = np.random.default_rng(count).lognormal(-5, 0.4, count)
    got = timing(samples)
    assert got.samples == samples.tolist() and got.count == count
    assert got.mean == pytest.approx(samples.mean())
    assert [got.p50, got.p90, got.p99] == pytest.approx([np.percentile(samples, p) for p in (50, 90, 99)])
    assert samples.min() <= got.ci95[0] <= got.p50 <= got.ci95[1] <= samples.max()
    assert timing(samples) == got


def test_interval_narrows_with_the_samples() -> None:
    draw = np.random.default_rng(0)
    few, many = (timing(draw.normal(1.0, 0.1, count)) for count in (20, 2000))
    assert many.ci95[1] - many.ci95[0] < (few.ci95[1] - few.ci95[0]) / 3


def test_interval_covers_the_true_median() -> None:
    """Nominally 95 %; of 200 experiments at least 88 % must hold the truth (far below chance at 95 %)."""
    draw = np.random.default_rng(1)
    intervals = [timing(draw.exponential(1.0, 51)).ci95 for _ in range(200)]
    assert sum(low <= np.log(2) <= high for low, high in intervals) >= 176


@pytest.mark.parametrize("bad", [[], [[1.0]]])
def test_no_statistics_of_nothing(bad: list) -> None:
    with pytest.raises(ValueError, match="non-empty row"):
        timing(bad)


def test_ratio_of_a_thing_with_itself_is_one() -> None:
    same = timing(np.random.default_rng(2).normal(1.0, 0.1, 51))
    assert ratio(same, same) == (1.0, 1.0, 1.0)


def test_pairing_takes_the_common_noise_out() -> None:
    draw = np.random.default_rng(3)
    weather = draw.lognormal(0, 0.5, 101)
    a = timing(2.0 * weather * draw.normal(1, 0.01, 101))
    b = timing(weather * draw.normal(1, 0.01, 101))
    paired, apart = ratio(a, b), ratio(a, timing(b.samples[:-1]))
    assert ratio(a, b, interleaved=False) != paired
    assert paired.low < 2.0 < paired.high and apart.low < 2.0 < apart.high
    assert paired.high - paired.low < (apart.high - apart.low) / 2


def test_ratio_of_unrelated_samples() -> None:
    draw = np.random.default_rng(4)
    a, b = timing(draw.normal(3.0, 0.1, 40)), timing(draw.normal(1.0, 0.05, 61))
    got = ratio(a, b)
    assert got.value == pytest.approx(a.p50 / b.p50)
    assert got.low < 3.0 < got.high
    assert ratio(b, a).value == pytest.approx(1 / got.value)


@pytest.mark.parametrize("batch", [1, 3])
def test_engines_take_turns_on_the_same_fresh_prompts(uneven_model, make_gpt2, make_engine, batch: int) -> None:
    calls: list = []
    models = {"a": uneven_model, "b": from_gpt2(make_gpt2(seed=1))}
    engines = {name: make_engine(model, name, calls) for name, model in models.items()}
    measure(engines, **SHORT, batch=batch, min_count=3, warmup=2)

    turn = ["prefill", "decode", "decode", "decode"]
    assert [(who, what) for who, what, _ in calls] == [(who, what) for _ in range(5) for who in "ab" for what in turn]

    prompts = [ids for _, what, ids in calls if what == "prefill"]
    in_text = {tuple(POOL[start : start + 7]) for start in range(len(POOL) - 6)}
    assert all(ids.shape == (batch, 7) and {tuple(row.tolist()) for row in ids} <= in_text for ids in prompts)
    assert all(torch.equal(a, b) for a, b in zip(prompts[::2], prompts[1::2], strict=True))
    assert len({tuple(ids.flatten().tolist()) for ids in prompts}) == 5

    for start in range(0, len(calls), len(turn)):  # greedy: each engine continues with its own choice
        ids = calls[start][2]
        for _, _, token in calls[start + 1 : start + len(turn)]:
            assert torch.equal(token, models[calls[start][0]](ids).logits[:, -1].argmax(-1))
            ids = torch.cat([ids, token[:, None]], 1)


def test_samples_and_labels(engine) -> None:
    (latency,) = measure({"one": engine}, **SHORT, batch=2, min_count=5).values()
    assert (latency.prompt_tokens, latency.new_tokens, latency.batch) == (7, 4, 2)
    assert latency.prefill.count == latency.decode.count == 5
    assert all(sample > 0 for sample in latency.prefill.samples + latency.decode.samples)


def test_decode_sample_is_a_step_of_the_clock(engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that ticks once a call, with prefill and three steps between its three marks."""
    ticks = iter(np.cumsum([0, 10, 6] * 2).tolist())
    monkeypatch.setattr("eval.latency.time.perf_counter", lambda: next(ticks))
    (latency,) = measure({"one": engine}, **SHORT, min_count=2, warmup=0).values()
    assert latency.prefill.samples == [10.0, 10.0] and latency.decode.samples == [2.0, 2.0]


def test_goes_on_until_every_engine_was_timed_long_enough(uneven_model, make_engine) -> None:
    engines = {name: make_engine(uneven_model) for name in "ab"}
    for latency in measure(engines, **{**SHORT, "min_seconds": 0.2}, min_count=1).values():
        timed = np.array(latency.prefill.samples) + 3 * np.array(latency.decode.samples)
        assert timed.sum() >= 0.2
    counts = {latency.prefill.count for latency in measure(engines, **SHORT, min_count=4).values()}
    assert counts == {4}


def test_same_seed_same_prompts(engine) -> None:
    def prompts(seed: int) -> list:
        engine.calls.clear()
        measure({"one": engine}, **SHORT, min_count=2, seed=seed)
        return [ids.tolist() for _, what, ids in engine.calls if what == "prefill"]

    assert prompts(3) == prompts(3) != prompts(4)


def test_garbage_collection_rests_meanwhile_and_comes_back(engine) -> None:
    seen = []
    engine.synchronize = lambda: seen.append(gc.isenabled())
    measure({"one": engine}, **SHORT, min_count=1)
    assert seen and not any(seen)
    assert gc.isenabled()
    engine.decode = lambda token: 1 / 0
    with pytest.raises(ZeroDivisionError):
        measure({"one": engine}, **SHORT, min_count=1)
    assert gc.isenabled() and gc.get_freeze_count() == 0


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"prompt_tokens": 60, "new_tokens": 8}, "are 68; one takes at most 67"),
        ({"prompt_pool": POOL[:6]}, "has 6 tokens; a prompt of 7"),
        ({"prompt_pool": np.full(50, 269)}, "token ids from 269 to 269"),
        ({"prompt_pool": np.full(50, -1)}, "token ids from -1"),
        ({"new_tokens": 1}, "1 is too few for new tokens"),
        ({"prompt_tokens": 0}, "0 is too few for the prompt"),
        ({"batch": 0}, "0 is too few for the batch"),
        ({"min_count": 0}, "0 is too few for rounds"),
    ],
)
def test_bad_lengths(engine, change: dict, told: str) -> None:
    with pytest.raises(UserError, match=told):
        measure({"one": engine}, **{**SHORT, "batch": 1, "min_count": 1, **change})
    assert not engine.calls


def test_the_context_may_be_filled(engine) -> None:
    pool = POOL[:60]  # a single place to cut from
    measure({"one": engine}, **{**SHORT, "prompt_pool": pool, "prompt_tokens": 60, "new_tokens": 7}, min_count=1)
    assert len(engine.calls) == 3 * 7


@pytest.mark.gpu
def test_cuda_engines_are_timed_by_events(uneven_model, make_engine) -> None:
    engine = make_engine(uneven_model.cuda())
    engine.device, engine.synchronize = "cuda:0", torch.cuda.synchronize
    prefill, decode = engine.prefill, engine.decode
    engine.prefill = lambda ids: prefill(ids.cuda())
    engine.decode = lambda ids: decode(ids.cuda())
    (latency,) = measure({"one": engine}, **SHORT, batch=2, min_count=5).values()
    assert latency.prefill.count == 5 and min(latency.prefill.samples + latency.decode.samples) > 0
