"""INT8 codes against an independent NumPy RTN; GPTQ against RTN; what is ignored, shared and refused."""

import numpy as np
import pytest
import torch
from torch import nn
from uneven import uneven_model

from eval.errors import UserError
from pipeline.data import TokenBlocks
from pipeline.inc import INCQuantizer, WeightOnlyConfig
from pipeline.model import CompactGPT2LMHeadModel
from pipeline.model.quantized import HalfEmbedding, QuantizedEmbedding, QuantizedLinear

IDS = torch.randint(0, 101, (3, 23), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def model() -> CompactGPT2LMHeadModel:
    return uneven_model()


@pytest.fixture
def blocks() -> TokenBlocks:
    return TokenBlocks(np.random.default_rng(1).integers(0, 101, (9, 31)))


def _linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def _numpy_rtn(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    scale = np.abs(weight).max(axis=1, keepdims=True) / np.float32(127)
    return np.rint(weight / scale).astype(np.int8), scale


def test_rtn_is_round_to_nearest(model: CompactGPT2LMHeadModel) -> None:
    """Every layer, the head too: exact codes and scales, as an independent NumPy RTN computes them."""
    quantized = INCQuantizer.from_pretrained(model).quantize(WeightOnlyConfig())
    assert not _linears(quantized)
    for name, original in _linears(model).items():
        layer = quantized.get_submodule(name)
        assert isinstance(layer, QuantizedLinear)
        codes, scale = _numpy_rtn(original.weight.detach().numpy())
        np.testing.assert_array_equal(layer.weight.numpy(), codes)
        np.testing.assert_allclose(layer.scale.numpy(), scale, rtol=1e-7)
        assert layer.weight.dtype == torch.int8 and layer.scale.dtype == torch.float32
        assert layer.weight.min() >= -127 and layer.weight.abs().max() == 127
        if original.bias is not None:
            assert layer.bias is not None and torch.equal(layer.bias, original.bias)


def test_forward_is_that_of_the_dequantised_weights(model: CompactGPT2LMHeadModel) -> None:
    """The quantised model computes what the FP32 model computes with rounded weights, and stays close to it."""
    quantized = INCQuantizer.from_pretrained(model).quantize()
    exact = model(IDS).logits
    with torch.no_grad():
        for linear in _linears(model).values():
            codes, scale = _numpy_rtn(linear.weight.detach().numpy())
            linear.weight.copy_(torch.from_numpy(codes * scale))
        model.transformer.wpe.weight.copy_(model.transformer.wpe.weight.half().float())
    torch.testing.assert_close(quantized(IDS).logits, model(IDS).logits, atol=1e-5, rtol=1e-5)
    error = (quantized(IDS).logits - exact).norm() / exact.norm()
    assert 1e-5 < error < 0.02


def test_embedding_shares_the_heads_tensor(model: CompactGPT2LMHeadModel) -> None:
    quantized = INCQuantizer.from_pretrained(model).quantize()
    embedding, head = quantized.transformer.wte, quantized.lm_head
    assert isinstance(embedding, QuantizedEmbedding) and isinstance(head, QuantizedLinear)
    assert embedding.weight is head.weight and embedding.scale is head.scale
    torch.testing.assert_close(embedding(IDS), (head.weight.float() * head.scale)[IDS])
    assert isinstance(quantized.transformer.wpe, HalfEmbedding)


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_the_model_passed_in_stays(model: CompactGPT2LMHeadModel, blocks: TokenBlocks, method: str) -> None:
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    quantized = INCQuantizer.from_pretrained(model).quantize(WeightOnlyConfig(method), blocks)  # type: ignore[arg-type]
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert model.config.use_cache and quantized.config.use_cache
    assert all(weight.requires_grad for weight in model.parameters())


def test_gptq_beats_rtn_on_its_calibration_inputs(model: CompactGPT2LMHeadModel, blocks: TokenBlocks) -> None:
    """GPTQ minimises |X (W - Q)^T| on the calibration inputs X; in the first block those are the FP32 model's."""
    rtn = INCQuantizer.from_pretrained(model).quantize(WeightOnlyConfig("rtn"))
    gptq = INCQuantizer.from_pretrained(model).quantize(WeightOnlyConfig("gptq"), blocks)
    inputs: dict[str, list[torch.Tensor]] = {}
    names = [name for name in _linears(model) if name.startswith("transformer.h.0.")]
    for name in names:
        inputs[name] = []
        model.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: inputs[name].append(args[0]))
    for index in range(len(blocks)):
        model(blocks[index]["input_ids"].unsqueeze(0))

    def output_error(quantized: CompactGPT2LMHeadModel, name: str) -> float:
        layer, original = quantized.get_submodule(name), model.get_submodule(name)
        assert isinstance(layer, QuantizedLinear) and isinstance(original, nn.Linear)
        change = original.weight - layer.weight.float() * layer.scale
        return (torch.cat(inputs[name]).flatten(0, -2) @ change.t()).norm().item()

    for name in names:
        assert output_error(gptq, name) < output_error(rtn, name), name
        assert not torch.equal(gptq.get_buffer(f"{name}.weight"), rtn.get_buffer(f"{name}.weight"))


def test_gptq_covers_every_layer_and_leaves_the_head_to_rtn(model: CompactGPT2LMHeadModel, blocks: TokenBlocks) -> None:
    quantizer = INCQuantizer.from_pretrained(model)
    quantized = quantizer.quantize(WeightOnlyConfig("gptq"), blocks)
    assert {layer.name: layer.method for layer in quantizer.report} == {
        name: "rtn" if name == "lm_head" else "gptq" for name in _linears(model)
    }
    exact = model(IDS).logits
    assert (quantized(IDS).logits - exact).norm() / exact.norm() < 0.02


def test_gptq_keeps_rows_without_negative_weights(model: CompactGPT2LMHeadModel, blocks: TokenBlocks) -> None:
    """A row of one sign, whose largest weights a scale half as large would clip."""
    with torch.no_grad():
        model.get_parameter("transformer.h.1.attn.c_proj.weight")[2].abs_()
    quantized = INCQuantizer.from_pretrained(model).quantize(WeightOnlyConfig("gptq"), blocks)
    layer = quantized.get_submodule("transformer.h.1.attn.c_proj")
    assert isinstance(layer, QuantizedLinear)
    restored = layer.weight[2].float() * layer.scale[2]
    assert (restored - model.get_parameter("transformer.h.1.attn.c_proj.weight")[2]).abs().max() <= layer.scale[
        2
    ] / 2 * 1.001


def test_gptq_does_not_see_padding(model: CompactGPT2LMHeadModel, blocks: TokenBlocks) -> None:
    """The same text, padded or not, gives the same codes."""
    lengths = [31, 7, 12, 31, 5, 31, 20, 31, 9]
    cut = [blocks.tokens[row : row + 1, :length] for row, length in enumerate(lengths)]
    padded = np.full_like(blocks.tokens, 100)
    for row, tokens in enumerate(cut):
        padded[row, : tokens.shape[1]] = tokens

    class Ragged(TokenBlocks):
        def __len__(self) -> int:
            return len(cut)

        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            return {"input_ids": torch.from_numpy(cut[index][0])}

    config = WeightOnlyConfig("gptq")
    plain = INCQuantizer.from_pretrained(model).quantize(config, Ragged(blocks.tokens))
    masked = INCQuantizer.from_pretrained(model).quantize(config, TokenBlocks(padded, lengths))
    for (name, one), two in zip(plain.state_dict().items(), masked.state_dict().values(), strict=True):
        assert torch.equal(one, two), name


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_ignore_keeps_layers_in_fp32(model: CompactGPT2LMHeadModel, blocks: TokenBlocks, method: str) -> None:
    """A whole first block, one layer elsewhere, and the head with its tied embedding."""
    ignore = (r"transformer\.h\.0\..*", r".*\.2\.mlp\.c_fc", "lm_head", r"transformer\.wpe")
    config = WeightOnlyConfig(method, ignore=ignore)  # type: ignore[arg-type]
    quantized = INCQuantizer.from_pretrained(model).quantize(config, blocks)
    kept = {name for name in _linears(model) if ".h.0." in name} | {"transformer.h.2.mlp.c_fc", "lm_head"}
    assert _linears(quantized).keys() == kept
    for name in kept:
        assert torch.equal(quantized.get_parameter(f"{name}.weight"), model.get_parameter(f"{name}.weight"))
    assert quantized.transformer.wte.weight is quantized.lm_head.weight
    assert isinstance(quantized.transformer.wpe, nn.Embedding)


def test_neural_compressors_own_configs(model: CompactGPT2LMHeadModel, blocks: TokenBlocks) -> None:
    from neural_compressor.torch.quantization import GPTQConfig, RTNConfig

    quantizer = INCQuantizer.from_pretrained(model)
    options = {"bits": 8, "use_sym": True, "group_size": -1}
    for method, config in (("rtn", RTNConfig(**options)), ("gptq", GPTQConfig(**options, block_size=128))):
        ours = quantizer.quantize(WeightOnlyConfig(method), blocks).state_dict()  # type: ignore[arg-type]
        theirs = quantizer.quantize(config, blocks).state_dict()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    with pytest.raises(UserError, match="bits=4"):
        quantizer.quantize(RTNConfig(bits=4, use_sym=True, group_size=-1))
    with pytest.raises(UserError, match="act_order"):
        quantizer.quantize(GPTQConfig(**options, act_order=True), blocks)


def test_report_states_what_happened(model: CompactGPT2LMHeadModel) -> None:
    quantizer = INCQuantizer.from_pretrained(model)
    quantizer.quantize()
    for layer in quantizer.report:
        weight = _linears(model)[layer.name].weight.detach().numpy()
        codes, scale = _numpy_rtn(weight)
        assert layer.bits == 8 and layer.method == "rtn"
        assert layer.scale_min == pytest.approx(scale.min()) and layer.scale_max == pytest.approx(scale.max())
        wanted = np.linalg.norm(codes * scale - weight) / np.linalg.norm(weight)
        assert layer.error == pytest.approx(wanted, rel=1e-3)


def test_fp16_models_are_quantised_from_their_own_weights(model: CompactGPT2LMHeadModel) -> None:
    half = model.half()
    quantized = INCQuantizer.from_pretrained(half).quantize()
    name = "transformer.h.1.mlp.c_fc.weight"
    codes, _ = _numpy_rtn(half.get_parameter(name).detach().float().numpy())
    np.testing.assert_array_equal(quantized.get_buffer(name).numpy(), codes)
    assert half.lm_head.weight.dtype == torch.float16


def test_user_errors(model: CompactGPT2LMHeadModel) -> None:
    quantizer = INCQuantizer.from_pretrained(model)
    with pytest.raises(UserError, match="calibration"):
        quantizer.quantize(WeightOnlyConfig("gptq"))
    with pytest.raises(UserError, match="matches no layer"):
        quantizer.quantize(WeightOnlyConfig(ignore=("h.0",)))
    with pytest.raises(UserError, match="regular expression"):
        WeightOnlyConfig(ignore=("(",))
    with pytest.raises(UserError, match="rtn or gptq"):
        WeightOnlyConfig("awq")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="bits=4"):
        WeightOnlyConfig(bits=4)
    with pytest.raises(UserError, match="WeightOnlyConfig"):
        quantizer.quantize({"bits": 8})
    with pytest.raises(UserError, match="already"):
        INCQuantizer.from_pretrained(quantizer.quantize())


def test_nothing_on_stdout(
    model: CompactGPT2LMHeadModel, blocks: TokenBlocks, capfd: pytest.CaptureFixture[str]
) -> None:
    INCQuantizer.from_pretrained(model).quantize(WeightOnlyConfig("gptq"), blocks)
    assert capfd.readouterr().out == ""


def test_an_untied_head_is_refused(model: CompactGPT2LMHeadModel) -> None:
    """One table of codes would serve as both."""
    model.lm_head.weight = nn.Parameter(model.lm_head.weight * 1.01)
    with pytest.raises(UserError, match=r"lm_head\.weight differs from transformer\.wte\.weight"):
        INCQuantizer(model)
