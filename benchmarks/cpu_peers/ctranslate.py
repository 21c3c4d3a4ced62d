"""CTranslate2 with int8 weights. It takes pruned models whose layers all have the same number of heads."""

import os
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.cpu_peers.runner import Generated

# Its choice on Intel; oneDNN, its choice on other CPUs, saturates in int8 where there is no VNNI.
os.environ.setdefault("CT2_USE_MKL", "1")


def convert(source: Path, out: Path, variant: str) -> None:
    """CTranslate2's own format. Raises `WorkError` where layers differ in heads."""
    from eval.errors import WorkError
    from pipeline.checkpoint import load_model

    model = load_model(source)
    config, body = model.config, model.transformer
    heads = {len(kept) for kept in config.kept_heads}
    if len(heads) > 1:
        raise WorkError("CTranslate2 has one head count for all layers")
    if config.activation_function != "gelu_new":
        raise WorkError(f"no activation {config.activation_function} here")

    from ctranslate2.specs import Activation, TransformerDecoderModelSpec

    spec = TransformerDecoderModelSpec.from_config(
        num_layers=config.n_layer,
        num_heads=heads.pop(),
        head_dim=config.head_dim,
        pre_norm=True,
        activation=Activation.GELUTanh,
    )

    def set_linear(target: Any, part: Any) -> None:
        target.weight, target.bias = part.weight.detach().numpy(), part.bias.detach().numpy()

    def set_norm(target: Any, part: Any) -> None:
        target.gamma, target.beta = part.weight.detach().numpy(), part.bias.detach().numpy()

    decoder = spec.decoder
    decoder.scale_embeddings = False
    decoder.embeddings.weight = decoder.projection.weight = body.wte.weight.detach().numpy()
    decoder.position_encodings.encodings = body.wpe.weight.detach().numpy()
    set_norm(decoder.layer_norm, body.ln_f)
    layers: Any = zip(decoder.layer, body.h, strict=True)
    for target, block in layers:
        set_norm(target.self_attention.layer_norm, block.ln_1)
        set_linear(target.self_attention.linear[0], block.attn.c_attn)
        set_linear(target.self_attention.linear[1], block.attn.c_proj)
        set_norm(target.ffn.layer_norm, block.ln_2)
        set_linear(target.ffn.linear_0, block.mlp.c_fc)
        set_linear(target.ffn.linear_1, block.mlp.c_proj)
    spec.config.layer_norm_epsilon = config.layer_norm_epsilon
    spec.config.bos_token = spec.config.eos_token = spec.config.unk_token = "0"
    spec.register_vocabulary([str(index) for index in range(config.vocab_size)])
    spec.validate()
    spec.optimize(quantization=variant)
    out.mkdir(parents=True, exist_ok=True)
    spec.save(str(out))


def load(folder: Path, variant: str, *, threads: int, batch: int, capacity: int) -> "CTranslateRunner":
    """The model on a converted folder."""
    return CTranslateRunner(folder, threads)


class CTranslateRunner:
    """See `benchmarks.cpu_peers.runner.Runner`. Its vocabulary is the token ids as text."""

    def __init__(self, folder: Path, threads: int):
        import ctranslate2

        self.api = ctranslate2
        self.model = ctranslate2.Generator(str(folder), device="cpu", intra_threads=threads, inter_threads=1)
        backend = "MKL" if os.environ["CT2_USE_MKL"] == "1" else "oneDNN"
        self.compute = f"threads {threads}, compute type {self.model.compute_type}, {backend}, FP32 KV cache"
        self.weight_bytes, self.kv_bytes = 1.0, 4.0

    def generate(self, ids: np.ndarray, count: int) -> Generated:
        """See `Runner`."""
        moments: dict[int, float] = {}

        def heard(result: Any) -> bool:
            moments[result.step] = time.perf_counter()  # the last row's
            return False

        start = time.perf_counter()
        found = self.model.generate_batch(
            _text(ids),
            max_length=count,
            min_length=count,
            beam_size=1,
            sampling_topk=1,
            include_prompt_in_result=False,
            callback=heard,
        )
        first, last = moments[min(moments)], moments[max(moments)]
        return Generated(np.array([result.sequences_ids[0] for result in found]), first - start, last - first)

    def logits(self, ids: np.ndarray) -> np.ndarray:
        """See `Runner`."""
        return np.asarray(self.model.forward_batch(_text(ids), return_log_probs=False))


def _text(ids: np.ndarray) -> list[list[str]]:
    return [[str(token) for token in row] for row in ids]
