"""A family of trainings: what is trained, once, and what its figure and page say."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from eval.errors import UserError, WorkError
from eval.scaling_law import Law
from pipeline.cli import app
from pipeline.data import encode
from pipeline.pretrain import shard_blocks
from pipeline.recipe import Scaling, load_recipe, parse_recipe
from pipeline.scaling import RESULT, _prepared, expand, scaling
from pipeline.shards import find_shards
from pipeline.texts import load_text
from pipeline.tokenizer import load_tokenizer
from pipeline.wikitext import DOCUMENT_MARK
from plots.scaling import draw, markdown

CHOICES: dict[str, Any] = {
    "name": "tiny",
    "sizes": [{"n_layer": 1, "n_head": n_head, "head_dim": 8} for n_head in (1, 2, 3)],
    "budgets": [2e7, 4e7],
    "min_steps": 2,
    "resamples": 15,
    "passes": 50,
    "tokens_per_parameter": [0.01, 500],
    "pretrain": {
        "model": {"n_positions": 16, "vocab_size": 263},
        "tokenizer_bytes": 5000,
        "batch_size": 4,
        "eval_blocks": 4,
        "log_steps": 4,
        "save_steps": 4,
    },
}


def recipe(**changes: Any) -> Scaling:
    return parse_recipe(Scaling, CHOICES | changes)


@pytest.fixture(scope="module")
def text(tiny_texts: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents, of which some are held out."""
    path = tmp_path_factory.mktemp("text") / "documents.txt"
    path.write_text(tiny_texts["train"].read_text().replace("\n\n", f"\n{DOCUMENT_MARK}\n"))
    return path


