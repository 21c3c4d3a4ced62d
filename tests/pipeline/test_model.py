"""CompactGPT2 against Hugging Face's GPT-2: the same function, and what stock GPT-2 cannot do."""

import json
from collections.abc import Callable

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GPT2LMHeadModel

from pipeline.model import (
    CompactGPT2Config,
    CompactGPT2LMHeadModel,
    CompactGPT2Model,
    from_gpt2,
    slice_heads,
    to_gpt2,
)

UNEVEN = [[0, 2, 3], [4], [0, 1, 2, 3, 4]]
SHAPES = {
    "tiny": {},
    "odd": {"vocab_size": 101, "n_positions": 31, "n_embd": 33, "n_head": 3, "n_layer": 2, "n_inner": 57},
    "one head": {"vocab_size": 7, "n_positions": 19, "n_embd": 5, "n_head": 1, "n_layer": 1},
    "relu": {"activation_function": "relu", "layer_norm_epsilon": 1e-3},
}


def _tokens(model, batch: int, length: int, seed: int = 2) -> torch.Tensor:
    return torch.randint(1, model.config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


def _same(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@torch.no_grad()
def test_logits_and_loss_agree_with_gpt2(make_gpt2, shape):
    theirs = make_gpt2(**shape)
    ours = from_gpt2(theirs)
    ids = _tokens(theirs, 3, 17)
    labels = ids.clone()
    labels[0, 5:9] = -100
    wanted, got = theirs(ids, labels=labels), ours(ids, labels=labels)
    assert wanted.logits.std() > 0.1
    _same(got.logits, wanted.logits)
    _same(got.loss, wanted.loss)
    _same(ours(inputs_embeds=ours.transformer.wte(ids)).logits, wanted.logits)
    assert torch.equal(ours(ids, logits_to_keep=2).logits, ours.lm_head(ours.transformer(ids)[0][:, -2:]))


@torch.no_grad()
def test_full_context_and_one_token(tiny_gpt2, tiny_model):
    for length in (1, tiny_gpt2.config.n_positions):
        ids = _tokens(tiny_gpt2, 2, length)
        _same(tiny_model(ids).logits, tiny_gpt2(ids).logits)


@pytest.mark.parametrize("steps", [[5, 1, 1, 7, 2], [1, 1, 14], [16]])
@torch.no_grad()
def test_cached_logits_agree_with_gpt2(tiny_gpt2, tiny_model, steps):
    """Prefill, single tokens and several tokens on top of a cache."""
    ids = _tokens(tiny_gpt2, 3, sum(steps))
    cache, parts = None, []
    for chunk in ids.split(steps, dim=1):
        out = tiny_model(chunk, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        parts.append(out.logits)
    assert cache.get_seq_length() == sum(steps)
    _same(torch.cat(parts, dim=1), tiny_gpt2(ids).logits)
    assert tiny_model(ids, use_cache=False).past_key_values is None


@torch.no_grad()
def test_left_padding_agrees_with_gpt2_and_with_each_row_alone(tiny_gpt2, tiny_model):
    lengths, width = [13, 4, 1], 13
    ids = _tokens(tiny_gpt2, 3, width)
    mask = torch.stack([(torch.arange(width) >= width - n).long() for n in lengths])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    ours = tiny_model(ids, attention_mask=mask, position_ids=positions)
    theirs = tiny_gpt2(ids, attention_mask=mask, position_ids=positions)
    _same(ours.logits[mask == 1], theirs.logits[mask == 1])
    for row, n in enumerate(lengths):
        _same(ours.logits[row, width - n :], tiny_gpt2(ids[row : row + 1, width - n :]).logits[0])
    # One more token on the padded cache.
    token, longer = _tokens(tiny_gpt2, 3, 1, seed=5), torch.cat([mask, torch.ones(3, 1, dtype=torch.long)], dim=1)
    step = tiny_model(
        token, attention_mask=longer, position_ids=mask.sum(1, True), past_key_values=ours.past_key_values
    )
    for row, n in enumerate(lengths):
        alone = tiny_gpt2(torch.cat([ids[row, width - n :], token[row]])[None]).logits[0, -1]
        _same(step.logits[row, -1], alone)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@torch.no_grad()
def test_what_else_gpt2_tells_is_the_same(tiny_gpt2, implementation):
    """Hidden states, attentions, tuples and caches, by argument and by configuration; padding on the left."""
    tiny_gpt2.set_attn_implementation(implementation)
    ours = from_gpt2(tiny_gpt2)
    assert ours.config._attn_implementation == implementation
    tiny_gpt2.set_attn_implementation("eager")  # stock GPT-2 tells attentions by this one alone, and else none
    ids = _tokens(tiny_gpt2, 2, 11)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    how = {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0), "labels": ids, "use_cache": True}
    how |= {"token_type_ids": _tokens(tiny_gpt2, 2, 11, seed=9), "num_items_in_batch": torch.tensor(13)}
    how |= {"output_hidden_states": True, "output_attentions": True}
    wanted, got = tiny_gpt2(ids, **how), ours(ids, **how)
    for name in ("hidden_states", "attentions"):
        assert len(got[name]) == len(wanted[name]) == (3 if name == "attentions" else 4)
        for a, b in zip(got[name], wanted[name], strict=True):
            _same(a[0], b[0])
            _same(a[1, ..., 4:, :], b[1, ..., 4:, :])  # not what the padding saw
    _same(got.loss, wanted.loss)
    for a, b in zip(got.past_key_values.layers, wanted.past_key_values.layers, strict=True):
        _same(a.keys, b.keys)
        _same(a.values, b.values)
    theirs = tiny_gpt2(ids, return_dict=False, **how)[:-1]  # without its cross attentions
    assert [type(part) for part in ours(ids, return_dict=False, **how)] == [type(part) for part in theirs]
    assert type(ours.transformer(ids, return_dict=False)) is tuple
    ours.config.return_dict = False
    assert type(ours(ids)) is tuple
    ours.config.return_dict = ours.config.output_hidden_states = True
    assert len(ours(ids).hidden_states) == 4 and ours(ids).attentions is None
    assert ours(ids, output_attentions=True).attentions[0].shape == (2, 5, 11, 11)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@torch.no_grad()
def test_a_mask_of_ones_own_agrees_with_gpt2(tiny_gpt2, implementation):
    """`[batch, 1, length, past + length]`: a text in two parts of which each sees itself alone; on a cache, too."""
    tiny_gpt2.set_attn_implementation("sdpa")
    ours = from_gpt2(tiny_gpt2)
    ours.set_attn_implementation(implementation)
    ids, part = _tokens(tiny_gpt2, 2, 9), torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 1])
    mask = (part[:, None] == part) & torch.ones(9, 9).tril().bool()
    mask = mask.expand(2, 1, 9, 9)
    wanted = tiny_gpt2(ids, attention_mask=mask).logits
    added = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    for given in (mask, added):
        _same(ours(ids, attention_mask=given).logits, wanted)
        first = ours(ids[:, :6], attention_mask=given[:, :, :6, :6])
        rest = ours(ids[:, 6:], attention_mask=given[:, :, 6:], past_key_values=first.past_key_values)
        _same(torch.cat([first.logits, rest.logits], dim=1), wanted)
    both = torch.ones(2, 9, dtype=torch.long)
    _same(
        ours(ids, attention_mask=both, is_causal=False).logits,
        tiny_gpt2(ids, attention_mask=both, is_causal=False).logits,
    )


