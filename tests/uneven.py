"""A pruned model, its layers of unlike head counts, small and random."""

import torch

from pipeline.model import CompactGPT2Config, CompactGPT2LMHeadModel

KEPT = [[0, 1, 2, 3, 4], [3], [0, 2, 4]]


def uneven_model(**overrides: object) -> CompactGPT2LMHeadModel:
    """FP32, in eval mode, every weight random and large enough to matter; keywords override the configuration."""
    shape = {"vocab_size": 101, "n_positions": 37, "n_embd": 40, "n_layer": 3, "n_head": 5, "kept_heads": KEPT}
    torch.manual_seed(0)
    model = CompactGPT2LMHeadModel(CompactGPT2Config(**(shape | overrides), bos_token_id=0, eos_token_id=0)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape) * 0.1)
    return model
