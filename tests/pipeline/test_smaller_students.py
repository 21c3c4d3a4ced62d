"""Fewer layers and narrower MLPs: what is cut computes as if it were silent, scores are what a loop by hand gives, and
the student lives through every later stage."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import GPT2LMHeadModel

from cuda_ext.packing import pack
from eval.errors import UserError
from eval.results import load_results
from pipeline.compensate import compensate
from pipeline.data import TokenBlocks
from pipeline.importance import choose_layers, choose_neurons, layer_scores, neuron_scores
from pipeline.model import CompactGPT2LMHeadModel, keep_layers, slice_heads, slice_neurons, to_gpt2, to_windowed
from pipeline.recipe import Recipe, load_recipe
from pipeline.runner import Runner
from pipeline.stages import BY_NAME
from pipeline.stages.finetune import equal_steps
from pipeline.watching import training_flops

INNER = 160  # of the tiny model
KEPT = [sorted(np.random.default_rng(layer).permutation(INNER)[:37].tolist()) for layer in range(3)]


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(1, 269, (3, 29), generator=torch.Generator().manual_seed(6))


def hidden(model: Any, watch: Callable[[int, torch.Tensor], torch.Tensor | None]) -> None:
    """Let `watch(layer, neurons)` see, and exchange, what enters the second half of each MLP."""
    for layer, block in enumerate(model.transformer.h):
        block.mlp.c_proj.register_forward_pre_hook(lambda _, args, layer=layer: watch(layer, args[0]))


@torch.no_grad()
def test_slicing_neurons_equals_silencing_them(
    tiny_gpt2: GPT2LMHeadModel, tiny_model: CompactGPT2LMHeadModel, ids: torch.Tensor
) -> None:
    sliced = slice_neurons(tiny_model, KEPT)
    gates = [torch.isin(torch.arange(INNER), torch.tensor(neurons)).float() for neurons in KEPT]
    whole = tiny_gpt2(ids).logits
    hidden(tiny_gpt2, lambda layer, neurons: neurons * gates[layer])
    wanted = tiny_gpt2(ids).logits
    torch.testing.assert_close(sliced(ids).logits, wanted, atol=1e-5, rtol=0)
    assert (wanted - whole).abs().max() > 0.1
    assert sliced.config.n_inner == 37 and not sliced.config.pruned
    assert sliced.num_parameters() == tiny_model.num_parameters() - 3 * (INNER - 37) * (2 * 40 + 1)
    torch.testing.assert_close(to_gpt2(sliced)(ids).logits, wanted, atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("kept", [[0, 2], [1], [0, 1, 2]])
def test_a_model_without_a_layer_skips_it(
    tiny_gpt2: GPT2LMHeadModel, tiny_model: CompactGPT2LMHeadModel, ids: torch.Tensor, kept: list[int]
) -> None:
    shallow = keep_layers(tiny_model, kept)
    for layer, block in enumerate(tiny_gpt2.transformer.h):
        if layer not in kept:
            block.register_forward_hook(lambda _, args, output: args[0])
    wanted = tiny_gpt2(ids).logits
    torch.testing.assert_close(shallow(ids).logits, wanted, atol=1e-5, rtol=0)
    text = shallow.generate(ids[:, :4], max_new_tokens=5, min_new_tokens=5, do_sample=False, pad_token_id=0)
    logits = shallow(text).logits  # with the cache as without
    logits[..., 0] = -torch.inf
    assert torch.equal(logits[:, 3:-1].argmax(-1), text[:, 4:])


def test_layers_keep_their_own_heads_and_windows(tiny_model: CompactGPT2LMHeadModel) -> None:
    uneven = to_windowed(slice_heads(tiny_model, [[0, 2], [1, 3, 4], [4]]), [5, None, 9])
    shallow = keep_layers(uneven, [0, 2])
    assert (shallow.config.n_layer, shallow.config.kept_heads) == (2, [[0, 2], [4]])
    assert shallow.config.windows == [5, 9] and uneven.config.n_layer == 3
    assert keep_layers(to_windowed(tiny_model, 7), [1]).config.windows == [7]


def test_taylor_scores_of_neurons_by_a_loop(tiny_model: CompactGPT2LMHeadModel, tiny_blocks: TokenBlocks) -> None:
    """One sequence after the other, a gate a neuron, its gradient by autograd, in FP64."""
    lengths = [33, 7, 20]
    padded = np.zeros((3, 33), dtype=np.int64)
    for row, block, length in zip(padded, tiny_blocks.tokens, lengths, strict=False):
        row[:length] = block[:length]
    scores = neuron_scores(tiny_model, "taylor", TokenBlocks(padded, lengths), batch_size=2, progress=False)
    model = copy.deepcopy(tiny_model).double()
    gates = [torch.ones(INNER, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    hidden(model, lambda layer, neurons: neurons * gates[layer])
    slopes = torch.zeros(3, INNER, dtype=torch.float64)
    for row, length in zip(padded, lengths, strict=True):
        sequence = torch.from_numpy(row[:length])
        loss = F.cross_entropy(model(sequence[None]).logits[0, :-1], sequence[1:])
        slopes += torch.stack(torch.autograd.grad(loss, gates)).abs()
    wanted = slopes / slopes.norm(dim=1, keepdim=True)
    np.testing.assert_allclose(scores, wanted, rtol=2e-3, atol=1e-6)


def test_other_scores_of_neurons_by_hand(tiny_model: CompactGPT2LMHeadModel, tiny_blocks: TokenBlocks) -> None:
    seen: list[torch.Tensor] = []
    model = copy.deepcopy(tiny_model)
    hidden(model, lambda layer, neurons: seen.append(neurons))
    with torch.no_grad():
        model(torch.from_numpy(tiny_blocks.tokens))
    found = {
        name: neuron_scores(tiny_model, name, tiny_blocks, batch_size=3, progress=False)  # type: ignore[arg-type]
        for name in ("magnitude", "activation", "random")
    }
    for layer, block in enumerate(tiny_model.transformer.h):
        mlp: Any = block.mlp
        own = [torch.cat([mlp.c_fc.weight[i], mlp.c_proj.weight[:, i]]).norm().item() for i in range(INNER)]
        np.testing.assert_allclose(found["magnitude"][layer], np.array(own) / np.linalg.norm(own), rtol=1e-5)
        columns = [mlp.c_proj.weight[:, i].norm().item() for i in range(INNER)]
        added = seen[layer].abs().mean(dim=(0, 1)).numpy() * columns
        np.testing.assert_allclose(found["activation"][layer], added / np.linalg.norm(added), rtol=1e-4)
    assert [len(layer) for layer in found["random"]] == [INNER] * 3
    assert found["random"] == neuron_scores(tiny_model, "random", tiny_blocks)


def test_influence_of_a_layer(tiny_model: CompactGPT2LMHeadModel, tiny_blocks: TokenBlocks) -> None:
    lengths = [33, 5, 17, 33, 21]
    padded = np.where(np.arange(41) < np.array(lengths)[:, None], np.pad(tiny_blocks.tokens[:5], ((0, 0), (0, 8))), 0)
    scores = layer_scores(tiny_model, "taylor", TokenBlocks(padded, lengths), batch_size=2, progress=False)
    streams: list[list[np.ndarray]] = [[], [], []]
    body = copy.deepcopy(tiny_model).transformer
    for layer, block in enumerate(body.h):
        block.register_forward_hook(lambda _, args, out, layer=layer: streams[layer].append(torch.cat([args[0], out])))
    with torch.no_grad():
        for row, length in zip(padded, lengths, strict=True):
            body(torch.from_numpy(row[None, :length]))
    for layer, pairs in enumerate(streams):
        before, after = (np.concatenate([pair[half].double() for pair in pairs]) for half in (0, 1))
        cosine = (before * after).sum(1) / np.linalg.norm(before, axis=1) / np.linalg.norm(after, axis=1)
        assert scores[layer] == pytest.approx((1 - cosine).mean(), rel=1e-5)
    first, again, other = (layer_scores(tiny_model, "random", tiny_blocks, seed=seed) for seed in (7, 7, 8))
    assert first == again != other


def test_a_layer_that_does_nothing_goes_first(tiny_model: CompactGPT2LMHeadModel, tiny_blocks: TokenBlocks) -> None:
    for part in ("attn", "mlp"):
        for weight in tiny_model.get_submodule(f"transformer.h.1.{part}.c_proj").parameters():
            weight.data.zero_()
    scores = layer_scores(tiny_model, "taylor", tiny_blocks, progress=False)
    assert scores[1] == pytest.approx(0, abs=1e-12) and choose_layers(scores, 1) == [0, 2]
    tiny_model.transformer.wte.weight.data[17] = float("nan")
    with pytest.raises(UserError, match="influence of the layers is not finite"):
        layer_scores(tiny_model, "taylor", TokenBlocks(np.array([[17, 3]])), progress=False)


@pytest.mark.parametrize(
    ("total", "share", "stay"),
    [
        (160, 0.0, 160),
        (160, 0.2, 128),
        (160, 0.1, 160),  # 144 is half way between 128 and 160
        (160, 0.99, 32),
        (1280, 0.125, 1120),
        (1280, 0.5, 640),
        (3072, 0.3, 2144),  # 2150.4
        (50, 0.0, 50),
        (50, 0.5, 32),
        (20, 0.5, 20),
    ],
)
def test_neurons_stay_in_multiples(total: int, share: float, stay: int) -> None:
    rising = [float(i) for i in range(total)]
    kept = choose_neurons([rising, rising[::-1], [1.0] * total], share)
    assert kept == [list(range(total - stay, total)), list(range(stay)), list(range(total - stay, total))]


def test_layers_that_stay() -> None:
    assert choose_layers([0.3, 0.1, 0.2, 0.1], 2) == [0, 2]
    assert choose_layers([0.1, 0.1], 1) == [1]
    with pytest.raises(UserError, match=r"prune.layers is 3, and this model has 3; give at most 2: one must stay"):
        choose_layers([1, 2, 3], 3)


def test_compensation_solves_for_neurons_too(tiny_model: CompactGPT2LMHeadModel, tiny_blocks: TokenBlocks) -> None:
    """Against numpy's least squares; and what is rebuilt comes nearer to what was there."""
    seen: list[np.ndarray] = []
    model = copy.deepcopy(tiny_model)
    hidden(model, lambda layer, neurons: seen.append(neurons.flatten(0, 1).double().numpy()))
    blocks = TokenBlocks(np.random.default_rng(5).integers(1, 269, (24, 33)))
    with torch.no_grad():
        model(torch.from_numpy(blocks.tokens))
    heads = [[0, 1, 3, 4], [0, 1, 2, 3, 4], [1, 2]]
    pruned = slice_neurons(slice_heads(tiny_model, heads), KEPT)
    result = compensate(tiny_model, pruned, blocks, neurons=KEPT, ridge=1e-4, batch_size=5, progress=False)
    for layer, (inputs, keeps) in enumerate(zip(seen, KEPT, strict=True)):
        name = f"transformer.h.{layer}.mlp.c_proj"
        dense, old, new = (each.get_submodule(name) for each in (tiny_model, pruned, result))
        weight = dense.weight.detach().double().numpy()
        x = inputs[:, keeps]
        r = np.delete(inputs, keeps, 1) @ np.delete(weight, keeps, 1).T
        centred = x - x.mean(0)
        penalty = np.sqrt(len(x) * 1e-4 * centred.var(0).mean()) * np.eye(x.shape[1])
        rows = np.vstack([centred, penalty])
        a = np.linalg.lstsq(rows, np.vstack([r - r.mean(0), np.zeros((x.shape[1], r.shape[1]))]), rcond=None)[0]
        np.testing.assert_allclose((new.weight - old.weight).detach(), a.T, atol=2e-5)
        np.testing.assert_allclose((new.bias - old.bias).detach(), r.mean(0) - x.mean(0) @ a, atol=5e-5)
        wanted = inputs @ weight.T + dense.bias.detach().numpy()
        errors = [
            np.square(x @ each.weight.detach().numpy().T + each.bias.detach().numpy() - wanted).mean()
            for each in (old, new)
        ]
        assert errors[1] < 0.7 * errors[0]
    alone = compensate(tiny_model, slice_heads(tiny_model, heads), blocks, ridge=1e-4, progress=False)
    for layer in (0, 2):  # a fit takes no account of the others
        name = f"transformer.h.{layer}.attn.c_proj.weight"
        torch.testing.assert_close(alone.get_parameter(name), result.get_parameter(name), atol=1e-5, rtol=1e-4)


