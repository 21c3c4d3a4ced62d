"""The registered operations: schemas and fakes by torch's own check, and what they refuse."""

import pytest
import torch

from cuda_ext import CudaExtError, Engine, ops
from pipeline.model import CompactGPT2Config, CompactGPT2LMHeadModel


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    torch.manual_seed(0)
    config = CompactGPT2Config(
        vocab_size=50, n_positions=16, n_embd=32, n_layer=1, n_head=1, head_dim=32, bos_token_id=0, eos_token_id=0
    )
    path = tmp_path_factory.mktemp("model")
    CompactGPT2LMHeadModel(config).half().save_pretrained(path)
    engine = Engine.from_checkpoint(path, device="cpu", max_batch=2)
    engine.prefill(torch.ones(2, 3, dtype=torch.long))
    return engine


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def test_opcheck(engine: Engine) -> None:
    model = (engine.table, engine.workspace, engine.cache)
    tokens, position, lengths, logits = ints(1, 2), ints(3, 3), ints(4, 4), torch.zeros(2, 50)
    checks = ("test_schema", "test_faketensor")
    working = (engine.table, engine.workspace, ints(*[0] * 8), engine.cache)
    torch.library.opcheck(ops.decode, (*working, tokens, position, lengths, logits, 1, False), test_utils=checks)
    prompt = torch.ones(2, 3, dtype=torch.int32)
    torch.library.opcheck(
        ops.prefill, (*model, prompt, ints(0, 0), ints(3, 3), ints(2, 5), logits), test_utils=checks
    )  # fmt: skip
    a, weight, out, scratch = torch.ones(4, 32).half(), torch.ones(8, 32).half(), torch.zeros(4, 8), torch.zeros(1)
    torch.library.opcheck(ops.product, (a, weight, None, out, scratch, 3, 0), test_utils=checks)
    torch.library.opcheck(ops.sample, (torch.randn(2, 50), ints(0, 0), tokens, 1.0, 5, 0.9, 7), test_utils=checks)
    state = (ints(1, 2), ints(3, 3), ints(4, 4), ints(1, 1), ints(0, 0), torch.zeros(2, 4, dtype=torch.int32))
    torch.library.opcheck(ops.advance, (*state, ints(7), 0, 16), test_utils=checks)
    layers, size = ops.layers(engine.table, "cpu"), ops.persistent_bytes(engine.table, 2, 64, "cpu")
    persistent = (engine.table, layers, torch.zeros(size, dtype=torch.uint8), engine.cache)
    torch.library.opcheck(
        ops.decode_persistent, (*persistent, *state, ints(7), logits, 0, True, 2, 2, 64), test_utils=checks
    )  # fmt: skip


def test_wrong_tensors_are_refused(engine: Engine) -> None:
    model = (engine.table, engine.workspace, ints(*[0] * 8), engine.cache)
    logits = torch.zeros(2, 50)
    with pytest.raises(CudaExtError, match=r"expected torch\.int32 .* not torch\.int64"):
        ops.decode(*model, torch.ones(2, dtype=torch.long), ints(3, 3), ints(4, 4), logits, 1, False)
    with pytest.raises(CudaExtError, match=r"expected torch\.float32 .* not torch\.float16"):
        ops.decode(*model, ints(1, 2), ints(3, 3), ints(4, 4), logits.half(), 1, False)
