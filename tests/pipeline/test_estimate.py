"""What `pretrain --estimate` says, beside published figures and what a real step keeps."""

import json
import re

import pytest
import torch

from pipeline import hardware
from pipeline.estimate import estimate, format_estimate, verdict
from pipeline.pretrain import new_model
from pipeline.recipe import Pretrain, load_recipe, parse_recipe

SHAPE = {"n_layer": 3, "n_head": 3, "head_dim": 8, "n_positions": 33, "vocab_size": 280}


def small(**changes: object) -> Pretrain:
    return parse_recipe(Pretrain, {"model": SHAPE, "batch_size": 5, "optimizer": "adamw"} | changes)


def test_the_presets_are_what_their_scripts_say() -> None:
    for name, parameters, steps, tokens in (
        ("gpt2-124M", 124_475_904, 18_865, 1e10),
        ("gpt2-350M", 354.9e6, 6e4, 3.1e10),
    ):
        recipe = load_recipe(Pretrain, name)
        assert recipe.batch_size * recipe.accumulation * recipe.model.n_positions == 524_288
        found = estimate(recipe, "A100", 8)
        assert recipe.steps == steps and found["tokens"] == pytest.approx(tokens, rel=0.02)
        assert found["parameters"] == pytest.approx(parameters, rel=1e-3)
    # llm.c's script: 18,865 steps of 300 ms on eight A100.
    ours = estimate(load_recipe(Pretrain, "gpt2-124M"), "A100", 8, utilisation=0.5)
    assert ours["seconds"] == pytest.approx(18_865 * 0.3, rel=0.25)
    assert 20 < ours["memory"]["total"] / 2**30 < 80


def test_memory_by_hand() -> None:
    count = estimate(small(), "H100")["parameters"]
    alone, zero, fsdp = (
        estimate(small(accumulation=4, parallel=parallel), "H100", devices)["memory"]
        for parallel, devices in (("none", 1), ("zero1", 4), ("fsdp", 4))
    )
    assert (alone["weights"], alone["gradients"], alone["optimizer"]) == (4 * count, 4 * count, 8 * count)
    assert (zero["weights"], zero["optimizer"]) == (4 * count, 2 * count)
    assert (fsdp["weights"], fsdp["gradients"], fsdp["optimizer"]) == (count, count, 2 * count)
    assert alone["total"] == sum(value for name, value in alone.items() if name != "total")
    again = estimate(small(checkpointing=True), "H100")["memory"]["activations"]
    assert again < 0.7 * alone["activations"]


@pytest.mark.parametrize("autocast", [True, False])
def test_activations_are_those_of_a_real_step(autocast: bool) -> None:
    model = new_model(small())

    def kept(blocks: int) -> int:
        alive: list[torch.Tensor] = []  # or a place in memory would be given away and counted once

        def keep(value: torch.Tensor) -> torch.Tensor:
            alive.append(value)
            return value

        ids = torch.zeros(blocks, 33, dtype=torch.int64)
        cast = torch.autocast("cpu", torch.bfloat16, enabled=autocast)
        with cast, torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
            model(ids, labels=ids, use_cache=False)
        storages = {value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for value in alive}
        return sum(storages.values())

    found = estimate(small(batch_size=3, autocast=autocast), "T4")
    assert found["memory"]["activations"] == 3 * (kept(2) - kept(1) + 4 * 33 * 280)
    assert found["memory"]["copies"] == (2 * found["parameters"] if autocast else 0)
    assert ("which FP32 does not reach" in format_estimate(found)) is not autocast


def test_the_command(cli) -> None:
    code, out, err = cli("pretrain", "--estimate", "--on", "H100", "--devices", 8, "--json", "--recipe", "gpt2-124M")
    assert code == 0 and json.loads(out)["devices"] == 8, err
    code, out, err = cli("pretrain", "--estimate", "--on", "A100", "--recipe", "gpt2-350M")
    assert code == 0 and "memory of each device, of 1 A100" in out and "time: " in out
    for words, said in (
        (("--on", "Abacus"), "--on Abacus: unknown; give one of T4, V100"),
        (("--on", "A100", "--devices", 3), "accumulation 8 is no multiple of it; --set accumulation=9"),
        (("--on", "A100", "--devices", 2, "--set", "parallel=none"), "parallel is none; --set parallel=ddp, zero1"),
        (("--on", "A100", "--utilisation", "nan"), "--utilisation nan: give a share of the peak"),
    ):
        code, out, err = cli("pretrain", "--estimate", "--recipe", "gpt2-124M", *words)
        assert (code, out, err.count("\n")) == (2, "", 1) and said in err
    advised = ("--on", "A100", "--devices", 3, "--set", "accumulation=9")
    assert cli("pretrain", "--estimate", "--recipe", "gpt2-124M", *advised)[0] == 0


@pytest.mark.parametrize(("name", "gib"), [("A100", 80), ("NVIDIA A100-SXM4-40GB", 40), ("NVIDIA T4", 15), ("X", None)])
def test_memory_of_cards(name: str, gib: int | None) -> None:
    assert hardware.memory(name) == (gib and gib << 30)


def test_every_card_with_a_peak_has_a_memory() -> None:
    assert hardware.MEMORIES.keys() == hardware.PEAKS.keys()


def test_what_does_not_fit_is_said_and_the_advice_makes_it_fit(cli) -> None:
    words = ("pretrain", "--estimate", "--recipe", "gpt2-350M", "--set", "batch_size=64", "--set", "accumulation=8")
    for card, fits in (("H200", True), ("H100", False), ("T4", False)):
        code, out, err = cli(*words, "--on", card)
        assert code == 0 and ("it fits: " in out) is fits and ("IT DOES NOT FIT: " in out) is not fits, err
    code, out, _ = cli(*words, "--on", "H100")
    advice = out.partition("IT DOES NOT FIT: H100 has 80 GiB; ")[2].splitlines()[0].split()
    tokens = json.loads(cli(*words, "--on", "H100", "--json")[1])["tokens"]
    code, out, _ = cli(*words, "--on", "H100", *advice)
    assert code == 0 and "it fits: H100 has 80 GiB" in out and f"{tokens:,} tokens" in out
    double = [re.sub(r"(batch_size=)(\d+)", lambda found: found[1] + str(2 * int(found[2])), word) for word in advice]
    assert "IT DOES NOT FIT" in cli(*words, "--on", "H100", *double)[1]  # nor was it more than needed
    huge = {"n_layer": 48, "n_head": 64, "head_dim": 64, "n_positions": 33, "vocab_size": 280}
    found = estimate(small(model=huge, batch_size=1), "T4")
    assert "; --set checkpointing=true, or more devices with parallel=fsdp" in verdict(found)
    assert "is not known" in verdict(estimate(small(peak_tflops=3), "Abacus"))
