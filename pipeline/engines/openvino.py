"""Run an exported IR on the CPU with OpenVINO itself: no optimum, no transformers in the loop."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from cuda_ext.configuration import read_sizes
from cuda_ext.errors import CheckpointError
from eval.errors import UserError
from pipeline.engines.inputs import check_step, check_tokens
from pipeline.engines.paged import PagedRequest, page
from pipeline.openvino_runtime import IR_NAME, computes_bf16, import_openvino

# OpenVINO's defaults are not FP32: it may compute in bf16, keep keys and values in 8 bits and quantise activations.
TRUE_FP32 = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
_HINTS: dict[str, dict[str, str]] = {
    "fp32": TRUE_FP32,
    "fp16": TRUE_FP32,
    "bf16": {"INFERENCE_PRECISION_HINT": "bf16"},
    "auto": {},
    "int8": {},
    "int4-int8": {},
    "w8a8": {},
}
_PRODUCT = re.compile(r"__module\.(.+)/aten::linear/(MatMul|Add)$")
_STATED = (
    "INFERENCE_PRECISION_HINT",
    "KV_CACHE_PRECISION",
    "DYNAMIC_QUANTIZATION_GROUP_SIZE",
    "INFERENCE_NUM_THREADS",
)


class OpenVINOEngine:
    """A stateful IR on the CPU, as an `eval.engine.Engine`; it is run in its paged form."""

    name = "openvino"
    device = "cpu"

    def __init__(
        self,
        compile_ir: Callable[[bool], Any],
        *,
        precision: str,
        context: int,
        vocab_size: int,
        counting: bool = False,
    ):
        """`compile_ir(counting)` compiles the paged IR; `counting`: with the time of each node."""
        self.precision = precision
        self.context = context
        self.vocab_size = vocab_size
        self._compile = compile_ir
        compiled = compile_ir(counting)
        self.compute = ", ".join(f"{key}={_text(compiled.get_property(key))}" for key in _STATED)
        self._request = PagedRequest(compiled)
        self._all_positions = PagedRequest(compiled)
        self._batch = self._past = 0
        self._steps = self._steps_told = 0
        self._told: dict[str, float] = {}

    @classmethod
    def from_folder(
        cls,
        folder: str | Path,
        *,
        precision: str | None = None,
        threads: int | None = None,
        hints: Mapping[str, str] | None = None,
    ) -> Self:
        """Load the IR in `folder`.

        `fp32` and `fp16` (weights stored as such) compute in true FP32, keys and values too; `bf16` computes
        an FP32 IR in bf16, `auto` as OpenVINO does by default on this CPU; so run `int8`, `int4-int8` (some
        matrices in 4 bits) and `w8a8` (activations too). Those defaults differ from one CPU to the next. `None`
        takes what the IR holds. `threads` defaults to OpenVINO's choice. `hints` are OpenVINO's properties by
        name, in place of those of the precision: `TRUE_FP32` gives the same arithmetic on any CPU. `compute`
        tells what came to be in force.

        Raises `UserError` where openvino is not installed, the folder holds no IR or a damaged one, the
        precision does not fit the IR, or the CPU has no bf16.
        """
        folder = Path(folder)
        if precision is not None and precision not in _HINTS:
            raise UserError(f"precision {precision!r}: OpenVINO runs {', '.join(_HINTS)}")
        if threads is not None and threads < 1:
            raise UserError(f"threads is {threads}: give at least 1")
        context, vocab_size = _read_config(folder)
        xml = folder / IR_NAME
        if not xml.is_file() or not xml.with_suffix(".bin").is_file():
            raise UserError(f"{folder}: no {IR_NAME} with its .bin there; export the model with the quantize stage")
        core = import_openvino().Core()
        options = {"PERFORMANCE_HINT": "LATENCY"}
        if threads is not None:
            options["INFERENCE_NUM_THREADS"] = str(threads)
        try:
            with xml.open("rb") as file:
                if b"<net " not in file.read(4096):  # OpenVINO would try all formats it knows, aloud
                    raise UserError(f"{xml}: no OpenVINO IR; export the model again")
            ir = core.read_model(xml)
            _check_is_ours(xml, ir, context, vocab_size)
            held = _held_precision(ir)
            del ir  # it maps the file
            precision = precision or held
            _check_fits(folder, held, precision)
            chosen = {**options, **_HINTS[precision], **(hints or {})}

            def compile_ir(counting: bool) -> Any:
                properties = {**chosen, "PERF_COUNT": "YES" if counting else "NO"}
                return core.compile_model(page(core.read_model(xml)), "CPU", properties)

            return cls(compile_ir, precision=precision, context=context, vocab_size=vocab_size)
        except UserError:
            raise
        except Exception as error:  # what a damaged IR leads OpenVINO and its transformation to has many types
            reason = next((line for line in reversed(str(error).splitlines()) if line.strip()), "no reason given")
            raise UserError(f"{xml}: damaged IR ({reason.strip()}); export the model again") from error

    def logits(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Logits of all positions, past forgotten before. `[batch, length]` int64 -> `[batch, length, vocab]` FP32.

        Raises `UserError` for what the model has no positions or embeddings for.
        """
        self._check(input_ids, 0)
        ids, length = input_ids.numpy(), input_ids.shape[1]
        return torch.from_numpy(self._all_positions.infer(ids, past=0, capacity=length, last_only=False).copy())

    def prefill(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Forget the past, read a prompt. `[batch, length]` int64 -> the next token's logits `[batch, vocab]` FP32.

        Raises `UserError` as `logits` does.
        """
        self._batch = self._past = 0
        return self._step(input_ids)

    def decode(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Append one token a sequence. `[batch]` int64 -> `[batch, vocab]` FP32.

        Raises `UserError` where the context is full, or there are not as many sequences.
        """
        check_step(token_ids, batch=self._batch)
        return self._step(token_ids.unsqueeze(1))

    def for_profiling(self) -> Self:
        """The same engine, compiled to count the time of each node; slower, so not for latencies."""
        return type(self)(
            self._compile, precision=self.precision, context=self.context, vocab_size=self.vocab_size, counting=True
        )

    def operator_times(self) -> list[tuple[str, str, float]]:
        """Node name, kind with the kernel that ran, and its mean milliseconds in the steps since last asked."""
        found, steps = [], max(1, self._steps - self._steps_told)
        for node in self._request.request.profiling_info:
            total = self._steps * 1000 * node.real_time.total_seconds()  # OpenVINO tells the mean of all steps
            mean = max(0.0, total - self._told.get(node.node_name, 0.0)) / steps
            self._told[node.node_name] = total
            found.append((node.node_name, f"{node.node_type} {node.exec_type}", mean))
        self._steps_told = self._steps
        return found

    def kernels(self) -> dict[str, str]:
        """What multiplies each weight matrix here, by the module's name: node type and kernel."""
        engine = self.for_profiling()
        engine.prefill(torch.zeros(1, 2, dtype=torch.int64))
        products = ((_PRODUCT.match(node), kind) for node, kind, _ in engine.operator_times())
        return {match.group(1): kind for match, kind in products if match is not None}

    def synchronize(self) -> None:
        """Nothing to wait for: `infer` returns when it is done."""

    def _step(self, input_ids: torch.Tensor) -> torch.Tensor:
        self._check(input_ids, self._past)
        logits = self._request.infer(input_ids.numpy(), past=self._past, capacity=self.context, last_only=True)
        self._batch = input_ids.shape[0]
        self._past += input_ids.shape[1]
        self._steps += 1
        return torch.from_numpy(logits[:, 0].copy())

    def _check(self, input_ids: torch.Tensor, past: int) -> None:
        check_tokens(input_ids, past=past, context=self.context, vocab_size=self.vocab_size)


def _read_config(folder: Path) -> tuple[int, int]:
    """The context and the vocabulary's size."""
    try:
        sizes = read_sizes(folder, "n_positions", "vocab_size")
        return sizes["n_positions"], sizes["vocab_size"]
    except CheckpointError as error:
        raise UserError(str(error)) from error


def _check_is_ours(xml: Path, ir: Any, context: int, vocab_size: int) -> None:
    """Raise `UserError` for an IR that is no language model with a state, has other sizes than its config.json says,
    or holds weights that are no numbers."""
    inputs = {name for port in ir.inputs for name in port.get_names()}
    outputs = [port.get_names() for port in ir.outputs]
    nodes = ir.get_ops()
    stateful = any(node.get_type_name() == "ReadValue" for node in nodes)
    if not {"input_ids", "position_ids"} <= inputs or outputs != [{"logits"}] or not stateful:
        raise UserError(f"{xml}: no language model that keeps its past as a state; export the model again")
    logits = ir.output(0).get_partial_shape()
    rows = _table_rows(nodes)
    for field, said, found in (
        ("vocab_size", vocab_size, logits[len(logits) - 1].get_length()),
        ("vocab_size", vocab_size, rows.get("input_ids", vocab_size)),
        ("n_positions", context, rows.get("position_ids", context)),  # rotary positions have no table
    ):
        if said != found:
            raise UserError(f"{xml}: {field} is {found} in the IR, {said} by config.json; export the model again")
    for node in nodes:
        if node.get_type_name() != "Constant" or node.get_element_type().get_type_name() not in ("f32", "f16"):
            continue
        if node.data.size > 1 and not np.isfinite(node.data).all():  # one number alone may be a mask's infinity
            raise UserError(f"{xml}: {node.get_friendly_name()} holds NaN or infinity; export the model again")


def _table_rows(nodes: list[Any]) -> dict[str, int]:
    """How many rows the table has that each of the IR's inputs looks up."""
    rows = {}
    for node in nodes:
        if node.get_type_name() != "Gather":
            continue
        source = node.input_value(1).get_node()
        while source.get_type_name() == "Convert":
            source = source.input_value(0).get_node()
        table = node.input_value(0).get_partial_shape()
        if source.get_type_name() == "Parameter" and table.is_static:
            rows[source.output(0).get_any_name()] = table[0].get_length()
    return rows


def _held_precision(ir: Any) -> str:
    """What the IR's weights are stored as: integers if any is, else the type of its matrices."""
    nodes = ir.get_ordered_ops()
    if any(node.get_type_name() == "FakeQuantize" for node in nodes):
        return "w8a8"
    types = {
        node.get_output_element_type(0).get_type_name()
        for node in nodes
        if node.get_type_name() == "Constant" and len(node.get_output_shape(0)) >= 2
    }
    kinds = (("i4", "int4-int8"), ("i8", "int8"), ("f16", "fp16"))
    return next((precision for kind, precision in kinds if kind in types), "fp32")


def _check_fits(folder: Path, held: str, precision: str) -> None:
    fitting = ("fp32", "bf16", "auto") if held == "fp32" else (held,)
    if precision not in fitting:
        raise UserError(f"{folder}: holds {held} weights, which run as {' or '.join(fitting)}, not as {precision}")
    if precision == "bf16" and not computes_bf16():
        raise UserError("this CPU has no bf16 instructions (AMX or AVX512-BF16); use precision fp32")


def _text(value: Any) -> str:
    """A property's value as OpenVINO writes it: element types by their short name."""
    return value.get_type_name() if hasattr(value, "get_type_name") else str(value)
