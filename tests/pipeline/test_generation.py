"""Generation against Hugging Face's own, and sampling against its definition."""

import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache, GPT2LMHeadModel, PreTrainedTokenizerFast

from eval.errors import UserError, WorkError
from pipeline.data import encode
from pipeline.engines.torch import TorchEngine
from pipeline.generation import end_tokens, generate
from pipeline.model import CompactGPT2LMHeadModel

PROMPT = "the cat säid"


class Recorded:
    """An engine that says what was asked of it."""

    def __init__(self, engine: TorchEngine):
        self.engine = engine
        self.calls: list[int] = []

    def __getattr__(self, name: str):
        return getattr(self.engine, name)

    def decode(self, token_ids: torch.Tensor) -> torch.Tensor:
        self.calls.append(int(token_ids))
        return self.engine.decode(token_ids)


@pytest.fixture
def engine(tiny_model: CompactGPT2LMHeadModel) -> TorchEngine:
    return TorchEngine(tiny_model)


def huggingface(
    model: CompactGPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, prompt: str, count: int
) -> list[int]:
    ids = torch.from_numpy(encode(prompt, tokenizer))[None]
    out = model.generate(ids, max_new_tokens=count, do_sample=False, pad_token_id=0, attention_mask=ids * 0 + 1)
    return out[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("prompt", ["a", PROMPT, "the mat the mat the"])
def test_greedy_is_hugging_faces(engine: TorchEngine, tiny_model, tiny_tokenizer, prompt: str) -> None:
    ids = huggingface(tiny_model, tiny_tokenizer, prompt, 40)
    wanted = tiny_tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    for _ in range(2):
        assert "".join(generate(engine, tiny_tokenizer, prompt, max_new_tokens=40)) == wanted


def test_the_end_of_text_token_ends_it(engine: TorchEngine, tiny_model, tiny_tokenizer) -> None:
    ids = huggingface(tiny_model, tiny_tokenizer, PROMPT, 12)
    end = ids[4]
    wanted = tiny_tokenizer.decode(ids[: ids.index(end)])
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)
    assert "".join(generate(engine, tokenizer, PROMPT, max_new_tokens=12)) == wanted


def test_it_streams_one_token_at_a_time(engine: TorchEngine, tiny_tokenizer) -> None:
    recorded = Recorded(engine)
    pieces = generate(recorded, tiny_tokenizer, PROMPT, max_new_tokens=20)
    seen = []
    for piece in pieces:
        seen.append((len(recorded.calls), piece))
    assert len(recorded.calls) == 19  # the last token needs no step of its own
    assert seen[0][0] < 19, "nothing came before the end"
    assert [count for count, _ in seen] == sorted(count for count, _ in seen)


def test_characters_come_whole(engine: TorchEngine, tiny_tokenizer, monkeypatch) -> None:
    ids = encode("aß✓🙂b", tiny_tokenizer).tolist()
    assert len(ids) > 5  # characters of several tokens
    planned = iter(ids)
    monkeypatch.setattr("pipeline.generation._sample", lambda *_: next(planned))
    assert list(generate(engine, tiny_tokenizer, "x", max_new_tokens=len(ids))) == ["a", "ß", "✓", "🙂", "b", ""]
    planned = iter(ids[:-2])
    monkeypatch.setattr("pipeline.generation._sample", lambda *_: next(planned))
    assert "".join(generate(engine, tiny_tokenizer, "x", max_new_tokens=len(ids) - 2)) == "aß✓\ufffd"


def test_seeds_reproduce_sampling(engine: TorchEngine, tiny_tokenizer) -> None:
    def sampled(seed: int) -> str:
        return "".join(generate(engine, tiny_tokenizer, PROMPT, max_new_tokens=30, temperature=1.5, seed=seed))

    assert sampled(1) == sampled(1) != sampled(2)