def test_flops_of_a_student(tiny_model: CompactGPT2LMHeadModel) -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    student = slice_neurons(slice_heads(keep_layers(tiny_model, [0, 2]), [[0, 1, 3], [2]]), KEPT[:2])
    for model, length in ((student, 31), (tiny_model, 67)):
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
            model(torch.zeros(2, length, dtype=torch.int64))
        assert training_flops(model.config, length) * 2 * length == 3 * counter.get_total_flops()
    assert equal_steps(60, tiny_model.config, tiny_model.config, 33) == 80  # four forwards' worth in place of three
    assert equal_steps(60, student.config, tiny_model.config, 33) > 90


@pytest.fixture(scope="module")
def student_run(tmp_path_factory: pytest.TempPathFactory, tiny_recipe: Path) -> Path:
    """A whole run that drops one layer of two, 80 neurons of 160 and heads, compensates and distils."""
    folder = tmp_path_factory.mktemp("student") / "run"
    changes = ["prune.layers=1", "prune.mlp=0.4", "prune.compensate=true", "quantize.w8a8=true"]
    changes += ["finetune.distill={weight: 0.5, temperature: 2}", "measure.latency=false", "measure.agreement_tokens=0"]
    changes += ["controls={dense_finetuned: false, random_heads: false}"]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    Runner(load_recipe(Recipe, tiny_recipe, changes), folder).execute()
    torch.set_num_threads(threads)
    return folder


