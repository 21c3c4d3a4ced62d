"""Recipes: every key and value is checked before work starts, and each mistake is one clear line."""

import time
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from eval.errors import UserError
from pipeline import plain
from pipeline.grids import expand
from pipeline.model import CompactGPT2Config
from pipeline.recipe import RECIPES, Pretrain, Recipe, Scaling, load_recipe, parse_recipe


@pytest.fixture
def recipe_file(tmp_path):
    def write(text: str):
        path = tmp_path / "mine.yaml"
        path.write_text(text)
        return path

    return write


def _message(caught) -> str:
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_preset_loads(path):
    kinds = {"budgets": Scaling, "steps": Pretrain}
    kind = next((kind for key, kind in kinds.items() if key in yaml.safe_load(path.read_text())), Recipe)
    assert load_recipe(kind, path.stem) == load_recipe(kind, path)
    assert load_recipe(kind, path.stem).name == path.stem


def test_an_empty_file_is_all_defaults(recipe_file):
    recipe = load_recipe(Recipe, recipe_file("# nothing\n"))
    assert recipe == Recipe()
    assert recipe.prune.ratio == 0.2 and recipe.finetune.distill is None


def test_what_is_written_is_read_back():
    recipe = parse_recipe(Recipe, {"finetune": {"distill": {"weight": 0.25}}, "quantize": {"ignore": ["lm_head"]}})
    assert parse_recipe(Recipe, recipe.model_dump()) == recipe
    with pytest.raises(ValidationError, match="frozen"):
        recipe.seed = 3


@pytest.mark.parametrize(
    ("raw", "key", "known"),
    [
        ({"pruen": {}}, "pruen", "prune"),
        ({"prune": {"ratoi": 0.2}}, "prune.ratoi", "calibration_blocks"),
        ({"finetune": {"distill": {"temprature": 2}}}, "finetune.distill.temprature", "temperature, weight"),
    ],
)
def test_an_unknown_key_at_any_depth(raw, key, known):
    with pytest.raises(UserError) as caught:
        parse_recipe(Recipe, raw, where="recipe x")
    message = _message(caught)
    assert message.startswith(f"recipe x: unknown key '{key}'; known here: ")
    assert known in message


@pytest.mark.parametrize(
    ("raw", "key"),
    [
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**32}, "seed is 4294967296"),
        ({"name": 7}, "name is 7"),
        ({"prune": None}, "prune is None"),
        ({"prune": {"ratio": 1.0}}, "prune.ratio is 1.0"),
        ({"prune": {"ratio": float("nan")}}, "prune.ratio is nan"),
        ({"prune": {"scope": "model"}}, "prune.scope is 'model'"),
        ({"prune": {"rounding": "up"}}, "prune.rounding is 'up'"),
        ({"finetune": {"epochs": 6}}, "finetune.epochs is 6"),
        ({"finetune": {"epochs": 1.5}}, "finetune.epochs is 1.5"),
        ({"finetune": {"steps": 0}}, "finetune.steps is 0"),
        ({"finetune": {"learning_rate": float("inf")}}, "finetune.learning_rate is inf"),
        ({"finetune": {"distill": {"temperature": 0}}}, "finetune.distill.temperature is 0"),
        ({"quantize": {"ignore": "lm_head"}}, "quantize.ignore is 'lm_head'"),
        ({"quantize": {"ignore": ["a", 1]}}, "quantize.ignore.1 is 1"),
        ({"measure": {"text_share": 0}}, "measure.text_share is 0"),
        ({1: 2}, "Keys should be strings"),
    ],
)
def test_a_value_out_of_range(raw, key):
    with pytest.raises(UserError) as caught:
        parse_recipe(Recipe, raw)
    assert key in _message(caught)


