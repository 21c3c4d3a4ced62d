"""A folder's tokenizer: what it says of a text is what transformers says, and no file's hidden state changes it."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, ByT5Tokenizer, GPT2LMHeadModel, PreTrainedTokenizerFast

from eval.errors import UserError
from pipeline.data import encode, scored_bytes
from pipeline.refusals import refusals
from pipeline.tokenizer import load_tokenizer

TRUNCATION = {"direction": "Right", "max_length": 12, "strategy": "LongestFirst", "stride": 3}
PADDING = {
    "strategy": {"Fixed": 200},
    "direction": "Left",
    "pad_to_multiple_of": 8,
    "pad_id": 7,
    "pad_type_id": 0,
    "pad_token": "[PAD]",
}
BEGINNING = {
    "type": "TemplateProcessing",
    "single": [
        {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
        {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}},
    ],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}},
}
TEXT = "the cat sat on the mat.\nIt säid: 猫 <|endoftext|> the End\n" * 5


def change(folder: Path, config: dict[str, Any] | None = None, **parts: Any) -> None:
    """Put `parts` into tokenizer.json, and `config` into tokenizer_config.json."""
    for name, new in (("tokenizer.json", parts), ("tokenizer_config.json", config or {})):
        raw = json.loads((folder / name).read_text(encoding="utf-8"))
        (folder / name).write_text(json.dumps(raw | new), encoding="utf-8")


def only_tokenizer_json(folder: Path) -> None:
    (folder / "tokenizer_config.json").unlink()


def vocabulary_and_merges(folder: Path) -> None:
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in model["merges"]))
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()


def slow(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    ByT5Tokenizer(extra_ids=0).save_pretrained(folder)


def special_tokens_split(folder: Path) -> None:
    change(folder, {"split_special_tokens": True})


def in_a_file_of_a_version(folder: Path) -> None:
    change(folder, {"fast_tokenizer_files": ["tokenizer.4.0.json"]}, truncation=TRUNCATION)
    (folder / "tokenizer.json").rename(folder / "tokenizer.4.0.json")


TOKENIZERS: dict[str, Callable[[Path], None]] = {
    "plain": lambda _: None,
    "truncation": lambda folder: change(folder, truncation=TRUNCATION),
    "padding": lambda folder: change(folder, padding=PADDING),
    "both": lambda folder: change(folder, truncation=TRUNCATION, padding=PADDING),
    "both, by GPT-2's class": lambda folder: change(
        folder, {"tokenizer_class": "GPT2TokenizerFast"}, truncation=TRUNCATION, padding=PADDING
    ),
    "of a version": in_a_file_of_a_version,
    "beginning and end": lambda folder: change(folder, post_processor=BEGINNING),
    "lower case": lambda folder: change(folder, normalizer={"type": "Lowercase"}),
    "normalizer by GPT-2's class": lambda folder: change(
        folder, {"tokenizer_class": "GPT2Tokenizer"}, normalizer={"type": "Lowercase"}
    ),
    "space before": lambda folder: change(folder, {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True}),
    "short": lambda folder: change(folder, {"model_max_length": 5}),
    "another's class": lambda folder: change(folder, {"tokenizer_class": "LlamaTokenizer"}, truncation=TRUNCATION),
    "no one's class": lambda folder: change(folder, {"tokenizer_class": "NoSuchTokenizer"}),
    "code of its own": lambda folder: change(
        folder, {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": [None, "mine.Mine"]}}
    ),
    "tokenizer.json alone": only_tokenizer_json,
    "vocabulary and merges": vocabulary_and_merges,
    "slow": slow,
    "special tokens split": special_tokens_split,
}
TEXTS = {
    "stored": TEXT.encode(),
    "mark": b"\xef\xbb\xbf" + TEXT.encode(),
    "windows": TEXT.replace("\n", "\r\n").encode(),
    "old mac": TEXT.replace("\n", "\r").encode(),
    "separators": "the cat\x85sat on\u2028the mat\u2029and\x0cthe\x1chat\x0bhat".encode(),
    "one line": b"the cat sat on the mat " * 60,
    "newlines": b"\n\n\nthe cat\n\n\n\n \n",
    "markdown": b"# the cat\n\n- sat\n- on\n\n```python\nmat = [\n    1,\n]\n```\n",
    "half a character": "🐈the cat sat".encode(),
}


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


def own(folder: Path, text: str) -> list[int]:
    """The tokenizer's own call, of transformers alone."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return tokenizer(text, add_special_tokens=False, truncation=False, padding=False)["input_ids"]


