"""Quantise: INT8 (and, where asked for, INT4) weights with neural-compressor, and stateful OpenVINO IRs for the CPU."""

import sys
from typing import Any

from pipeline.checkpoint import load_model
from pipeline.data import TokenBlocks, tokenize_dataset
from pipeline.recipe import Quantize, Recipe
from pipeline.stages.job import Job
from pipeline.texts import has_rows, load_text
from pipeline.tokenizer import load_tokenizer

VERSION = 3
_W8A8_BLOCKS = 8


def config(recipe: Recipe) -> dict[str, Any]:
    """The quantisation choices."""
    return recipe.quantize.model_dump()


def reads(recipe: Recipe) -> tuple[str, ...]:
    """The calibration text, where something wants one: RTN to 8 bits looks at weights alone."""
    return (recipe.data.calibration,) if _calibrated(recipe.quantize) else ()


def _calibrated(choices: Quantize) -> bool:
    return choices.method == "gptq" or choices.bits == "mixed" or choices.w8a8


def build(job: Job) -> dict[str, Any]:
    """Write `model/` (the quantised IR), and `ir_fp32/`, `ir_fp16/` and, if asked for, `ir_w8a8/` to compare with."""
    from pipeline.full_int8 import export_w8a8
    from pipeline.inc import INCQuantizer, WeightOnlyConfig
    from pipeline.openvino_export import export_openvino
    from pipeline.openvino_runtime import IR_NAME
    from pipeline.sensitivity import four_bit_layers

    assert job.source is not None
    choices = job.recipe.quantize
    model = load_model(job.source / "model")
    tokenizer = load_tokenizer(job.source / "model")
    blocks = None
    if _calibrated(choices):
        length = min(choices.block_size, model.config.n_positions)
        blocks = tokenize_dataset(_calibration(job.recipe.data.calibration), tokenizer, length)
        blocks = TokenBlocks(blocks.tokens[: choices.calibration_samples])
    fp32 = export_openvino(model, job.out / "ir_fp32", tokenizer=tokenizer) / IR_NAME
    export_openvino(model, job.out / "ir_fp16", tokenizer=tokenizer, compress_to_fp16=True, traced=fp32)
    if choices.w8a8:
        assert blocks is not None
        print("quantize: weights and activations in INT8, to compare with", file=sys.stderr)
        export_w8a8(job.out / "ir_fp32", job.out / "ir_w8a8", blocks.tokens[:_W8A8_BLOCKS])
    four_bit: list[str] = []
    if choices.bits == "mixed":
        assert blocks is not None
        four_bit = four_bit_layers(model, blocks, budget=choices.budget, ignore=choices.ignore)
    INCQuantizer.from_pretrained(model, tokenizer=tokenizer).quantize(
        quantization_config=WeightOnlyConfig(
            method=choices.method, ignore=tuple(choices.ignore), four_bit=tuple(four_bit)
        ),
        calibration_dataset=blocks,
        save_directory=job.out / "model",
        traced=fp32,
    )
    return {
        "method": choices.method,
        "four_bit": four_bit,
        "w8a8": choices.w8a8,
        "parameters": model.num_parameters(),
    }


def _calibration(source: str) -> str | list[str]:
    """A text as it is; of one in WikiText's rows what is worth calibrating on."""
    text = load_text(source)
    return _filtered(text) if has_rows(source) else text


def _filtered(text: str, shortest: int = 80) -> list[str]:
    """The paragraphs worth calibrating on: no empty lines, no headings, none under `shortest` characters."""
    return [line for line in text.split("\n") if len(line.strip()) >= shortest]
