"""INT8 and INT4 weights with Intel Neural Compressor 3: the `INCQuantizer` surface that optimum-intel 2.0 dropped.

Round-to-nearest (RTN), or GPTQ (Frantar et al. 2023, arXiv 2210.17323) with calibration text.
"""

import contextlib
import copy
import dataclasses
import json
import re
import sys
import tempfile
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
from pipeline.model import CompactGPT2LMHeadModel, in_fp32
from pipeline.model.quantized import HalfEmbedding, QuantizedEmbedding, QuantizedLinear, dequantized
from pipeline.openvino_export import export_openvino, quiet

_HEAD = "lm_head"
_TOKENS = "transformer.wte"
FOUR_BIT_GROUP = 64
_RTN_ROWS = 4096

Codes = tuple[torch.Tensor, torch.Tensor]
"""int8 codes `[out, in]` and FP32 scales `[out, groups]`."""


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
            codes: Iterator[tuple[str, Codes]] = _gptq(model, inc_config, calibration_dataset, len(blocks))
        else:
            codes = (
                (name, _rtn(linear, four_bit_config if name in config.four_bit else inc_config))
                for name, linear in blocks.items()
            )
        self.report = []
        with _inc_quiet():
            for name, (weight, scale) in codes:
                bits = 4 if name in config.four_bit else 8
                if config.method == "gptq":
                    _repair_one_sided(linears[name].weight, weight, scale, bits)
                self._replace(result, name, linears[name], weight, scale, config.method, bits)
            if _HEAD not in ignored:
                # Always RTN: the tensor is an embedding table too, and GPTQ's rounding would trade error between
                # the columns of a row by the statistics of the head's input alone, at the embedding's expense.
                head = result.lm_head
                weight, scale = _rtn(head)
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


def _gptq(
    model: CompactGPT2LMHeadModel, inc_config: Any, calibration: TokenBlocks | None, total: int
) -> Iterator[tuple[str, Codes]]:
    """Quantise `model` in place; codes and scales by layer name."""
    if not calibration:
        raise UserError("GPTQ needs calibration text: give calibration_dataset, or use method rtn")
    with _gptq_repaired(total):
        from neural_compressor.torch.algorithms.weight_only.modules import INCWeightOnlyLinear
        from neural_compressor.torch.quantization import convert, prepare

        prepared = prepare(model, inc_config)
        for index in range(len(calibration)):
            # Row by row and without padding, which would count in the Hessian.
            row = calibration[index]
            ids = row["input_ids"][row["attention_mask"].bool()] if "attention_mask" in row else row["input_ids"]
            prepared(ids.unsqueeze(0))
        converted = convert(prepared, use_optimum_format=False)
    for name, module in converted.named_modules():
        if isinstance(module, INCWeightOnlyLinear):
            yield name, _unpack(module)


@contextlib.contextmanager
def _inc_quiet() -> Iterator[None]:
    """neural-compressor without its chatter, and its workspace in a temporary place, not the user's folder."""
    with quiet(), tempfile.TemporaryDirectory(prefix="headroom-inc-") as folder:
        from neural_compressor.common import set_workspace

        set_workspace(folder)
        yield


def _rtn(linear: nn.Linear, config: Any = None) -> Codes:
    """One layer's codes and scales, a slice of its rows at a time, as each row has a scale of its own: the packing
    that neural-compressor does on the way takes several times a slice's memory. The layer stays as it is."""
    from neural_compressor.torch.quantization import RTNConfig, convert, prepare

    config = config or RTNConfig(bits=8, use_sym=True, group_size=-1, use_layer_wise=False, model_path=".")
    parts = []
    for rows in linear.weight.detach().split(_RTN_ROWS):
        # neural-compressor skips layers by the name lm_head, so this one goes under another.
        holder = nn.ModuleDict({"rows": nn.Linear(rows.shape[1], rows.shape[0], bias=False, device="meta")})
        holder["rows"].weight = nn.Parameter(rows.clone(), requires_grad=False)
        parts.append(_unpack(convert(prepare(holder, config), use_optimum_format=False).rows))
    weights, scales = zip(*parts, strict=True)
    return torch.cat(weights), torch.cat(scales)


def _unpack(module: Any) -> Codes:
    """Codes and scales from neural-compressor's packed layer."""
    parts = module.unpack()
    weight, scale = parts["int_weight"], parts["scales"]
    return weight.to(torch.int8).contiguous(), scale.float().reshape(len(weight), -1).contiguous()


def _repair_one_sided(weight: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, bits: int) -> None:
    """Requantise, in place, rows (with several scales: their groups) without a negative weight, for which
    neural-compressor's symmetric GPTQ takes a scale half as large as needed and clips the upper half away."""
    groups, grouped_codes = weight.view(*scale.shape, -1), codes.view(*scale.shape, -1)
    wrong = (groups >= 0).all(dim=-1) & (groups > 0).any(dim=-1)
    scale[wrong] = groups[wrong].amax(dim=-1) / (2 ** (bits - 1) - 1)
    grouped_codes[wrong] = (groups[wrong] / scale[wrong].unsqueeze(-1)).round().to(torch.int8)


@contextlib.contextmanager
def _gptq_repaired(total: int) -> Iterator[None]:
    """GPTQ with two repairs, and a progress bar over `total` layers on stderr.

    neural-compressor 3.10 gives a layer that is excluded by name the first config it finds, so that the
    layer is quantised all the same; and it stores scales as FP16, though the codes were found for FP32 ones.
    """
    from neural_compressor.torch.algorithms.weight_only import gptq
    from tqdm import tqdm

    packed, lookup = gptq.INCWeightOnlyLinear, gptq.RAWGPTQuantizer.get_layer_config
    with tqdm(total=total, desc="gptq", unit="layer", file=sys.stderr, leave=False, delay=1) as bar:

        def pack(*args: Any, **kwargs: Any) -> Any:
            bar.update()
            return packed(*args, **kwargs, use_optimum_format=False)

        gptq.INCWeightOnlyLinear = pack
        gptq.RAWGPTQuantizer.get_layer_config = lambda self, name: self.weight_config.get(name)
        try:
            yield
        finally:
            gptq.INCWeightOnlyLinear, gptq.RAWGPTQuantizer.get_layer_config = packed, lookup