@torch.no_grad()
def by_hand(folder: Path, ids: list[int], stride: int, context: int = 48) -> float:
    """The mean NLL of the tokens after the first, window by window, by transformers' own GPT-2 in FP32."""
    model = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32).eval()
    total, scored, begin = 0.0, 1, 0
    while scored < len(ids):
        end = min(begin + context, len(ids) - 1)
        found = model(torch.tensor([ids[begin:end]])).logits[0].double().log_softmax(-1)
        for target in range(scored, end + 1):
            total -= float(found[target - 1 - begin, ids[target]])
        scored, begin = end + 1, begin + stride
    return total / (len(ids) - 1)


@pytest.mark.parametrize(
    ("tokenizer", "text"), [*((name, "stored") for name in TOKENIZERS), *(("both", name) for name in TEXTS)]
)
def test_numbers_are_those_of_transformers_on_the_raw_text(
    tokenizer: str, text: str, folder: Path, tmp_path: Path, cli
) -> None:
    TOKENIZERS[tokenizer](folder)
    (tmp_path / "text.txt").write_bytes(TEXTS[text])
    content = TEXTS[text].decode("utf-8-sig")
    ids = own(folder, content)
    command = ("evaluate", folder, "--text", tmp_path / "text.txt", "--engine", "torch", "--device", "cpu", "--json")
    for stride in (48, 17):
        code, stdout, err = cli(*command, "--stride", stride)
        assert code == 0, err
        found = json.loads(stdout)
        assert found["tokens"] == len(ids) - 1
        nll = by_hand(folder, ids, stride)
        assert found["nll"] == pytest.approx(nll, rel=1e-5)
        assert found["perplexity"] == pytest.approx(math.exp(nll), rel=1e-4)
        # The first token is "the", of bytes "t", a newline, "#", or the first byte of a cat.
        first = {"newlines": 1, "markdown": 1, "half a character": 1}.get(text, 1 if tokenizer == "slow" else 3)
        assert found["scored_bytes"] == len(content.encode()) - first
        assert found["bits_per_byte"] == pytest.approx(nll * (len(ids) - 1) / math.log(2) / found["scored_bytes"])


@pytest.mark.parametrize("name", TOKENIZERS)
def test_copies_say_the_same_and_keep_nothing_of_an_earlier_call(name: str, folder: Path, tmp_path: Path) -> None:
    TOKENIZERS[name](folder)
    wanted = own(folder, TEXT)
    tokenizer = load_tokenizer(folder, 269)
    assert encode(TEXT, tokenizer).tolist() == wanted
    shutil.copytree(folder, tmp_path / "copy", ignore=shutil.ignore_patterns("*token*", "vocab.json", "merges.txt"))
    tokenizer.save_pretrained(tmp_path / "copy")
    assert encode(TEXT, load_tokenizer(tmp_path / "copy")).tolist() == wanted == own(tmp_path / "copy", TEXT)
    saved = [json.loads(path.read_text()) for path in (tmp_path / "copy").glob("tokenizer*.json")]
    assert saved and not any(raw.get(key) for raw in saved for key in ("truncation", "padding", "max_length", "stride"))


def test_a_copy_with_a_stored_call_is_another_load(folder: Path, tiny_choices: dict[str, Any]) -> None:
    """Runs of versions that kept it are not up to date; all others are."""
    from pipeline.recipe import Recipe, parse_recipe
    from pipeline.stages import load

    recipe = parse_recipe(Recipe, tiny_choices | {"load": {"source": str(folder)}})
    assert load.config(recipe).keys() == {"source", "revision", "content"}
    change(folder, padding=PADDING)
    assert load.config(recipe).keys() - {"source", "revision", "content"} == {"left_out"}


