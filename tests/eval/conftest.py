"""The smallest real engine: a tiny model, a KV cache, the CPU."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers import DynamicCache

from eval.engine import Engine
from pipeline.model import CompactGPT2LMHeadModel, slice_heads


class TinyEngine:
    """`calls` keeps what the engine was asked to do, in order."""

    name, device, precision, compute = "torch", "cpu", "fp32", ""

    def __init__(self, model: nn.Module, label: str = "", calls: list | None = None):
        self.model, self.label = model, label
        self.context, self.vocab_size = model.config.n_positions, model.config.vocab_size
        self.calls: list = [] if calls is None else calls

    def logits(self, input_ids: torch.Tensor) -> torch.Tensor:
        self.calls.append((self.label, "logits", input_ids.clone()))
        return self.model(input_ids).logits

    def prefill(self, input_ids: torch.Tensor) -> torch.Tensor:
        self.calls.append((self.label, "prefill", input_ids.clone()))
        self.cache = DynamicCache()
        return self.model(input_ids, past_key_values=self.cache, use_cache=True).logits[:, -1]

    def decode(self, token_ids: torch.Tensor) -> torch.Tensor:
        self.calls.append((self.label, "decode", token_ids.clone()))
        return self.model(token_ids[:, None], past_key_values=self.cache, use_cache=True).logits[:, -1]

    def synchronize(self) -> None:
        pass


@pytest.fixture
def make_engine() -> Callable[..., TinyEngine]:
    """A factory of engines over a model."""
    return TinyEngine


@pytest.fixture
def uneven_model(tiny_model: CompactGPT2LMHeadModel) -> CompactGPT2LMHeadModel:
    """`tiny_model` with 3, 5 and 1 of its 5 heads left in its layers."""
    return slice_heads(tiny_model, [[0, 2, 4], [0, 1, 2, 3, 4], [3]])


@pytest.fixture
def engine(uneven_model: CompactGPT2LMHeadModel) -> TinyEngine:
    """An engine over the unevenly pruned model."""
    built = TinyEngine(uneven_model)
    assert isinstance(built, Engine)
    return built
