"""What a model folder may hold: the number that stock transformers gets from it, or one line, on both engines."""

import json
import os
import random
import shutil
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from cuda_ext import CheckpointError
from cuda_ext.packing import pack
from eval.errors import UserError
from pipeline.checkpoint import check_generation, load_model
from pipeline.engines.torch import TorchEngine

IDS = torch.tensor([[1, 2, 3, 5, 8, 13, 21]])
POSITIONS = 24
SHAPE = {"n_embd": 64, "n_head": 2, "n_layer": 2, "n_positions": POSITIONS, "vocab_size": 61}
SHAPE |= {"bos_token_id": 0, "eos_token_id": 0}
COMPUTING = ("n_head", "layer_norm_epsilon", "activation_function")
Weights = dict[str, torch.Tensor]
TABLE, HEAD = "transformer.wte.weight", "lm_head.weight"
DEEP = "[" * 10_000 + "]" * 10_000


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stock GPT-2 whose heads the CUDA kernels know."""
    folder = tmp_path_factory.mktemp("stock") / "model"
    model = GPT2LMHeadModel(GPT2Config(**SHAPE))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator) * 0.2)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(stock: Path, tmp_path: Path) -> Path:
    """A copy to do harm to."""
    return Path(shutil.copytree(stock, tmp_path / "model"))


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_weights(folder: Path, change: Callable[[Weights], Weights]) -> None:
    path = folder / "model.safetensors"
    save_file({name: value.contiguous() for name, value in change(load_file(path)).items()}, path, {"format": "pt"})


def cut_in_two(folder: Path) -> dict[str, str]:
    """Two shards and their index; returns its map."""
    weights = list(load_file(folder / "model.safetensors").items())
    (folder / "model.safetensors").unlink()
    where: dict[str, str] = {}
    for number, part in enumerate((weights[:9], weights[9:])):
        save_file(dict(part), folder / f"shard{number}.safetensors", {"format": "pt"})
        where |= {name: f"shard{number}.safetensors" for name, _ in part}
    write_index(folder, where)
    return where


def write_index(folder: Path, where: object) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def refused(folder: Path) -> str:
    """The one line that both engines refuse a folder with."""
    with pytest.raises(UserError) as caught:
        load_model(folder)
    message = str(caught.value)
    assert "\n" not in message and message.isprintable() and str(folder) in message
    assert len(message) < len(str(folder)) + 1000
    return message


def refused_by_both(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        pack(folder)
    assert str(caught.value) == refused(folder)
    return str(caught.value)


@torch.no_grad()
def stock_logits(folder: Path) -> torch.Tensor:
    return GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32).eval()(IDS).logits


@torch.no_grad()
def same_as_stock(folder: Path) -> None:
    torch.testing.assert_close(load_model(folder)(IDS).logits, stock_logits(folder), atol=1e-5, rtol=1e-5)


# ---- config.json ----

SIZES = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")
NO_SIZES = ["12", 1.5, 2.0, None, float("nan"), float("inf"), -1, 0, True, [], {}, [2], 10**30]


@pytest.mark.parametrize("field", SIZES)
@pytest.mark.parametrize("value", NO_SIZES, ids=repr)
def test_a_size_that_is_none(folder: Path, field: str, value: object) -> None:
    change_config(folder, **{field: value})
    message = refused_by_both(folder)
    assert f"config.json: {field} is " in message and "a whole number of at least 1 is needed" in message


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"n_layer": 3}, "transformer.h.2.ln_1.weight is missing, which config.json asks for (n_layer is 3)"),
        ({"n_layer": 1}, "transformer.h.1.attn.c_attn.bias [192] has no place in this model"),
        ({"n_layer": 10**9}, "transformer.h.2.ln_1.weight is missing"),
        ({"n_embd": 10**9}, "transformer.wte.weight is [61, 64] in the file, [61, 1000000000] by config.json"),
        ({"vocab_size": 62}, "transformer.wte.weight is [61, 64] in the file, [62, 64] by config.json"),
        ({"n_positions": 25}, "transformer.wpe.weight is [24, 64] in the file, [25, 64] by config.json"),
        ({"n_inner": 128}, "transformer.h.0.mlp.c_fc.weight is [64, 256] in the file, [64, 128] by config.json"),
        ({"n_inner": 0}, "n_inner is 0; a whole number of at least 1, or null is needed"),
        ({"n_head": 7}, "n_embd 64 is no multiple of n_head 7"),
        ({"n_head": 10**9}, "n_embd 64 is no multiple of n_head 1000000000"),
        ({"hidden_size": 32}, "n_embd is 64 and hidden_size 32, which are one"),
        ({"layer_norm_epsilon": "1e-5"}, "layer_norm_epsilon is '1e-5'; a number above 0 and at most 1 is needed"),
        ({"layer_norm_epsilon": -1}, "layer_norm_epsilon is -1"),
        ({"layer_norm_epsilon": 0}, "layer_norm_epsilon is 0"),
        ({"layer_norm_epsilon": float("nan")}, "layer_norm_epsilon is nan"),
        ({"layer_norm_epsilon": 1e39}, "layer_norm_epsilon is 1e+39"),
        ({"attn_pdrop": 1.5}, "attn_pdrop is 1.5; a number from 0 to 1 is needed"),
        ({"resid_pdrop": [0]}, "resid_pdrop is [0]"),
        ({"initializer_range": -1}, "initializer_range is -1"),
        ({"use_cache": "yes"}, "use_cache is 'yes'; true or false is needed"),
        ({"eos_token_id": "0"}, "eos_token_id is '0'; a token id or a list of them, or null is needed"),
        ({"eos_token_id": [0, "1"]}, "eos_token_id is [0, '1']"),
        ({"bos_token_id": 10**20}, "bos_token_id is 1"),
        ({"activation_function": None}, "activation_function is None"),
        ({"dtype": "float99"}, "dtype is 'float99'; a floating-point type of torch's"),
        ({"torch_dtype": "int8"}, "torch_dtype is 'int8'"),
        ({"torch_dtype": {"": "float16"}}, "torch_dtype is {"),
        ({"model_type": ["gpt2"]}, "model_type is ['gpt2']; gpt2 or compact_gpt2 is needed"),
        ({"architectures": ["T5Model"]}, "architectures is ['T5Model']; GPT2LMHeadModel is needed"),
        ({"architectures": "GPT2LMHeadModel"}, "architectures is 'GPT2LMHeadModel'"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
        ({"reorder_and_upcast_attn": True}, "reorder_and_upcast_attn is True"),
        ({"add_cross_attention": True}, "add_cross_attention is True"),
        ({"scale_attn_weights": False}, "scale_attn_weights is False; a GPT-2 is supported with true alone"),
        ({"is_causal": False}, "is_causal is False"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantized already (by 'gptq'); give the check"),
        ({"quantization_config": {"load_in_8bit": True}}, "quantization_config: the folder is quantized already"),
        ({"quantization_config": {}}, "quantization_config: the folder is quantized already"),
        ({"quantization_config": "x" * 10_000}, "quantization_config: the folder is quantized already"),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads is {'0': [1]}: pruned by transformers 4"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false'"),
        ({"model_type": "compact_gpt2"}, "transformer.h.0.attn.c_attn.weight is [64, 192] in the file, [192, 64] by"),
    ],
    ids=lambda value: str(value)[:60] if isinstance(value, dict) else "",
)
def test_a_config_that_cannot_be(folder: Path, changes: dict[str, Any], words: str) -> None:
    change_config(folder, **changes)
    tracemalloc.start()
    message = refused_by_both(folder)
    assert tracemalloc.get_traced_memory()[1] < 16 << 20  # whatever a size says, nothing of it is made
    tracemalloc.stop()
    assert words in message


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kept_heads": [[0], [0, 1], [0]]}, "kept_heads lists 3 layers, n_layer is 2"),
        ({"kept_heads": [[], [0]]}, "kept_heads[0] is []; at least one head"),
        ({"kept_heads": [[1, 0], [0]]}, "kept_heads[0] is [1, 0]"),
        ({"kept_heads": [[0, 2], [0]]}, "kept_heads[0] is [0, 2]"),
        ({"kept_heads": [[-1], [0]]}, "kept_heads[0] is [-1]"),
        ({"kept_heads": [["0"], [0]]}, "kept_heads is [['0'], [0]]; a list of head numbers for each layer"),
        ({"kept_heads": 5}, "kept_heads is 5"),
        ({"kept_heads": [[0], [0, 1]]}, "transformer.h.0.attn.c_attn.weight is [192, 64] in the file, [96, 64] by"),
        (
            {"kept_heads": None, "n_kv_head": None, "n_head": 10**9},
            "transformer.h.0.attn.c_attn.weight is [192, 64] in the file",
        ),
        ({"head_dim": 0}, "head_dim is 0"),
        ({"head_dim": 16}, "transformer.h.0.attn.c_attn.weight is [192, 64] in the file, [96, 64] by config.json"),
        ({"n_kv_head": 3}, "n_kv_head is 3; a divisor of n_head 2 is needed"),
        ({"n_kv_head": 1}, "transformer.h.0.attn.c_attn.q.weight is missing"),
        ({"position": "alibi"}, "position is 'alibi'; learned or rope is needed"),
        ({"position": "rope"}, "transformer.wpe.weight [24, 64] has no place in this model"),
        ({"rope_base": 1}, "rope_base is 1; a number above 1 is needed"),
        ({"rope_share": float("nan")}, "rope_share is nan"),
        ({"window": "4"}, "window is '4'; a number of at least 2 tokens"),
        ({"window": 1}, "window is 1; a number of at least 2 tokens"),
        ({"window": [4, None, 4, None, 4, None, 4]}, "window lists 7 layers, n_layer is "),
        ({"position": "rope", "rope_share": 0.01}, "rope_share is 0.01; a share of head_dim "),
        ({"window": [4, 1.5]}, "window is [4, 1.5]"),
    ],
    ids=lambda value: str(value)[:60] if isinstance(value, dict) else "",
)
def test_a_compact_config_that_cannot_be(stock: Path, tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    load_model(stock).save_pretrained(tmp_path)
    change_config(tmp_path, **changes)
    assert words in refused_by_both(tmp_path)


@pytest.mark.parametrize("changes", [{"window": 1}, {"window": [4]}, {"window": -3}, {"activation_function": "gelu9"}])
def test_a_config_that_the_class_refuses(stock: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    load_model(stock).save_pretrained(tmp_path)
    change_config(tmp_path, **changes)
    assert f"config.json: {next(iter(changes))} " in (message := refused(tmp_path))
    assert "gelu_new" in message or "window" in message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"", "no JSON"),
        (b"\xef\xbb\xbf{}", "BOM"),
        ("é".encode("latin-1"), "no JSON ('utf-8' codec"),
        (DEEP.encode(), "nested too deep"),
        (b'{"a": ' + DEEP.encode() + b"}", "nested too deep"),
        (b'{"n_layer": 2, "n_layer": 3}', "'n_layer' is there twice"),
        (b'{"n_layer": ' + b"9" * 5000 + b"}", "no JSON"),
        (b'["gpt2"]', "holds no mapping but ['gpt2']"),
        (b'{"model_type": "g\\ud800\\n"}', "model_type is 'g\\ud800\\n'"),
        (b'{"model_type": "gpt2"}', "transformer.wte.weight is [61, 64] in the file, [50257, 768] by config.json"),
        (b" " * (17 << 20), "holds 17825792 bytes"),
    ],
    ids=range(11),
)
def test_a_config_that_is_no_json_of_ours(folder: Path, text: bytes, words: str) -> None:
    (folder / "config.json").write_bytes(text)
    assert words in refused_by_both(folder)


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "generation_config.json"])
def test_no_file_in_a_files_place(folder: Path, make: Callable[[Path], None], name: str) -> None:
    (folder / name).unlink()
    make(folder / name)
    assert f"{name}: is " in refused(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"layer_norm_epsilon": 1e-3},
        {"activation_function": "relu"},
        {"n_head": 4},
        {"n_head": 64},
        {"summary_first_dropout": 7, "task_specific_params": {"a": DEEP[:50]}, "n_ctx": 3, "id2label": None},
        {"eos_token_id": [3, 4], "bos_token_id": None, "pad_token_id": -1},
        {"tie_word_embeddings": True, "architectures": ["GPT2Model"], "n_inner": None},
        {"torch_dtype": "bfloat16"},
        {"torch_dtype": "torch.float32", "dtype": "auto"},
        {"auto_map": {"AutoModelForCausalLM": "evil.Model"}, "_attn_implementation": "kernels-community/evil"},
    ],
    ids=str,
)
def test_a_config_that_can_be(folder: Path, changes: dict[str, Any]) -> None:
    change_config(folder, **changes)
    computing = {name: value for name, value in changes.items() if name in COMPUTING}
    reference = GPT2LMHeadModel(GPT2Config(**(SHAPE | computing))).eval()
    reference.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    reference.tie_weights()
    with torch.no_grad():
        torch.testing.assert_close(load_model(folder)(IDS).logits, reference(IDS).logits, atol=1e-5, rtol=1e-5)


def test_the_names_of_other_models_for_sizes(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    for alias, name in {
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
    }.items():
        config[alias] = config.pop(name)
    (folder / "config.json").write_text(json.dumps(config))
    same_as_stock(folder)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "no JSON"),
        ("[1]", "holds no mapping"),
        (DEEP, "nested too deep"),
        ('{"max_new_tokens": 0}', "max_new_tokens"),
        ('{"cache_implementation": "no"}', "cache_implementation"),
        ('{"validate": 1}', "'validate' is no setting"),
        ('{"watermarking_config": 3}', "generation_config.json: "),
    ],
)
def test_a_generation_config_that_cannot_be(folder: Path, text: str, words: str) -> None:
    (folder / "generation_config.json").write_text(text)
    assert words in refused(folder)


def test_a_generation_config_that_transformers_reads_but_does_not_write(folder: Path) -> None:
    """It decides nothing about a number; but a stage could not save it."""
    (folder / "generation_config.json").write_text('{"temperature": 0.7}')
    same_as_stock(folder)
    with pytest.raises(UserError, match=r"generation_config\.json: .*temperature.*mend it, or delete it") as caught:
        check_generation(folder)
    assert "\n" not in str(caught.value)


# ---- tensors ----


@pytest.mark.parametrize("kind", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_a_folder_in_any_floating_type(folder: Path, kind: torch.dtype) -> None:
    """As stored: what config.json says of the type decides nothing."""
    change_weights(folder, lambda weights: {name: value.to(kind) for name, value in weights.items()})
    same_as_stock(folder)
    held = {torch.float16: "fp16", torch.bfloat16: "bf16"}.get(kind, "fp32")
    assert TorchEngine.from_folder(folder, device="cpu").precision == held


def test_a_folder_of_several_types(folder: Path) -> None:
    change_weights(folder, lambda weights: {name: v.half() if v.dim() > 1 else v for name, v in weights.items()})
    assert load_model(folder, "auto").dtype == torch.float32
    same_as_stock(folder)


@pytest.mark.parametrize("kind", [torch.int8, torch.int64, torch.bool, torch.uint8, torch.float8_e4m3fn])
def test_a_tensor_of_another_type(folder: Path, kind: torch.dtype) -> None:
    change_weights(
        folder, lambda weights: weights | {"transformer.ln_f.bias": weights["transformer.ln_f.bias"].to(kind)}
    )
    assert "transformer.ln_f.bias is stored as " in (message := refused_by_both(folder)) and "F16, BF16" in message


def another_head(weights: Weights) -> Weights:
    return weights | {HEAD: weights[TABLE] * 1.001}


@pytest.mark.parametrize("tied", [True, False])
def test_an_untied_head(stock: Path, folder: Path, tied: bool) -> None:
    """Whatever config.json says: what the file holds would be used by stock GPT-2."""
    change_weights(folder, another_head)
    change_config(folder, tie_word_embeddings=tied)
    assert f"{HEAD} differs from {TABLE}: an untied head" in refused_by_both(folder)
    assert not torch.allclose(stock_logits(folder), stock_logits(stock))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_a_head_that_is_the_table(stock: Path, folder: Path, tied: bool, kind: torch.dtype) -> None:
    change_weights(folder, lambda weights: weights | {HEAD: weights[TABLE].to(kind, copy=True)})
    change_config(folder, tie_word_embeddings=tied)
    same_as_stock(folder)
    assert torch.equal(pack(folder).weights, pack(stock).weights)


def test_the_table_under_the_heads_name(folder: Path) -> None:
    change_weights(folder, lambda weights: {HEAD if name == TABLE else name: v for name, v in weights.items()})
    same_as_stock(folder)
    change_config(folder, tie_word_embeddings=False)
    assert "transformer.wte.weight is missing" in refused_by_both(folder)


def test_an_untied_head_that_is_not_there(folder: Path) -> None:
    """Stock GPT-2 would make one at random."""
    change_config(folder, tie_word_embeddings=False)
    assert "tie_word_embeddings false, and the file no lm_head.weight" in refused_by_both(folder)


@pytest.mark.parametrize("side", [POSITIONS, 9, 100])
@pytest.mark.parametrize("kind", [torch.uint8, torch.bool, torch.float32])
def test_the_mask_that_old_files_hold(folder: Path, side: int, kind: torch.dtype) -> None:
    """As long as `n_ctx` was when it was made; stock GPT-2 makes its own."""
    masks = {f"transformer.h.{layer}.attn.bias": torch.ones(1, 1, side, side).tril().to(kind) for layer in range(2)}
    masks |= {f"transformer.h.{layer}.attn.masked_bias": torch.tensor([-1e4]) for layer in range(2)}
    change_weights(folder, lambda weights: weights | masks)
    same_as_stock(folder)


HUB = {"n_ctx": 1024, "embd_pdrop": 0.1, "summary_activation": None, "summary_first_dropout": 0.1}
HUB |= {"summary_proj_to_labels": True, "summary_type": "cls_index", "summary_use_proj": True, "resid_pdrop": 0.1}
HUB |= {"activation_function": "gelu_new", "bos_token_id": 50256, "eos_token_id": 50256, "model_type": "gpt2"}


@pytest.mark.parametrize(
    "config",
    [
        {"architectures": ["GPT2LMHeadModel"], "task_specific_params": {"text-generation": {"do_sample": True}}},
        {"_num_labels": 1, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}, "architectures": ["GPT2Model"]},
        {"task_specific_params": {"conversational": {"max_length": 1000}}, "architectures": ["GPT2DoubleHeadsModel"]},
        {"gradient_checkpointing": False, "output_past": True, "tokenizer_class": "BertTokenizer", "n_inner": None},
        {"_name_or_path": "x/y", "torch_dtype": "float32", "transformers_version": "4.3.0", "use_cache": False},
    ],
    ids=["gpt2", "distilgpt2", "DialoGPT", "gpt2-chinese", "tiny-gpt2"],
)
def test_configs_as_the_hub_has_them(folder: Path, config: dict[str, Any]) -> None:
    sizes = {name: SHAPE[name] for name in SIZES}
    (folder / "config.json").write_text(json.dumps(HUB | sizes | config))
    same_as_stock(folder)
    pack(folder)


def without(name: str) -> Callable[[Weights], Weights]:
    return lambda weights: {key: value for key, value in weights.items() if key != name}


def put(name: str, value: torch.Tensor) -> Callable[[Weights], Weights]:
    return lambda weights: weights | {name: value}


H0 = "transformer.h.0"
PRUNED = "; were its heads pruned, give the unpruned checkpoint"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without(f"{H0}.mlp.c_fc.bias"), f"{H0}.mlp.c_fc.bias is missing, which config.json asks for (n_layer is 2)"),
        (
            put(f"{H0}.attn.c_attn.weight", torch.ones(64, 96)),
            f"{H0}.attn.c_attn.weight is [64, 96] in the file, [64, 192] by config.json{PRUNED}",
        ),
        (
            put(f"{H0}.attn.c_proj.weight", torch.ones(32, 64)),
            f"{H0}.attn.c_proj.weight is [32, 64] in the file, [64, 64] by config.json{PRUNED}",
        ),
        (put(f"{H0}.ln_1.weight", torch.ones(0)), f"{H0}.ln_1.weight is [0] in the file, [64] by"),
        (put(f"{H0}.ln_1.weight", torch.ones(64, 1)), f"{H0}.ln_1.weight is [64, 1] in the file, [64] by"),
        (put("lm_head.bias", torch.ones(61)), "lm_head.bias [61] has no place"),
        (put("score.weight", torch.ones(2, 64)), "score.weight [2, 64] has no place"),
        (put("transformer.lm_head.weight", torch.ones(61, 64)), "transformer.lm_head.weight [61, 64] has no place"),
        (put(HEAD, torch.ones(60, 64)), "lm_head.weight is [60, 64] in the file, [61, 64] by config.json"),
        (put(HEAD, torch.ones(61, 64, dtype=torch.int8)), "lm_head.weight is stored as I8"),
        (put("wte.weight", torch.ones(61, 64)), "is there twice, in model.safetensors and model.safetensors"),
        (put(f"{H0}.attn.bias", torch.ones(1, 1, 9, 8)), f"{H0}.attn.bias [1, 1, 9, 8] has no place"),
        (put("transformer.h.7.attn.masked_bias", torch.ones(())), "transformer.h.7.attn.masked_bias [] has no place"),
        (put("transformer.h.9.ln_1.weight", torch.ones(64)), "transformer.h.9.ln_1.weight [64] has no place"),
        (put("a\nb\x1b[31m", torch.ones(1)), "'a\\nb\\x1b[31m' [1] has no place"),
        (put("x" * 5000, torch.ones(1)), "xxx' [1] has no place"),
        (put("transformer.ln_f.bias", torch.full((64,), float("nan"))), "transformer.ln_f.bias holds NaN or infinity"),
        (put("transformer.ln_f.bias", torch.full((64,), -float("inf"))), "transformer.ln_f.bias holds NaN or infinity"),
        (
            lambda weights: {f"_orig_mod.{name}": v for name, v in weights.items()},
            "transformer.wte.weight is missing, which config.json asks for (n_layer is 2); "
            "there is _orig_mod.transformer.wte.weight: take _orig_mod. off the names",
        ),
        (lambda weights: {}, "transformer.wte.weight is missing"),
        (  # nanoGPT's
            lambda weights: {name: v.T if v.dim() == 2 and ".c_" in name else v for name, v in weights.items()},
            f"{H0}.attn.c_attn.weight is [192, 64] in the file, [64, 192] by config.json; GPT-2 keeps linear weights",
        ),
        (
            lambda weights: weights | {name: torch.full((61, 64), float("nan")) for name in (TABLE, HEAD)},
            f"{TABLE} holds NaN or infinity",
        ),
        (put("", torch.ones(1)), "'' [1] has no place"),
    ],
    ids=range(23),
)
def test_tensors_that_do_not_fit(folder: Path, change: Callable[[Weights], Weights], words: str) -> None:
    change_weights(folder, change)
    assert words in refused_by_both(folder)


def test_a_weight_beyond_the_type_asked_for(folder: Path) -> None:
    change_weights(folder, put("transformer.ln_f.bias", torch.full((64,), -7e4)))
    same_as_stock(folder)
    for attempt in (pack, lambda folder: load_model(folder, torch.float16)):
        with pytest.raises((CheckpointError, UserError), match=r"ln_f\.bias reaches 7e\+04, beyond the .* of float16"):
            attempt(folder)
    change_weights(folder, put("transformer.ln_f.bias", torch.full((64,), 1e39, dtype=torch.float64)))
    assert "ln_f.bias reaches 1e+39, beyond the 3.4e+38 of float32" in refused(folder)


# ---- files ----


def test_shards_are_read_as_one(stock: Path, folder: Path) -> None:
    cut_in_two(folder)
    same_as_stock(folder)
    assert torch.equal(pack(folder).weights, pack(stock).weights)
    (folder / "shard0.safetensors").rename(folder.parent / "blob")  # as the Hub's cache has it
    (folder / "shard0.safetensors").symlink_to("../blob")
    same_as_stock(folder)


@pytest.mark.parametrize(
    "name",
    [
        "pytorch_model.bin",
        "../outside.safetensors",
        "/x.safetensors",
        "",
        ".safetensors/",
        3,
        None,
        ["a"],
        "\0.safetensors",
    ],
    ids=repr,
)
def test_an_index_that_leads_elsewhere(folder: Path, name: object) -> None:
    where = cut_in_two(folder)
    torch.save(load_file(folder / "shard0.safetensors"), folder / "pytorch_model.bin")
    shutil.copy(folder / "shard0.safetensors", folder.parent / "outside.safetensors")
    write_index(folder, where | {TABLE: name})
    assert f"index.json: {TABLE} is in " in (message := refused_by_both(folder)) and "of the same folder" in message


@pytest.mark.parametrize("where", [{}, [], None, "a.safetensors", 7], ids=repr)
def test_an_index_that_is_none(folder: Path, where: object) -> None:
    cut_in_two(folder)
    write_index(folder, where)
    assert "weight_map is " in refused_by_both(folder)
    (folder / "model.safetensors.index.json").write_text(DEEP)
    assert "nested too deep" in refused_by_both(folder)


def test_an_index_that_lies(folder: Path) -> None:
    where = cut_in_two(folder)
    assert where[TABLE] == "shard1.safetensors"
    write_index(folder, where | {TABLE: "shard0.safetensors"})
    assert f"shard0.safetensors: holds no {TABLE}" in refused_by_both(folder)
    write_index(folder, where | {TABLE: "shard2.safetensors"})
    assert "shard2.safetensors: is not there" in refused_by_both(folder)
    write_index(folder, where)
    weights = load_file(folder / "shard0.safetensors")
    save_file(weights | {TABLE: torch.ones(61, 64)}, folder / "shard0.safetensors")
    assert f"{TABLE} is there twice, in shard0.safetensors and shard1.safetensors" in refused_by_both(folder)


def test_an_adapter_or_a_pointer_is_no_model(folder: Path) -> None:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    assert "is a Git LFS pointer to the weights; run git lfs pull" in refused_by_both(folder)
    (folder / "adapter_config.json").write_text("{}")
    assert "merge the adapter into its model" in refused_by_both(folder)


def test_the_verbs_refuse_before_they_write(
    stock: Path, folder: Path, tmp_path: Path, cli: Callable[..., tuple[int, str, str]]
) -> None:
    change_weights(folder, another_head)
    (folder / "odd.json").mkdir()  # what has a file's name need not be one
    run = tmp_path / "run"
    load = ("load", "--out", run, "--set", f"load.source={folder}")
    for words in (
        ("evaluate", folder),
        ("evaluate", folder, "--engine", "cuda", "--device", "cpu"),
        ("generate", folder, "--prompt", "the cat"),
        load,
    ):
        code, out, err = cli(*words)
        assert (code, out) == (2, "") and "Traceback" not in err
        (line,) = (line for line in err.splitlines() if line.startswith("error: "))
        assert "lm_head.weight differs" in line
    change_config(folder, n_layer=10**9)
    for words in (("probe", folder), load):
        code, out, err = cli(*words)
        assert (code, out) == (2, "") and "transformer.h.2.ln_1.weight is missing" in err
    shutil.rmtree(folder)
    shutil.copytree(stock, folder)
    no_tokenizer = cli(*load)
    change_config(folder, n_positions=None)
    no_number = cli(*load)
    change_config(folder, n_positions=POSITIONS)
    change_weights(folder, put("transformer.ln_f.bias", torch.full((64,), float("nan"))))
    not_finite = cli(*load)
    for (code, out, err), said in zip(
        (no_tokenizer, no_number, not_finite), ("no usable tokenizer", "n_positions is None", "holds NaN"), strict=True
    ):
        assert (code, out) == (2, "") and said in err and len(err.splitlines()) == 1
    (folder / "config.json").write_text(DEEP)
    for words in (("evaluate", folder), ("evaluate", folder, "--engine", "cuda"), load):
        code, out, err = cli(*words)
        assert (code, err) == (
            2,
            f"error: {folder}/config.json: no JSON (nested too deep); copy the checkpoint again\n",
        )
    assert not run.exists()


def test_a_folder_is_judged_without_what_takes_seconds(folder: Path) -> None:
    words = "import sys; from pipeline.cli import main; sys.argv[1:] = ['evaluate', sys.argv[1]]\n"
    words += "try: main()\nexcept SystemExit as end: print(end.code, *{'torch', 'transformers'} & {*sys.modules})"
    for harm in (lambda: change_config(folder, n_layer=3), lambda: (folder / "config.json").unlink()):
        harm()
        done = subprocess.run([sys.executable, "-c", words, folder], capture_output=True, text=True, check=True)
        assert done.stdout == "2\n" and done.stderr.startswith(f"error: {folder}") and done.stderr.count("\n") == 1


# ---- whatever else ----

VALUES = [
    None,
    True,
    0,
    1,
    -1,
    2,
    3,
    1.0,
    0.5,
    1e300,
    float("nan"),
    2**40,
    "",
    "2",
    "gelu",
    "relu",
    "float16",
    [],
    [1],
    {},
]


@pytest.mark.parametrize("seed", range(6))
def test_random_configs_give_stocks_number_or_one_line(folder: Path, seed: int) -> None:
    rng = random.Random(seed)
    config = json.loads((folder / "config.json").read_text())
    for _ in range(40):
        changed = dict(config)
        for name in rng.sample(sorted(config), rng.randint(1, 2)):
            changed[name] = rng.choice(VALUES)
        (folder / "config.json").write_text(json.dumps(changed))
        number_or_line(folder, changed)


@pytest.mark.parametrize("seed", range(6))
def test_random_bytes_give_stocks_number_or_one_line(folder: Path, seed: int) -> None:
    rng = random.Random(seed)
    config = (folder / "config.json").read_text()
    for name in ("config.json", "model.safetensors"):
        whole = (folder / name).read_bytes()
        head = len(whole) if name == "config.json" else 8 + int.from_bytes(whole[:8], "little")
        for _ in range(25):
            raw = bytearray(whole)
            begin = rng.randrange(head)
            raw[begin : begin + rng.choice([1, 1, 1, 3, 40])] = rng.choice(
                [b"", bytes([rng.randrange(256)]), b"0", b'"']
            )
            (folder / name).write_bytes(raw)
            number_or_line(folder, json.loads(config))
        (folder / name).write_bytes(whole)


@torch.no_grad()
def number_or_line(folder: Path, config: dict[str, Any]) -> None:
    try:
        logits = load_model(folder)(IDS).logits
    except UserError:
        refused(folder)
        return
    try:
        wanted = stock_logits(folder)
    except Exception:  # transformers refuses more: an int for a float, say
        return
    torch.testing.assert_close(logits, wanted, atol=1e-5, rtol=1e-5)
