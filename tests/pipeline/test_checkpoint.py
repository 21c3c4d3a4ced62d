"""What may be loaded, and one line for what may not."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2LMHeadModel

from eval.errors import UserError
from pipeline.checkpoint import load_model, save_model
from pipeline.recipe import Recipe, parse_recipe
from pipeline.runner import Runner
from pipeline.tokenizer import load_tokenizer

IDS = torch.tensor([[1, 2, 3, 5, 8, 13, 21]])


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy to do harm to."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


@pytest.fixture
def expected(tiny_folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return GPT2LMHeadModel.from_pretrained(tiny_folder).eval()(IDS).logits


def change_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def refused(folder: Path) -> str:
    """The one line of the refusal."""
    with pytest.raises(UserError) as caught:
        load_model(folder)
    message = str(caught.value)
    assert "\n" not in message and str(folder) in message
    return message


@torch.no_grad()
@pytest.mark.parametrize("prefix", [True, False])
def test_stock_layout_with_and_without_prefix(folder: Path, expected: torch.Tensor, prefix: bool) -> None:
    def rename(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        bare = {key.removeprefix("transformer."): value for key, value in weights.items()}
        # OpenAI's files hold the causal mask as well.
        mask = {f"h.{layer}.attn.bias": torch.ones(1, 1, 48, 48).tril().bool() for layer in range(2)}
        mask |= {f"h.{layer}.attn.masked_bias": torch.tensor(-1e4) for layer in range(2)}
        return {("transformer." if prefix else "") + key: value for key, value in (bare | mask).items()}

    change_weights(folder, rename)
    keys = load_file(folder / "model.safetensors").keys()
    assert all(key.startswith("transformer.") == prefix for key in keys)
    torch.testing.assert_close(load_model(folder)(IDS).logits, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_our_own_layout_in_the_dtype_asked_for(folder: Path, tmp_path: Path, tiny_tokenizer) -> None:
    model = load_model(folder).half()
    save_model(model, tiny_tokenizer, tmp_path / "ours")
    assert load_model(tmp_path / "ours", "auto").dtype == torch.float16
    again = load_model(tmp_path / "ours")
    assert again.dtype == torch.float32 and not again.training
    for key, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], value.float()), key
    text = "the cat sat on the mät"
    assert load_tokenizer(tmp_path / "ours").decode(load_tokenizer(tmp_path / "ours")(text).input_ids) == text


@pytest.mark.parametrize("size", [0, 5, 300, 0.5, 0.999])
def test_truncated(folder: Path, size: float) -> None:
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    path.write_bytes(raw[: size if isinstance(size, int) else int(size * len(raw))])
    assert "damaged or incomplete" in refused(folder)


def test_header_overwritten(folder: Path) -> None:
    path = folder / "model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[8:200] = b"\xff" * 192
    path.write_bytes(raw)
    assert "damaged or incomplete" in refused(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_a_pickle_is_not_loaded(folder: Path, name: str) -> None:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / name)
    assert "can run code" in (message := refused(folder)) and name in message


def test_no_weights_at_all(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert "model.safetensors" in refused(folder)


@pytest.mark.parametrize("kind", ["llama", None, 7])
def test_another_architecture(folder: Path, kind: object) -> None:
    change_config(folder, model_type=kind)
    assert repr(kind) in (message := refused(folder)) and "gpt2" in message


@pytest.mark.parametrize(
    ("field", "value"),
    [("add_cross_attention", True), ("scale_attn_by_inverse_layer_idx", True), ("tie_word_embeddings", False)],
)
def test_a_gpt2_that_computes_something_else(folder: Path, field: str, value: object) -> None:
    change_config(folder, **{field: value})
    refused(folder)


@pytest.mark.parametrize("changes", [{"n_embd": 48, "n_head": 6}, {"n_layer": 3}, {"n_head": 7}, {"n_positions": 49}])
def test_a_config_that_does_not_fit_the_weights(folder: Path, changes: dict[str, int]) -> None:
    change_config(folder, **changes)
    refused(folder)


def test_fewer_layers_than_the_weights_have(folder: Path) -> None:
    change_config(folder, n_layer=1)
    assert "h.1." in refused(folder)


def test_a_weight_is_missing(folder: Path) -> None:
    key = "transformer.h.1.mlp.c_fc.weight"
    change_weights(folder, lambda weights: {name: value for name, value in weights.items() if name != key})
    assert key in refused(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_no_numbers(folder: Path, value: float) -> None:
    key = "transformer.h.0.ln_2.bias"

    def spoil(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        weights[key][11] = value
        return weights

    change_weights(folder, spoil)
    assert key in (message := refused(folder)) and "NaN or infinity" in message


@pytest.mark.parametrize("text", [None, "", "{", "[1, 2]", "null", '"gpt2"', b"\xff\xfe\x00"])
def test_config_missing_or_damaged(folder: Path, text: str | bytes | None) -> None:
    path = folder / "config.json"
    path.unlink()
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert "config.json" in refused(folder)


@pytest.mark.parametrize("text", [None, "{", '{"model": 3}'])
def test_tokenizer_missing_or_damaged(folder: Path, text: str | None) -> None:
    (folder / "tokenizer.json").unlink()
    if text is not None:
        (folder / "tokenizer.json").write_text(text)
    with pytest.raises(UserError, match="no usable tokenizer") as caught:
        load_tokenizer(folder)
    assert "\n" not in str(caught.value)


def run_load(source: str | Path, tmp_path: Path, text: Path) -> None:
    recipe = {"load": {"source": str(source)}, "data": {"evaluation": str(text)}, "measure": {"text_share": 0.1}}
    Runner(parse_recipe(Recipe, recipe), tmp_path / "run").execute(until="load")


def test_the_run_refuses_a_tokenizer_with_more_tokens_than_the_model(
    tmp_path: Path, make_gpt2, tiny_tokenizer, tiny_texts: dict[str, Path]
) -> None:
    make_gpt2(vocab_size=268).save_pretrained(tmp_path / "small")
    tiny_tokenizer.save_pretrained(tmp_path / "small")
    with pytest.raises(UserError, match=r"tokens that the model does not \('.*' is 268\); its ids are 0 to 267"):
        run_load(tmp_path / "small", tmp_path, tiny_texts["evaluation"])


@pytest.mark.parametrize("source", ["./nowhere", "/no/such/model", "a/b/c"])
def test_the_run_says_how_to_get_on_without_the_folder(
    source: str, tmp_path: Path, tiny_texts: dict[str, Path]
) -> None:
    with pytest.raises(UserError, match=r"no such folder; give a folder with config\.json"):
        run_load(source, tmp_path, tiny_texts["evaluation"])