@pytest.mark.parametrize("argument", ["no_such_argument", "head_mask", "encoder_hidden_states", "output_router_logits"])
def test_an_argument_that_nothing_reads_is_refused(tiny_model, argument):
    ids = _tokens(tiny_model, 1, 3)
    for model in (tiny_model, tiny_model.transformer):
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{argument}'"):
            model(ids, **{argument: True})
        model(ids, **{argument: None})  # asks for nothing
    with pytest.raises(ValueError, match=r"not used by the model: .*no_such"):
        tiny_model.generate(ids, no_such=1)


@torch.no_grad()
def test_positions_end_where_they_were_learned(tiny_model):
    """A padded text may be longer than its positions; a static cache and a compiled call change nothing."""
    ids = _tokens(tiny_model, 1, 70)
    words = "the text has 70 tokens, the model 67 positions; give a shorter one"
    with pytest.raises(ValueError, match=words):
        tiny_model(ids)
    cache = tiny_model(ids[:, :60]).past_key_values
    with pytest.raises(ValueError, match=words):
        tiny_model(ids[:, 60:], past_key_values=cache)
    with pytest.raises(ValueError, match="the text has 68 tokens"):
        tiny_model.generate(ids[:, :60], max_new_tokens=9, eos_token_id=-1, cache_implementation="static")
    mask = torch.ones_like(ids)
    mask[:, :5] = 0
    padded = tiny_model(ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0)).logits
    _same(padded[:, 5:], tiny_model(ids[:, 5:]).logits)


def test_greedy_generation_agrees_with_gpt2(tiny_gpt2, tiny_model):
    ids = _tokens(tiny_gpt2, 3, 9)
    mask = torch.ones_like(ids)
    mask[1, :6] = 0
    how = {"attention_mask": mask, "max_new_tokens": 23, "do_sample": False, "pad_token_id": 0, "eos_token_id": 268}
    wanted = tiny_gpt2.generate(ids, **how)
    assert len(set(wanted[:, 9:].flatten().tolist())) > 5
    assert torch.equal(tiny_model.generate(ids, **how), wanted)
    assert torch.equal(tiny_model.generate(ids, **how, use_cache=False), wanted)


