"""The chain at GPT-2 124M's size: random weights in a stock Hub-format folder, under 16 GiB of memory."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

ROOT = Path(__file__).parents[1]
GIB = 2**30
VOCABULARY = 50257


def save_tokenizer(folder: Path) -> None:
    """GPT-2's own tokenizer where `GPT2_TOKENIZER` names a folder that has it; else one trained here."""
    own = os.environ.get("GPT2_TOKENIZER")
    if own:
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_file=str(Path(own) / "tokenizer.json"), bos_token="<|endoftext|>", eos_token="<|endoftext|>"
        )
    else:
        bpe = ByteLevelBPETokenizer()
        text = (ROOT / "pipeline/assets/wikitext-2/train.txt").read_text(encoding="utf-8").splitlines()
        bpe.train_from_iterator(text, vocab_size=20_000, special_tokens=["<|endoftext|>"])
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=bpe._tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>"
        )
    tokenizer.save_pretrained(folder)


@pytest.mark.slow
def test_the_chain_runs_at_full_size(tmp_path: Path) -> None:
    source = tmp_path / "gpt2"
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config()).save_pretrained(source)
    save_tokenizer(source)
    assert json.loads((source / "config.json").read_text())["model_type"] == "gpt2"
    out = tmp_path / "run"
    settings = {
        "load.source": source,
        "prune.calibration_blocks": 4,
        "finetune.steps": 2,
        "finetune.batch_size": 2,
        "measure.text_share": 0.01,
        "measure.context": 512,
        "measure.min_count": 3,
        "measure.min_seconds": 0,
    }
    command = [sys.executable, "-m", "pipeline", "run", "--recipe", "demo", "--out", str(out), "--json"]
    for key, value in settings.items():
        command += ["--set", f"{key}={value}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stderr[-2000:]
    # The largest child that was waited for: the run itself, with all its engines loaded at once.
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 < 16 * GIB

    on_cpu = [row for row in json.loads(done.stdout)["rows"] if row["device"] == "cpu"]
    rows = {"/".join((row["stage"], row["engine"], row["precision"])): row for row in on_cpu}
    measured = {key for key, row in rows.items() if row["skipped"] is None}
    assert {"load/torch/fp32", "prune/torch/fp16", "finetune/torch/fp32", "quantize/openvino/int8"} <= measured
    int8, fp32 = rows["quantize/openvino/int8"], rows["quantize/openvino/fp32"]
    assert int8["bytes_on_disk"] <= 0.27 * fp32["bytes_on_disk"]
    assert int8["quality"]["perplexity"] <= 1.005 * fp32["quality"]["perplexity"]
    # Two of twelve heads in each layer: 3.8 % of the parameters, as the arithmetic says.
    kept = json.loads((out / "prune" / "stage.json").read_text())["details"]["kept"]
    assert [len(heads) for heads in kept] == [10] * 12
