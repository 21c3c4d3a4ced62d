"""Head scores against finite differences and sums by hand; the choice of heads against worked examples."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from eval.errors import UserError
from pipeline.data import TokenBlocks
from pipeline.importance import choose_heads, head_scores
from pipeline.model import slice_heads

UNEVEN = [[0, 2, 3], [4], [0, 1, 2, 3, 4]]


def _padded(blocks: TokenBlocks, lengths: list[int], width: int) -> TokenBlocks:
    """The first `lengths[i]` tokens of each block, padded to `width`."""
    tokens = np.zeros((len(lengths), width), dtype=np.int64)
    for row, block, length in zip(tokens, blocks.tokens, lengths, strict=False):
        row[:length] = block[:length]
    return TokenBlocks(tokens, lengths)


def _columns(model, layer: int, head: int) -> tuple[torch.Tensor, slice]:
    size = model.config.head_dim
    return model.transformer.h[layer].attn.c_proj.weight.data, slice(head * size, (head + 1) * size)


def _finite_difference_taylor(model, sequences: list[torch.Tensor]) -> list[list[float]]:
    """Mean over sequences of |dL/d gate| in FP64: a gate on a head is a factor on its output columns."""
    model, step = copy.deepcopy(model).double().eval(), 1e-4

    def loss(ids: torch.Tensor) -> float:
        with torch.no_grad():
            return F.cross_entropy(model(ids[None]).logits[0, :-1], ids[1:]).item()

    scores = []
    for layer, heads in enumerate(model.config.kept_heads):
        row = []
        for i in range(len(heads)):
            weight, columns = _columns(model, layer, i)
            original = weight[:, columns].clone()
            slopes = []
            for ids in sequences:
                weight[:, columns] = original * (1 + step)
                above = loss(ids)
                weight[:, columns] = original * (1 - step)
                slopes.append(abs(above - loss(ids)) / (2 * step))
                weight[:, columns] = original
            row.append(float(np.mean(slopes)))
        scores.append((np.array(row) / np.linalg.norm(row)).tolist())
    return scores


@pytest.mark.parametrize("heads", [None, UNEVEN])
def test_taylor_is_the_mean_absolute_slope_of_each_sequence(tiny_model, tiny_blocks, heads):
    model = slice_heads(tiny_model, heads) if heads else tiny_model
    lengths = [33, 7, 20]
    expected = _finite_difference_taylor(
        model, [torch.tensor(row[:n]) for row, n in zip(tiny_blocks.tokens, lengths, strict=False)]
    )
    scores = head_scores(model, "taylor", _padded(tiny_blocks, lengths, 33), batch_size=2, progress=False)
    for got, wanted in zip(scores, expected, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("method", ["taylor", "activation"])
def test_scores_depend_on_neither_batch_size_nor_padding(tiny_model, tiny_blocks, method):
    lengths = [33, 2, 11, 29, 17]
    reference = head_scores(tiny_model, method, _padded(tiny_blocks, lengths, 33), batch_size=1, progress=False)
    for batch_size, width in [(2, 33), (5, 41)]:
        blocks = _padded(tiny_blocks, lengths, width)
        scores = head_scores(tiny_model, method, blocks, batch_size=batch_size, progress=False)
        np.testing.assert_allclose(scores, reference, rtol=1e-4)


def test_a_sequence_without_a_target_changes_no_taylor_ranking(tiny_model, tiny_blocks):
    alone = head_scores(tiny_model, "taylor", _padded(tiny_blocks, [33], 33), progress=False)
    beside = head_scores(tiny_model, "taylor", _padded(tiny_blocks, [33, 1], 33), progress=False)
    np.testing.assert_allclose(beside, alone, rtol=1e-4)


def test_magnitude_is_the_norm_of_the_heads_own_weights(tiny_model, tiny_blocks):
    model = slice_heads(tiny_model, UNEVEN)
    scores = head_scores(model, "magnitude", tiny_blocks, progress=False)
    for layer, heads in enumerate(UNEVEN):
        attn, size = model.transformer.h[layer].attn, model.config.head_dim
        norms = []
        for i in range(len(heads)):
            own = [attn.c_attn.weight[(part * len(heads) + i) * size :][:size] for part in range(3)]
            own.append(attn.c_proj.weight[:, i * size : (i + 1) * size])
            norms.append(torch.cat([part.flatten() for part in own]).norm().item())
        np.testing.assert_allclose(scores[layer], np.array(norms) / np.linalg.norm(norms), rtol=1e-5)


def test_activation_is_the_mean_norm_of_what_a_head_adds(tiny_model, tiny_blocks):
    """The reference silences all other heads of a layer, and its bias, and looks at what comes out."""
    model = slice_heads(tiny_model, UNEVEN)
    scores = head_scores(model, "activation", tiny_blocks, batch_size=3, progress=False)
    for layer, heads in enumerate(UNEVEN):
        attn = model.transformer.h[layer].attn
        inputs: list[tuple[Any, ...]] = []
        handle = attn.register_forward_pre_hook(lambda _, args, inputs=inputs: inputs.append(args))
        with torch.no_grad():
            model(torch.from_numpy(tiny_blocks.tokens))
        handle.remove()
        norms = []
        for i in range(len(heads)):
            alone = copy.deepcopy(attn)
            alone.c_proj.bias.data.zero_()
            columns = slice(i * alone.head_dim, (i + 1) * alone.head_dim)
            others = torch.ones(alone.c_proj.in_features, dtype=torch.bool)
            others[columns] = False
            alone.c_proj.weight.data[:, others] = 0
            with torch.no_grad():
                norms.append(alone(*inputs[0])[0].norm(dim=-1).mean().item())
        np.testing.assert_allclose(scores[layer], np.array(norms) / np.linalg.norm(norms), rtol=1e-4)


@pytest.mark.parametrize("method", ["taylor", "activation"])
def test_a_head_that_adds_nothing_scores_zero(tiny_model, tiny_blocks, method):
    weight, columns = _columns(tiny_model, 1, 3)
    weight[:, columns] = 0
    scores = head_scores(tiny_model, method, tiny_blocks, progress=False)
    assert scores[1][3] == 0
    assert all(score > 0 for layer, row in enumerate(scores) for i, score in enumerate(row) if (layer, i) != (1, 3))


def test_random_scores_come_from_the_seed_alone(tiny_model, tiny_blocks):
    model = slice_heads(tiny_model, UNEVEN)
    first, again, other = (head_scores(model, "random", tiny_blocks, seed=seed) for seed in (7, 7, 8))
    assert first == again != other
    assert [len(row) for row in first] == [3, 1, 5]
    assert all(0 <= score < 1 for row in first for score in row)


@pytest.mark.parametrize("method", ["taylor", "magnitude", "activation"])
def test_scoring_leaves_the_model_alone(tiny_model, tiny_blocks, method):
    tiny_model.train()
    tiny_model.transformer.wpe.weight.requires_grad_(False)
    before = {key: value.clone() for key, value in tiny_model.state_dict().items()}
    with torch.no_grad():  # a caller's no_grad must not silence the gates
        scores = head_scores(tiny_model, method, tiny_blocks, progress=False)
    assert tiny_model.training
    assert [name for name, p in tiny_model.named_parameters() if not p.requires_grad] == ["transformer.wpe.weight"]
    assert all(parameter.grad is None for parameter in tiny_model.parameters())
    assert all(torch.equal(value, before[key]) for key, value in tiny_model.state_dict().items())
    assert not any(block.attn.c_proj._forward_pre_hooks for block in tiny_model.transformer.h)
    # Dropout would make these differ.
    assert scores == head_scores(tiny_model.eval(), method, tiny_blocks, progress=False)


@pytest.mark.parametrize("method", ["taylor", "magnitude", "activation"])
def test_fp16_weights_are_scored_in_fp32(tiny_model, tiny_blocks, method):
    half = copy.deepcopy(tiny_model).half()
    assert head_scores(half, method, tiny_blocks, progress=False) == head_scores(
        copy.deepcopy(half).float(), method, tiny_blocks, progress=False
    )
    assert half.dtype == torch.float16


def test_dead_and_broken_checkpoints_are_named(tiny_model, tiny_blocks):
    dead = copy.deepcopy(tiny_model)
    for block in dead.transformer.h:
        block.attn.c_proj.weight.data.zero_()
    for method in ("taylor", "activation"):
        with pytest.raises(UserError, match=f"{method} head scores are all zero"):
            head_scores(dead, method, tiny_blocks, progress=False)
    tiny_model.transformer.h[1].attn.c_attn.weight.data[3, 4] = float("nan")
    for method in ("taylor", "magnitude", "activation"):
        with pytest.raises(UserError, match=f"{method} head scores are not finite"):
            head_scores(tiny_model, method, tiny_blocks, progress=False)


def test_text_without_a_target_is_an_error(tiny_model):
    with pytest.raises(UserError, match="no token to predict"):
        head_scores(tiny_model, "taylor", TokenBlocks(np.ones((3, 1), dtype=np.int64)), progress=False)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_gpu_scores_as_the_cpu_does(tiny_model, tiny_blocks, dtype):
    model = tiny_model.to(dtype)
    for method in ("taylor", "magnitude", "activation"):
        on_cpu = head_scores(model.cpu(), method, tiny_blocks, progress=False)
        on_gpu = head_scores(model.cuda(), method, tiny_blocks, progress=False)
        np.testing.assert_allclose(on_gpu, on_cpu, rtol=1e-3)


def _removed(scores, kept, n_head, **how) -> list[list[int]]:
    left = choose_heads(scores, kept, n_head, **how)
    return [sorted(set(had) - set(stay)) for had, stay in zip(kept, left, strict=True)]


@pytest.mark.parametrize(
    ("n_head", "ratio", "rounding", "gone"),
    [
        (12, 0.2, "floor", 2),
        (12, 0.2, "nearest", 2),
        (12, 0.2, "ceil", 3),
        (10, 0.25, "nearest", 3),  # halves go up
        (5, 0.2, "floor", 1),
        (5, 0.2, "ceil", 1),
        (10, 0.3, "ceil", 3),
        (10, 0.7, "ceil", 7),  # 0.7 * 10 is 7.000000000000001 in floats
        (100, 0.29, "floor", 29),  # 0.29 * 100 is 28.999999999999996
        (3, 1e-05, "ceil", 1),
        (7, 0.0, "ceil", 0),
        (1, 0.9, "ceil", 0),
        (4, 0.99, "ceil", 3),
    ],
)
def test_layer_scope_counts(n_head, ratio, rounding, gone):
    scores = [[float(i) for i in range(n_head)], [float(-i) for i in range(n_head)]]
    kept = [list(range(n_head))] * 2
    removed = _removed(scores, kept, n_head, ratio=ratio, scope="layer", rounding=rounding)
    assert removed == [list(range(gone)), list(range(n_head - gone, n_head))]


@pytest.mark.parametrize(("rounding", "gone"), [("floor", 28), ("nearest", 29), ("ceil", 29)])
def test_global_scope_takes_the_lowest_of_all(rounding, gone):
    scores = np.random.default_rng(0).permutation(144).reshape(12, 12).astype(float)
    kept = [list(range(12))] * 12
    left = choose_heads(scores.tolist(), kept, 12, ratio=0.2, scope="global", rounding=rounding)
    assert sum(map(len, left)) == 144 - gone
    assert min(scores[layer][head] for layer, heads in enumerate(left) for head in heads) == gone


def test_global_scope_skips_a_layers_last_head():
    kept = [[0, 1, 2], [0, 1, 2]]
    how = {"ratio": 0.5, "scope": "global", "rounding": "nearest"}
    assert choose_heads([[1, 3, 2], [9, 8, 7]], kept, 3, **how) == [[1], [0, 1]]
    assert choose_heads([[1, 3, 2], [9, 8, 7]], kept, 3, **(how | {"ratio": 0.99})) == [[1], [0]]


def test_ties_fall_in_layer_and_head_order():
    kept, scores = [[0, 1, 2, 3]] * 2, [[1.0] * 4] * 2
    assert _removed(scores, kept, 4, ratio=0.5, scope="layer", rounding="floor") == [[0, 1], [0, 1]]
    assert _removed(scores, kept, 4, ratio=0.5, scope="global", rounding="floor") == [[0, 1, 2], [0]]


def test_a_pruned_model_is_pruned_further_by_original_index():
    kept = [[1, 4, 5, 9, 11], [7]]
    assert choose_heads([[5, 1, 4, 3, 2], [0]], kept, 12, ratio=0.4, scope="layer", rounding="nearest") == [
        [1, 5, 9],
        [7],
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ratio": 1.0}, "ratio is 1.0"),
        ({"ratio": -0.1}, "ratio is -0.1"),
        ({"ratio": float("nan")}, "ratio is nan"),
        ({"scores": [[1, 2, 3]]}, "differ in shape"),
        ({"scores": [[1, 2], [1, 2]]}, "differ in shape"),
        ({"scores": [[1, float("nan"), 3], [1, 2, 3]]}, "finite"),
        ({"kept_heads": [[0, 1, 3], [0, 1, 2]]}, r"0\.\.2"),
    ],
)
def test_arguments_that_do_not_fit(changes, message):
    fits = {"scores": [[1, 2, 3]] * 2, "kept_heads": [[0, 1, 2]] * 2, "n_head": 3, "ratio": 0.5}
    with pytest.raises(ValueError, match=message):
        choose_heads(**(fits | changes), scope="layer", rounding="floor")
