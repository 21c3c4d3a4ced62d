"""The OpenVINO engine against torch: all positions, token by token, batches, uneven heads, and bad folders."""

import json
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from uneven import uneven_model

from eval.engine import Engine
from eval.errors import UserError
from pipeline import openvino_runtime
from pipeline.engines import openvino as engine_module
from pipeline.engines.openvino import OpenVINOEngine
from pipeline.inc import INCQuantizer
from pipeline.model import CompactGPT2LMHeadModel
from pipeline.openvino_export import export_openvino
from pipeline.openvino_runtime import IR_NAME, computes_bf16

pytest.importorskip("openvino")
VOCAB, CONTEXT = 101, 37


@pytest.fixture(scope="module")
def model() -> CompactGPT2LMHeadModel:
    return uneven_model()


@pytest.fixture(scope="module")
def irs(model: CompactGPT2LMHeadModel, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("ir")
    INCQuantizer.from_pretrained(model).quantize(save_directory=root / "int8")
    return {
        "fp32": export_openvino(model, root / "fp32"),
        "fp16": export_openvino(model, root / "fp16", compress_to_fp16=True),
        "int8": root / "int8",
    }


@pytest.fixture(scope="module")
def fp32(irs: dict[str, Path]) -> OpenVINOEngine:
    return OpenVINOEngine.from_folder(irs["fp32"])


def _ids(batch: int, length: int) -> torch.Tensor:
    return torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(batch * length))


@torch.no_grad()
@pytest.mark.parametrize(("batch", "length"), [(1, 1), (1, 37), (3, 29), (2, 8)])
def test_logits_are_torchs(fp32: OpenVINOEngine, model: CompactGPT2LMHeadModel, batch: int, length: int) -> None:
    ids = _ids(batch, length)
    logits = fp32.logits(ids)
    assert logits.dtype == torch.float32 and logits.shape == (batch, length, VOCAB)
    torch.testing.assert_close(logits, model(ids).logits, atol=1e-4, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 3])
def test_prefill_and_decode_are_the_full_forward(
    fp32: OpenVINOEngine, model: CompactGPT2LMHeadModel, batch: int
) -> None:
    """A prompt, then token by token up to the last position; twice, so that the past is really forgotten."""
    ids = _ids(batch, CONTEXT)
    wanted = model(ids).logits
    for prompt in (13, 1):
        torch.testing.assert_close(fp32.prefill(ids[:, :prompt]), wanted[:, prompt - 1], atol=1e-4, rtol=0)
        for position in range(prompt, CONTEXT):
            torch.testing.assert_close(fp32.decode(ids[:, position]), wanted[:, position], atol=1e-4, rtol=0)


def test_results_outlive_the_next_run(fp32: OpenVINOEngine) -> None:
    """The request reuses its memory; what was handed out must not change."""
    first = fp32.prefill(_ids(2, 9))
    copy = first.clone()
    whole = fp32.logits(_ids(2, 9))
    kept = whole.clone()
    fp32.logits(_ids(2, 9).flip(1))
    assert torch.equal(first, copy) and torch.equal(whole, kept)


@torch.no_grad()
def test_fp16_weights_compute_in_fp32(irs: dict[str, Path], model: CompactGPT2LMHeadModel) -> None:
    import copy

    rounded = copy.deepcopy(model)
    for weight in rounded.parameters():
        weight.data = weight.data.half().float()
    engine = OpenVINOEngine.from_folder(irs["fp16"])
    assert engine.precision == "fp16"
    torch.testing.assert_close(engine.logits(_ids(3, 21)), rounded(_ids(3, 21)).logits, atol=1e-4, rtol=0)


@torch.no_grad()
def test_int8_is_close_to_fp32(irs: dict[str, Path], model: CompactGPT2LMHeadModel) -> None:
    engine = OpenVINOEngine.from_folder(irs["int8"])
    assert engine.precision == "int8"
    ids = _ids(3, CONTEXT)
    wanted, logits = model(ids).logits, engine.logits(ids)
    assert 1e-5 < (logits - wanted).norm() / wanted.norm() < 0.05

    def nll(values: torch.Tensor) -> float:
        return torch.nn.functional.cross_entropy(values[:, :-1].flatten(0, 1).double(), ids[:, 1:].flatten()).item()

    assert nll(logits) == pytest.approx(nll(wanted), abs=0.05)