def test_every_stage_takes_the_student(student_run: Path) -> None:
    results = load_results(student_run / "results.json")
    heads = results.heads["prune"]
    assert (len(heads.layers), len(heads.influence), heads.n_inner, len(heads.kept)) == (1, 2, [96, 160], 1)
    assert heads.layers == [int(np.argmax(heads.influence))]
    rows = {row.key: row for row in results.rows if row.skipped is None}
    assert {"quantize/openvino/cpu/int8", "quantize/openvino/cpu/w8a8", "control-plain/torch/cpu/fp32"} <= set(rows)
    assert len({rows[key].parameters for key in rows if key.startswith(("prune", "finetune", "quantize"))}) == 1
    fp32 = rows["finetune/torch/cpu/fp32"].quality
    ir = rows["quantize/openvino/cpu/fp32"].quality
    assert fp32 is not None and ir is not None and ir.perplexity == pytest.approx(fp32.perplexity, rel=1e-4)
    packed = pack_shape(student_run / "finetune" / "model_fp16")
    assert packed == (96, (len(heads.kept[0]),))
    for page in ("report.md", "report.html"):
        text = (student_run / page).read_text()
        assert "1 of 2 layers" in text and "64 of 160 hidden neurons in each layer" in text
        assert "With the dense teacher, fine-tuning came to perplexity" in text and "(7 steps, " in text


