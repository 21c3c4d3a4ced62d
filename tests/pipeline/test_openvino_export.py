"""The IR: what is in the file, that it computes what torch computes, and that the same model gives the same bytes."""

import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from uneven import uneven_model

from eval.errors import UserError
from pipeline.inc import INCQuantizer, WeightOnlyConfig
from pipeline.model import CompactGPT2LMHeadModel
from pipeline.openvino_export import export_openvino, int8_weights
from pipeline.openvino_runtime import IR_NAME

pytest.importorskip("openvino")
VOCAB, WIDTH, POSITIONS = 101, 40, 37
Export = Callable[..., Path]


@pytest.fixture(scope="module")
def models() -> dict[str, CompactGPT2LMHeadModel]:
    fp32 = uneven_model()
    int8 = INCQuantizer.from_pretrained(fp32).quantize()
    return {"fp32": fp32, "fp16": fp32, "int8": int8}


@pytest.fixture(scope="module")
def irs(models: dict[str, CompactGPT2LMHeadModel], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("ir")
    fp32 = export_openvino(models["fp32"], root / "fp32")
    return {
        "fp32": fp32,
        "fp16": export_openvino(models["fp16"], root / "fp16", compress_to_fp16=True),
        "int8": export_openvino(models["fp32"], root / "int8", int8=models["int8"], traced=fp32 / IR_NAME),
    }


def _constants(folder: Path) -> list[tuple[str, list[int]]]:
    """Type and shape of every constant."""
    import openvino

    ir = openvino.Core().read_model(folder / IR_NAME)
    nodes = [node for node in ir.get_ordered_ops() if node.get_type_name() == "Constant"]
    return [(node.get_output_element_type(0).get_type_name(), list(node.get_output_shape(0))) for node in nodes]


def _bytes(folder: Path) -> int:
    return sum((folder / IR_NAME).with_suffix(suffix).stat().st_size for suffix in (".xml", ".bin"))


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_weights_are_stored_in_their_type(irs: dict[str, Path], precision: str) -> None:
    """All matrices are of one type, and the tied table is there once."""
    stored = {"fp32": "f32", "fp16": "f16", "int8": "i8"}[precision]
    matrices = [(kind, shape) for kind, shape in _constants(irs[precision]) if len(shape) == 2 and min(shape) >= 8]
    assert matrices.count((stored, [VOCAB, WIDTH])) == 1
    assert [shape for _, shape in matrices].count([VOCAB, WIDTH]) == 1
    assert len(matrices) == 2 + 3 * 4
    positions = "f16" if precision == "int8" else stored
    assert {kind for kind, shape in matrices if shape != [POSITIONS, WIDTH]} == {stored}
    assert (positions, [POSITIONS, WIDTH]) in matrices


def test_int8_constants_follow_the_layers(irs: dict[str, Path]) -> None:
    """Every quantised weight arrives with its own shape, uneven heads and all; the FP32 IR has none."""
    shapes = int8_weights(irs["int8"] / IR_NAME)
    assert len(shapes) == 1 + 3 * 4
    for layer, heads in enumerate([5, 1, 3]):
        assert shapes[f"self.transformer.h.{layer}.attn.c_attn.weight"] == [3 * heads * 8, WIDTH]
    assert int8_weights(irs["fp32"] / IR_NAME) == {}


def test_int8_constants_hold_the_codes(irs: dict[str, Path], models: dict[str, CompactGPT2LMHeadModel]) -> None:
    import openvino

    codes = dict(models["int8"].named_buffers())
    seen = 0
    for node in openvino.Core().read_model(irs["int8"] / IR_NAME).get_ordered_ops():
        if node.get_type_name() == "Constant" and node.get_output_element_type(0).get_type_name() == "i8":
            name = node.get_friendly_name().removeprefix("self.")
            np.testing.assert_array_equal(node.get_data(), codes[name].numpy())
            seen += 1
    assert seen == 13


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_optimum_loads_it_and_generates_the_same_tokens(
    irs: dict[str, Path], models: dict[str, CompactGPT2LMHeadModel], precision: str
) -> None:
    from optimum.intel import OVModelForCausalLM

    exact = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
    loaded = OVModelForCausalLM.from_pretrained(irs[precision], ov_config=exact)
    model = copy.deepcopy(models[precision])
    if precision == "fp16":
        for weight in model.parameters():
            weight.data = weight.data.half().float()
    ids = torch.randint(1, VOCAB, (3, 11), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0  # left padding
    options = {"attention_mask": mask, "max_new_tokens": 15, "do_sample": False, "eos_token_id": None}
    wanted = model.generate(ids, pad_token_id=0, **options)
    assert torch.equal(loaded.generate(ids, pad_token_id=0, **options), wanted)
    assert len(set(wanted[:, 11:].flatten().tolist())) > 3


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_the_same_model_gives_the_same_bytes(
    irs: dict[str, Path], models: dict[str, CompactGPT2LMHeadModel], tmp_path: Path, precision: str
) -> None:
    """The INT8 one from a trace of its own, too."""
    int8 = models["int8"] if precision == "int8" else None
    again = export_openvino(models["fp32"], tmp_path / "again", int8=int8)
    files = sorted(path.name for path in irs[precision].iterdir())
    assert sorted(path.name for path in again.iterdir()) == files
    assert files == ["config.json", "generation_config.json", "openvino_model.bin", "openvino_model.xml"]
    for name in files:
        assert (again / name).read_bytes() == (irs[precision] / name).read_bytes(), name


def test_int8_is_about_a_quarter_of_fp32(tmp_path: Path) -> None:
    model = uneven_model(
        vocab_size=8192,
        n_embd=320,
        n_positions=512,
        n_layer=4,
        kept_heads=[[0, 1, 2, 3, 4], [1, 3], [0, 2, 4], [0, 1, 2, 3]],
    )
    INCQuantizer.from_pretrained(model).quantize(save_directory=tmp_path / "int8")
    fp32 = _bytes(export_openvino(model, tmp_path / "fp32"))
    assert fp32 > 4 * model.num_parameters()
    assert _bytes(tmp_path / "int8") <= 0.27 * fp32


def test_inc_saves_ir_tokenizer_and_report(tmp_path: Path, tiny_tokenizer) -> None:
    """GPTQ and an FP32 head, through `save_directory`: the IR holds both kinds of weights, the report the one."""
    from pipeline.data import TokenBlocks

    blocks = TokenBlocks(np.random.default_rng(1).integers(0, VOCAB, (5, 31)))
    config = WeightOnlyConfig("gptq", ignore=("lm_head",))
    INCQuantizer.from_pretrained(uneven_model(), tiny_tokenizer).quantize(config, blocks, tmp_path)
    layers = json.loads((tmp_path / "quantization.json").read_text())["layers"]
    assert len(layers) == 12 and {layer["method"] for layer in layers} == {"gptq"}
    assert _constants(tmp_path).count(("f32", [VOCAB, WIDTH])) == 1
    assert {f"self.{layer['name']}.weight" for layer in layers} == int8_weights(tmp_path / IR_NAME).keys()
    assert (tmp_path / "tokenizer.json").exists()
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "compact_gpt2"


def test_export_leaves_the_model_alone_and_stdout_empty(
    models: dict[str, CompactGPT2LMHeadModel], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = copy.deepcopy(models["fp32"]).half()
    config, dtype = model.config.to_dict(), model.dtype
    export_openvino(model, tmp_path)
    assert capfd.readouterr().out == ""
    assert model.config.to_dict() == config and model.dtype == dtype
    assert "f16" not in {kind for kind, shape in _constants(tmp_path) if len(shape) == 2}


def test_missing_openvino_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(UserError, match="pip install openvino"):
        export_openvino(uneven_model(), tmp_path / "never")
    assert not (tmp_path / "never").exists()


def test_openvino_genai_runs_the_folder_with_its_own_tokenizer(tmp_path: Path, tiny_tokenizer) -> None:
    import openvino_genai

    from pipeline.engines.openvino import TRUE_FP32, OpenVINOEngine

    INCQuantizer.from_pretrained(uneven_model(vocab_size=len(tiny_tokenizer)), tiny_tokenizer).quantize(
        save_directory=tmp_path
    )
    text, count = "The river was named", 12
    options = openvino_genai.GenerationConfig(max_new_tokens=count, do_sample=False, ignore_eos=True)
    written = openvino_genai.LLMPipeline(str(tmp_path), "CPU", **TRUE_FP32).generate(text, options)
    engine = OpenVINOEngine.from_folder(tmp_path, hints=TRUE_FP32)
    tokens = [engine.prefill(torch.tensor([tiny_tokenizer(text)["input_ids"]])).argmax(-1)]
    for _ in range(count - 1):
        tokens.append(engine.decode(tokens[-1]).argmax(-1))
    assert written == tiny_tokenizer.decode(torch.cat(tokens), skip_special_tokens=True)