def test_one_candidate_is_greedy(engine: TorchEngine, tiny_tokenizer) -> None:
    greedy = "".join(generate(engine, tiny_tokenizer, PROMPT, max_new_tokens=15))
    for narrow in ({"top_k": 1}, {"top_p": 1e-6}):
        assert "".join(generate(engine, tiny_tokenizer, PROMPT, max_new_tokens=15, temperature=3.0, **narrow)) == greedy


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({}, [0.1, 0.4, 0.2, 0.3]),
        ({"top_k": 2}, [0, 4 / 7, 0, 3 / 7]),
        ({"top_p": 0.75}, [0, 4 / 9, 2 / 9, 3 / 9]),
        ({"top_p": 0.4}, [0, 1, 0, 0]),
        ({"top_k": 3, "top_p": 0.69}, [0, 4 / 7, 0, 3 / 7]),
        ({"temperature": 0.5}, [1 / 30, 16 / 30, 4 / 30, 9 / 30]),
    ],
)
def test_the_distribution_that_is_drawn_from(settings: dict[str, float], wanted: list[float]) -> None:
    from pipeline.generation import _sample

    logits = torch.tensor([0.1, 0.4, 0.2, 0.3]).log() + 5
    generator = torch.Generator().manual_seed(0)
    every = {"temperature": 1.0, "top_k": None, "top_p": None} | settings
    draws = 4000
    counts = [0] * 4
    for _ in range(draws):
        counts[_sample(logits, every["temperature"], every["top_k"], every["top_p"], generator)] += 1
    for count, share in zip(counts, wanted, strict=True):
        # Five standard deviations of a binomial count; none where the share is 0 or 1.
        assert abs(count - draws * share) <= 5 * (draws * share * (1 - share)) ** 0.5 + 1e-6 * draws


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"temperature": -0.1}, "temperature >= 0"),
        ({"top_k": 0}, "top_k >= 1"),
        ({"top_p": 0.0}, "top_p <= 1"),
        ({"top_p": 1.1}, "top_p <= 1"),
        ({"top_p": float("nan")}, "top_p <= 1"),
        ({"temperature": float("nan")}, "a finite temperature"),
        ({"temperature": float("inf")}, "a finite temperature"),
        ({"temperature": float("-inf")}, "a finite temperature"),
        ({"seed": 1 << 64}, "more than 64 bits"),
        ({"seed": -(10**30)}, "more than 64 bits"),
        ({"max_new_tokens": 10**30}, "exceed the context of 67"),
        ({"max_new_tokens": 67}, "exceed the context of 67"),
    ],
)
def test_settings_out_of_range(engine: TorchEngine, tiny_tokenizer, settings: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        next(generate(engine, tiny_tokenizer, PROMPT, **settings))


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 1e-300},
        {"temperature": 5e-324},
        {"temperature": 1e308},
        {"temperature": 1.0, "top_k": 10**30},
        {"temperature": 1.0, "top_p": 5e-324},
        {"temperature": 1.0, "seed": (1 << 64) - 1},
        {"temperature": 1.0, "seed": -(1 << 63)},
    ],
)
def test_extreme_settings_sample_all_the_same(engine: TorchEngine, tiny_tokenizer, settings: dict) -> None:
    first, again = ("".join(generate(engine, tiny_tokenizer, PROMPT, max_new_tokens=9, **settings)) for _ in range(2))
    assert first == again
    greedy = "".join(generate(engine, tiny_tokenizer, PROMPT, max_new_tokens=9))
    if settings["temperature"] < 1 or settings.get("top_p"):
        assert first == greedy
    else:
        assert first != greedy


def test_logits_that_are_no_numbers_are_failed_work(engine: TorchEngine, tiny_tokenizer) -> None:
    with torch.no_grad():
        engine.model.transformer.ln_f.bias[3] = float("nan")
    for temperature in (0.0, 1.0):
        with pytest.raises(WorkError, match="torch gives NaN or infinity for token") as caught:
            list(generate(engine, tiny_tokenizer, PROMPT, max_new_tokens=3, temperature=temperature))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("generation", "config", "wanted"),
    [
        ([3, 5], 7, {3, 5}),
        (4, [7], {4}),
        (0, 7, {0}),
        (None, [7, 9], {7, 9}),
        ("absent", 7, {7}),
        (None, None, {0}),
        ([], 7, set()),
    ],
)
def test_the_tokens_that_end_a_text(generation, config, wanted: set[int], tmp_path: Path, tiny_tokenizer) -> None:
    if generation != "absent":
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": config}))
    assert end_tokens(tmp_path, tiny_tokenizer) == wanted