def pack_shape(folder: Path) -> tuple[int, tuple[int, ...]]:
    """What the CUDA engine reads; its kernels know no heads of 8, so the shape alone is looked at."""
    from cuda_ext.packing import read_shape

    shape = read_shape(folder)
    return shape.inner, shape.heads


def test_a_student_fits_the_kernels(make_gpt2: Callable[..., GPT2LMHeadModel], tmp_path: Path) -> None:
    from pipeline.model import from_gpt2

    model = from_gpt2(make_gpt2(n_embd=64, n_head=2, n_layer=3))
    student = slice_neurons(keep_layers(model, [0, 2]), choose_neurons([[float(i % 7) for i in range(256)]] * 2, 0.4))
    student.half().save_pretrained(tmp_path)
    packed = pack(tmp_path)
    assert (packed.shape.inner, packed.shape.heads) == (160, (2, 2))
    fc = student.transformer.h[1].mlp.c_fc.weight  # type: ignore[union-attr]
    at = packed.offsets["h.1.mlp.c_fc.weight"]
    assert torch.equal(packed.weights[at : at + fc.numel()].view(fc.shape), fc.detach())


def test_the_ir_of_a_student_says_what_torch_says(student_run: Path) -> None:
    from pipeline.engines import load_engine

    torch_engine, ir = (
        load_engine(name, student_run / folder, device="cpu", precision="fp32")
        for name, folder in (("torch", "finetune/model"), ("openvino", "quantize/ir_fp32"))
    )
    ids = torch.from_numpy(np.random.default_rng(3).integers(1, 269, (2, 29)))
    np.testing.assert_allclose(ir.logits(ids), torch_engine.logits(ids), atol=1e-4)


