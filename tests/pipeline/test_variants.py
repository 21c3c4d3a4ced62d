"""Each variant of CompactGPT2 against a plain forward pass written here, whose rotation is GPT-NeoX's of transformers;
and through all that a model goes through: training, files, generation, pruning, quantisation, the engines."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import DynamicCache, GPTNeoXConfig, StaticCache
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXRotaryEmbedding, apply_rotary_pos_emb

from cuda_ext.errors import CheckpointError
from cuda_ext.packing import pack, read_shape, unsupported
from eval.errors import UserError
from pipeline.checkpoint import load_model
from pipeline.data import TokenBlocks
from pipeline.engines.openvino import OpenVINOEngine
from pipeline.engines.torch import TorchEngine
from pipeline.importance import head_scores
from pipeline.inc import INCQuantizer, WeightOnlyConfig
from pipeline.model import CompactGPT2Config, CompactGPT2LMHeadModel, slice_heads, to_gpt2, to_grouped, to_windowed
from pipeline.openvino_export import export_openvino
from pipeline.openvino_runtime import IR_NAME
from pipeline.pretrain import pretrain
from pipeline.recipe import Pretrain, Recipe, parse_recipe
from pipeline.stages import load, prune
from pipeline.stages.job import Job

CONTEXT, VOCAB = 41, 97
ALL = {"position": "rope", "rope_share": 0.6, "n_kv_head": 2, "window": [4, None, 11]}
VARIANTS: dict[str, dict[str, Any]] = {
    "rope": {"position": "rope"},
    "partial rope": {"position": "rope", "rope_share": 0.6, "rope_base": 500},
    "grouped": {"n_kv_head": 3},
    "windows": {"window": [2, None, 7]},
    "windows everywhere": {"window": [3, 9, 40]},
    "all": ALL,
}
UNEVEN = [[0, 3, 4], [1], [0, 1, 2, 3, 4, 5]]
IN_OPENVINO: dict[str, tuple[dict[str, Any], list[list[int]] | None]] = {
    "whole groups left": (ALL, [[0, 1, 2], [3, 4, 5], [0, 1, 2, 3, 4, 5]]),
    "uneven groups": (ALL, [[0, 3], [1, 3, 4], [0, 1, 2, 3, 4, 5]]),
}


def build(**fields: Any) -> CompactGPT2LMHeadModel:
    """Three layers of six heads of eight, all weights random and large enough to matter."""
    shape = {"vocab_size": VOCAB, "n_positions": CONTEXT, "n_embd": 36, "n_layer": 3, "n_head": 6, "head_dim": 8}
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    model = CompactGPT2LMHeadModel(CompactGPT2Config(**(shape | ends | fields))).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator) * 0.15)
    return model


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS)
def model(request: pytest.FixtureRequest) -> CompactGPT2LMHeadModel:
    return build(**request.param)


def tokens(batch: int, length: int) -> torch.Tensor:
    return torch.randint(1, VOCAB, (batch, length), generator=torch.Generator().manual_seed(batch * length))


def close(a: torch.Tensor, b: torch.Tensor, atol: float = 2e-5) -> None:
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


def naive(
    model: CompactGPT2LMHeadModel, ids: torch.Tensor, told: dict[str, list[torch.Tensor]] | None = None
) -> torch.Tensor:
    """Logits by the definition: head by head, every query's keys picked one by one. `told` gets each layer's
    `attentions` `[batch, heads, length, length]` and input, the last one's normed output, too."""
    config, weights = model.config, dict(model.named_parameters())
    batch, length = ids.shape
    size = config.head_dim

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ weights[name + ".weight"].T + weights[name + ".bias"]

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], weights[name + ".weight"], weights[name + ".bias"])

    positions = torch.arange(length)[None]
    x = weights["transformer.wte.weight"][ids]
    rotary = None
    if config.position == "learned":
        x = x + weights["transformer.wpe.weight"][positions]
    else:
        rope = {"rope_theta": config.rope_base, "rope_type": "default"}
        neox = GPTNeoXConfig(
            hidden_size=size,
            num_attention_heads=1,
            rope_parameters=rope | {"partial_rotary_factor": config.rotary_dim / size},
        )
        rotary = GPTNeoXRotaryEmbedding(neox)(x, positions)
    hidden, attentions = [], []
    for layer, heads in enumerate(config.kept_heads):
        h = f"transformer.h.{layer}."
        normed = norm(x, h + "ln_1")
        groups = (
            [head // (config.n_head // config.n_kv_head) for head in heads]
            if config.grouped
            else list(range(len(heads)))
        )
        if config.grouped:
            q, k, v = (linear(normed, f"{h}attn.c_attn.{part}") for part in "qkv")
        else:
            q, k, v = linear(normed, h + "attn.c_attn").chunk(3, dim=-1)
        contexts = []
        attention = torch.zeros(batch, len(heads), length, length)
        hidden.append(x)
        for index in range(len(heads)):
            group = sorted(set(groups)).index(groups[index])
            one = [t[:, None, :, at * size : at * size + size] for t, at in ((q, index), (k, group), (v, group))]
            if rotary is not None:
                one[:2] = apply_rotary_pos_emb(one[0], one[1], *rotary)
            query, key, value = (tensor[:, 0] for tensor in one)
            context = torch.empty(batch, length, size)
            for at in range(length):
                seen = range(max(0, at + 1 - (config.windows[layer] or CONTEXT)), at + 1)
                scores = (key[:, list(seen)] @ query[:, at, :, None])[..., 0] / size**0.5
                context[:, at] = (scores.softmax(-1)[:, None] @ value[:, list(seen)])[:, 0]
                attention[:, index, at, list(seen)] = scores.softmax(-1)
            contexts.append(context)
        attentions.append(attention)
        x = x + linear(torch.cat(contexts, dim=-1), h + "attn.c_proj")
        x = x + linear(F.gelu(linear(norm(x, h + "ln_2"), h + "mlp.c_fc"), approximate="tanh"), h + "mlp.c_proj")
    x = norm(x, "transformer.ln_f")
    if told is not None:
        told |= {"hidden_states": [*hidden, x], "attentions": attentions}
    return x @ weights["transformer.wte.weight"].T


@torch.no_grad()
def test_the_definition_is_gpt2s_without_a_variant(tiny_model: CompactGPT2LMHeadModel) -> None:
    ids = tokens(2, 19)
    close(naive(tiny_model, ids), tiny_model(ids).logits)


@torch.no_grad()
def test_logits_follow_the_definition(model: CompactGPT2LMHeadModel) -> None:
    for length in (1, 2, CONTEXT):
        ids = tokens(2, length)
        close(model(ids).logits, naive(model, ids))


@torch.no_grad()
def test_hidden_states_and_attentions_follow_the_definition(model: CompactGPT2LMHeadModel) -> None:
    """With uneven heads; in one go and token by token on a cache, however attention is computed."""
    model, ids = slice_heads(model, UNEVEN), tokens(2, 17)
    told: dict[str, list[torch.Tensor]] = {}
    logits = naive(model, ids, told)
    for implementation in ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
        out = model(ids, output_hidden_states=True, output_attentions=True)
        close(out.logits, logits)
        for name, wanted in told.items():
            for got, one in zip(out[name], wanted, strict=True):
                close(got, one)
        close(model(ids, labels=ids, return_dict=False)[1], logits)
        cache = DynamicCache(config=model.config)
        for at in range(17):
            out = model(ids[:, at : at + 1], past_key_values=cache, output_hidden_states=True, output_attentions=True)
            close(out.hidden_states[-1][:, 0], told["hidden_states"][-1][:, at])
            for got, one in zip(out.attentions, told["attentions"], strict=True):
                keys = got.shape[-1]
                close(got[:, :, 0], one[:, :, at, at + 1 - keys : at + 1])


@torch.no_grad()
def test_a_compiled_step_on_a_static_cache() -> None:
    """The whole graph, and the same numbers, past any window."""
    model, ids = slice_heads(build(**(ALL | {"window": [4, None], "n_layer": 2})), UNEVEN[:2]), tokens(2, 16)
    wanted = naive(model, ids)
    cache = StaticCache(config=model.config, max_cache_len=CONTEXT)
    torch._dynamo.reset()
    step = torch.compile(model.forward, fullgraph=True, backend="eager")
    close(model(ids[:, :13], past_key_values=cache, use_cache=True).logits, wanted[:, :13])
    for at in range(13, 16):
        close(step(ids[:, at : at + 1], past_key_values=cache, use_cache=True).logits[:, 0], wanted[:, at])


def test_what_writes_the_same_text(model: CompactGPT2LMHeadModel) -> None:
    """Caches that roll, stand or are cropped: greedy text is that without a cache."""
    model, ids = slice_heads(model, UNEVEN), tokens(1, 12).repeat(1, 2)
    drafter = slice_heads(model, [[3], [1], [0, 5]])  # proposes what is mostly refused
    how: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 11, "do_sample": False}
    how |= {"pad_token_id": 0, "eos_token_id": VOCAB}
    wanted = model.generate(ids, use_cache=False, **how)
    for choice in (
        {"assistant_model": drafter},
        {"assistant_model": model, "output_attentions": True},
        {"prompt_lookup_num_tokens": 5},
        {"cache_implementation": "static"},
        {"cache_implementation": "dynamic_full"},
        {"prefill_chunk_size": 5},
    ):
        text = model.generate(ids, **how, return_dict_in_generate=True, **choice).sequences
        assert torch.equal(text[:, : wanted.shape[1]], wanted), choice  # a prompt's copy may write more than it should