@pytest.mark.parametrize("how", [{"num_beams": 3}, {"do_sample": True, "top_k": 20, "top_p": 0.9, "temperature": 1.3}])
def test_search_and_sampling_with_uneven_heads(tiny_model, how):
    """The cache is reordered and read right: without a cache the same tokens come out."""
    model = slice_heads(tiny_model, UNEVEN)
    ids = _tokens(model, 2, 5)

    def generate(seed: int, **more: object) -> torch.Tensor:
        torch.manual_seed(seed)
        mask = torch.ones_like(ids)
        return model.generate(ids, attention_mask=mask, max_new_tokens=11, pad_token_id=0, **how, **more)

    first = generate(1)
    assert torch.equal(first, generate(1))
    assert torch.equal(first, generate(1, use_cache=False))
    if "do_sample" in how:
        assert not torch.equal(first, generate(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("heads", [None, UNEVEN], ids=["whole", "uneven"])
def test_saving_and_loading_is_bit_exact(tiny_model, tmp_path, dtype, heads):
    model = (slice_heads(tiny_model, heads) if heads else tiny_model).to(dtype)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is CompactGPT2LMHeadModel and loaded.dtype == dtype and not loaded.training
    assert loaded.config.kept_heads == model.config.kept_heads == AutoConfig.from_pretrained(tmp_path).kept_heads
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in loaded.state_dict().items())
    assert loaded.lm_head.weight is loaded.transformer.wte.weight
    ids = _tokens(model, 2, 13)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
        body = AutoModel.from_pretrained(tmp_path)
        assert type(body) is CompactGPT2Model
        assert torch.equal(body(ids).last_hidden_state, model.transformer(ids).last_hidden_state)


def test_the_files_hold_each_weight_once(tiny_model, tmp_path):
    model = slice_heads(tiny_model, UNEVEN)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    assert "lm_head.weight" not in shapes
    assert shapes.keys() == {key for key, _ in model.named_parameters()}
    assert shapes["transformer.h.1.attn.c_attn.weight"] == (3 * 8, 40)
    assert shapes["transformer.h.0.attn.c_proj.weight"] == (40, 3 * 8)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["model_type"] == "compact_gpt2" and saved["head_dim"] == 8 and saved["kept_heads"] == UNEVEN


def test_round_trip_to_gpt2_is_bit_exact(tiny_gpt2, tiny_model):
    back = to_gpt2(tiny_model)
    assert back.state_dict().keys() == tiny_gpt2.state_dict().keys()
    assert all(torch.equal(value, tiny_gpt2.state_dict()[key]) for key, value in back.state_dict().items())
    back.transformer.h[0].attn.c_attn.weight.data.zero_()  # a copy, not a view
    assert tiny_model.transformer.h[0].attn.c_attn.weight.any() and tiny_gpt2.transformer.h[0].attn.c_attn.weight.any()


@torch.no_grad()
@pytest.mark.parametrize("said", [True, False], ids=["by its configuration", "by its weights"])
def test_a_head_of_its_own(tiny_model, make_gpt2, said, tmp_path):
    """Goes to stock GPT-2, through slicing and files; comes from no stock GPT-2."""
    config = CompactGPT2Config.from_dict(tiny_model.config.to_dict() | {"tie_word_embeddings": not said})
    model = CompactGPT2LMHeadModel(config).eval()
    model.load_state_dict(tiny_model.state_dict())
    model.lm_head.weight = torch.nn.Parameter(tiny_model.lm_head.weight.flip(0))
    ids = _tokens(model, 2, 9)
    wanted = tiny_model(ids).logits.flip(-1)
    stock = to_gpt2(model)
    for one in (model, stock, slice_heads(model, model.config.kept_heads)):
        _same(one(ids).logits, wanted)
    stock.save_pretrained(tmp_path)
    _same(type(stock).from_pretrained(tmp_path)(ids).logits, wanted)
    theirs = make_gpt2()
    theirs.lm_head.weight = torch.nn.Parameter(theirs.lm_head.weight + 1)
    for each in (stock, theirs):
        with pytest.raises(ValueError, match=r"lm_head\.weight differs from transformer\.wte\.weight"):
            from_gpt2(each)


def test_import_keeps_dtype_mode_and_generation_defaults(tiny_gpt2):
    tiny_gpt2.generation_config.max_length = 43
    compact = from_gpt2(tiny_gpt2.half().train())
    assert compact.dtype == torch.float16 and compact.training
    assert compact.generation_config.max_length == 43 and compact.config.eos_token_id == 0


def test_a_pruned_model_has_no_gpt2_form(tiny_model):
    with pytest.raises(ValueError, match="pruned"):
        to_gpt2(slice_heads(tiny_model, UNEVEN))
    wide = CompactGPT2LMHeadModel(CompactGPT2Config(vocab_size=11, n_embd=12, n_layer=1, n_head=2, head_dim=8))
    with pytest.raises(ValueError, match="no stock GPT-2 form"):
        to_gpt2(wide)


@pytest.mark.parametrize(
    "variant",
    [
        {"scale_attn_by_inverse_layer_idx": True},
        {"scale_attn_weights": False},
        {"add_cross_attention": True},
        {"reorder_and_upcast_attn": True},
        {"is_causal": False},
    ],
    ids=lambda variant: next(iter(variant)),
)
def test_variants_that_compute_something_else_are_refused(make_gpt2, variant):
    with pytest.raises(ValueError, match=next(iter(variant))):
        from_gpt2(make_gpt2(**variant))


def test_a_head_that_is_the_table_is_tied(make_gpt2: Callable[..., GPT2LMHeadModel]) -> None:
    """Whatever the configuration says: the weights decide."""
    untied = make_gpt2(tie_word_embeddings=False)
    untied.lm_head.weight = torch.nn.Parameter(untied.transformer.wte.weight.detach().clone())
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    with torch.no_grad():
        torch.testing.assert_close(from_gpt2(untied)(ids).logits, untied(ids).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_embd": 40, "n_head": 3}, "n_embd 40 is no multiple of n_head 3"),
        ({"kept_heads": [[0, 1]]}, "lists 1 layers, n_layer is 2"),
        ({"kept_heads": [[0], []]}, r"kept_heads\[1\] is \[\]"),
        ({"kept_heads": [[0, 5], [0]]}, r"kept_heads\[0\] is \[0, 5\]"),
        ({"kept_heads": [[-1], [0]]}, r"kept_heads\[0\]"),
        ({"kept_heads": [[0], [2, 1]]}, r"kept_heads\[1\] .* ascending"),
        ({"kept_heads": [[0], [1, 1]]}, r"kept_heads\[1\]"),
    ],
)
def test_configurations_that_cannot_be(fields, message):
    with pytest.raises(ValueError, match=message):
        CompactGPT2Config(**({"n_embd": 40, "n_head": 5, "n_layer": 2} | fields))


