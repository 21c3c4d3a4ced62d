"""Task scores against sums over Hugging Face's logits, and an adapter that can be stopped at any time."""

import bz2
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from lm_eval.api.instance import Instance

from eval.errors import UserError, WorkError
from eval.task_data import Documents, load_documents
from eval.tasks import EngineLM, evaluate
from pipeline.data import encode

WORDS = "the cat dog hat mat sat saw ran on and other old red big bird sang"


def words(rng: np.random.Generator, count: int) -> str:
    return " ".join(rng.choice(WORDS.split(), count))


def endings(count: int = 5, seed: int = 0) -> Documents:
    """Questions with four endings of different lengths; the last question is longer than the context of 67 tokens."""
    rng = np.random.default_rng(seed)
    rows = [
        {
            "query": words(rng, 30 if index == count - 1 else 1 + 2 * index),
            "choices": [words(rng, 1 + (index + c) % 4) for c in range(4)],
            "gold": index % 4,
        }
        for index in range(count)
    ]
    return Documents(rows, "ab")


@pytest.fixture
def lm(make_engine, tiny_model, tiny_tokenizer):
    def make(**options) -> EngineLM:
        return EngineLM(make_engine(tiny_model), tiny_tokenizer, encode, **options)

    return make


def log_p(model, ids: list[int]) -> torch.Tensor:
    """`[len(ids) - 1, vocab]`: of each token after the first."""
    with torch.no_grad():
        return model(torch.tensor([ids[:-1]])).logits[0].double().log_softmax(-1)


def test_hellaswag_is_the_least_mean_loss_a_token(lm, tiny_gpt2, tiny_tokenizer) -> None:
    documents = endings()
    right = []
    for row in documents.rows:
        losses = []
        for choice in row["choices"]:
            ids = tiny_tokenizer(f"{row['query']} {choice}")["input_ids"]
            scored = len(ids) - len(tiny_tokenizer(row["query"])["input_ids"])
            ids = ids[-68:]
            found = log_p(tiny_gpt2, ids)
            losses.append(-np.mean([float(found[i - 1, ids[i]]) for i in range(len(ids) - scored, len(ids))]))
        right.append(int(np.argmin(losses) == row["gold"]))
    # Some right, some wrong: else the score would say nothing.
    assert 0 < sum(right) < 5, right
    score = evaluate(lm(), {"hellaswag": documents})["hellaswag"]
    assert score.accuracy == pytest.approx(np.mean(right))
    assert score.stderr == pytest.approx(np.std(right, ddof=1) / math.sqrt(5))
    assert (score.documents, score.of, score.data_sha256) == (5, 5, "ab")
    limited = evaluate(lm(), {"hellaswag": documents}, limit=3)["hellaswag"]
    assert (limited.accuracy, limited.documents, limited.of) == (pytest.approx(np.mean(right[:3])), 3, 5)


def test_lambada_wants_all_of_the_last_word(lm, tiny_gpt2, tiny_tokenizer) -> None:
    rng = np.random.default_rng(3)
    prompts = [words(rng, 3 + index % 5) for index in range(200)]
    known, others = [], []
    for prompt in prompts:
        ids = tiny_tokenizer(prompt)["input_ids"]
        with torch.no_grad():
            text = tiny_tokenizer.decode([int(tiny_gpt2(torch.tensor([ids])).logits[0, -1].argmax())])
        if text.startswith(" ") and len(text) > 1:
            known.append({"query": prompt, "choices": [text[1:]], "gold": 0})
        elif len(others) < 4:
            others.append({"query": prompt, "choices": ["bird"], "gold": 0})
    assert known
    score = evaluate(lm(), {"lambada": Documents(known[:3] + others, "")})["lambada"]
    assert score.accuracy == pytest.approx(len(known[:3]) / (len(known[:3]) + 4))


def test_greedy_means_every_token(lm, tiny_gpt2) -> None:
    prompt = [5, 9, 200]
    written = tiny_gpt2.generate(
        torch.tensor([prompt]), max_new_tokens=4, do_sample=False, eos_token_id=-1, pad_token_id=0
    )[0, 3:].tolist()
    other = [*written[:2], (written[2] + 1) % 269, written[3]]
    answers = lm()._loglikelihood_tokens([(None, prompt, written), (None, prompt, other)], disable_tqdm=True)
    assert [greedy for _, greedy in answers] == [True, False]
    for continuation, (score, _) in zip((written, other), answers, strict=True):
        found = log_p(tiny_gpt2, prompt + continuation)[2:]
        wanted = sum(float(row[token]) for row, token in zip(found, continuation, strict=True))
        assert score == pytest.approx(wanted, rel=1e-5)