@pytest.mark.parametrize("said", ["0", 1.5, True, [None], [[3]], {"a": 1}, ["<|endoftext|>"]])
def test_ends_that_are_no_tokens_are_named(said, tmp_path: Path, tiny_tokenizer) -> None:
    path = tmp_path / "generation_config.json"
    for content, what in ((json.dumps({"eos_token_id": said}), "eos_token_id is"), ("{", "no readable JSON")):
        path.write_text(content)
        with pytest.raises(UserError, match=what) as caught:
            end_tokens(tmp_path, tiny_tokenizer)
        assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
def test_generation_ends_where_hugging_faces_does(name: str, cli, tiny_folder: Path, tiny_tokenizer, tmp_path) -> None:
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "model"))
    stock = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32)
    ids = torch.from_numpy(encode(PROMPT, tiny_tokenizer))[None]
    free = stock.generate(ids, max_new_tokens=20, do_sample=False, eos_token_id=-1, pad_token_id=0)[0, ids.shape[1] :]
    ends = [268, int(free[6])]  # no token of the text but that one
    (folder / "generation_config.json").unlink()
    path = folder / name
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | {"eos_token_id": ends}))
    stock = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32)
    out = stock.generate(ids, max_new_tokens=20, do_sample=False, pad_token_id=0)[0, ids.shape[1] :].tolist()
    assert len(out) < 20 and out[-1] == ends[1]
    wanted = tiny_tokenizer.decode(out[:-1], clean_up_tokenization_spaces=False)
    code, stdout, err = cli("generate", folder, "--prompt", PROMPT, "--max-new-tokens", 20, "--device", "cpu")
    assert (code, stdout) == (0, wanted + "\n"), err


def test_prompts_that_do_not_fit(engine: TorchEngine, tiny_tokenizer) -> None:
    with pytest.raises(UserError, match="the prompt is empty"):
        next(generate(engine, tiny_tokenizer, ""))
    with pytest.raises(UserError, match="exceed the context of 67"):
        next(generate(engine, tiny_tokenizer, "ä" * 40, max_new_tokens=1))
    full = "".join(generate(engine, tiny_tokenizer, "b" * 60, max_new_tokens=7))
    assert full  # 60 and 7 are the whole context


def test_it_starts_afresh_each_time(engine: TorchEngine, tiny_tokenizer) -> None:
    first = "".join(generate(engine, tiny_tokenizer, PROMPT, max_new_tokens=9))
    next(generate(engine, tiny_tokenizer, "the other hat", max_new_tokens=3))  # abandoned
    assert "".join(generate(engine, tiny_tokenizer, PROMPT, max_new_tokens=9)) == first
    assert isinstance(engine.cache, DynamicCache)


def test_the_command(cli, tiny_folder: Path, tiny_tokenizer) -> None:
    from pipeline.checkpoint import load_model

    ids = huggingface(load_model(tiny_folder), tiny_tokenizer, PROMPT, 11)
    command = ("generate", tiny_folder, "--prompt", PROMPT, "--max-new-tokens", 11)
    code, stdout, _ = cli(*command)
    assert (code, stdout) == (0, tiny_tokenizer.decode(ids, clean_up_tokenization_spaces=False) + "\n")
    sampling = ("--temperature", 2, "--top-k", 50, "--top-p", 0.95)
    outputs = [cli(*command, *sampling, "--seed", seed)[1] for seed in (4, 4, 5)]
    assert outputs[0] == outputs[1] != outputs[2]
    code, stdout, err = cli(*command, "--prompt", "the cat " * 50)
    assert (code, stdout, len(err.splitlines())) == (2, "", 1) and "exceed the context of 48" in err


def test_an_ir_answers_without_what_only_models_need(finished_run: Path) -> None:
    """Importing transformers' model code takes longer than everything else together."""
    script = (
        "import sys; from pipeline.cli import main\n"
        "try:\n"
        "    main()\n"
        "finally:\n"
        "    heavy = {'transformers.modeling_utils', 'datasets', 'optimum'}\n"
        "    print(sorted(heavy & set(sys.modules)), file=sys.stderr)\n"
    )
    command = [sys.executable, "-c", script, "generate", str(finished_run / "quantize/model")]
    command += ["--prompt", PROMPT, "--max-new-tokens", "3"]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True)
    assert done.stdout.strip() and done.stderr.splitlines()[-1] == "[]"
