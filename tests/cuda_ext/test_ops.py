"""The registered operations: schemas and fakes by torch's own check, and what they refuse."""

import ctypes

import pytest
import torch

from cuda_ext import CudaExtError, Engine, build, ops
from cuda_ext.sampling import STOP_TOKENS, WORDS, Sampling
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
    registered = torch.ops.headroom
    working = (engine.table, engine.workspace, ints(*[0] * 8), engine.cache)
    torch.library.opcheck(
        registered.decode.default, (*working, tokens, position, lengths, logits, 1, False), test_utils=checks
    )
    prompt = torch.ones(2, 3, dtype=torch.int32)
    given = (*model, prompt, ints(0, 0), ints(3, 3), ints(2, 5), logits)
    torch.library.opcheck(registered.prefill.default, given, test_utils=checks)
    a, weight, out, scratch = torch.ones(4, 32).half(), torch.ones(8, 32).half(), torch.zeros(4, 8), torch.zeros(1)
    torch.library.opcheck(registered.product.default, (a, weight, None, out, scratch, 3, 0), test_utils=checks)
    how = Sampling(1.0, 5, 0.9, 7, stop=(7,)).packed()
    torch.library.opcheck(registered.sample.default, (torch.randn(2, 50), how, ints(0, 0), tokens), test_utils=checks)
    state = (ints(1, 2), ints(3, 3), ints(4, 4), ints(1, 1), ints(0, 0), torch.zeros(2, 4, dtype=torch.int32))
    torch.library.opcheck(registered.advance.default, (*state, how, 16), test_utils=checks)
    layers, size = ops.layers(engine.table, "cpu"), ops.persistent_bytes(engine.table, 2, 64, "cpu")
    persistent = (engine.table, layers, torch.zeros(size, dtype=torch.uint8), engine.cache)
    given = (*persistent, *state, how, logits, True, 2, 2, 64)
    torch.library.opcheck(registered.decode_persistent.default, given, test_utils=checks)


def test_a_traced_operation_stays_what_it_is() -> None:
    def draw(logits: torch.Tensor, how: torch.Tensor, step: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        ops.sample(logits * 2, how, step, tokens)
        return tokens + 1

    how, logits = Sampling(1.0, seed=5).packed(), torch.randn(3, 40)
    plain, traced = ((ints(0, 0, 0), ints(0, 0, 0)) for _ in range(2))
    wanted = draw(logits, how, *plain)
    got = torch.compile(draw, backend="aot_eager", fullgraph=True)(logits, how, *traced)
    assert torch.equal(got, wanted) and torch.equal(traced[0], ints(1, 1, 1)) and torch.equal(traced[1], plain[1])


def test_signatures_are_read_from_the_header() -> None:
    found = ops._signatures()
    defined = (build.CSRC / "api.cpp").read_text()
    assert len(found) == 18 and all(f" {name}(" in defined for name in found)
    assert found["hr_product_scratch_bytes"] == (ctypes.c_int64, [])
    assert found["hr_error_text"] == (ctypes.c_char_p, [ctypes.c_int])
    pointer, number = ctypes.c_void_p, ctypes.c_int
    assert found["hr_sample"] == (number, [pointer, *[number] * 3, *[pointer] * 3, number, pointer])
    with pytest.raises(TypeError, match=r"required|argument"):
        ops._function("cpu", "hr_product_variant_for")(1)


def test_a_table_that_is_none_of_this_library(engine: Engine) -> None:
    """One number more or less, another layout's, an odd address, an odd row: refused before anything is read."""
    good = engine.table
    ops.workspace_bytes(good, 1, 1, "cpu")
    broken = {name: good.clone() for name in ("layout", "length", "address", "row", "layers")}
    broken["layout"][0] += 1
    broken["length"][1] -= 1
    broken["address"][15] += 2
    broken["row"][10] += 4
    broken["layers"][2] += 1
    tables = [*broken.values(), torch.cat([good[:1], good[1:2] + 1, good[2:], good[-1:]])]
    for table in tables:
        for size in (ops.workspace_bytes, ops.counters):
            with pytest.raises(CudaExtError, match="not of this library's layout"):
                size(table, 1, 1, "cpu") if size is ops.workspace_bytes else size(table, 1, "cpu")  # type: ignore[call-arg]
        with pytest.raises(CudaExtError, match=r"decode: the table .* is not of this library's layout"):
            ops.decode(
                table, engine.workspace, ints(*[0] * 8), engine.cache, ints(1, 2), ints(3, 3), ints(4, 4),
                torch.zeros(2, 50), 1, False,
            )  # fmt: skip


def test_counters_that_are_not_zero_are_seen(engine: Engine) -> None:
    counters = ints(*[0] * 8)
    counters[1] = 1
    with pytest.raises(CudaExtError, match="counters of an earlier launch are not zero"):
        ops.decode(
            engine.table, engine.workspace, counters, engine.cache, ints(1, 2), ints(3, 3), ints(4, 4),
            torch.zeros(2, 50), 1, False,
        )  # fmt: skip


def test_sampling_parameters_as_the_kernels_read_them() -> None:
    how = Sampling(0.5, 7, 0.25, -1, stop=(3, 4), pad=9).packed()
    assert how.dtype == torch.int32 and how.shape == (WORDS,) == (288 // 4,)
    assert how[:2].tolist() == [-1, -1] and how[[3, 5, 6, 7, 8]].tolist() == [7, 9, 2, 3, 4]
    assert how.view(torch.float32)[[2, 4]].tolist() == [0.5, 0.25]
    assert STOP_TOKENS == 64
    with pytest.raises(CudaExtError, match=r"sampling parameters are int32 \[72\]"):
        ops.sample(torch.zeros(1, 8), ints(*[0] * 8), ints(0), ints(0))


def test_wrong_tensors_are_refused(engine: Engine) -> None:
    model = (engine.table, engine.workspace, ints(*[0] * 8), engine.cache)
    logits = torch.zeros(2, 50)
    with pytest.raises(CudaExtError, match=r"expected torch\.int32 .* not torch\.int64"):
        ops.decode(*model, torch.ones(2, dtype=torch.long), ints(3, 3), ints(4, 4), logits, 1, False)
    with pytest.raises(CudaExtError, match=r"expected torch\.float32 .* not torch\.float16"):
        ops.decode(*model, ints(1, 2), ints(3, 3), ints(4, 4), logits.half(), 1, False)