def test_batches_change_nothing_and_go_from_long_to_short(lm) -> None:
    one, many = lm(batch=1), lm(batch=7)
    documents = {"hellaswag": endings(7)}
    assert evaluate(one, documents) == evaluate(many, documents)
    for key, (score, greedy) in one._known.items():
        assert many._known[key] == (pytest.approx(score, rel=1e-4), greedy)
    lengths = [ids.shape for _, _, ids in many.engine.calls]
    assert lengths == sorted(lengths, key=lambda shape: -shape[1]) and [shape[0] for shape in lengths] == [7] * 4
    assert lengths[0][1] == 67


def test_a_stopped_evaluation_goes_on_where_it_was(lm, tmp_path: Path) -> None:
    documents, path = {"hellaswag": endings(6)}, tmp_path / "new" / "answers.jsonl"
    whole = evaluate(lm(), documents)

    stopped = lm(batch=4, responses=path)
    calls, answer = stopped.engine.calls, stopped.engine.logits

    def breaks(input_ids: torch.Tensor) -> torch.Tensor:
        if len(calls) == 3:
            raise KeyboardInterrupt
        return answer(input_ids)

    stopped.engine.logits = breaks
    with pytest.raises(KeyboardInterrupt):
        evaluate(stopped, documents)
    assert len(path.read_text().splitlines()) == 12
    path.write_text(path.read_text()[:-9])  # the last line cut off as by a kill

    resumed = lm(batch=4, responses=path)
    assert evaluate(resumed, documents) == whole
    assert sum(len(ids) for _, _, ids in resumed.engine.calls) == 24 - 11
    again = lm(responses=path)
    assert evaluate(again, documents) == whole and not again.engine.calls
    path.write_text('[1]\n{"a": 2}\nnull\n["k", "x", true]\n\xff\n')
    assert evaluate(lm(responses=path), documents) == whole


def test_rolling_scores_each_token_once(lm, tiny_gpt2, tiny_tokenizer) -> None:
    texts = [words(np.random.default_rng(seed), count) for seed, count in ((1, 4), (2, 40))]
    wanted = []
    for text in texts:
        ids = tiny_tokenizer(text)["input_ids"]
        first = [0, *ids[:67]]
        found = log_p(tiny_gpt2, first)
        total = sum(float(found[i, token]) for i, token in enumerate(first[1:]))
        begin = 67
        while begin < len(ids):
            end = min(begin + 67, len(ids))
            found = log_p(tiny_gpt2, ids[end - 68 : end])
            total += sum(float(row[token]) for row, token in zip(found[begin - end :], ids[begin:end], strict=True))
            begin = end
        wanted.append(total)
    assert len(tiny_tokenizer(texts[1])["input_ids"]) > 67
    requests = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in texts]
    assert lm().loglikelihood_rolling(requests, disable_tqdm=True) == pytest.approx(wanted, rel=1e-5)


def test_continuations_are_greedy_and_stop(lm, tiny_gpt2, tiny_tokenizer) -> None:
    def ask(options: dict) -> str:
        return lm().generate_until([Instance("generate_until", {}, ("the cat", options), 0)], disable_tqdm=True)[0]

    ids = tiny_tokenizer("the cat", return_tensors="pt")["input_ids"]
    written = tiny_gpt2.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=0, pad_token_id=0)
    text = tiny_tokenizer.decode(written[0, ids.shape[1] :])
    assert ask({"max_gen_toks": 12}) == text and len(text) > 5
    stop = text[3:5]
    assert ask({"until": [stop, "never there"], "max_gen_toks": 12}) == text.partition(stop)[0]
    assert ask({"until": stop, "max_gen_toks": 12}) == text.partition(stop)[0]
    with pytest.raises(UserError, match="sampling"):
        ask({"do_sample": True})


def test_an_engine_that_breaks_is_told(lm) -> None:
    broken = lm()
    broken.engine.logits = lambda ids: torch.full((*ids.shape, 269), float("nan"))
    with pytest.raises(WorkError, match=r"log-likelihood of .* is nan"):
        evaluate(broken, {"hellaswag": endings()})