def test_states_what_is_in_force(irs: dict[str, Path], fp32: OpenVINOEngine) -> None:
    assert isinstance(fp32, Engine)
    assert (fp32.name, fp32.device, fp32.precision) == ("openvino", "cpu", "fp32")
    assert (fp32.context, fp32.vocab_size) == (CONTEXT, VOCAB)
    for hint in ("INFERENCE_PRECISION_HINT=f32", "KV_CACHE_PRECISION=f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE=0"):
        assert hint in fp32.compute
    single = OpenVINOEngine.from_folder(irs["int8"], precision="int8", threads=1)
    assert "INFERENCE_NUM_THREADS=1" in single.compute
    fp32.synchronize()


def test_a_full_context_is_refused(fp32: OpenVINOEngine) -> None:
    with pytest.raises(UserError, match="38 tokens, the model 37 positions"):
        fp32.logits(_ids(1, 38))
    fp32.prefill(_ids(2, 37))
    with pytest.raises(UserError, match="38 tokens, the model 37 positions"):
        fp32.decode(_ids(2, 1)[:, 0])
    assert fp32.logits(_ids(1, 5)).shape == (1, 5, VOCAB)  # and goes on working


@pytest.mark.parametrize(
    ("held", "asked"), [("fp32", "int8"), ("fp32", "fp16"), ("int8", "fp32"), ("fp16", "bf16"), ("fp32", "fp64")]
)
def test_a_precision_that_does_not_fit_is_refused(irs: dict[str, Path], held: str, asked: str) -> None:
    with pytest.raises(UserError, match=asked):
        OpenVINOEngine.from_folder(irs[held], precision=asked)


@torch.no_grad()
def test_bf16_runs_where_the_cpu_has_it(irs: dict[str, Path], model: CompactGPT2LMHeadModel) -> None:
    if not computes_bf16():
        with pytest.raises(UserError, match="no bf16"):
            OpenVINOEngine.from_folder(irs["fp32"], precision="bf16")
        return
    engine = OpenVINOEngine.from_folder(irs["fp32"], precision="bf16")
    assert "INFERENCE_PRECISION_HINT=bf16" in engine.compute
    wanted = model(_ids(1, 21)).logits
    assert (engine.logits(_ids(1, 21)) - wanted).norm() / wanted.norm() < 0.05


def test_broken_folders(irs: dict[str, Path], tmp_path: Path) -> None:
    """Each gives one line that names the file."""

    def broken(name: str) -> Path:
        return Path(shutil.copytree(irs["fp32"], tmp_path / name))

    with pytest.raises(UserError, match="not found"):
        OpenVINOEngine.from_folder(tmp_path / "nowhere")
    folder = broken("without xml")
    (folder / IR_NAME).unlink()
    with pytest.raises(UserError, match=r"no openvino_model\.xml"):
        OpenVINOEngine.from_folder(folder)
    folder = broken("cut xml")
    (folder / IR_NAME).write_bytes((folder / IR_NAME).read_bytes()[:5000])
    with pytest.raises(UserError, match="damaged IR") as error:
        OpenVINOEngine.from_folder(folder)
    assert "\n" not in str(error.value)
    folder = broken("cut bin")
    binary = (folder / IR_NAME).with_suffix(".bin")
    binary.write_bytes(binary.read_bytes()[:1000])
    with pytest.raises(UserError, match="damaged IR") as error:
        OpenVINOEngine.from_folder(folder)
    assert "\n" not in str(error.value)
    folder = broken("bad config")
    (folder / "config.json").write_text(json.dumps({"n_positions": CONTEXT}))
    with pytest.raises(UserError, match="vocab_size"):
        OpenVINOEngine.from_folder(folder)
    with pytest.raises(UserError, match="threads is 0"):
        OpenVINOEngine.from_folder(irs["fp32"], threads=0)


WINDOWS = '<headroom><windows value="0,-4" /></headroom>'


def _without(folder: Path, name: str) -> None:
    (folder / name).unlink()


def _other_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _other_text(folder: Path, old: str, new: str) -> None:
    text = (folder / IR_NAME).read_text()
    assert old in text
    (folder / IR_NAME).write_text(text.replace(old, new))


