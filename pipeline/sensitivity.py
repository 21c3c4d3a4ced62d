"""Which weight matrices may go to 4 bits: each one's effect on perplexity, and as many as a budget allows."""

import math
import sys
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from pipeline.data import TokenBlocks
from pipeline.inc import FOUR_BIT_GROUP, INCQuantizer, WeightOnlyConfig
from pipeline.model import CompactGPT2LMHeadModel, in_fp32
from pipeline.model.quantized import QuantizedLinear

_RANKING_BLOCKS = 4


def four_bit_layers(
    model: CompactGPT2LMHeadModel, calibration: TokenBlocks, *, budget: float, ignore: Sequence[str] = ()
) -> list[str]:
    """The names of the linear layers that may hold 4 bits, all others holding 8, so that perplexity on the
    `calibration` text stays at or under `budget` times that of `model` in FP32.

    Layers are taken in the order of how little perplexity rises for a weight with that layer alone at 4 bits, on the
    first few blocks; how many, a binary search finds on all blocks. Codes are round-to-nearest, whatever the method
    to be used in the end: the ranking then costs no GPTQ run for each layer. Layers that match `ignore`, whose
    columns do not fill groups of `FOUR_BIT_GROUP`, and the LM head, whose table is the embedding too, stay out.
    """
    exact = _nll(in_fp32(model), calibration)
    candidates = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head" and module.in_features % FOUR_BIT_GROUP == 0
    ]
    eight = INCQuantizer(model).quantize(WeightOnlyConfig(ignore=tuple(ignore)))
    candidates = [name for name in candidates if isinstance(eight.get_submodule(name), QuantizedLinear)]
    four = INCQuantizer(model).quantize(WeightOnlyConfig(ignore=tuple(ignore), four_bit=tuple(candidates)))
    coarse = {name: four.get_submodule(name) for name in candidates}
    fine = {name: eight.get_submodule(name) for name in candidates}

    few = TokenBlocks(calibration.tokens[:_RANKING_BLOCKS])
    rise = {}
    base = _nll(eight, few)
    for index, name in enumerate(candidates, 1):
        eight.set_submodule(name, coarse[name])
        rise[name] = (_nll(eight, few) - base) / model.get_parameter(f"{name}.weight").numel()
        eight.set_submodule(name, fine[name])
        print(f"quantize: sensitivity of layer {index}/{len(candidates)}", file=sys.stderr)
    order = sorted(candidates, key=lambda name: rise[name])

    def fits(count: int) -> bool:
        for index, name in enumerate(order):
            eight.set_submodule(name, coarse[name] if index < count else fine[name])
        ratio = math.exp(_nll(eight, calibration) - exact)
        print(f"quantize: {count} of {len(order)} layers in 4 bits: perplexity x {ratio:.4f}", file=sys.stderr)
        return ratio <= budget

    low, high = 0, len(order)  # all of the first `low` fit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return order[:low]


@torch.no_grad()
def _nll(model: CompactGPT2LMHeadModel, blocks: TokenBlocks) -> float:
    """Mean negative log-likelihood in nats a token, each block on its own."""
    total = 0.0
    for row in torch.from_numpy(blocks.tokens).long():
        logits = model(row.unsqueeze(0)).logits[0, :-1].float()
        total += F.cross_entropy(logits, row[1:], reduction="sum").item()
    return total / (blocks.tokens.shape[0] * (blocks.tokens.shape[1] - 1))
