"""The benchmark verb: what it compares, and what it says."""

import json
import shutil
from pathlib import Path

import pytest

from eval.errors import UserError
from pipeline.bench import bench, format_bench

SHORT = {"prompt_tokens": 7, "new_tokens": 3, "min_count": 4, "min_seconds": 0.0}


def test_folders_against_the_first(tiny_folder: Path, tmp_path: Path) -> None:
    twin = Path(shutil.copytree(tiny_folder, tmp_path / "twin"))
    outcome = bench([tiny_folder, twin], ["torch"], device="cpu", batch=2, **SHORT)
    first, second = outcome["subjects"]
    assert [subject["name"] for subject in outcome["subjects"]] == [f"{tiny_folder} (torch)", f"{twin} (torch)"]
    assert outcome["machine"]["cpu"]["cores"] >= 1
    for part in ("prefill", "decode"):
        assert first["speedup"][part] == {"value": 1.0, "low": 1.0, "high": 1.0}
        gain = second["speedup"][part]
        medians = [subject["latency"][part]["p50"] for subject in outcome["subjects"]]
        assert gain["value"] == pytest.approx(medians[0] / medians[1])
        assert 0 < gain["low"] <= gain["value"] <= gain["high"]
        assert second["latency"][part]["count"] == first["latency"][part]["count"] >= 4
    assert second["latency"]["batch"] == 2
    table = format_bench(outcome).splitlines()
    assert len(table) == 4 and "prompt 7, new 3, batch 2" in table[0] and table[2].endswith("1.00 [1.00, 1.00]")


def test_two_engines_in_one_command(finished_run: Path, cli) -> None:
    folders = (finished_run / "finetune" / "model", finished_run / "quantize" / "model")
    code, stdout, err = cli("bench", *folders, "--prompt-tokens", 7, "--new-tokens", 3, "--device", "cpu", "--json")
    assert code == 0, err
    subjects = json.loads(stdout)["subjects"]
    assert [(subject["precision"], subject["device"]) for subject in subjects] == [("fp32", "cpu"), ("int8", "cpu")]
    assert [subject["name"].rpartition(" ")[2] for subject in subjects] == ["(torch)", "(openvino)"]


def test_what_cannot_be_compared(tiny_folder: Path) -> None:
    for models, engines, said in (
        ([tiny_folder] * 2, [], "named twice"),
        ([tiny_folder] * 3, ["torch"] * 2, "2 engines for 3 folders"),
        ([tiny_folder], ["openvino"], "no openvino_model.xml"),
        ([tiny_folder / "no"], [], "not found"),
    ):
        with pytest.raises(UserError, match=said):
            bench(models, engines, **SHORT)
    with pytest.raises(UserError, match="takes at most 48"):
        bench([tiny_folder], [], **(SHORT | {"prompt_tokens": 46}))