def nothing(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()


def vocabulary_without_merges(folder: Path) -> None:
    vocabulary_and_merges(folder)
    (folder / "merges.txt").unlink()


def merges_without_vocabulary(folder: Path) -> None:
    vocabulary_and_merges(folder)
    (folder / "vocab.json").unlink()


def nothing_but_a_name(folder: Path) -> None:
    change(folder, {"tokenizer_class": "GPT2Tokenizer"})
    (folder / "tokenizer.json").unlink()


def a_folder_in_its_place(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").mkdir()


UNUSABLE: dict[str, Callable[[Path], None]] = {
    "nothing": nothing,
    "nothing but a name": nothing_but_a_name,
    "vocabulary without merges": vocabulary_without_merges,
    "merges without vocabulary": merges_without_vocabulary,
    "a folder": a_folder_in_its_place,
    "cut off": lambda folder: (folder / "tokenizer.json").write_text('{"version": "1.0", "model": {'),
    "a list": lambda folder: (folder / "tokenizer.json").write_text("[]"),
    "config is a list": lambda folder: (folder / "tokenizer_config.json").write_text("[]"),
    "config is no JSON": lambda folder: (folder / "tokenizer_config.json").write_bytes(b"\xff{"),
    "class is a number": lambda folder: change(folder, {"tokenizer_class": 5}),
    "an empty vocabulary": lambda folder: change(
        folder, added_tokens=[], model={"type": "BPE", "vocab": {}, "merges": []}
    ),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_a_folder_without_a_usable_tokenizer_is_refused(name: str, folder: Path, capfd) -> None:
    UNUSABLE[name](folder)
    with pytest.raises(UserError, match="no usable tokenizer") as caught:
        load_tokenizer(folder)
    assert str(caught.value).startswith(f"{folder}: ") and "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_a_model_is_no_tokenizer(folder: Path) -> None:
    """Where config.json does not tell better, transformers takes the class by its name, whatever that is."""
    change(folder, {"tokenizer_class": "GPT2LMHeadModel"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "compact_gpt2"}))
    with pytest.raises(UserError, match="no usable tokenizer") as caught:
        load_tokenizer(folder)
    assert "\n" not in str(caught.value)


def test_load_refuses_it_at_once(folder: Path, cli, tiny_recipe: Path, tmp_path: Path) -> None:
    nothing(folder)
    words = ("--recipe", tiny_recipe, "--set", f"load.source={folder}", "--out", tmp_path / "run")
    code, stdout, err = cli("load", *words)
    assert (code, stdout) == (2, "") and "no usable tokenizer" in err.splitlines()[-1] and "Traceback" not in err
    assert not (tmp_path / "run" / "load").exists()


def test_tokens_beyond_the_model_are_named_on_every_engine(finished_run: Path, cli, tmp_path: Path) -> None:
    for part in ("finetune/model", "quantize/ir_fp32"):
        folder = Path(shutil.copytree(finished_run / part, tmp_path / part))
        tokens = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
        more = [{**tokens[0], "id": 269 + number, "content": f"[{number}]"} for number in range(4)]
        change(folder, added_tokens=[*tokens, *more])
        for verb in (
            ("evaluate", folder),
            ("evaluate", folder, "--tasks", "lambada", "--task-data", tmp_path),
            ("generate", folder, "--prompt", "a"),
            ("bench", folder),
            ("compare", folder, folder),
        ):
            (tmp_path / "lambada_test.jsonl").write_text('{"text": "a b"}\n{"text": "a c"}\n')
            code, stdout, err = cli(*verb)
            assert (code, stdout, err.count("\n")) == (2, "", 1), err
            assert f"{folder}: the tokenizer has tokens that the model does not ('[0]' is 269, " in err
            assert "..." in err and "0 to 268" in err


def test_a_panic_is_one_line(folder: Path, cli, tmp_path: Path) -> None:
    """This expression takes more tries than Oniguruma allows, upon which tokenizers panics: no `Exception`."""
    hard = {"type": "Split", "pattern": {"Regex": "(a+)+(a+)+$b"}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    change(folder, pre_tokenizer={"type": "Sequence", "pretokenizers": [hard, level]})
    (tmp_path / "text.txt").write_text("a" * 40 + "c")
    code, stdout, err = cli("evaluate", folder, "--text", tmp_path / "text.txt")
    assert (code, stdout, err.count("\n")) == (2, "", 1)
    assert "the tokenizer gives up on the text (Onig: Regex search error" in err
    assert encode("b c", load_tokenizer(folder)).tolist() == own(folder, "b c")
    words = ("--tokenizer", folder, "--workers", 1, "--out", tmp_path / "shards")
    code, stdout, err = cli("data", "prepare", tmp_path / "text.txt", *words)
    assert (code, stdout, err.count("\n")) == (2, "", 1)
    assert "the tokenizer gives up on a document (Onig: Regex search error" in err


def test_an_interrupt_is_none_of_the_tokenizers_refusals() -> None:
    with pytest.raises(KeyboardInterrupt), refusals("no matter"):
        raise KeyboardInterrupt


@pytest.mark.parametrize("name", ["both", "slow", "beginning and end"])
def test_agreement_and_tasks_hear_the_whole_text(
    name: str, folder: Path, cli, tmp_path: Path, task_data: Path, tiny_folder: Path
) -> None:
    TOKENIZERS[name](folder)
    (tmp_path / "text.txt").write_bytes(TEXTS["stored"])
    ids = own(folder, TEXT)
    code, stdout, err = cli(
        *("compare", folder, folder, "--text", tmp_path / "text.txt", "--tokens", 10**6, "--device", "cpu", "--json")
    )
    assert code == 0, err
    assert json.loads(stdout)["tokens"] >= len(ids) - 48
    if name != "slow":
        found = []
        for model in (folder, tiny_folder):
            words = ("--tasks", "hellaswag,lambada", "--task-data", task_data, "--task-cache", tmp_path / "answers")
            code, stdout, err = cli("evaluate", model, *words, "--device", "cpu", "--json")
            assert code == 0, err
            found.append(json.loads(stdout)["tasks"])
        assert found[0] == found[1]


@torch.no_grad()
def test_agreement_is_that_of_transformers_on_the_raw_text(folder: Path, cli, tmp_path: Path) -> None:
    slow(folder)
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    model = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32).eval()
    changed = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32).eval()
    changed.transformer.wte.weight.mul_(0.9)
    changed.save_pretrained(other)
    (tmp_path / "text.txt").write_bytes(TEXTS["separators"])
    options = ("--text", tmp_path / "text.txt", "--tokens", 10**6, "--precision", "fp32", "--device", "cpu", "--json")
    code, stdout, err = cli("compare", folder, other, *options)
    assert code == 0, err
    windows = torch.tensor([own(folder, TEXTS["separators"].decode())]).split(48, 1)
    p, q = (torch.cat([m(part).logits[0] for part in windows]).double().log_softmax(-1) for m in (model, changed))
    found = json.loads(stdout)
    assert found["tokens"] == len(p)
    assert found["kl"][0][1] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-5)
    assert found["kl"][1][0] == pytest.approx(float((q.exp() * (q - p)).sum(-1).mean()), rel=1e-5)
    assert found["top1"][0][1] == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))