SIX = "Sport: a man runs. he\n2\nsits.\nsings.\nfalls down.\nstops.\nArt: she\n0\na: b\nb\nc\nd\n"
ROWS = [
    {"query": "a man runs. he", "choices": ["sits.", "sings.", "falls down.", "stops."], "gold": 2},
    {"query": "she", "choices": ["a: b", "b", "c", "d"], "gold": 0},
]


def test_documents_from_files(tmp_path: Path) -> None:
    place = tmp_path / "deep" / "hellaswag"
    place.mkdir(parents=True)
    (place / "hellaswag_val_full.txt.bz2").write_bytes(bz2.compress(SIX.encode()))
    packed = load_documents("hellaswag", tmp_path)
    assert packed.rows == ROWS
    for form in (SIX, "\ufeff" + SIX, SIX.replace("\n", "\r\n")):
        (place / "hellaswag_val.txt").write_bytes(form.encode())
        assert load_documents("hellaswag", tmp_path) == packed
    lines = [{"ctx": row["query"], "endings": row["choices"], "label": row["gold"]} for row in ROWS]
    (place / "hellaswag_val.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert load_documents("hellaswag", tmp_path) == packed
    passages = ['"Well"?\n\nI saw a  cat', "one two"]
    (tmp_path / "lambada_test.jsonl").write_text("\n".join(json.dumps({"text": text}) + "\n" for text in passages))
    assert load_documents("lambada", tmp_path).rows == [
        {"query": '"Well"?\n\nI saw a ', "choices": ["cat"], "gold": 0},
        {"query": "one", "choices": ["two"], "gold": 0},
    ]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("hellaswag_val.txt", SIX[:-3].encode(), "damaged at document 2"),
        ("hellaswag_val.txt", SIX.replace("2\n", "4\n").encode(), "damaged at document 1 (4 endings and a label"),
        ("hellaswag_val.txt", SIX.replace("2\n", "two\n").encode(), "damaged at document 1"),
        ("hellaswag_val.txt.bz2", b"BZh9 no more", "Invalid data stream; give a readable file"),
        ("hellaswag_val.txt.bz2", bz2.compress(SIX.encode())[:-9], "damaged at document 1"),
        ("hellaswag_val.jsonl", b'{"ctx": "a"}\n', "damaged at document 1 ('endings')"),
        ("hellaswag_val.jsonl", b"\xff\n", "damaged at document 1"),
        ("hellaswag_val.jsonl", b"3\n", "damaged at document 1"),
        ("hellaswag_val.jsonl", b'{"ctx": 3, "endings": ["a", "b", "c", "d"], "label": 0}\n', "4 endings and a label"),
        ("hellaswag_val.jsonl", b'{"ctx": "a", "endings": [1, 2, 3, 4], "label": 0}\n', "4 endings and a label"),
        ("hellaswag_val.jsonl", b'{"ctx": "a", "endings": "abcd", "label": 0}\n', "4 endings and a label"),
        ("hellaswag_val.jsonl", b'{"ctx": "a", "endings": ["a", "b", "c", "d"], "label": 1.7}\n', "damaged"),
        ("hellaswag_val.jsonl", b'{"ctx": "a", "endings": ["a", "b", "c", "d"], "label": true}\n', "damaged"),
        ("lambada_test.jsonl", b'{"text": null}\n', "a passage of two words"),
        ("lambada_test.jsonl", b"[" * 99_999, "damaged at document 1"),
        ("lambada_test.jsonl", b'{"text": "half \\ud83d"}\n', "damaged at document 1"),
        ("lambada_test.jsonl", b'{"text": "word"}\n', "a passage of two words"),
        ("lambada_test.jsonl", b'{"text": "two words"}\n', "1 documents; a score needs at least 2"),
        ("other.txt", b"", "no hellaswag_val*.jsonl or hellaswag_val*.txt"),
    ],
)
def test_damaged_documents(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        load_documents(name.partition("_")[0].replace("other.txt", "hellaswag"), tmp_path)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_unknown_task_and_a_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="task other: unknown; give one of hellaswag, lambada"):
        load_documents("other")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"Rowan/hellaswag cannot be loaded .*give --task-data FOLDER"):
        load_documents("hellaswag")
