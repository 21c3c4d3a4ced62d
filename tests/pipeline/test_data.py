"""Packing, padding and reading: nothing lost, nothing scored twice, every bad text named in one line."""

import lzma

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import Trainer, TrainingArguments

from eval.errors import UserError
from pipeline.data import IGNORE, encode, encode_many, sha256_text, tokenize_dataset
from pipeline.reading import read_text

ROWS = ["the cat sat.\n", "", "Ünïcode – 猫 🐈\n", " = Title = \n", "on the mat, the other cat", "   "]


def _one_line(caught) -> str:
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("block_size", [1, 7, 16])
def test_packed_blocks_are_the_text(tiny_tokenizer, block_size):
    blocks = tokenize_dataset(Dataset.from_dict({"text": ROWS, "id": range(6)}), tiny_tokenizer, block_size)
    wanted = tiny_tokenizer("\n\n".join(ROWS), add_special_tokens=False)["input_ids"]
    assert len(blocks) == len(wanted) // block_size
    joined = torch.cat([block["input_ids"] for block in blocks]).tolist()
    assert joined == wanted[: len(blocks) * block_size]
    for block in blocks:
        assert block.keys() == {"input_ids", "labels"}
        assert block["input_ids"].dtype == torch.int64 and torch.equal(block["input_ids"], block["labels"])
    if block_size == 1:
        assert tiny_tokenizer.decode(joined) == "\n\n".join(ROWS)


def test_strings_lists_and_datasets_pack_alike(tiny_tokenizer):
    from_dataset = tokenize_dataset(Dataset.from_dict({"text": ROWS}), tiny_tokenizer, 5)
    for other in (ROWS, "\n\n".join(ROWS)):
        assert np.array_equal(from_dataset.tokens, tokenize_dataset(other, tiny_tokenizer, 5).tokens)


def test_padding_is_masked_and_not_scored(tiny_tokenizer):
    blocks = tokenize_dataset(Dataset.from_dict({"text": ROWS}), tiny_tokenizer, 11, pack=False)
    texts = [row for row in ROWS if row.strip()]
    assert len(blocks) == len(texts)
    for block, text in zip(blocks, texts, strict=True):
        ids = encode(text, tiny_tokenizer)[:11]
        assert len(block["input_ids"]) == 11
        assert block["input_ids"].tolist() == [*ids, *[tiny_tokenizer.eos_token_id] * (11 - len(ids))]
        assert block["attention_mask"].tolist() == [1] * len(ids) + [0] * (11 - len(ids))
        assert block["labels"].tolist() == [*ids, *[IGNORE] * (11 - len(ids))]


def test_padding_goes_to_the_longest_row_with_the_padding_token(tiny_tokenizer):
    rows = ["ab", "abcdefg"]
    tiny_tokenizer.pad_token_id = 9
    try:
        blocks = tokenize_dataset(rows, tiny_tokenizer, 50, pack=False)
    finally:
        tiny_tokenizer.pad_token = None
    assert blocks.tokens.shape == (2, 7)
    assert blocks[0]["input_ids"].tolist()[2:] == [9] * 5


def test_an_end_of_text_token_in_the_text_is_scored(tiny_tokenizer):
    """Padding is known by its place, not by its token."""
    (block,) = tokenize_dataset(["a<|endoftext|>b"], tiny_tokenizer, 9, pack=False)
    assert block["labels"].tolist()[1] == tiny_tokenizer.eos_token_id == 0 and block["attention_mask"].all()


def test_padded_rows_cost_what_they_cost_alone(tiny_model, tiny_tokenizer):
    blocks = tokenize_dataset(ROWS, tiny_tokenizer, 23, pack=False)
    for block in blocks:
        n = int(block["attention_mask"].sum())
        with torch.no_grad():
            padded = tiny_model(**{key: value[None] for key, value in block.items()}).loss
            ids = block["input_ids"][None, :n]
            torch.testing.assert_close(padded, tiny_model(ids, labels=ids).loss, atol=1e-5, rtol=0)


