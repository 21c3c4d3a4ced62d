"""llama.cpp through llama-cpp-python's low-level calls; the GGUF is written here."""

import ctypes
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.cpu_peers.runner import Stepwise

_FILE = "model.gguf"
_Q8_0_BYTES = 34 / 32  # 32 codes and an FP16 scale


def convert(source: Path, out: Path, variant: str) -> None:
    """`out/model.gguf`: matrices as Q8_0, the rest FP32. Raises `WorkError` for a pruned model."""
    from eval.errors import WorkError
    from pipeline.checkpoint import load_model

    model = load_model(source)
    config = model.config
    if config.pruned:
        raise WorkError("llama.cpp's GPT-2 has as many heads as the width holds")

    import gguf

    out.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(out / _FILE, "gpt2")
    writer.add_block_count(config.n_layer)
    writer.add_context_length(config.n_positions)
    writer.add_embedding_length(config.n_embd)
    writer.add_feed_forward_length(config.n_inner)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")  # token ids go in and come out
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)

    def add(name: str, tensor: Any) -> None:
        values, kind = tensor.detach().float().numpy(), None
        if values.ndim == 2 and name != "position_embd.weight":
            kind = gguf.GGMLQuantizationType.Q8_0
            values = gguf.quants.quantize(values, kind)
        writer.add_tensor(name, values, raw_dtype=kind)

    body: Any = model.transformer
    add("token_embd.weight", body.wte.weight)  # the head too: llama.cpp ties where there is no other
    add("position_embd.weight", body.wpe.weight)
    parts = {"output_norm": body.ln_f}
    for index, block in enumerate(body.h):
        for name, part in (
            ("attn_norm", block.ln_1),
            ("attn_qkv", block.attn.c_attn),
            ("attn_output", block.attn.c_proj),
            ("ffn_norm", block.ln_2),
            ("ffn_up", block.mlp.c_fc),
            ("ffn_down", block.mlp.c_proj),
        ):
            parts[f"blk.{index}.{name}"] = part
    for name, part in parts.items():
        add(f"{name}.weight", part.weight)
        add(f"{name}.bias", part.bias)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def load(folder: Path, variant: str, *, threads: int, batch: int, capacity: int) -> "LlamaRunner":
    """The model on a converted folder. `variant` is flash or plain, the kind of attention."""
    return LlamaRunner(folder / _FILE, variant == "flash", threads, batch, capacity)


class LlamaRunner(Stepwise):
    """See `benchmarks.cpu_peers.runner.Runner`. Each row of a batch is a sequence of its own in one cache."""

    def __init__(self, path: Path, flash: bool, threads: int, batch: int, capacity: int):
        import llama_cpp

        self.api = llama_cpp
        self._silence = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self._silence, ctypes.c_void_p())
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        if not self.model:
            raise RuntimeError(f"llama.cpp cannot load {path}")
        options = llama_cpp.llama_context_default_params()
        options.n_ctx = options.n_batch = batch * capacity
        options.n_seq_max = batch
        options.n_threads = options.n_threads_batch = threads
        options.flash_attn_type = int(flash)
        self.context = llama_cpp.llama_init_from_model(self.model, options)
        if not self.context:
            raise RuntimeError(f"llama.cpp cannot make a context of {batch} x {capacity} tokens")
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.tokens = llama_cpp.llama_batch_init(batch * capacity, 0, 1)
        info = llama_cpp.llama_print_system_info().decode()
        self.compute = f"threads {threads}, flash attention {'on' if flash else 'off'}, FP16 KV cache; {info.strip()}"
        self.weight_bytes, self.kv_bytes = _Q8_0_BYTES, 2.0
        self.length = 0

    def prefill(self, ids: np.ndarray) -> np.ndarray:
        """See `Stepwise`."""
        self._forget()
        return self._step(ids, np.arange(1, 1 + ids.size) % ids.shape[1] == 0)

    def decode(self, tokens: np.ndarray) -> np.ndarray:
        """See `Stepwise`."""
        return self._step(tokens[:, None], np.ones(len(tokens), bool))

    def logits(self, ids: np.ndarray) -> np.ndarray:
        """See `Runner`."""
        self._forget()
        return self._step(ids, np.ones(ids.size, bool)).reshape(*ids.shape, -1).copy()

    def _forget(self) -> None:
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)
        self.length = 0

    def _step(self, ids: np.ndarray, wanted: np.ndarray) -> np.ndarray:
        """Logits of the `wanted` tokens, `[wanted, vocab]`, in llama.cpp's memory."""
        (batch, length), asked = ids.shape, self.tokens
        asked.n_tokens = ids.size

        def fill(field: Any, values: np.ndarray) -> None:
            np.ctypeslib.as_array(field, (ids.size,))[:] = values

        fill(asked.token, ids.ravel())
        fill(asked.pos, np.tile(np.arange(self.length, self.length + length), batch))
        fill(asked.n_seq_id, np.ones(ids.size))
        fill(asked.logits, wanted)
        for place in range(ids.size):
            asked.seq_id[place][0] = place // length
        code = self.api.llama_decode(self.context, asked)
        if code:
            raise RuntimeError(f"llama_decode returned {code}")
        self.length += length
        found = self.api.llama_get_logits(self.context)
        return np.ctypeslib.as_array(found, (int(wanted.sum()), self.vocabulary))
