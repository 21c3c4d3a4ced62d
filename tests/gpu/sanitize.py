"""A tiny pruned model through every path of the engine, for compute-sanitizer: it is no test of numbers.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python tests/gpu/sanitize.py graph

Without torch's caching each tensor is an allocation of its own, at whose end memcheck looks. Odd widths,
uneven heads, ragged lengths, a context over which attention is split, batches on both sides of the matrix-vector
limit; the sampler's every branch.
"""

import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from cuda_ext import Engine
from pipeline.model import CompactGPT2Config, CompactGPT2LMHeadModel


def main(mode: str, device: str) -> None:
    """Load, prefill in ragged batches, decode, sample, all logits; then wait for the device."""
    torch.manual_seed(0)
    config = CompactGPT2Config(
        vocab_size=131, n_positions=150, n_embd=104, n_layer=2, n_head=3, head_dim=32, n_inner=420,
        kept_heads=[[0, 2], [1]], initializer_range=0.1,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        CompactGPT2LMHeadModel(config).half().save_pretrained(folder)
        engine = Engine.from_checkpoint(folder, device=device, max_batch=9, decode=mode)
    for batch in (1, 3, 9):
        ids = torch.randint(0, 131, (batch, 140))
        engine.generate(ids, 4, lengths=[140 - 14 * b for b in range(batch)])
        engine.generate(ids[:, :5], 3, temperature=0.8, top_k=7, top_p=0.9, seed=1, stop=[3])
    engine.forward(ids[:2])
    engine.prefill(ids[:2, :6])
    engine.decode(torch.tensor([1, 2]))
    if device != "cpu":
        torch.cuda.synchronize()
    print("sanitize: done")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "cuda")