@pytest.fixture(scope="module")
def trained(text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A family and its record. Only to be looked at."""
    out = tmp_path_factory.mktemp("family") / "out"
    return out, scaling(recipe(), [text], out, workers=2)


@pytest.mark.parametrize(("shape", "position"), [((3, 2, 16), "learned"), ((1, 5, 8), "learned"), ((2, 3, 8), "rope")])
def test_a_member_has_the_parameters_that_multiply_and_tokens_for_its_flops(
    shape: tuple[int, int, int], position: str
) -> None:
    layers, heads, head_dim = shape
    model = CHOICES["pretrain"]["model"] | {"position": position}
    sizes = [*CHOICES["sizes"], {"n_layer": layers, "n_head": heads, "head_dim": head_dim}]
    choices = {"sizes": sizes, "budgets": [2e7, 4e8], "pretrain": CHOICES["pretrain"] | {"model": model}}
    family, _ = expand(recipe(**choices), 10**9)
    member = family[-1]
    width = heads * head_dim
    # Matrices and biases of a block, its two norms, the last norm, and the embedding that is the head as well.
    by_hand = layers * (12 * width**2 + 13 * width) + 2 * width + 263 * width
    assert member.parameters == by_hand
    assert member.tokens == member.recipe.steps * 4 * 16
    assert 6 * by_hand * member.tokens == pytest.approx(member.budget, rel=0.5 / member.recipe.steps)
    assert member.recipe.warmup_steps == round(0.1 * member.recipe.steps)
    assert member.recipe.eval_steps == member.recipe.steps


def test_what_a_family_leaves_out_it_names() -> None:
    sizes = [*CHOICES["sizes"], {"n_layer": 4, "n_head": 6, "head_dim": 16}]
    choices = recipe(sizes=sizes, budgets=[1e7, 2e7, 4e7], tokens_per_parameter=[0.015, 1], passes=0.55)
    family, left_out = expand(choices, 2000)
    assert len(family) + len(left_out) == 12
    reasons = "\n".join(left_out)
    assert "steps, under min_steps 2" in reasons
    assert "tokens a parameter, outside 0.015 to 1" in reasons
    assert "passes over the text of 2,000 tokens, over 0.55" in reasons
    assert all(0.015 <= member.tokens / member.parameters <= 1 and member.tokens <= 1100 for member in family)


@pytest.mark.parametrize(
    ("name", "at_hand", "least"),
    [("scaling-mini", 1_500_000, 3), ("scaling-mini", 6_000_000, 4), ("scaling-gpu", 10**10, 4)],
)
def test_the_presets_make_families_worth_fitting(name: str, at_hand: int, least: int) -> None:
    recipe = load_recipe(Scaling, name)
    family, _ = expand(recipe, at_hand)
    assert len(family) >= 19 and len({member.parameters for member in family}) >= 7
    assert min(sum(member.budget == budget for member in family) for budget in recipe.budgets) >= least


def test_the_embedded_text_is_judged_as_it_is_read(tmp_path: Path) -> None:
    template = load_recipe(Scaling, "scaling-mini").pretrain
    prepared = _prepared(template, [], tmp_path / "data")
    shards = Path(str(prepared.shards))
    train = shard_blocks(prepared, shards, "train", 1024)
    seen = set(np.unique(np.concatenate([train[i] for i in range(len(train))])).tolist())
    judged = encode(load_text(str(prepared.validation)), load_tokenizer(shards / "tokenizer"))
    assert len(judged) > 100_000 and len(seen) > 900
    assert np.mean([token not in seen for token in judged.tolist()]) < 1e-3  # letters of other scripts


@pytest.mark.parametrize("parts", [1, 2])
def test_text_of_few_documents_is_not_half_held_out(parts: int, tiny_texts: dict[str, Path], tmp_path: Path) -> None:
    files = [tiny_texts["train"], tiny_texts["calibration"]][:parts]
    shards = Path(str(_prepared(recipe().pretrain, files, tmp_path / "data").shards))
    train, val = (sum(shard.tokens for shard in find_shards(shards, split)) for split in ("train", "val"))
    assert 0.04 < val / (train + val) < 0.11


def test_advice_names_the_family_s_keys(text: Path, tmp_path: Path) -> None:
    model = CHOICES["pretrain"]["model"] | {"vocab_size": 5000}
    with pytest.raises(UserError, match=r"--set pretrain\.model\.vocab_size=(\d+)") as caught:
        scaling(recipe(pretrain=CHOICES["pretrain"] | {"model": model}), [text], tmp_path / "out")
    assert not (tmp_path / "out" / "family.json").exists()  # so that the mended command can use the folder
    model["vocab_size"] = int(str(caught.value).rpartition("=")[2])
    prepared = _prepared(
        recipe(pretrain=CHOICES["pretrain"] | {"model": model}).pretrain, [text], tmp_path / "out/data"
    )
    assert len(load_tokenizer(Path(str(prepared.shards)) / "tokenizer")) == model["vocab_size"]


def test_a_family_and_what_is_kept_of_it(trained: tuple[Path, dict[str, Any]]) -> None:
    out, record = trained
    assert len(record["trainings"]) == 6 and record["text"] == ["documents.txt"]
    for training in record["trainings"]:
        assert 3 < training["loss"] < 6 and training["seconds"] > 0
    assert json.loads((out / "scaling.json").read_text())["law"] == record["law"]
    assert not list(out.glob("runs/*/checkpoint-*")) and len(list(out.glob("runs/*/model"))) == 6
    # The loss is that of the curve's end, on documents that were held out from training.
    for folder in out.glob("runs/*"):
        result = json.loads((folder / RESULT).read_text())
        last = json.loads((folder / "curve.json").read_text())[-1]
        assert result["loss"] == last["validation_loss"]
        assert last["step"] * 4 * 16 == result["tokens"]
    assert json.loads((out / "data" / "shards" / "manifest.json").read_text())["kept"] > 1


def test_a_family_may_grow_and_one_that_fails_takes_no_other_along(
    trained: tuple[Path, dict[str, Any]], text: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out, more = tmp_path / "out", recipe(budgets=[2e7, 4e7, 3e7])
    shutil.copytree(trained[0], out)
    before = {path: path.stat().st_mtime_ns for path in out.glob(f"runs/*/{RESULT}")}
    broken = expand(more, 10**4)[0][-1].name
    (out / "runs" / broken).mkdir()
    (out / "runs" / broken / "pretrain.json").write_text("{")
    with pytest.raises(WorkError, match=rf"1 trainings failed, first {broken}: .*damaged.*are of the others"):
        scaling(more, [text], out, workers=2)
    assert "6 of 9 trainings are there" in capfd.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in before} == before
    record = json.loads((out / "scaling.json").read_text())
    assert len(record["trainings"]) == 8 and broken in record["left_out"][-1]
    (out / "runs" / broken / "pretrain.json").unlink()
    first = next(iter(before))
    first.write_text("[]")
    with pytest.raises(UserError, match=rf"{first.parent.name}/result.json: damaged; delete"):
        scaling(more, [text], out)
    shutil.rmtree(first.parent)
    assert len(scaling(more, [text], out, workers=2)["trainings"]) == 9
    with pytest.raises(UserError, match="another recipe or text"):
        scaling(recipe(warmup_share=0.2), [text], out)


def test_figure_and_page_show_what_was_found(trained: tuple[Path, dict[str, Any]]) -> None:
    out, record = trained
    figure = draw(record)
    sizes, losses, best, exponents = figure.axes
    marked = [line for line in sizes.lines if line.get_marker() not in ("None", "x")]
    drawn = sorted((float(x), float(y)) for line in marked for x, y in zip(*line.get_data(), strict=True))
    assert drawn == sorted((each["parameters"], each["loss"]) for each in record["trainings"])
    for axes in figure.axes:
        assert axes.get_xlabel()
    assert [axes.get_ylabel() for axes in (sizes, losses, best)] == [
        "loss (nats per token)",
        "loss (nats per token)",
        "best number of parameters",
    ]
    assert [label.get_text() for label in exponents.get_yticklabels()][:2] == ["here", "Kaplan et al. 2020"]
    page = markdown(record)
    assert (out / "scaling.md").read_text().startswith("# Scaling law: tiny")
    law = Law(**record["law"])
    for each in record["trainings"]:
        assert f"| {each['parameters']:,} | {each['tokens']:,} |" in page
        assert f"| {each['loss']:.4f} | {law.loss(each['parameters'], each['tokens']):.4f} |" in page
    assert re.search(r"\*\*Trust it (nowhere, not even from \S+ FLOPs on|from \S+ to \S+ FLOPs)\*\*: \w", page)
    for name in ("scaling.png", "scaling.svg"):
        assert (out / name).stat().st_size > 10_000


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"budgets": [2e7]}, "3 trainings of 3 sizes, but a fit wants six or more"),
        ({"passes": 1e-9}, "left out: .* passes over the text"),
    ],
)
def test_too_small_a_family_is_refused_before_it_is_trained(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        expand(recipe(**changes), 10**6)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"sizes": [{"n_layr": 1, "n_layer": 1, "n_head": 1}, *CHOICES["sizes"][1:]]},
            "unknown key 'sizes.0.n_layr'; known here: n_layer, n_head",
        ),
        ({"sizes": CHOICES["sizes"][:2]}, "sizes is .*at least 3"),
        ({"warmup_share": 0.8}, "warmup_share \\+ decay_share exceed 1"),
        ({"pretrain": {"step": 3}}, "unknown key 'pretrain.step'"),
    ],
)
def test_a_wrong_recipe_is_one_line(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(CHOICES | changes))
    with pytest.raises(UserError, match=said) as error:
        load_recipe(Scaling, tmp_path / "r.yaml")
    assert "\n" not in str(error.value)


def test_what_cannot_be_trained_on_is_one_line(text: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "tokenizer").mkdir()
    (tmp_path / "empty" / "tokenizer" / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="no val shard holds a block"):
        scaling(recipe(pretrain=CHOICES["pretrain"] | {"shards": str(tmp_path / "empty")}), [], tmp_path / "out")
    with pytest.raises(UserError, match=r"nothing.txt: No such file"):
        scaling(recipe(), [tmp_path / "nothing.txt"], tmp_path / "out")
    with pytest.raises(UserError, match="max_bytes has no meaning"):
        scaling(recipe(pretrain=CHOICES["pretrain"] | {"max_bytes": 10}), [text], tmp_path / "out")
    model = CHOICES["pretrain"]["model"] | {"n_kv_head": 2, "n_head": 2}
    grouped = recipe(pretrain=CHOICES["pretrain"] | {"model": model}, sizes=CHOICES["sizes"][::-1])
    with pytest.raises(UserError, match=r"size 1 x 3 x 8.*n_kv_head is 2: give a divisor of n_head 3"):
        expand(grouped, 10**6)


def test_text_and_shards_do_not_go_together(text: Path, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    result = CliRunner().invoke(
        app, ["scaling", "--text", str(text), "--set", f"pretrain.shards={tmp_path}", "--out", str(tmp_path / "out")]
    )
    assert isinstance(result.exception, UserError) and "either --text" in str(result.exception)
