"""Training from scratch: what it writes, that it learns, and that a cut-off one goes on exactly."""

import json
import lzma
import math
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from forks import holder
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import Trainer, TrainerCallback, set_seed

from eval.errors import UserError, WorkError
from pipeline.artifacts import sha256_tree
from pipeline.checkpoint import load_model
from pipeline.corpus import TextFile
from pipeline.model import CompactGPT2LMHeadModel
from pipeline.prepare import prepare
from pipeline.pretrain import _documents, pretrain
from pipeline.recipe import Pretrain, parse_recipe
from pipeline.shards import ShardBlocks, ShuffledBlocks, find_shards
from pipeline.tokenizer import load_tokenizer
from pipeline.training import collate, drop_checkpoints, last_checkpoint
from pipeline.wikitext import DOCUMENT_MARK

CHOICES = {
    "model": {"n_layer": 2, "n_head": 3, "head_dim": 8, "n_positions": 16, "vocab_size": 263},
    "steps": 8,
    "warmup_steps": 2,
    "decay_steps": 3,
    "batch_size": 3,
    "accumulation": 2,
    "save_steps": 2,
    "eval_steps": 4,
    "eval_blocks": 2,
    "log_steps": 3,
}


@pytest.fixture
def files(tiny_texts: dict[str, Path], tmp_path: Path) -> list[Path]:
    """Two files of documents, one of them compressed."""
    text = tiny_texts["train"].read_text().replace("\n\n", f"\n{DOCUMENT_MARK}\n", 5)
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "b.txt.xz").write_bytes(lzma.compress(tiny_texts["calibration"].read_bytes()))
    return [tmp_path / "a.txt", tmp_path / "b.txt.xz"]


@pytest.fixture
def validation(tiny_texts: dict[str, Path]) -> str:
    return tiny_texts["evaluation"].read_text()


def recipe(**changes: Any) -> Pretrain:
    return parse_recipe(Pretrain, CHOICES | changes)