def test_head_dim_is_a_field_of_its_own():
    """Heads wider than `n_embd / n_head`, as stock GPT-2 cannot have them, train and generate."""
    config = CompactGPT2Config(
        vocab_size=13, n_positions=17, n_embd=12, n_layer=2, n_head=5, head_dim=8, bos_token_id=0, eos_token_id=0
    )
    assert not config.pruned and config.n_inner == 48
    model = CompactGPT2LMHeadModel(config)
    assert model.transformer.h[1].attn.c_attn.weight.shape == (3 * 5 * 8, 12)
    ids = _tokens(model, 2, 17)
    loss = model(ids, labels=ids).loss
    loss.backward()
    assert loss.isfinite() and all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_fresh_weights_follow_gpt2s_initialisation():
    config = CompactGPT2Config(vocab_size=501, n_embd=96, n_layer=8, n_head=6, initializer_range=0.05)
    torch.manual_seed(0)
    block = CompactGPT2LMHeadModel(config).transformer.h[3]
    assert block.mlp.c_fc.weight.std().item() == pytest.approx(0.05, rel=0.05)
    for projection in (block.attn.c_proj, block.mlp.c_proj):
        assert projection.weight.std().item() == pytest.approx(0.05 / 4, rel=0.05)  # 1 / sqrt(2 * 8 layers)
        assert not projection.bias.any()
    assert (block.ln_1.weight == 1).all() and not block.ln_1.bias.any()


def test_gradient_checkpointing_changes_no_gradient(tiny_model):
    model = slice_heads(tiny_model, UNEVEN).train()  # with dropout: the recomputation must draw the same
    ids = _tokens(model, 3, 21)

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        torch.manual_seed(4)
        model(ids, labels=ids).loss.backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    plain = gradients()
    model.gradient_checkpointing_enable()
    assert model.is_gradient_checkpointing
    for a, b in zip(plain, gradients(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
    assert model(ids, use_cache=True).past_key_values is None
    model.gradient_checkpointing_disable()
    assert model(ids, use_cache=True).past_key_values is not None


def test_either_ids_or_embeddings(tiny_model):
    for inputs in ({}, {"input_ids": torch.ones(1, 2, dtype=torch.long), "inputs_embeds": torch.ones(1, 2, 40)}):
        with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
            tiny_model(**inputs)