@torch.no_grad()
def test_pooling_key_value_heads() -> None:
    """Where a group's heads were alike, nothing changes; else each group has the mean, also of a pruned model."""
    model, ids = build(), tokens(2, 23)
    assert all(torch.equal(a, b) for a, b in zip(to_grouped(model, 6).parameters(), model.parameters(), strict=True))
    for given in (model, slice_heads(model, UNEVEN)):
        grouped = to_grouped(given, 3)
        back = CompactGPT2LMHeadModel(given.config).eval()
        back.load_state_dict(given.state_dict())
        for layer, heads in enumerate(given.config.kept_heads):
            for parameter in back.transformer.h[layer].attn.c_attn.parameters():
                for part in parameter.chunk(3)[1:]:
                    for group in range(3):
                        rows = [slice(i * 8, i * 8 + 8) for i, head in enumerate(heads) if head // 2 == group]
                        mean = sum(part[row] for row in rows) / max(1, len(rows))
                        for row in rows:
                            part[row] = mean
        close(grouped(ids).logits, back(ids).logits)
        close(to_grouped(back, 3)(ids).logits, back(ids).logits)
        assert grouped.num_parameters() < given.num_parameters()
    with pytest.raises(ValueError, match="3 key/value heads for 6 heads already"):
        to_grouped(grouped, 1)
    with pytest.raises(ValueError, match="n_kv_head is 4: give a divisor of n_head 6"):
        to_grouped(model, 4)


@torch.no_grad()
def test_a_cache_changes_nothing(model: CompactGPT2LMHeadModel) -> None:
    ids = tokens(3, CONTEXT)
    wanted = naive(model, ids)
    for steps in ([17, 1, 1, 1, 9, 1, 11], [1] * CONTEXT, [CONTEXT]):
        cache, parts = None, []
        for chunk in ids.split(steps, dim=1):
            out = model(chunk, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            parts.append(out.logits)
        assert cache.get_seq_length() == CONTEXT
        close(torch.cat(parts, dim=1), wanted)


@torch.no_grad()
def test_a_rolling_cache_holds_no_more_than_the_window() -> None:
    """Over prompts shorter, equal and longer than the windows, in a cache that was made for the model."""
    model, ids = build(window=[2, None, 7], n_kv_head=2), tokens(2, CONTEXT)
    for prompt in (1, 2, 6, 7, 8, 30):
        cache = DynamicCache(config=model.config)
        model(ids[:, :prompt], past_key_values=cache, use_cache=True)
        for at in range(prompt, CONTEXT):
            shapes = [tuple(layer.keys.shape) for layer in cache.layers]
            assert shapes == [(2, 2, min(at, most), 8) for most in (1, CONTEXT, 6)]
            model(ids[:, at : at + 1], past_key_values=cache, use_cache=True)
    for layer, kept in zip(cache.layers, (1, CONTEXT, 6), strict=True):
        assert layer.keys.untyped_storage().nbytes() <= (kept + 1) * 2 * 2 * 8 * 4
    close(model(ids, past_key_values=DynamicCache(), use_cache=True).logits, naive(model, ids))  # one that keeps all
    assert not {"sliding_window", "layer_types"} & model.config.to_dict().keys()
    with pytest.raises(ValueError, match="windows look back alone"):
        model(ids, is_causal=False)


@torch.no_grad()
@pytest.mark.parametrize("window", [2, 3, 6, 7])
def test_what_lies_at_the_windows_border(window: int) -> None:
    """A change of the token `window` back changes nothing in the first layer; of the one after it, it does."""
    model, ids = build(window=window, n_layer=1), tokens(1, 13)
    before = model(ids).logits[0, -1]
    for back, seen in ((window, False), (window - 1, True)):
        other = ids.clone()
        other[0, -1 - back] = (other[0, -1 - back] + 1) % VOCAB
        assert torch.equal(model(other).logits[0, -1], before) != seen


@torch.no_grad()
def test_texts_packed_into_one_row_do_not_see_each_other() -> None:
    model = build(window=[3, None, 5])
    parts = [tokens(1, length) for length in (9, 14)]
    positions = torch.cat([torch.arange(part.shape[1]) for part in parts])[None]
    logits = model(torch.cat(parts, dim=1), position_ids=positions, use_cache=False).logits
    close(logits, torch.cat([naive(model, part) for part in parts], dim=1))


@torch.no_grad()
def test_left_padding_changes_nothing(model: CompactGPT2LMHeadModel) -> None:
    lengths, width = [23, 9, 1], 23
    ids = tokens(3, width + 1)
    mask = torch.stack([(torch.arange(width + 1) >= width - n).long() for n in lengths])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    first = model(ids[:, :-1], attention_mask=mask[:, :-1], position_ids=positions[:, :-1], use_cache=True)
    step = model(
        ids[:, -1:], attention_mask=mask, position_ids=positions[:, -1:], past_key_values=first.past_key_values
    )
    for row, n in enumerate(lengths):
        wanted = naive(model, ids[row : row + 1, width - n :])[0]
        close(first.logits[row, width - n :], wanted[:-1])
        close(step.logits[row, -1], wanted[-1])


def test_generation_with_a_cache_and_beams(model: CompactGPT2LMHeadModel) -> None:
    ids = tokens(2, 7)
    how: dict[str, Any] = {"max_new_tokens": 30, "do_sample": False, "pad_token_id": 0, "eos_token_id": -1}
    for beams in (1, 3):
        text = model.generate(ids, attention_mask=torch.ones_like(ids), num_beams=beams, **how)
        again = model.generate(ids, attention_mask=torch.ones_like(ids), num_beams=beams, use_cache=False, **how)
        assert torch.equal(text, again) and text.shape == (2, 37)


def test_gradients_are_those_of_the_definition(model: CompactGPT2LMHeadModel) -> None:
    ids = tokens(2, 13)
    grads = []
    for logits in (model(ids).logits, naive(model, ids)):
        F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        grads.append({name: parameter.grad for name, parameter in model.named_parameters()})
        model.zero_grad()
    for name, grad in grads[0].items():
        assert grad is not None and grad.any(), name
        torch.testing.assert_close(grad, grads[1][name], atol=1e-5, rtol=1e-3, msg=name)


@torch.no_grad()
def test_files(model: CompactGPT2LMHeadModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    ids = tokens(2, 29)
    assert loaded.config.to_diff_dict() == model.config.to_diff_dict() | {"dtype": "float32"}
    assert torch.equal(loaded(ids).logits, model(ids).logits)


@torch.no_grad()
def test_pruning_equals_gating(model: CompactGPT2LMHeadModel) -> None:
    ids = tokens(2, CONTEXT)
    pruned = slice_heads(model, UNEVEN)
    gated = CompactGPT2LMHeadModel(model.config).eval()
    gated.load_state_dict(model.state_dict())
    for block, kept in zip(gated.transformer.h, UNEVEN, strict=True):
        gone = torch.tensor([head not in kept for head in range(6)]).repeat_interleave(8)
        block.attn.c_proj.weight[:, gone] = 0
    close(pruned(ids).logits, naive(gated, ids))
    close(pruned(ids).logits, naive(pruned, ids))
    twice, once = (slice_heads(given, [[3], [1], [0, 5]]) for given in (pruned, model))
    assert all(torch.equal(a, b) for a, b in zip(twice.parameters(), once.parameters(), strict=True))


def test_every_score_ranks_its_heads(model: CompactGPT2LMHeadModel) -> None:
    blocks = TokenBlocks(tokens(4, 21).numpy())
    silent = slice_heads(model, UNEVEN)
    silent.transformer.h[0].attn.c_proj.weight.data[:, 8:16] = 0  # the second head that is left
    for method in ("taylor", "activation", "magnitude"):
        scores = head_scores(silent, method, blocks, progress=False)  # type: ignore[arg-type]
        assert [len(layer) for layer in scores] == [3, 1, 6]
        assert scores[0][1] == min(scores[0]) and (method == "magnitude") == (scores[0][1] > 0)


@torch.no_grad()
@pytest.mark.parametrize("name", IN_OPENVINO)
def test_the_ir_on_the_cpu(name: str, tmp_path: Path) -> None:
    """All positions, and token by token past any window: paged, and as the IR stands; INT8 too."""
    openvino = pytest.importorskip("openvino")
    fields, heads = IN_OPENVINO[name]
    model = slice_heads(build(**fields), heads) if heads else build(**fields)
    folder = export_openvino(model, tmp_path / "fp32")
    assert not any(block.attn.fill_groups for block in model.transformer.h)  # the model itself is not changed
    ids = tokens(3, CONTEXT)
    wanted = model(ids).logits
    for engine in (OpenVINOEngine.from_folder(folder), TorchEngine(model)):
        close(engine.logits(ids), wanted, 1e-4)
        close(engine.logits(ids[:, :11]), wanted[:, :11], 1e-4)
        for prompt in (1, 13):
            close(engine.prefill(ids[:, :prompt]), wanted[:, prompt - 1], 1e-4)
            for at in range(prompt, CONTEXT):
                close(engine.decode(ids[:, at]), wanted[:, at], 1e-4)

    exact = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
    request = openvino.Core().compile_model(folder / IR_NAME, "CPU", exact).create_infer_request()
    for begin, end in ((0, 17), (17, 18), (18, CONTEXT)):
        inputs = {
            "input_ids": ids[:, begin:end],
            "position_ids": torch.arange(begin, end).repeat(3, 1),
            "attention_mask": torch.ones(3, end, dtype=torch.int64),
            "beam_idx": torch.arange(3, dtype=torch.int32),
        }
        outputs = request.infer({key: value.numpy() for key, value in inputs.items()})
        close(torch.from_numpy(outputs["logits"].copy()), wanted[:, begin:end], 1e-4)

    if name != "uneven groups":
        return
    INCQuantizer.from_pretrained(model).quantize(save_directory=tmp_path / "int8", traced=folder / IR_NAME)
    int8 = OpenVINOEngine.from_folder(tmp_path / "int8").logits(ids)
    assert 1e-5 < (int8 - wanted).norm() / wanted.norm() < 0.05


@torch.no_grad()
def test_gptq_calibrates_on_what_the_model_computes() -> None:
    pytest.importorskip("neural_compressor")
    model, ids = build(**ALL), tokens(3, 31)
    quantized = INCQuantizer(model).quantize(WeightOnlyConfig("gptq"), TokenBlocks(ids.numpy()))
    wanted = model(ids).logits
    assert 1e-5 < (quantized(ids).logits - wanted).norm() / wanted.norm() < 0.05


@torch.no_grad()
def test_a_window_on_a_trained_model(tiny_model: CompactGPT2LMHeadModel) -> None:
    ids = tokens(2, 31)
    model = to_windowed(tiny_model, [None, 4, 9])
    close(model(ids).logits, naive(model, ids))
    assert tiny_model.config.window is None and torch.equal(
        to_windowed(tiny_model, 31)(ids).logits, tiny_model(ids).logits
    )
    with pytest.raises(ValueError, match="window lists 1 layers, n_layer is 3"):
        to_windowed(tiny_model, [4])


def test_a_run_converts_what_it_loads(tiny_choices: dict[str, Any], tmp_path: Path) -> None:
    """Stage by stage, from the loaded variant to its pruned form; the plain stage's fingerprint is what it was."""
    plain = parse_recipe(Recipe, tiny_choices)
    assert load.config(plain).keys() == {"source", "revision", "content"}
    recipe = parse_recipe(Recipe, tiny_choices | {"load": tiny_choices["load"] | {"n_kv_head": 1, "window": 9}})
    assert load.config(recipe)["window"] == 9
    load.build(Job(recipe, tmp_path / "load", None, "cpu"))
    loaded = load_model(tmp_path / "load" / "model")
    assert loaded.config.variants == ["grouped-query attention", "sliding windows"]
    prune.build(Job(recipe, tmp_path / "prune", tmp_path / "load", "cpu"))
    pruned = load_model(tmp_path / "prune" / "model")
    assert pruned.config.pruned and pruned.config.groups(0) == {0: 4}
    ids = tokens(2, 29)
    close(pruned(ids).logits, naive(pruned, ids))
    wrong = parse_recipe(Recipe, tiny_choices | {"load": tiny_choices["load"] | {"n_kv_head": 2}})
    with pytest.raises(UserError, match="recipe, load: n_kv_head is 2: give a divisor of n_head 5"):
        load.build(Job(wrong, tmp_path / "wrong", None, "cpu"))


def test_the_cuda_engine_reads_it(model: CompactGPT2LMHeadModel, tmp_path: Path) -> None:
    """Its numbers are tests/cuda_ext/test_geometry.py's; here heads are of 8 numbers, which its kernels do not take."""
    model.save_pretrained(tmp_path)
    shape, config = read_shape(tmp_path), model.config
    assert shape.kv_heads == tuple(len(config.groups(layer)) for layer in range(config.n_layer))
    assert shape.groups == tuple(tuple(config.groups(layer).values()) for layer in range(config.n_layer))
    assert shape.windows == tuple(window or 0 for window in config.windows)
    assert shape.rotary == (config.rotary_dim if config.position == "rope" else 0)
    assert unsupported(shape) == "head_dim is 8; the kernels know 32, 64, 128"
    config.activation_function = "relu"
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"config\.json: the model has the activation relu, which the kernels"):
        pack(tmp_path)


def test_stock_gpt2_cannot_express_it(model: CompactGPT2LMHeadModel) -> None:
    with pytest.raises(ValueError, match=r"a CompactGPT2 with .* has no stock GPT-2 form") as caught:
        to_gpt2(model)
    assert "\n" not in str(caught.value)


@torch.no_grad()
def test_a_checkpoint_from_before_there_were_variants(tiny_model: CompactGPT2LMHeadModel, tmp_path: Path) -> None:
    tiny_model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for field in ("position", "rope_base", "rope_share", "n_kv_head", "window"):
        del config[field]
    (tmp_path / "config.json").write_text(json.dumps(config))
    old = load_model(tmp_path)
    ids = tokens(2, 23)
    assert (
        not old.config.variants and unsupported(read_shape(tmp_path)) == "head_dim is 8; the kernels know 32, 64, 128"
    )
    assert torch.equal(old(ids).logits, tiny_model(ids).logits)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"position": "alibi"}, "position is 'alibi': give learned or rope"),
        ({"rope_base": 1.0}, "rope_base is 1.0"),
        ({"rope_share": 0.2}, "rope_share is 0.2: give a share of head_dim 8"),
        ({"rope_share": 1.5}, "rope_share is 1.5"),
        ({"n_kv_head": 4}, "n_kv_head is 4: give a divisor of n_head 6"),
        ({"window": 1}, "window"),
        ({"window": [4, None]}, "window lists 2 layers, n_layer is 3"),
    ],
)
def test_fields_that_do_not_fit(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**fields)
    shape = {"n_layer": 3, "n_head": 6, "head_dim": 8} | fields
    with pytest.raises(UserError, match=next(iter(fields))) as caught:
        parse_recipe(Pretrain, {"model": shape})
    assert "\n" not in str(caught.value)


def test_training_from_scratch(tiny_texts: dict[str, Path], tmp_path: Path) -> None:
    shape = {"n_layer": 3, "n_head": 6, "head_dim": 8, "n_positions": 16, "vocab_size": 263} | ALL
    choices = {"model": shape, "steps": 25, "warmup_steps": 2, "decay_steps": 3, "batch_size": 4, "log_steps": 1}
    recipe = parse_recipe(Pretrain, choices | {"eval_blocks": 1})
    folder = pretrain(recipe, [tiny_texts["train"]], tmp_path, tiny_texts["evaluation"].read_text())
    trained = load_model(folder).config
    assert (trained.rotary_dim, trained.n_kv_head, trained.window) == (4, 2, ALL["window"])
    losses = [point["loss"] for point in json.loads((tmp_path / "curve.json").read_text()) if "loss" in point]
    assert losses[-1] < losses[0] - 0.5
