"""Models and a tokenizer small enough to build anew for every test.

`tiny_gpt2` and `tiny_model` are one and the same function in Hugging Face's and in our form: 3 layers of
5 heads of 8, 67 positions, every weight (biases and norms too) random and large enough to matter.
`tiny_tokenizer` fits them: byte-level BPE with 269 tokens, which encodes any text.
"""

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from pipeline.data import TokenBlocks
from pipeline.model import CompactGPT2LMHeadModel, from_gpt2

VOCAB = 269


@pytest.fixture(autouse=True)
def _one_thread(request: pytest.FixtureRequest) -> Iterator[None]:
    """One thread for all but slow tests: at these sizes waking a second one costs more than it gives."""
    threads = torch.get_num_threads()
    if not request.node.get_closest_marker("slow"):
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def make_gpt2() -> Callable[..., GPT2LMHeadModel]:
    """A factory of random Hugging Face GPT-2s in eval mode; keywords override the configuration."""

    def make(seed: int = 0, **overrides: object) -> GPT2LMHeadModel:
        shape = {"vocab_size": VOCAB, "n_positions": 67, "n_embd": 40, "n_layer": 3, "n_head": 5}
        ends = {"bos_token_id": 0, "eos_token_id": 0}
        model = GPT2LMHeadModel(GPT2Config(**(shape | ends | overrides))).eval()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                noise = torch.randn(weight.shape, generator=generator) * 0.2
                weight.copy_(noise + 1 if ".ln_" in name and name.endswith("weight") else noise)
        return model

    return make


@pytest.fixture
def tiny_gpt2(make_gpt2: Callable[..., GPT2LMHeadModel]) -> GPT2LMHeadModel:
    """Hugging Face's GPT-2, FP32, eval mode."""
    return make_gpt2()


@pytest.fixture
def tiny_model(tiny_gpt2: GPT2LMHeadModel) -> CompactGPT2LMHeadModel:
    """The CompactGPT2 with `tiny_gpt2`'s weights."""
    return from_gpt2(tiny_gpt2)


@pytest.fixture
def tiny_blocks() -> TokenBlocks:
    """Seven blocks of 33 random tokens."""
    return TokenBlocks(np.random.default_rng(1).integers(1, VOCAB, (7, 33)))


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE: `<|endoftext|>` is token 0, then the 256 bytes and 12 merges; no padding token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the cat sat on the mat and the other cat sat on the hat"], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>", unk_token="<|endoftext|>"
    )