def test_training_phases_must_fit():
    with pytest.raises(UserError, match=r"warmup_steps \+ decay_steps exceed steps 9"):
        parse_recipe(Pretrain, {"steps": 9, "warmup_steps": 5, "decay_steps": 5})
    with pytest.raises(UserError, match=r"model\.vocab_size is 256"):
        parse_recipe(Pretrain, {"model": {"vocab_size": 256}})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prune: [", "no readable YAML"),
        ("a: b: c", "no readable YAML"),
        ("\tname: x", "no readable YAML"),
        ("!!python/object/apply:os.system ['true']", "no readable YAML"),
        ("- name: x", "holds list; a mapping"),
        ("just words", "holds str; a mapping"),
    ],
)
def test_files_that_hold_no_recipe(recipe_file, text, message):
    with pytest.raises(UserError, match=message) as caught:
        load_recipe(Recipe, recipe_file(text))
    assert "mine.yaml" in _message(caught)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match=r"recipe nope: not found; give a preset \(.*mini.*\) or a \.yaml file"):
        load_recipe(Recipe, "nope")
    with pytest.raises(UserError, match="not found"):
        load_recipe(Recipe, tmp_path / "nope.yaml")
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "latin1.yaml").write_bytes("name: déjà".encode("latin-1"))
    for name in ("folder.yaml", "latin1.yaml"):
        with pytest.raises(UserError, match=f"{name}: no readable YAML") as caught:
            load_recipe(Recipe, tmp_path / name)
        _message(caught)


def test_overrides_reach_any_depth(recipe_file):
    recipe = load_recipe(
        Recipe,
        recipe_file("seed: 3\nprune: {ratio: 0.4, scope: global}\nfinetune: {steps: 9}\n"),
        [
            "name=mine",
            "prune.ratio=0.3",
            "finetune.steps=null",
            "finetune.learning_rate=1e-4",
            "finetune.distill.temperature=3",
            "quantize.ignore=[lm_head, 'h\\.0\\..*']",
            "measure.latency=false",
            "load.source=a=b",
        ],
    )
    assert (recipe.name, recipe.seed, recipe.load.source) == ("mine", 3, "a=b")
    assert (recipe.prune.ratio, recipe.prune.scope) == (0.3, "global")
    assert (recipe.finetune.steps, recipe.finetune.learning_rate) == (None, 1e-4)
    assert recipe.finetune.distill is not None
    assert (recipe.finetune.distill.temperature, recipe.finetune.distill.weight) == (3, 0.5)
    assert recipe.quantize.ignore == ["lm_head", r"h\.0\..*"]
    assert recipe.measure.latency is False


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("prune.ratio", "give key=value"),
        ("=3", "give key=value"),
        ("", "give key=value"),
        ("prune.ratio=[", "prune.ratio is '[': Input should be a valid number"),
        ("prune.ratio=2", "prune.ratio is 2"),
        ("prune.ratio=", "prune.ratio is None"),
        ("prune.ratoi=0.2", "unknown key 'prune.ratoi'"),
        ("seed.deeper=1", "seed is"),
        ("prune..ratio=1", "unknown key 'prune.'"),
        ("load.source=", "load.source is '': String should have at least 1 character"),
        ("data.train=", "data.train is ''"),
        ("finetune.steps=true", "finetune.steps is True: a number is needed"),
        ("measure.min_seconds=false", "measure.min_seconds is False: a number is needed"),
        ("quantize.ignore=['(']", "quantize.ignore.0 is '(': not a regular expression (missing ), unterminated"),
    ],
)
def test_overrides_that_are_wrong(recipe_file, override, message):
    with pytest.raises(UserError) as caught:
        load_recipe(Recipe, recipe_file("seed: 1\n"), [override])
    assert message in _message(caught)


@pytest.mark.parametrize(
    "word",
    ["FOLDER #v2", "a: b", "~", "null", "007", "1e-3", "2024-13-45", "9" * 5000, " x ", "!!int y", "[", "déjà"],
)
def test_a_key_of_text_takes_the_word(word: str, tmp_path: Path) -> None:
    recipe = load_recipe(Recipe, "demo", [f"load.source={word}", f"name={word}", f"data.train={word}"])
    assert (recipe.load.source, recipe.name, recipe.data.train) == (word, word, word)
    kept = tmp_path / "kept.yaml"
    kept.write_text(plain.dump(recipe.model_dump(mode="json")))
    assert load_recipe(Recipe, kept) == recipe
    if "," not in word:
        assert [point.recipe.name for point in expand("demo", [f"name={word},b"])] == [word, "b"]