def test_no_text_is_too_long_for_the_tokenizer(tiny_tokenizer) -> None:
    """One line of a million letters, and one of a million spaces: all of it, in about the time of many lines."""
    for line in ("the cat " * 125_000, " " * 1_000_000):
        ids = encode(line, tiny_tokenizer)
        assert tiny_tokenizer.decode(ids.tolist(), clean_up_tokenization_spaces=False) == line


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
SPACED = {"special": False, "single_word": False, "normalized": False, "lstrip": False, "rstrip": True}


@pytest.mark.parametrize(
    ("parts", "text", "first"),
    [
        ({}, "aa", b"a"),
        ({}, "<|endoftext|>a", b"<|endoftext|>"),
        ({}, "  a", b" "),
        ({}, "猫", "猫".encode()[:1]),
        ({}, "\ufffd cat", b"\xef"),
        ({"normalizer": {"type": "Lowercase"}}, "The cat", b"The"),
        ({"normalizer": {"type": "NFC"}}, "e\u0301", b"\xc3"),
        ({"normalizer": {"type": "Strip", "strip_left": True, "strip_right": True}}, " \n the cat", b" \n the"),
        ({"pre_tokenizer": BYTES | {"add_prefix_space": True}}, "xa", b""),
        ({"pre_tokenizer": BYTES | {"add_prefix_space": True}}, "猫", b""),
        ({"post_processor": BYTES}, "  \n\nthe", b" "),
        ({"added_tokens": [{"id": 0, "content": "<|endoftext|>", **SPACED}]}, "<|endoftext|>  the", b"<|endoftext|>  "),
    ],
)
def test_scored_bytes_leave_out_what_the_first_token_stands_for(
    parts: dict[str, Any], text: str, first: bytes, folder: Path
) -> None:
    change(folder, **parts)
    assert scored_bytes(text, load_tokenizer(folder)) == len(text.encode()) - len(first)


@pytest.mark.parametrize(("text", "first"), [("the cat", "the"), ("猫 the", "\udce7"), ("a", "")])
def test_scored_bytes_of_words_with_bytes_to_fall_back_on(text: str, first: str) -> None:
    """As SentencePiece's: a space is put before a text, and unknown letters are written as their bytes."""
    vocabulary = {token: number for number, token in enumerate(["<unk>", "▁the", "▁", "▁cat", "c", "a"])}
    vocabulary |= {f"<0x{byte:02X}>": 6 + byte for byte in range(256)}
    bpe = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True, ignore_merges=True))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never" if text[0] == "猫" else "always")
    bpe.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe)
    assert scored_bytes(text, tokenizer) == len(text.encode()) - len(first.encode(errors="surrogateescape"))


@pytest.mark.parametrize(("text", "first"), [("ab", 1), ("猫", 1), ("</s>a", 4)])
def test_scored_bytes_of_a_slow_tokenizer(text: str, first: int, folder: Path) -> None:
    slow(folder)
    assert scored_bytes(text, load_tokenizer(folder)) == len(text.encode()) - first
