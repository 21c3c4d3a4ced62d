"""INT4 beside INT8: codes, the IR, which layers the budget allows; and W8A8, the row to compare with."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from uneven import uneven_model

from eval.errors import UserError
from eval.results import load_results
from pipeline.data import TokenBlocks
from pipeline.engines.openvino import TRUE_FP32, OpenVINOEngine
from pipeline.full_int8 import export_w8a8
from pipeline.inc import INCQuantizer, WeightOnlyConfig
from pipeline.model import CompactGPT2LMHeadModel
from pipeline.model.quantized import QuantizedLinear, dequantized
from pipeline.openvino_export import export_openvino
from pipeline.openvino_runtime import IR_NAME
from pipeline.recipe import Recipe, load_recipe
from pipeline.runner import Runner
from pipeline.sensitivity import four_bit_layers

IDS = torch.randint(0, 101, (2, 29), generator=torch.Generator().manual_seed(5))
# 4 heads of 16 kept in layer 0, so that only there c_proj reads 64 columns.
FITTING = [
    "transformer.h.0.attn.c_attn",
    "transformer.h.0.attn.c_proj",
    "transformer.h.0.mlp.c_fc",
    "transformer.h.0.mlp.c_proj",
    "transformer.h.1.attn.c_attn",
    "transformer.h.1.mlp.c_fc",
    "transformer.h.1.mlp.c_proj",
]


@pytest.fixture(scope="module")
def model() -> CompactGPT2LMHeadModel:
    return uneven_model(n_positions=48, n_embd=64, n_layer=2, n_head=4, kept_heads=[[0, 1, 2, 3], [0, 3]])


@pytest.fixture(scope="module")
def blocks() -> TokenBlocks:
    return TokenBlocks(np.random.default_rng(1).integers(0, 101, (9, 31)))


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return ((one - other).norm() / other.norm()).item()


def test_codes_are_round_to_nearest_in_groups(model: CompactGPT2LMHeadModel) -> None:
    quantizer = INCQuantizer(model)
    quantized = quantizer.quantize(WeightOnlyConfig(four_bit=(FITTING[3], FITTING[4])))
    assert {layer.name: layer.bits for layer in quantizer.report if layer.bits != 8} == dict.fromkeys(FITTING[3:5], 4)
    for name in FITTING[3:5]:
        layer, weight = quantized.get_submodule(name), model.get_parameter(f"{name}.weight").detach().numpy()
        groups = weight.reshape(len(weight), -1, 64)
        scale = np.abs(groups).max(axis=-1, keepdims=True) / np.float32(7)
        assert isinstance(layer, QuantizedLinear) and layer.bits == 4
        np.testing.assert_array_equal(layer.weight.numpy(), np.rint(groups / scale).reshape(weight.shape))
        np.testing.assert_allclose(layer.scale.numpy(), scale[..., 0], rtol=1e-6)
        np.testing.assert_allclose(
            layer(torch.eye(weight.shape[1])).detach().numpy() - layer.bias.numpy(),
            (layer.weight.numpy().reshape(groups.shape) * scale).reshape(weight.shape).T,
            atol=1e-6,
        )
    eight = quantized.get_submodule(FITTING[0])
    assert isinstance(eight, QuantizedLinear) and eight.scale.shape == (192, 1) and eight.weight.abs().max() == 127


def test_gptq_takes_four_bits_too(model: CompactGPT2LMHeadModel, blocks: TokenBlocks) -> None:
    """On its calibration inputs, with less error in the layer's outputs than round-to-nearest of the same bits."""
    name = FITTING[0]
    seen: list[torch.Tensor] = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    for row in torch.from_numpy(blocks.tokens):
        model(row[None])
    hook.remove()
    errors = {}
    for method in ("rtn", "gptq"):
        config = WeightOnlyConfig(method, four_bit=(name,))  # type: ignore[arg-type]
        layer = INCQuantizer(model).quantize(config, blocks).get_submodule(name)
        assert isinstance(layer, QuantizedLinear) and layer.bits == 4 and layer.weight.abs().max() <= 8
        change = dequantized(layer.weight, layer.scale) - model.get_parameter(f"{name}.weight")
        errors[method] = (torch.cat(seen).flatten(0, 1) @ change.detach().t()).norm().item()
    assert errors["gptq"] < 0.95 * errors["rtn"]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("lm_head", "four_bit: lm_head is no quantised layer; they are named like transformer.h.0.attn.c_attn"),
        ("transformer.h.1.attn.c_proj", "has 32 columns; 4 bits need a multiple of 64"),
    ],
)
def test_what_cannot_have_four_bits(model: CompactGPT2LMHeadModel, name: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        INCQuantizer(model).quantize(WeightOnlyConfig(four_bit=(name,)))


def test_the_ir_computes_the_same_and_is_smaller(model: CompactGPT2LMHeadModel, tmp_path: Path) -> None:
    sizes = {}
    for name, four_bit in (("eight", ()), ("four", tuple(FITTING))):
        quantized = INCQuantizer(model).quantize(WeightOnlyConfig(four_bit=four_bit), save_directory=tmp_path / name)
        engine = OpenVINOEngine.from_folder(tmp_path / name, hints=TRUE_FP32)
        assert engine.precision == ("int4-int8" if four_bit else "int8")
        assert distance(engine.logits(IDS), quantized(IDS).logits.detach()) < 1e-5
        sizes[name] = (tmp_path / name / IR_NAME).with_suffix(".bin").stat().st_size
    codes = sum(model.get_parameter(f"{name}.weight").numel() for name in FITTING)
    scales = 4 * (codes // 64 - sum(len(model.get_parameter(f"{name}.weight")) for name in FITTING))
    assert 0.9 * (codes / 2 - scales) < sizes["eight"] - sizes["four"] <= codes / 2


def perplexity(model: nn.Module, blocks: TokenBlocks) -> float:
    ids = torch.from_numpy(blocks.tokens)
    with torch.no_grad():
        loss = nn.functional.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    return math.exp(loss.item())


def test_the_budget_is_kept(model: CompactGPT2LMHeadModel, blocks: TokenBlocks) -> None:
    """Text that the model itself wrote, so that any change of it costs."""
    start = torch.from_numpy(blocks.tokens[:, :1])
    torch.manual_seed(1)
    own = TokenBlocks(model.generate(start, do_sample=True, max_length=40, eos_token_id=-1).numpy())
    exact, found = perplexity(model, own), {}
    for budget in (1.002, 1.01, 10.0):
        found[budget] = four_bit_layers(model, own, budget=budget)
        quantized = INCQuantizer(model).quantize(WeightOnlyConfig(four_bit=tuple(found[budget])))
        assert perplexity(quantized, own) <= budget * exact * 1.00001
    assert sorted(found[10.0]) == FITTING
    assert found[1.01] == found[10.0][: len(found[1.01])] and found[1.002] == found[1.01][: len(found[1.002])]
    assert 0 < len(found[1.01]) < len(FITTING)


def test_the_layer_that_matters_least_goes_first(model: CompactGPT2LMHeadModel, blocks: TokenBlocks) -> None:
    """A layer that 4 bits hold exactly; and what is to be ignored never goes."""
    with torch.no_grad():
        weight = model.get_parameter("transformer.h.1.mlp.c_fc.weight")
        before = weight.clone()
        weight.copy_(weight.sign() * 0.07)
        found = four_bit_layers(model, blocks, budget=10.0, ignore=[r".*h\.0\..*"])
        weight.copy_(before)
    assert len(found) == 3 and all("h.1." in name for name in found)
    assert found.index("transformer.h.1.mlp.c_fc") < found.index("transformer.h.1.mlp.c_proj")


def test_w8a8(model: CompactGPT2LMHeadModel, blocks: TokenBlocks, tmp_path: Path) -> None:
    """INT8 constants, quantised activations, near the model's answers, and the same bytes each time."""
    fp32 = export_openvino(model, tmp_path / "fp32")
    folders = [export_w8a8(fp32, tmp_path / name, blocks.tokens) for name in ("one", "two")]
    for name in ("openvino_model.xml", "openvino_model.bin", "config.json"):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes(), name
    engine = OpenVINOEngine.from_folder(folders[0])
    assert engine.precision == "w8a8"
    exact = model(IDS).logits.detach()
    whole = distance(engine.logits(IDS), exact)
    weights_alone = distance(INCQuantizer(model).quantize()(IDS).logits.detach(), exact)
    assert weights_alone < whole < 0.2
    first = engine.prefill(IDS[:, :20])
    torch.testing.assert_close(first, engine.logits(IDS[:, :20])[:, -1], atol=0.05, rtol=0.05)
    assert (folders[0] / IR_NAME).with_suffix(".bin").stat().st_size < 0.35 * (fp32 / IR_NAME).with_suffix(
        ".bin"
    ).stat().st_size


def test_a_run_with_both(run_copy: Path, tiny_recipe: Path) -> None:
    """The rows are named by what is in the folder: no layer of this model has columns for groups of 64."""
    changes = ("quantize.bits=mixed", "quantize.w8a8=true", "measure.latency=false")
    Runner(load_recipe(Recipe, tiny_recipe, changes), run_copy).execute(force=["quantize"])
    rows = [row for row in load_results(run_copy / "results.json").rows if row.stage == "quantize"]
    assert [(row.precision, row.role) for row in rows][-2:] == [("w8a8", "baseline"), ("int8", "chain")]
    qualities = [row.quality.perplexity for row in rows if row.quality]
    assert len(qualities) >= 4 and max(qualities) < 1.05 * min(qualities)