@pytest.mark.parametrize(
    ("word", "value"), [("null", None), ("~", None), ("", None), ("None", None), ("v2 #x", "v2 #x")]
)
def test_a_key_of_text_or_nothing(word: str, value: str | None) -> None:
    assert load_recipe(Recipe, "demo", [f"load.revision={word}"]).load.revision == value


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("prune.ratio=0.3 # less", "prune.ratio is '0.3 # less'"),
        ("prune.scope=global #x", "prune.scope is 'global #x'"),
        ("seed=" + "9" * 5000, "seed is '999"),
        ("seed=!!int 3", "seed is '!!int 3'"),
        ("quantize.ignore=" + "[" * 5000, "quantize.ignore is '[[["),
        ("quantize.ignore=[&a x, *a]", "quantize.ignore is '[&a x, *a]'"),
        ("load.window=[4, x]", "load.window.1 is 'x'"),
        ("seed" + ".a" * 5000 + "=1", "no key is as deep"),
        ("x" * 5000 + "=1", "unknown key 'xxx"),
    ],
)
def test_a_word_that_is_not_wholly_of_the_type(override: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        load_recipe(Recipe, "demo", [override])
    assert message in _message(caught) and len(_message(caught)) < 700


_BOMB = "\n".join(
    ["a: &a [x]"] + [f"{b}: &{b} [{', '.join(['*' + a] * 9)}]" for a, b in zip("abcdefgh", "bcdefghi", strict=True)]
)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"!!int y", "a tag in line 1"),
        (b"name: !!python/name:os.system", "a tag in line 1"),
        (_BOMB.encode(), "an anchor or alias in line 1"),
        (b"[" * 60000, "nested deeper than 20 levels"),
        (b"{a: " * 10000, "nested deeper than 20 levels"),
        (b"seed: 1\nprune:\n  ratio: 0.1\n  ratio: 0.2\n", "the key 'ratio' is given twice, again in line 4"),
        (b"x: " + b"y" * 70000, "longer than 65,536 bytes"),
        (b"seed: 1\n---\nseed: 2\n", "holds several documents"),
        (b"? [a]\n: 1\n", "a key that is no plain word"),
        (b'name: "\\0"', "a character that is no text"),
        (b'name: "\\ud800"', "a character that is no text"),
        (b"name: \x01", "special characters are not allowed"),
        ("name: x".encode("utf-16"), "not UTF-8 at byte 0"),
        (b"name: 2024-13-45\nseed: " + b"9" * 5000, "seed is '999"),
        (b"name: 7", "name is 7"),
        (b"prune: ~", "prune is None"),
    ],
)
def test_a_file_is_plain_data(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_bytes(content)
    begun = time.process_time()
    with pytest.raises(UserError) as caught:
        load_recipe(Recipe, tmp_path / "mine.yaml")
    assert message in _message(caught) and len(_message(caught)) < 700
    assert time.process_time() - begun < 3


def test_what_a_file_may_hold(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(b"\xef\xbb\xbfname: 2024-01-01\r\nseed: 1_0\nmeasure: {latency: no, text_share: 1e-1}\n")
    recipe = load_recipe(Recipe, path)
    assert (recipe.name, recipe.seed, recipe.measure.latency, recipe.measure.text_share) == (
        "2024-01-01",
        10,
        False,
        0.1,
    )


@pytest.mark.parametrize(
    "shape",
    [
        {"n_head": 5, "n_kv_head": 2},
        {"n_head": 6, "n_kv_head": 3},
        {"window": [4, None]},
        {"window": [4, None, 2, 9]},
        {"head_dim": 4, "rope_share": 0.4},
        {"head_dim": 4, "rope_share": 0.5, "position": "rope"},
        {"head_dim": 1},
    ],
)
def test_a_shape_is_refused_where_the_model_refuses_it(shape: dict) -> None:
    def said(make) -> str:
        try:
            make()
        except (UserError, ValueError) as error:
            return str(error).rpartition("Value error, ")[2]
        return ""

    defaults = {"n_layer": 4, "n_head": 5, "head_dim": 64} | shape
    model = said(lambda: CompactGPT2Config(n_embd=defaults["n_head"] * defaults["head_dim"], **defaults))
    recipe = said(lambda: parse_recipe(Pretrain, {"model": shape}))
    assert bool(recipe) == bool(model) and recipe.endswith(model)
