"""An IR whose attention reads keys and values from blocks ("pages"): the form that the CPU plugin runs fastest.

PagedAttention: Kwon et al. 2023 (arXiv 2309.06180), here for sequences of one length, so that the tables of blocks are
simple. Beside the stateful form, the plugin prepares no mask, moves no keys and values and vectorises over blocks.
"""

import re
from typing import Any

import numpy as np

from eval.errors import UserError
from pipeline.openvino_runtime import WINDOWS

_ROWS = "rows"
_WINDOW_INPUT = 10  # of PagedAttentionExtension


def page(ir: Any) -> Any:
    """Change a stateful IR in place: keys and values become inputs in blocks, tokens of all sequences stand in one
    row, and the input `rows` (int64 `[n]`) says for which of them logits `[n, 1, vocab]` are wanted: a prompt needs
    those of the last position alone. The transformation takes the masks out: sliding windows are put in again from
    the IR's notes. Blocks older than a window are not given back. Returns `ir`.

    Raises `ValueError` where the notes are none of this IR.
    """
    from openvino import opset13 as ops

    # Where openvino keeps the transformation that its own serving libraries call.
    from openvino._offline_transformations import paged_attention_transformation

    paged_attention_transformation(ir)
    if ir.has_rt_info(WINDOWS):
        attentions = [node for node in ir.get_ordered_ops() if node.get_type_name() == "PagedAttentionExtension"]
        note = ir.get_rt_info(WINDOWS).astype(str)
        windows = note.split(",")
        if len(windows) != len(attentions) or not all(re.fullmatch("[0-9]{1,9}", window) for window in windows):
            raise ValueError(f"sliding windows {note} for {len(attentions)} layers")
        for node, window in zip(attentions, windows, strict=True):
            node.input(_WINDOW_INPUT).replace_source_output(ops.constant(int(window), np.int32).output(0))
    head = ir.output(0).get_node().input_value(0).get_node()
    while head.get_type_name() != "MatMul":
        head = head.input_value(0).get_node()
    rows = ops.parameter([-1], np.int64, name=_ROWS)
    rows.output(0).set_names({_ROWS})
    head.input(0).replace_source_output(ops.gather(head.input_value(0), rows, np.int64(0)).output(0))
    ir.add_parameters([rows])
    ir.validate_nodes_and_infer_types()
    return ir


class PagedRequest:
    """One infer request of a compiled paged IR and the keys and values of its sequences, which have one length."""

    def __init__(self, compiled: Any):
        self.request = compiled.create_infer_request()
        self._caches = {
            port.get_any_name(): (port.get_element_type(), [size.get_length() for size in list(port.partial_shape)[1:]])
            for port in compiled.inputs
            if "_cache." in port.get_any_name()
        }
        (self._block,) = {shape[1] for _, shape in self._caches.values()}
        self._reserved = self._each = 0

    def infer(self, ids: np.ndarray, *, past: int, capacity: int, last_only: bool) -> np.ndarray:
        """Logits after `ids` int64 `[batch, length]`, which follow `past` tokens: `[batch, 1 or length, vocab]` FP32 in
        the request's own memory, valid until the next run. With no past, room is made for `capacity` tokens each.
        """
        from openvino import Tensor

        batch, length = ids.shape
        if past == 0:
            self._reserve(batch, capacity)
        used = -(-(past + length) // self._block)
        sequences = np.arange(batch, dtype=np.int32)
        ends = np.arange(batch + 1, dtype=np.int32)
        inputs = {
            "input_ids": ids.reshape(-1),
            "position_ids": np.tile(np.arange(past, past + length, dtype=np.int64), batch),
            "past_lens": np.full(batch, past, dtype=np.int32),
            "subsequence_begins": ends * length,
            "block_indices_begins": ends * used,
            "block_indices": (sequences[:, None] * self._each + np.arange(used, dtype=np.int32)).reshape(-1),
            "max_context_len": np.array(past + length, dtype=np.int32),
            _ROWS: ends[1:].astype(np.int64) * length - 1 if last_only else np.arange(batch * length, dtype=np.int64),
        }
        for name, value in inputs.items():
            self.request.set_tensor(name, Tensor(value))
        self.request.infer()
        logits = self.request.get_output_tensor(0).data
        return logits.reshape(batch, -1, logits.shape[-1])

    def _reserve(self, batch: int, capacity: int) -> None:
        from openvino import Tensor

        self._each = -(-capacity // self._block)
        if batch * self._each > self._reserved:
            try:
                for name, (kind, shape) in self._caches.items():
                    self.request.set_tensor(name, Tensor(kind, [batch * self._each, *shape]))
            except RuntimeError as error:  # std::bad_alloc
                raise UserError(
                    f"no memory for the keys and values of {batch} x {capacity} tokens; use shorter or fewer texts, or "
                    "lower n_positions in config.json where positions are rotary"
                ) from error
            self._reserved = batch * self._each