def test_plain_fine_tuning_has_the_teachers_time(student_run: Path, tiny_recipe: Path) -> None:
    results = load_results(student_run / "results.json")
    configs = [
        CompactGPT2LMHeadModel.from_pretrained(student_run / stage / "model").config for stage in ("prune", "half")
    ]
    steps = results.curves["control-plain"][-1].step
    assert steps == equal_steps(7, *configs, 32) > 9
    assert results.curves["finetune"][-1].step == 7
    assert all(results.run["training_seconds"][stage] > 0 for stage in ("finetune", "control-plain"))
    plain = BY_NAME["control-plain"]
    recipe = load_recipe(Recipe, tiny_recipe, [])
    assert not plain.wanted(recipe)
    taught = load_recipe(Recipe, tiny_recipe, ["finetune.distill={weight: 0.5}"])
    assert plain.wanted(taught) and plain.config(taught) == BY_NAME["finetune"].config(recipe)
    assert not plain.wanted(load_recipe(Recipe, tiny_recipe, ["finetune.distill={}", "controls.plain_finetuned=false"]))
    manifest = json.loads((student_run / "control-plain" / "stage.json").read_text())
    assert manifest["details"]["parameters"] == results.rows[-1].parameters


def test_choices_that_change_nothing_leave_runs_up_to_date(tiny_recipe: Path) -> None:
    config = BY_NAME["prune"].config
    assert not {"mlp", "layers"} & set(config(load_recipe(Recipe, tiny_recipe, ["prune.mlp=0", "prune.layers=0"])))
    assert config(load_recipe(Recipe, tiny_recipe, ["prune.mlp=0.5", "prune.layers=1"]))["layers"] == 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("prune.layers=2", "error: prune.layers is 2, and this model has 2; give at most 1: one must stay\n"),
        ("prune.layers=-1", "prune.layers is -1: "),
        ("prune.layers=1.5", "prune.layers is 1.5: "),
        ("prune.mlp=1.0", "prune.mlp is 1.0: Input should be less than 1\n"),
    ],
)
def test_bad_choices_are_one_line(change: str, said: str, tiny_recipe: Path, run_copy: Path, cli: Callable) -> None:
    code, _, err = cli("prune", "--recipe", tiny_recipe, "--out", run_copy, "--set", change, "--force")
    lines = [line for line in err.splitlines(keepends=True) if line.startswith("error")]
    assert code == 2 and len(lines) == 1 and said in lines[0] and "Traceback" not in err
