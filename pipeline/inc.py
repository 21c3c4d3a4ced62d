"""INT8 and INT4 weights with Intel Neural Compressor 3: the `INCQuantizer` surface that optimum-intel 2.0 dropped."""

import copy
import dataclasses
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import nn

from eval.errors import UserError
from eval.results import QuantizedLayer
from pipeline.artifacts import QUANTIZATION
from pipeline.data import TokenBlocks
from pipeline.inc_codes import Codes, gptq, inc_quiet, repair_one_sided, rtn
from pipeline.model import CompactGPT2LMHeadModel, in_fp32
from pipeline.model.convert import check_tied
from pipeline.model.quantized import HalfEmbedding, QuantizedEmbedding, QuantizedLinear, dequantized
from pipeline.openvino_export import export_openvino, quiet

_HEAD = "lm_head"
_TOKENS = "transformer.wte"
FOUR_BIT_GROUP = 64


@dataclass(frozen=True)
class WeightOnlyConfig:
    """How weights become INT8: symmetric, one FP32 scale an output channel (`group_size` -1).

    `ignore` holds regular expressions; a layer whose whole name one of them matches stays FP32. The layers named in
    `four_bit` get INT4 codes and a scale for each `FOUR_BIT_GROUP` columns. The token embedding is tied to
    `lm_head` and follows it, always in INT8; the position embedding becomes FP16.

    Raises `UserError` for anything but INT8 codes with one scale a row, which is what the runtime computes with.
    """

    method: Literal["rtn", "gptq"] = "rtn"
    bits: int = 8
    symmetric: bool = True
    group_size: int = -1
    ignore: tuple[str, ...] = ()
    four_bit: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.method not in ("rtn", "gptq"):
            raise UserError(f"quantisation method {self.method!r}: give rtn or gptq")
        if (self.bits, self.symmetric, self.group_size) != (8, True, -1):
            raise UserError(
                f"quantisation with bits={self.bits}, symmetric={self.symmetric}, group_size={self.group_size}: "
                "only bits=8, symmetric=True, group_size=-1 (one scale an output channel) can be exported"
            )
        for pattern in self.ignore:
            try:
                re.compile(pattern)
            except re.error as error:
                raise UserError(f"ignore pattern {pattern!r}: not a regular expression ({error})") from error


class INCQuantizer:
    """Quantises a CompactGPT2 with neural-compressor; the model that was passed in stays as it was.

    `report` holds one `QuantizedLayer` for each quantised layer once `quantize` has run.
    """

    def __init__(self, model: CompactGPT2LMHeadModel, tokenizer: Any = None):
        if not isinstance(model.lm_head, nn.Linear):
            raise UserError("the model is quantised already: give the FP32 or FP16 model")
        try:
            check_tied(model)  # one table of codes will serve as both
        except ValueError as error:
            raise UserError(str(error)) from error
        self.model = model
        self.tokenizer = tokenizer
        self.report: list[QuantizedLayer] = []

    @classmethod
    def from_pretrained(cls, model: CompactGPT2LMHeadModel, tokenizer: Any = None) -> Self:
        """A quantizer for `model`; `tokenizer`, if given, is saved beside the result."""
        return cls(model, tokenizer)

    @torch.no_grad()
    def quantize(
        self,
        quantization_config: Any = None,
        calibration_dataset: TokenBlocks | None = None,
        save_directory: str | Path | None = None,
        traced: str | Path | None = None,
    ) -> CompactGPT2LMHeadModel:
        """An FP32 copy of the model whose linear layers are `QuantizedLinear`, its tied embedding a
        `QuantizedEmbedding` and its position embedding, if it has one, a `HalfEmbedding`.

        `quantization_config` is a `WeightOnlyConfig` (default: RTN), or neural-compressor's `RTNConfig` or
        `GPTQConfig` with INT8 codes and one scale a row. GPTQ reads `calibration_dataset`. With
        `save_directory`, the OpenVINO IR goes there, with config, tokenizer and `quantization.json`; `traced`, an
        FP32 IR of the model that `export_openvino` wrote, makes that quicker.

        Raises `UserError` for a config that cannot be exported, an `ignore` pattern that matches no
        layer, and GPTQ without calibration text.
        """
        config, inc_config = _read_config(quantization_config)
        result = in_fp32(self.model)
        linears = {name: module for name, module in result.named_modules() if isinstance(module, nn.Linear)}
        # The position embedding, where positions are learned.
        tables = [
            name for name, module in result.named_modules() if isinstance(module, nn.Embedding) and name != _TOKENS
        ]
        ignored = _ignored(config.ignore, [*linears, *tables])
        blocks = {name: linear for name, linear in linears.items() if name not in ignored | {_HEAD}}
        _check_four_bit(config.four_bit, blocks)
        four_bit_config = copy.deepcopy(inc_config)
        four_bit_config.bits, four_bit_config.group_size = 4, FOUR_BIT_GROUP
        if config.method == "gptq":
            model = in_fp32(self.model)
            model.config.use_cache = False  # GPTQ replays blocks: a cache would grow with every replay
            for name in sorted(linears.keys() - blocks.keys() - {_HEAD}):
                inc_config.set_local(re.escape(name), type(inc_config)(dtype="fp32"))
            for name in config.four_bit:
                inc_config.set_local(re.escape(name), four_bit_config)
            codes: Iterator[tuple[str, Codes]] = gptq(model, inc_config, calibration_dataset, len(blocks))
        else:
            codes = (
                (name, rtn(linear, four_bit_config if name in config.four_bit else inc_config))
                for name, linear in blocks.items()
            )
        self.report = []
        with inc_quiet():
            for name, (weight, scale) in codes:
                bits = 4 if name in config.four_bit else 8
                if config.method == "gptq":
                    repair_one_sided(linears[name].weight, weight, scale, bits)
                self._replace(result, name, linears[name], weight, scale, config.method, bits)
            if _HEAD not in ignored:
                # Always RTN: the tensor is an embedding table too, and GPTQ's rounding would trade error between
                # the columns of a row by the statistics of the head's input alone, at the embedding's expense.
                head = result.lm_head
                weight, scale = rtn(head)
                self._replace(result, _HEAD, head, weight, scale, "rtn", 8)
                assert isinstance(result.lm_head, QuantizedLinear)
                result.transformer.wte = QuantizedEmbedding(result.lm_head)
        for name in tables:
            if name not in ignored:
                result.set_submodule(name, HalfEmbedding(result.get_parameter(f"{name}.weight")))
        if save_directory is not None:
            self._save(result, Path(save_directory), traced)
        return result

    def _replace(
        self,
        model: CompactGPT2LMHeadModel,
        name: str,
        original: nn.Linear,
        weight: torch.Tensor,
        scale: torch.Tensor,
        method: str,
        bits: int,
    ) -> None:
        bias = None if original.bias is None else original.bias.detach()
        model.set_submodule(name, QuantizedLinear(weight, scale, bias, bits))
        change = dequantized(weight, scale).sub_(original.weight).norm()
        error = change / original.weight.norm().clamp_min(1e-30)
        shared = "an output" if bits == 8 else f"for {FOUR_BIT_GROUP} columns of an output"
        self.report.append(
            QuantizedLayer(
                name,
                method,
                bits,
                f"symmetric, one scale {shared}",
                scale.min().item(),
                scale.max().item(),
                error.item(),
            )
        )

    def _save(self, quantized: CompactGPT2LMHeadModel, folder: Path, traced: str | Path | None) -> None:
        export_openvino(self.model, folder, tokenizer=self.tokenizer, int8=quantized, traced=traced)
        layers = [dataclasses.asdict(layer) for layer in self.report]
        (folder / QUANTIZATION).write_text(json.dumps({"layers": layers}, indent=1) + "\n", encoding="utf-8")