def test_a_training_from_scratch(files: list[Path], validation: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    folder = pretrain(recipe(steps=40, save_steps=40, eval_steps=40), files, out, validation)
    assert folder == out / "model"
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    assert (model.config.n_layer, model.config.n_embd, model.config.vocab_size) == (2, 24, 263)
    assert len(tokenizer) == 263 and tokenizer.eos_token == DOCUMENT_MARK
    assert model.config.eos_token_id == tokenizer.eos_token_id
    text = "the cat sät\n on the mat"
    assert tokenizer.decode(tokenizer(text).input_ids) == text

    tokens = np.load(out / "tokens.npy")
    assert tokens.dtype == np.uint16 and tokens.shape[1] == 16
    written = tokenizer.decode(tokens.reshape(-1).tolist())
    assert written.startswith(files[0].read_text().partition(DOCUMENT_MARK)[0].strip() + DOCUMENT_MARK)
    # One end mark a document: five were cut out of the first file, which leaves six, and the second is one.
    assert written.count(DOCUMENT_MARK) in (6, 7)

    points = curve(out)
    assert points[-1]["step"] == 40 and points[-1]["loss"] < points[0]["loss"] - 0.5


def curve(out: Path) -> list[dict[str, float]]:
    """What a training wrote of itself, but for its speed."""
    points = json.loads((out / "curve.json").read_text())
    return [{key: value for key, value in point.items() if key != "tokens_per_second"} for point in points]


class Pulled(TrainerCallback):
    def on_save(self, args, state, control, **kwargs):
        if state.global_step == 4:
            raise KeyboardInterrupt


def test_a_cut_off_training_goes_on_to_the_same_weights(
    files: list[Path], validation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = pretrain(recipe(), files, tmp_path / "whole", validation)
    original = Trainer.train
    seen: list[Any] = []

    def pulled(self: Trainer, resume_from_checkpoint: Any = None) -> Any:
        seen.append(resume_from_checkpoint)
        if len(seen) == 1:
            self.add_callback(Pulled())
        return original(self, resume_from_checkpoint)

    monkeypatch.setattr(Trainer, "train", pulled)
    with pytest.raises(KeyboardInterrupt):
        pretrain(recipe(), files, tmp_path / "cut", validation)
    assert not (tmp_path / "cut" / "model").exists()
    cut = shutil.copytree(tmp_path / "cut" / "checkpoint-4", tmp_path / "cut" / "checkpoint-6")
    (cut / "trainer_state.json").unlink()  # killed while it wrote the next one
    resumed = pretrain(recipe(), files, tmp_path / "cut", validation)
    assert seen == [None, str(tmp_path / "cut" / "checkpoint-4")]
    assert sha256_tree(resumed) == sha256_tree(whole)
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")


@pytest.fixture
def shards(files: list[Path], tiny_folder: Path, tmp_path: Path) -> Path:
    """The same text prepared, by a tokenizer of 269 tokens: about 40 blocks of 101 to train on."""
    out = tmp_path / "shards"
    prepare([str(path) for path in files], out, tiny_folder, workers=1, shard_tokens=2000, validation_share=0.25)
    return out


def on_shards(shards: Path, **changes: Any) -> Pretrain:
    return recipe(shards=str(shards), model=CHOICES["model"] | {"n_positions": 101, "vocab_size": 280}, **changes)


def test_a_training_on_shards_walks_their_order_and_resumes_in_any_epoch(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[int]] = []

    def recording(rows: list[Any]) -> Any:
        batch = collate(rows)
        seen.extend(batch["input_ids"].tolist())
        return batch

    choices = on_shards(shards, steps=22, eval_steps=1000)
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.pretrain.collate", recording)
        whole = pretrain(choices, [], tmp_path / "whole", None)
    blocks = ShuffledBlocks(ShardBlocks(find_shards(shards, "train"), 101, 280), choices.seed)
    wanted = []
    for epoch in range(3):
        blocks.set_epoch(epoch)
        wanted += [blocks[index]["input_ids"].tolist() for index in range(len(blocks))]
    assert 2 * len(blocks) < 22 * 6 and seen[: 22 * 6] == wanted[: 22 * 6]  # into the third epoch

    original = Trainer.train
    steps_an_epoch = -(-len(blocks) // 6)
    for stop in (2, steps_an_epoch // 2 * 2 + 2):  # within the first epoch, within the second
        assert stop % steps_an_epoch

        class StoppedThere(TrainerCallback):
            def on_save(self, args, state, control, stop=stop, **kwargs):
                if state.global_step == stop:
                    raise KeyboardInterrupt

        def pulled(self: Trainer, resume_from_checkpoint: Any = None, then: Any = StoppedThere) -> Any:
            self.add_callback(then())
            return original(self, resume_from_checkpoint)

        cut = tmp_path / f"cut{stop}"
        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "train", pulled)
            with pytest.raises(KeyboardInterrupt):
                pretrain(choices, [], cut, None)
        assert sha256_tree(pretrain(choices, [], cut, None)) == sha256_tree(whole)
        assert curve(cut) == curve(tmp_path / "whole")


def test_adamw_cosine_clipping_and_accumulation_by_hand(shards: Path, tmp_path: Path) -> None:
    how = {"schedule": "cosine", "optimizer": "adamw", "clip": 0.5, "weight_decay": 0.1, "adam_learning_rate": 0.01}
    choices = on_shards(shards, steps=6, log_steps=1, autocast=False, **how)
    folder = pretrain(choices, [], tmp_path / "out", None)
    points = curve(tmp_path / "out")

    blocks = ShuffledBlocks(ShardBlocks(find_shards(shards, "train"), 101, 280), choices.seed)
    set_seed(choices.seed)
    model = CompactGPT2LMHeadModel(load_model(folder).config)
    decaying = [weight for weight in model.parameters() if weight.ndim == 2]
    rest = [weight for weight in model.parameters() if weight.ndim == 1]
    optimizer = torch.optim.AdamW([{"params": decaying}, {"params": rest, "weight_decay": 0}], 0.01, (0.9, 0.95))
    optimizer.param_groups[0]["weight_decay"] = 0.1
    for step, point in enumerate(points):
        rate = 0.01 * (step / 2 if step < 2 else (1 + math.cos(math.pi * (step - 2) / 4)) / 2)
        assert point["rate"] == pytest.approx(rate)
        for group in optimizer.param_groups:
            group["lr"] = rate
        ids = torch.stack([blocks[index]["input_ids"] for index in range(6 * step, 6 * step + 6)])
        loss = F.cross_entropy(model(ids).logits[:, :-1].reshape(-1, 280), ids[:, 1:].reshape(-1))
        assert point["loss"] == pytest.approx(loss.item(), rel=1e-5)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()


def test_blocks_computed_again_or_compiled_learn_the_same(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compiled.append(type(self).__name__))
    plain = pretrain(on_shards(shards), [], tmp_path / "plain", None)
    other = pretrain(on_shards(shards, checkpointing=True, compile=True), [], tmp_path / "other", None)
    assert compiled == ["Block", "Block"]
    for one, two in zip(load_model(plain).parameters(), load_model(other).parameters(), strict=True):
        torch.testing.assert_close(one, two, atol=1e-6, rtol=0)


def test_attention_runs_by_the_kernel_that_is_asked_for(
    shards: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pretrain(on_shards(shards, attention="flash"), [], tmp_path / "out", None)
    assert "; attention by flash_attention" in capfd.readouterr().err
    with sdpa_kernel(SDPBackend.MATH), pytest.raises(UserError, match="SDPA chose math on cpu; --set attention=any"):
        pretrain(on_shards(shards, attention="flash"), [], tmp_path / "other", None)


def test_shards_of_llm_c_with_a_tokenizer_beside(shards: Path, validation: str, tmp_path: Path) -> None:
    """No manifest, other names, no validation shard: a text stands in."""
    foreign = tmp_path / "fineweb"
    shutil.copytree(shards / "tokenizer", foreign / "tokenizer")
    for number, path in enumerate(sorted(shards.glob("train_*.bin"))):
        shutil.copy(path, foreign / f"fineweb_train_{number:06d}.bin")
    choices = on_shards(foreign, steps=5)
    with pytest.raises(UserError, match="no val shard holds a block of 101 tokens; --set validation=FILE"):
        pretrain(choices, [], tmp_path / "out", None)
    pretrain(choices, [], tmp_path / "out", validation)
    moved = foreign.rename(tmp_path / "moved")
    pretrain(on_shards(moved, steps=6), [], tmp_path / "out", validation)
    (moved / "fineweb_train_000000.bin").unlink()
    with pytest.raises(UserError, match="another recipe or text"):
        pretrain(on_shards(moved, steps=6), [], tmp_path / "out", validation)


def test_shards_that_do_not_fit(shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    small = recipe(shards=str(shards), model=CHOICES["model"] | {"vocab_size": 268})
    for choices, said in (
        (small, "its tokenizer has 269 tokens, model.vocab_size is 268; --set model.vocab_size=269"),
        (
            on_shards(shards, style="wikitext"),
            "prepared with --style plain, but the recipe's style is wikitext; --set style=plain",
        ),
        (on_shards(tmp_path / "nowhere"), "nowhere/tokenizer: no usable tokenizer"),
        (
            recipe(shards=str(shards), model=CHOICES["model"] | {"n_positions": 3000, "vocab_size": 280}),
            "no train shard",
        ),
    ):
        with pytest.raises(UserError, match=said) as caught:
            pretrain(choices, [], out, None)
        assert "\n" not in str(caught.value)
    assert not (out / "pretrain.json").exists()
    path = shards / "train_000000.bin"
    whole = path.read_bytes()
    for place in (1024, 1024 + 2 * (19 * 101 - 1)):  # the last block ends there
        path.write_bytes(whole[:place] + (300).to_bytes(2, "little") + whole[place + 2 :])
        with pytest.raises(UserError, match=r"train_000000\.bin: holds token 300, the vocabulary has 269"):
            pretrain(on_shards(shards), [], out, None)
    assert not (out / "pretrain.json").exists()
    path.write_bytes(whole[:-1])
    with pytest.raises(UserError, match=r"train_000000\.bin: the header says 2000 tokens, the file holds 1999\.5"):
        pretrain(on_shards(shards), [], out, None)


def test_the_length_may_change_nothing_else(files: list[Path], validation: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    pretrain(recipe(), files, out, validation)
    before = sha256_tree(out)
    for changed, texts in (
        (recipe(seed=1), files),
        (recipe(batch_size=2), files),
        (recipe(autocast=False), files),
        (recipe(), files[:1]),
    ):
        with pytest.raises(UserError, match="another recipe or text"):
            pretrain(changed, texts, out, validation)
    assert sha256_tree(out) == before
    with pytest.raises(UserError, match="checkpoint-8: further than 6 steps; give as many or more, or another --out"):
        pretrain(recipe(steps=6), files, out, validation)
    pretrain(recipe(steps=10), files, out, validation)
    assert json.loads((out / "curve.json").read_text())[-1]["step"] == 10


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "empty"),
        ("short", "the text yields a vocabulary of .* tokens only"),
        (b"\x00\x01\x02", "NUL"),
    ],
)
def test_too_little_text(text: str | bytes, said: str, validation: str, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=said):
        pretrain(recipe(), [path], tmp_path / "out", validation)


@pytest.mark.parametrize("name", ["marked.txt", "plain.txt", "rows.jsonl"])
def test_documents_are_those_of_data_prepare(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text({
        "marked.txt": f" \none\n{DOCUMENT_MARK}\n\u3000two \n{DOCUMENT_MARK} {DOCUMENT_MARK}three\n",
        "plain.txt": " \none\n\n",
        "rows.jsonl": f'{{"text": " one\\n{DOCUMENT_MARK} two"}}\n{{"text": " "}}\n{{"text": "three\\n"}}\n',
    }[name])  # fmt: skip
    pieces = [text.decode() for text, _ in TextFile(path).pieces()]
    assert list(_documents(recipe(style="plain"), [path])) == [text for text in pieces if text.strip()]


def test_less_text_than_a_block(validation: str, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("the cat sat on the mat and on the mat sat the cat on the other mat")
    shape = CHOICES["model"] | {"n_positions": 400, "vocab_size": 258}
    with pytest.raises(UserError, match="fewer than one block of 400"):
        pretrain(recipe(model=shape), [tmp_path / "text.txt"], tmp_path / "out", validation)
    shape["n_positions"] = 16
    with pytest.raises(UserError, match="shorter than one block"):
        pretrain(recipe(model=shape), [tmp_path / "text.txt"], tmp_path / "out2", "hm")


def test_one_training_in_a_folder_at_a_time(files: list[Path], validation: str, tmp_path: Path) -> None:
    with holder(tmp_path / "out"), pytest.raises(UserError, match="another run is at work here"):
        pretrain(recipe(), files, tmp_path / "out", validation)


def test_a_damaged_record_of_the_choices(files: list[Path], validation: str, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "pretrain.json").write_text("{")
    with pytest.raises(UserError, match=r"pretrain\.json: damaged"):
        pretrain(recipe(), files, tmp_path / "out", validation)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("tokens.npy", r"tokens\.npy: damaged; delete it, and"),
        ("rollbacks.json", r"rollbacks\.json: damaged; give another --out"),
        ("tokenizer/tokenizer.json", "tokenizer: no usable tokenizer"),
    ],
)
def test_what_a_training_goes_on_with_is_damaged(
    name: str, said: str, files: list[Path], validation: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="shorter than one block"):
        pretrain(recipe(), files, tmp_path, "hm")  # by then text and tokenizer are there
    (tmp_path / name).write_bytes(b"garbage")
    with pytest.raises(UserError, match=said):
        pretrain(recipe(), files, tmp_path, validation)


def test_out_is_a_file(files: list[Path], validation: str, tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    with pytest.raises(UserError, match="is a file"):
        pretrain(recipe(), files, tmp_path / "out", validation)


def test_a_training_that_diverges(files: list[Path], validation: str, tmp_path: Path) -> None:
    wild = recipe(muon_learning_rate=1e30, adam_learning_rate=1e30)
    with pytest.raises(WorkError, match=r"pretrain: .*; lower the learning rate and give another --out"):
        pretrain(wild, files, tmp_path / "out", validation)
    assert not (tmp_path / "out" / "model").exists()


@pytest.mark.parametrize(
    ("changes", "kind", "said"),
    [
        ({"style": "wikitext", "model": CHOICES["model"] | {"vocab_size": 300}}, "line", "wikitext keeps no document"),
        ({"model": CHOICES["model"] | {"vocab_size": 8192}}, "text", "yields a vocabulary of"),
        ({"model": CHOICES["model"] | {"n_positions": 9000}}, "line", "fewer than one block of 9000"),
        ({}, "shards", "its tokenizer has 269 tokens"),
        (
            {"model": CHOICES["model"] | {"vocab_size": 269}, "style": "wikitext"},
            "shards",
            "prepared with --style plain",
        ),
        ({"model": CHOICES["model"] | {"vocab_size": 269}}, "train", "no val shard holds a block"),
    ],
)
def test_what_is_advised_works_in_the_same_folder(
    changes: dict[str, Any], kind: str, said: str, cli: Any, shards: Path, files: list[Path],
    tiny_texts: dict[str, Path], tmp_path: Path
) -> None:  # fmt: skip
    choices = CHOICES | {"steps": 1, "warmup_steps": 0, "decay_steps": 0, "accumulation": 1} | changes
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(choices))
    line, judge = tmp_path / "line.txt", tmp_path / "judge.txt"
    line.write_text(" ".join(files[0].read_text().replace(DOCUMENT_MARK, "").split())[:3000])
    judge.write_text(tiny_texts["evaluation"].read_text() * 5)
    for path in shards.glob("val*") if kind == "train" else ():
        path.unlink()
    if kind == "train":
        (shards / "manifest.json").unlink()
    given = {"line": ("--text", line), "text": ("--text", files[0])}.get(kind, ("--set", f"shards={shards}"))
    judged = () if kind == "train" else ("--set", f"validation={judge}")
    words = ("pretrain", "--recipe", tmp_path / "r.yaml", *given, *judged, "--out", tmp_path / "out")
    code, _, err = cli(*words)
    assert code == 2 and said in err and err.splitlines()[-1].startswith("error: ")
    advised: list[str] = []
    while code == 2 and len(advised) < 3:
        advised += re.findall(r"--set (\S+?)[,;]?(?:\s|$)", err)[-1:]
        changed = [word for advice in advised for word in ("--set", advice.replace("FILE", str(judge)))]
        code, _, err = cli(*words, *changed)
    assert code == 0, (advised, err)


def test_less_than_a_step_of_blocks(tiny_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """One block to train on, one to judge by, a batch of many."""
    (tmp_path / "a.txt").write_text("the cat sat on the mat. " * 20)
    prepare(
        [str(tmp_path / "a.txt")], tmp_path / "shards", tiny_folder, workers=1, shard_tokens=999, validation_share=0.4
    )
    held = find_shards(tmp_path / "shards", "val")[0].tokens
    choices = {"shards": str(tmp_path / "shards"), "eval_blocks": 1000, "batch_size": 7}
    fits = recipe(**choices, model=CHOICES["model"] | {"n_positions": held, "vocab_size": 269})
    pretrain(fits, [], tmp_path / "out", None)
    assert (
        f"8 steps of {held} tokens (batch_size x accumulation are 14 blocks, of which there are 1)"
        in capfd.readouterr().err
    )
    assert curve(tmp_path / "out")[-1]["step"] == 8
    longer = recipe(**choices, model=CHOICES["model"] | {"n_positions": held + 1, "vocab_size": 269})
    with pytest.raises(UserError, match="no val shard holds a block"):
        pretrain(longer, [], tmp_path / "out2", None)


def test_the_command(cli, files: list[Path], tiny_texts: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(CHOICES | {"validation": str(tiny_texts["evaluation"])}))
    words = ("--text", *files)
    code, stdout, err = cli("pretrain", "--recipe", path, *words, "--out", tmp_path / "out", "--set", "steps=6")
    assert (code, stdout) == (0, f"Model: {tmp_path / 'out' / 'model'}\n"), err
    assert "pretrain: step 6/6" in err
    code, stdout, err = cli(
        "pretrain", "--recipe", path, *words, "--out", tmp_path / "out", "--set", "steps=7", "--json"
    )
    assert json.loads(stdout) == {"model": str(tmp_path / "out" / "model")}
    assert code == 0 and "pretrain: step 7/7" in err  # resumed: no library has anything to say
    assert [line for line in err.splitlines() if not line.startswith("pretrain: ")] == []
    code, stdout, err = cli("pretrain", "--recipe", path, *words, "--out", tmp_path / "out", "--set", "seed=9")
    assert (code, stdout, len(err.splitlines())) == (2, "", 1) and err.startswith("error: ")
    for word, value in (("--on", "H100"), ("--devices", 8), ("--utilisation", 0.5)):
        code, stdout, err = cli("pretrain", "--recipe", path, *words, "--out", tmp_path / "out", word, value)
        assert (code, stdout, err.count("\n")) == (2, "", 1) and "go with --estimate" in err
    for given in ((), (*words, "--set", "shards=somewhere")):
        code, stdout, err = cli("pretrain", "--recipe", path, *given, "--out", tmp_path / "out")
        assert (code, stdout, err.count("\n")) == (2, "", 1) and "either --text FILES or --set shards=FOLDER" in err


@pytest.mark.parametrize(
    "name", ["model/thesis.txt", "tokenizer/mine.json", "checkpoint-500/optimizer.pt", "curve.json", "tokens.npy"]
)
def test_a_folder_of_somebody_else(name: str, cli, tiny_texts: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "theirs" / name
    path.parent.mkdir(parents=True)
    path.write_text("years of work")
    code, stdout, err = cli("pretrain", "--text", tiny_texts["train"], "--out", tmp_path / "theirs")
    assert (code, stdout, err.count("\n")) == (2, "", 1)
    top = name.partition("/")[0]
    assert f"theirs: holds {top}, but no training of Headroom's; give another --out" in err
    assert [each for each in (tmp_path / "theirs").rglob("*") if each.is_file()] == [path]
    assert path.read_text() == "years of work"


def test_checkpoints_are_those_that_name_a_step(tmp_path: Path) -> None:
    for name in ("checkpoint-7", "checkpoint-best", "checkpoint-"):
        (tmp_path / name).mkdir()
    assert last_checkpoint(tmp_path) is None  # 7 was cut off
    (tmp_path / "checkpoint-9").mkdir()
    drop_checkpoints(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-", "checkpoint-best"]
