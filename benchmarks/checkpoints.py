"""Random checkpoints to time: they run as fast as trained ones."""

from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from pipeline.model import CompactGPT2Config, from_gpt2, slice_heads


def write_checkpoints(shape: GPT2Config, folder: Path, seed: int = 0) -> CompactGPT2Config:
    """`folder/dense` as Hugging Face's, `folder/pruned` as ours without the first and last head of each layer; FP16."""
    torch.manual_seed(seed)
    dense = GPT2LMHeadModel(shape).half()
    kept = [list(range(1, shape.n_head - 1))] * shape.n_layer
    pruned = slice_heads(from_gpt2(dense), kept)
    dense.save_pretrained(folder / "dense")
    pruned.save_pretrained(folder / "pruned")
    return pruned.config
