"""What a token must read and a prefill must compute, against the table of GPT-2 124M worked out by hand."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.roofline import HALF, bytes_per_token, kv_bytes, prefill_operations, weight_bytes_per_token
from pipeline.model import CompactGPT2Config, CompactGPT2LMHeadModel

WIDTH, INNER, HEADS, VOCAB = 768, 3072, 640, 50257


@pytest.fixture(scope="module")
def gpt2_pruned() -> CompactGPT2Config:
    return CompactGPT2Config(kept_heads=[list(range(1, 11))] * 12)


def test_a_token_of_the_pruned_gpt2_reads_253_megabytes(gpt2_pruned: CompactGPT2Config) -> None:
    matrices = 12 * (WIDTH * 3 * HEADS + HEADS * WIDTH + 2 * WIDTH * INNER) + WIDTH * VOCAB
    kv = 12 * 512 * 2 * HEADS
    table = 2 * (matrices + kv)
    assert round(table / 1e6) == 253
    extra = bytes_per_token(gpt2_pruned, 1, 512) - table  # biases, norms and one row of positions
    assert 0 < extra < 0.002 * table


def test_a_batch_reads_the_weights_once(gpt2_pruned: CompactGPT2Config) -> None:
    one, many = (bytes_per_token(gpt2_pruned, batch, 512) for batch in (1, 32))
    assert many - one == 31 * kv_bytes(gpt2_pruned, 1, 512)
    assert kv_bytes(gpt2_pruned, 8, 512) == 12 * 8 * 512 * 2 * HEADS * HALF


def test_weights_are_the_models_parameters_with_uneven_layers() -> None:
    config = CompactGPT2Config(
        vocab_size=61, n_positions=17, n_embd=40, n_layer=3, n_head=5, head_dim=8, kept_heads=[[0], [1, 2], [0, 3, 4]]
    )
    numbers = sum(parameter.numel() for parameter in CompactGPT2LMHeadModel(config).parameters())
    assert weight_bytes_per_token(config) == HALF * (numbers - 16 * 40)


def test_operations_are_those_that_torch_counts() -> None:
    config = CompactGPT2Config(
        vocab_size=61, n_positions=17, n_embd=40, n_layer=2, n_head=5, head_dim=8, kept_heads=[[0], [1, 2]]
    )
    model = CompactGPT2LMHeadModel(config).eval()
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):  # no other backend is counted on a CPU
        model(torch.zeros(3, 16, dtype=torch.long), logits_to_keep=1)
    halved = 3 * 2 * 2 * 3 * 8 * (16 * 16 - 16 * 17 // 2)  # torch counts the masked half of attention too
    assert prefill_operations(config, 3, 16) == counter.get_total_flops() - halved


def test_variants_read_and_compute_less() -> None:
    config = CompactGPT2Config(
        vocab_size=61, n_positions=17, n_embd=40, n_layer=2, n_head=4, n_kv_head=2, head_dim=8, position="rope",
        kept_heads=[[0, 1, 2], [3]], window=[5, None],
    )  # fmt: skip
    model = CompactGPT2LMHeadModel(config)
    numbers = sum(parameter.numel() for parameter in model.parameters())
    assert weight_bytes_per_token(config) == HALF * numbers + 4 * 8  # one position's angles, in FP32
    assert kv_bytes(config, 3, 16) == HALF * 2 * 3 * 8 * (2 * 5 + 1 * 16)
    seen = [sum(min(t + 1, window) for t in range(16)) for window in (5, 16)]
    products = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2 and "wte" not in name)
    attention = 2 * 2 * 8 * (3 * seen[0] + 1 * seen[1])
    assert prefill_operations(config, 2, 16) == 2 * (2 * products * 16 + attention + 2 * 40 * 61)