def _read_config(given: Any) -> tuple[WeightOnlyConfig, Any]:
    """Our config and neural-compressor's, from either of the two."""
    with quiet():
        from neural_compressor.torch.quantization import GPTQConfig, RTNConfig

        if given is None:
            given = WeightOnlyConfig()
        if isinstance(given, WeightOnlyConfig):
            options: dict[str, Any] = {"bits": given.bits, "use_sym": True, "group_size": -1, "use_layer_wise": False}
            if given.method == "rtn":
                return given, RTNConfig(**options)
            # Lazy batch updates of 128 columns (the paper's B) are many times faster than the default of 2048.
            return given, GPTQConfig(**options, block_size=128, model_path=".")
        if isinstance(given, (RTNConfig, GPTQConfig)):
            inc_config = copy.deepcopy(given)
            inc_config.use_layer_wise = False
            inc_config.model_path = inc_config.model_path or "."  # read even where nothing is loaded from it
            method: Literal["rtn", "gptq"] = "gptq" if isinstance(given, GPTQConfig) else "rtn"
            if given.dtype not in ("int", "int8") or given.use_double_quant or getattr(given, "act_order", False):
                raise UserError(
                    f"{type(given).__name__}: give dtype='int', without double quantisation and act_order, "
                    "which cannot be exported"
                )
            bits = 8 if given.dtype == "int8" else given.bits
            return WeightOnlyConfig(method, bits, given.use_sym, given.group_size), inc_config
    raise UserError(
        f"quantization_config is {type(given).__name__}; "
        "give a WeightOnlyConfig, or neural-compressor's RTNConfig or GPTQConfig"
    )


def _ignored(patterns: tuple[str, ...], names: list[str]) -> set[str]:
    """The names of the layers to leave alone."""
    ignored: set[str] = set()
    for pattern in patterns:
        matches = {name for name in names if re.fullmatch(pattern, name)}
        if not matches:
            raise UserError(f"ignore pattern {pattern!r} matches no layer; layers are named like {names[0]}")
        ignored |= matches
    return ignored


def _check_four_bit(names: tuple[str, ...], linears: dict[str, nn.Linear]) -> None:
    for name in names:
        if name not in linears:
            raise UserError(f"four_bit: {name} is no quantised layer; they are named like {next(iter(linears))}")
        if linears[name].in_features % FOUR_BIT_GROUP:
            raise UserError(
                f"four_bit: {name} has {linears[name].in_features} columns; 4 bits need a multiple of {FOUR_BIT_GROUP}"
            )
