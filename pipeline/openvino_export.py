"""CompactGPT2 to OpenVINO: a stateful IR whose layers keep their own head counts, its weights FP32, FP16 or INT8."""

import contextlib
import copy
import logging
import re
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from transformers.utils import logging as transformers_logging

from eval.errors import UserError
from pipeline.ir_weights import compress_weights
from pipeline.model import CompactGPT2LMHeadModel, in_fp32
from pipeline.model.modeling import Block
from pipeline.openvino_runtime import IR_NAME, WINDOWS, import_openvino

TOKENIZER_IRS = ("openvino_tokenizer", "openvino_detokenizer")


def export_openvino(
    model: CompactGPT2LMHeadModel,
    save_directory: str | Path,
    *,
    tokenizer: Any = None,
    compress_to_fp16: bool = False,
    int8: CompactGPT2LMHeadModel | None = None,
    traced: str | Path | None = None,
) -> Path:
    """Write `openvino_model.xml/.bin`, configs and tokenizer into `save_directory`; returns that folder.

    The IR takes `input_ids`, `position_ids` (int64 `[batch, length]`), `attention_mask` (int64 `[batch,
    past + length]`) and `beam_idx` (int32 `[batch]`), keeps keys and values as its state, and gives FP32
    `logits` `[batch, length, vocab]`. Weights are stored as FP32, or as FP16 with `compress_to_fp16`; or, with
    `int8`, a copy of `model` that INCQuantizer made, its codes stand in the weights' places, the tied embedding
    one of them. Keys and values of grouped queries are kept for each group where all groups have one size, else for
    each query head. `traced` is an IR that this function wrote of the same model in FP32: tracing, which takes most of
    the time, is left out. The same model gives the same bytes. `model` is not changed.

    Raises `UserError` where openvino or optimum-intel is not installed.
    """
    openvino = import_openvino()
    folder = Path(save_directory)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".export-") as scratch:
        if traced is None:
            with quiet():
                _trace(in_fp32(model), Path(scratch))  # another config, for the exporter writes into it
            traced = Path(scratch) / IR_NAME
        ir = openvino.Core().read_model(traced)
        if int8 is not None:
            compress_weights(ir, int8)
        name_nodes(ir)
        if any(model.config.windows):
            ir.set_rt_info(",".join(str(window or 0) for window in model.config.windows), WINDOWS)
        openvino.save_model(ir, folder / IR_NAME, compress_to_fp16=compress_to_fp16)
        del ir  # it maps the scratch files
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.dtype = torch.float32
    config.save_pretrained(folder)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
        if tokenizer.is_fast:  # openvino_tokenizers converts no other
            _save_tokenizer_irs(openvino, tokenizer, folder)
    return folder


def int8_weights(xml: str | Path) -> dict[str, list[int]]:
    """The INT8 constants of an IR: name -> shape.

    Raises `UserError` where openvino is not installed.
    """
    ir = import_openvino().Core().read_model(xml)
    return {
        node.get_friendly_name(): list(node.get_output_shape(0))
        for node in ir.get_ordered_ops()
        if node.get_type_name() == "Constant" and node.get_output_element_type(0).get_type_name() == "i8"
    }


def _save_tokenizer_irs(openvino: Any, tokenizer: Any, folder: Path) -> None:
    """The tokenizer as IRs of its own, with which the folder runs in OpenVINO GenAI, without Python."""
    with quiet():
        from openvino_tokenizers import convert_tokenizer

        for ir, name in zip(convert_tokenizer(tokenizer, with_detokenizer=True), TOKENIZER_IRS, strict=True):
            name_nodes(ir, name)
            openvino.save_model(ir, folder / f"{name}.xml")


def _trace(model: CompactGPT2LMHeadModel, folder: Path) -> None:
    """Let optimum trace the model, hide its past in the state and write the IR, all FP32 weights as FP32."""
    try:
        from optimum.exporters.openvino.convert import export_from_model
        from optimum.exporters.openvino.model_configs import GPT2OpenVINOConfig
        from optimum.utils.input_generators import DummyPastKeyValuesGenerator, DummyTextInputGenerator
    except ImportError as error:
        raise UserError(f"optimum-intel cannot be imported ({error}); pip install optimum-intel==2.1.0") from error

    attentions = [cast(Block, block).attn for block in model.transformer.h]
    # OpenVINO 2026.4's paged attention on a CPU reads layers wrongly whose groups differ in size.
    fill = len({size for attn in attentions for size in attn.group_sizes}) > 1
    for attn in attentions:
        attn.fill_groups = fill
    head_counts = [attn.n_head if fill else len(attn.group_sizes) for attn in attentions]
    head_dim = model.config.head_dim

    class UnevenPast(DummyPastKeyValuesGenerator):
        """Example keys and values, each layer with its own head count."""

        def generate(
            self, input_name: str, framework: str = "pt", int_dtype: str = "int64", float_dtype: str = "fp32"
        ) -> list[tuple[Any, Any]]:
            shapes = [(self.batch_size, heads, self.sequence_length, head_dim) for heads in head_counts]

            def example(shape: tuple[Any, ...]) -> Any:
                return self.random_float_tensor(shape, framework=framework, dtype=float_dtype)

            return [(example(shape), example(shape)) for shape in shapes]

    class UnevenConfig(GPT2OpenVINOConfig):
        DUMMY_PKV_GENERATOR_CLASS = UnevenPast
        DUMMY_INPUT_GENERATOR_CLASSES = (DummyTextInputGenerator, UnevenPast)

    config = UnevenConfig(model.config, task="text-generation", use_past=True, use_past_in_inputs=True)
    export_from_model(
        model,
        folder,
        task="text-generation-with-past",
        stateful=True,
        custom_export_configs={"model": config},
    )


def name_nodes(ir: Any, name: str = "compact_gpt2") -> None:
    """Number nodes and tensors that openvino named from a process-wide counter: the same model, the same bytes."""
    counted = re.compile(r"^([A-Za-z]\w*?)_\d+(\.\d+)?$")
    ir.set_friendly_name(name)
    for index, node in enumerate(ir.get_ordered_ops()):
        if match := counted.match(node.get_friendly_name()):
            node.set_friendly_name(f"{match[1]}_{index}")
        for output in node.outputs():
            number = f"{index}.{output.get_index()}"
            output.set_names({counted.sub(rf"\1_{number}", tensor) for tensor in output.get_names()})


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep what the libraries print off stdout, and their warnings off stderr; errors stay."""
    disabled, verbosity = logging.root.manager.disable, transformers_logging.get_verbosity()
    with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        transformers_logging.set_verbosity_error()
        try:
            yield
        finally:
            logging.disable(disabled)
            transformers_logging.set_verbosity(verbosity)
