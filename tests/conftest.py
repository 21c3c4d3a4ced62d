"""Models and a tokenizer small enough to build anew for every test.

`tiny_gpt2` and `tiny_model` are one and the same function in Hugging Face's and in our form: 3 layers of
5 heads of 8, 67 positions, every weight (biases and norms too) random and large enough to matter.
`tiny_tokenizer` fits them: byte-level BPE with 269 tokens, which encodes any text.
"""

import json
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from browser import CHROMIUM, Browser
from prose import prose
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from pipeline.data import TokenBlocks
from pipeline.model import CompactGPT2LMHeadModel, from_gpt2

pytest_plugins = ["ptx_backend"]  # --ptx
VOCAB = 269

# Whoever started the tests may ignore Ctrl-C (a shell does so for its background jobs), and all that they start
# inherits that.
signal.signal(signal.SIGINT, signal.default_int_handler)


def random_gpt2(seed: int = 0, **overrides: object) -> GPT2LMHeadModel:
    """A random Hugging Face GPT-2 in eval mode; keywords override the configuration."""
    shape = {"vocab_size": VOCAB, "n_positions": 67, "n_embd": 40, "n_layer": 3, "n_head": 5}
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    model = GPT2LMHeadModel(GPT2Config(**(shape | ends | overrides))).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator) * 0.2
            weight.copy_(noise + 1 if ".ln_" in name and name.endswith("weight") else noise)
    return model


@pytest.fixture(autouse=True)
def _one_thread(request: pytest.FixtureRequest) -> Iterator[None]:
    """One thread for all but slow tests: at these sizes waking a second one costs more than it gives."""
    threads = torch.get_num_threads()
    if not request.node.get_closest_marker("slow"):
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """A Chromium without scrollbars; where there is none, the test is skipped."""
    if CHROMIUM is None:
        pytest.skip("needs chromium")
    opened = Browser(tmp_path_factory.mktemp("profile"))
    opened.call("Emulation.setScrollbarsHidden", hidden=True)
    yield opened
    opened.close()


@pytest.fixture
def make_gpt2() -> Callable[..., GPT2LMHeadModel]:
    """A factory of random Hugging Face GPT-2s in eval mode; keywords override the configuration."""

    return random_gpt2


@pytest.fixture
def tiny_gpt2(make_gpt2: Callable[..., GPT2LMHeadModel]) -> GPT2LMHeadModel:
    """Hugging Face's GPT-2, FP32, eval mode."""
    return make_gpt2()


@pytest.fixture
def tiny_model(tiny_gpt2: GPT2LMHeadModel) -> CompactGPT2LMHeadModel:
    """The CompactGPT2 with `tiny_gpt2`'s weights."""
    return from_gpt2(tiny_gpt2)


@pytest.fixture
def tiny_blocks() -> TokenBlocks:
    """Seven blocks of 33 random tokens."""
    return TokenBlocks(np.random.default_rng(1).integers(1, VOCAB, (7, 33)))


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE: `<|endoftext|>` is token 0, then the 256 bytes and 12 merges; no padding token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the cat sat on the mat and the other cat sat on the hat"], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>", unk_token="<|endoftext|>"
    )


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    """A model folder in Hub format, stock layout, with its tokenizer. Copy it before changing it."""
    folder = tmp_path_factory.mktemp("hub") / "tiny"
    random_gpt2(3, n_layer=2, n_positions=48).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files `train`, `calibration` and `evaluation`."""
    folder = tmp_path_factory.mktemp("texts")
    texts = {name: folder / f"{name}.txt" for name in ("train", "calibration", "evaluation")}
    for seed, path in enumerate(texts.values()):
        path.write_text(prose(seed, 24), encoding="utf-8")
    return texts


@pytest.fixture(scope="session")
def task_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with five short documents of each task."""
    folder = tmp_path_factory.mktemp("tasks")
    for count, name in ((6, "hellaswag_val.txt"), (1, "lambada_test.jsonl")):
        lines = [line[:30].strip() for line in prose(count, 25).split("\n\n")]
        if count == 6:
            parts = [[f"Art: {lines[5 * i]}", str(i % 4), *lines[5 * i + 1 : 5 * i + 5]] for i in range(5)]
            (folder / name).write_text("\n".join(line for part in parts for line in part), encoding="utf-8")
        else:
            (folder / name).write_text("\n".join(json.dumps({"text": line}) for line in lines[:5]), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def tiny_choices(tiny_folder: Path, tiny_texts: dict[str, Path]) -> dict[str, Any]:
    """A recipe as plain data: all stages, a few steps each, no memory probes (each starts a process)."""
    return {
        "name": "tiny",
        "load": {"source": str(tiny_folder)},
        "data": {name: str(path) for name, path in tiny_texts.items()},
        "prune": {"calibration_blocks": 3, "block_size": 32},
        "finetune": {"steps": 7, "batch_size": 2, "block_size": 32, "learning_rate": 1e-3, "save_steps": 2},
        "quantize": {"calibration_samples": 3, "block_size": 32},
        "measure": {
            "text_share": 0.2,
            "context": 32,
            "prompt_tokens": 8,
            "new_tokens": 4,
            "min_count": 2,
            "min_seconds": 0,
            "memory": False,
            "agreement_tokens": 101,
        },
    }


@pytest.fixture(scope="session")
def tiny_recipe(tmp_path_factory: pytest.TempPathFactory, tiny_choices: dict[str, Any]) -> Path:
    """The same as a file."""
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny_choices), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory, tiny_recipe: Path) -> Path:
    """The folder of a whole, undisturbed run of `tiny_recipe`. Copy it before changing it."""
    from pipeline.recipe import Recipe, load_recipe
    from pipeline.runner import Runner

    folder = tmp_path_factory.mktemp("finished") / "run"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    Runner(load_recipe(Recipe, tiny_recipe), folder).execute()
    torch.set_num_threads(threads)
    return folder


@pytest.fixture
def run_copy(finished_run: Path, tmp_path: Path) -> Path:
    """A copy of `finished_run` to do harm to."""
    return Path(shutil.copytree(finished_run, tmp_path / "run"))


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """The command line within this process: `cli("run", ...)` gives exit code, stdout, stderr."""
    from pipeline.cli import main

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["pipeline", *map(str, arguments)])
        capfd.readouterr()
        try:
            main()
            code: Any = 0
        except SystemExit as end:
            code = end.code or 0
        captured = capfd.readouterr()
        return code, captured.out, captured.err

    return call