@pytest.mark.parametrize("pack", [True, False])
def test_the_trainer_takes_the_blocks(tiny_model, tiny_tokenizer, tmp_path, pack):
    blocks = tokenize_dataset(ROWS, tiny_tokenizer, 13, pack=pack)
    arguments = TrainingArguments(
        tmp_path, max_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True, disable_tqdm=True
    )
    before = tiny_model.lm_head.weight.clone()
    result = Trainer(tiny_model, arguments, train_dataset=blocks).train()
    assert np.isfinite(result.training_loss) and not torch.equal(before, tiny_model.lm_head.weight)


@pytest.mark.parametrize("text", ["the cat", ["the", "cat"], "", []])
def test_text_shorter_than_a_block(tiny_tokenizer, text):
    with pytest.raises(UserError, match="shorter than one block of 64") as caught:
        tokenize_dataset(text, tiny_tokenizer, 64)
    _one_line(caught)


def test_datasets_without_usable_text(tiny_tokenizer):
    with pytest.raises(UserError, match=r"columns \['sentence'\]; one named 'text'"):
        tokenize_dataset(Dataset.from_dict({"sentence": ROWS}), tiny_tokenizer, 8)
    with pytest.raises(UserError, match="every row of the text is empty"):
        tokenize_dataset(Dataset.from_dict({"text": ["", " \n"]}), tiny_tokenizer, 8, pack=False)
    for rows, kind in [(["a", None], "NoneType"), ([3, 4], "int")]:
        for pack in (True, False):
            with pytest.raises(UserError, match=f"holds {kind}") as caught:
                tokenize_dataset(Dataset.from_dict({"text": rows}), tiny_tokenizer, 8, pack=pack)
            _one_line(caught)


@pytest.mark.parametrize("batch", [1, 2, 100])
def test_documents_are_encoded_in_order_and_closed(tiny_tokenizer, batch):
    documents = list(encode_many(iter(ROWS), tiny_tokenizer, batch))
    assert [ids[:-1].tolist() for ids in documents] == [encode(row, tiny_tokenizer).tolist() for row in ROWS]
    assert all(ids[-1] == tiny_tokenizer.eos_token_id for ids in documents)


def test_text_files_plain_and_packed(tmp_path):
    text = "".join(ROWS)
    plain, packed = tmp_path / "a.txt", tmp_path / "a.txt.xz"
    plain.write_bytes(text.encode())
    packed.write_bytes(lzma.compress(text.encode()))
    assert read_text(plain) == read_text(str(packed)) == text
    assert sha256_text("abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


BAD_FILES = {
    "utf16.txt": ("a cat".encode("utf-16"), "not UTF-8 text"),
    "utf16le.txt": ("a cat".encode("utf-16-le"), "NUL bytes"),
    "latin1.txt": ("déjà".encode("latin-1"), r"not UTF-8 text \(byte 1\)"),
    "binary.bin": (bytes(range(256)), "not UTF-8 text"),
    "zeros.bin": (bytes(100), "NUL bytes"),
    "empty.txt": (b"", "empty"),
    "blank.txt": (b" \n\t\n", "empty"),
    "cut.xz": (lzma.compress(b"text " * 999)[:-20], r"not a whole \.xz file"),
    "nothing.xz": (b"", r"not a whole \.xz file"),
    "fake.xz": (b"no archive", r"not a whole \.xz file"),
    "of_nothing.xz": (lzma.compress(b""), "empty"),
    "of_binary.xz": (lzma.compress(b"\xff\xfe\x00"), "not UTF-8 text"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_files_that_hold_no_text(tmp_path, name):
    raw, message = BAD_FILES[name]
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(UserError, match=message) as caught:
        read_text(tmp_path / name)
    assert _one_line(caught).startswith(str(tmp_path / name))


def test_files_that_cannot_be_read(tmp_path):
    for path, message in [(tmp_path / "missing.txt", "No such file"), (tmp_path, "Is a directory")]:
        with pytest.raises(UserError, match=message) as caught:
            read_text(path)
        assert _one_line(caught).startswith(str(path))
