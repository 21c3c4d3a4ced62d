"""Quantise: INT8 weights with neural-compressor, and stateful OpenVINO IRs for the CPU."""

from typing import Any

from pipeline.checkpoint import load_model, load_tokenizer
from pipeline.data import TokenBlocks, tokenize_dataset
from pipeline.recipe import Recipe
from pipeline.stages.job import Job
from pipeline.texts import load_text

VERSION = 2


def config(recipe: Recipe) -> dict[str, Any]:
    """The quantisation choices."""
    return recipe.quantize.model_dump()


def reads(recipe: Recipe) -> tuple[str, ...]:
    """The calibration text, where the method wants one: RTN looks at weights alone."""
    return (recipe.data.calibration,) if recipe.quantize.method == "gptq" else ()


def build(job: Job) -> dict[str, Any]:
    """Write `model/` (INT8 IR), and `ir_fp32/` and `ir_fp16/` to compare it with."""
    from pipeline.inc import INCQuantizer, WeightOnlyConfig
    from pipeline.openvino_export import IR_NAME, export_openvino

    assert job.source is not None
    choices = job.recipe.quantize
    model = load_model(job.source / "model")
    tokenizer = load_tokenizer(job.source / "model")
    blocks = None
    if choices.method == "gptq":
        length = min(choices.block_size, model.config.n_positions)
        blocks = tokenize_dataset(_filtered(load_text(job.recipe.data.calibration)), tokenizer, length)
        blocks = TokenBlocks(blocks.tokens[: choices.calibration_samples])
    fp32 = export_openvino(model, job.out / "ir_fp32", tokenizer=tokenizer) / IR_NAME
    export_openvino(model, job.out / "ir_fp16", tokenizer=tokenizer, compress_to_fp16=True, traced=fp32)
    INCQuantizer.from_pretrained(model, tokenizer=tokenizer).quantize(
        quantization_config=WeightOnlyConfig(method=choices.method, ignore=tuple(choices.ignore)),
        calibration_dataset=blocks,
        save_directory=job.out / "model",
        traced=fp32,
    )
    return {"method": choices.method, "parameters": model.num_parameters()}


def _filtered(text: str, shortest: int = 80) -> list[str]:
    """The paragraphs worth calibrating on: no empty lines, no headings, none under `shortest` characters."""
    return [line for line in text.splitlines() if len(line.strip()) >= shortest]