def _other_bytes(folder: Path) -> None:
    path = (folder / IR_NAME).with_suffix(".bin")
    raw = bytearray(path.read_bytes())
    raw[3000:3400] = b"\xff" * 400  # NaN in FP32
    path.write_bytes(raw)


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda folder: _other_config(folder, n_positions=38), "n_positions is 37 in the IR, 38 by config.json"),
        (lambda folder: _other_config(folder, n_positions=10**9), "n_positions is 37 in the IR, 1000000000 by"),
        (lambda folder: _other_config(folder, n_positions=10**30), "n_positions is 1000"),
        (lambda folder: _other_config(folder, vocab_size=102), "vocab_size is 101 in the IR, 102 by config.json"),
        (lambda folder: _other_config(folder, vocab_size="101"), "vocab_size is '101'; a whole number"),
        (lambda folder: _other_config(folder, vocab_size=None), "vocab_size is None"),
        (lambda folder: (folder / "config.json").write_text("[" * 9999), "nested too deep"),
        (lambda folder: (folder / "config.json").write_text("7"), "holds no mapping but 7"),
        (lambda folder: _without(folder, "openvino_model.bin"), "with its .bin"),
        (lambda folder: (folder / IR_NAME).write_text("<model/>"), "no OpenVINO IR"),
        (lambda folder: (folder / IR_NAME).write_bytes(b"\x00\xff" * 999), "no OpenVINO IR"),
        (lambda folder: _other_text(folder, "position_ids", "positions"), "keeps its past as a state"),
        (lambda folder: _other_text(folder, 'names="logits"', 'names="probabilities"'), "keeps its past as a state"),
        (_other_bytes, "self.transformer.wte.weight holds NaN or infinity"),
        (lambda folder: _other_text(folder, "</rt_info>", f"{WINDOWS}</rt_info>"), "sliding windows 0,-4 for 3 layers"),
    ],
    ids=range(15),
)  # fmt: skip
def test_an_ir_that_is_not_what_its_folder_says(
    irs: dict[str, Path], tmp_path: Path, harm: Callable[[Path], object], said: str
) -> None:
    """Past its table of positions, or with another vocabulary, an IR would answer all the same."""
    folder = Path(shutil.copytree(irs["fp32"], tmp_path / "ir"))
    harm(folder)
    with pytest.raises(UserError) as error:
        OpenVINOEngine.from_folder(folder)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_rotary_positions_take_no_more_memory_than_there_is(tmp_path: Path) -> None:
    """They have no table to hold config.json against."""
    folder = export_openvino(uneven_model(position="rope", n_layer=1, kept_heads=[[0, 2]]), tmp_path)
    _other_config(folder, n_positions=2**31 - 1)
    engine = OpenVINOEngine.from_folder(folder)
    with pytest.raises(UserError, match="no memory for the keys and values of 4000 x 2147483647 tokens"):
        engine.prefill(torch.ones(4000, 2, dtype=torch.int64))


def test_missing_openvino_is_one_line(irs: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    assert engine_module.import_openvino is openvino_runtime.import_openvino
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(UserError, match="pip install openvino"):
        OpenVINOEngine.from_folder(irs["fp32"])


def test_operator_times_are_those_of_the_steps_since_last_asked(irs: dict[str, Path]) -> None:
    engine = OpenVINOEngine.from_folder(irs["fp32"]).for_profiling()
    for step in (lambda: engine.prefill(_ids(4, 30)), lambda: engine.decode(torch.zeros(4, dtype=torch.int64))):
        began = time.perf_counter()
        step()
        milliseconds = 1000 * (time.perf_counter() - began)
        told = sum(each for _, _, each in engine.operator_times())
        assert 0 < told <= milliseconds


def test_kernels_name_what_multiplies_each_matrix(irs: dict[str, Path], model: CompactGPT2LMHeadModel) -> None:
    kernels = OpenVINOEngine.from_folder(irs["int8"]).kernels()
    assert kernels.keys() == {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert all(kernel.startswith("FullyConnected") for kernel in kernels.values())


def test_memory_that_held_other_things_does_no_harm(irs: dict[str, Path], model: CompactGPT2LMHeadModel) -> None:
    """Blocks of keys and values are not cleared: what they held, even NaN, must not come through."""
    engine = OpenVINOEngine.from_folder(irs["fp32"])
    engine.prefill(_ids(3, 30))
    for name in engine._request._caches:
        engine._request.request.get_tensor(name).data[:] = float("nan")
    ids = _ids(2, 9)
    with torch.no_grad():
        wanted = model(ids).logits
    torch.testing.assert_close(engine.prefill(ids[:, :8]), wanted[:, 7], atol=1e-4, rtol=0)
    torch.testing.assert_close(engine.decode(ids[:, 8]), wanted[:, 8], atol=1e-4, rtol=0)
