"""An export works where Headroom is not, says nothing about this machine's folders, and is whole or absent."""

import ast
import base64
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from forks import holder
from safetensors.torch import load_file

from eval.errors import UserError, WorkError
from pipeline import export as exporting
from pipeline.artifacts import RunFolder, sha256_tree
from pipeline.checkpoint import load_model
from pipeline.engines.openvino import OpenVINOEngine
from pipeline.model import CompactGPT2LMHeadModel

IDS = [[5, 17, 200, 3, 40, 41, 268]]
STRANGER = """
import json, sys
try:
    import pipeline
    sys.exit("Headroom can be imported here, so this proves nothing")
except ImportError:
    pass
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, out, ids = sys.argv[1], sys.argv[2], torch.tensor(json.loads(sys.argv[3]))
torch.set_num_threads(1)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
how = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
told = model(ids, output_hidden_states=True, output_attentions=True, return_dict=False)
try:
    model(ids, no_such_argument=1)
    sys.exit("an argument that nothing reads was taken")
except TypeError:
    pass
save_file({
    "logits": model(ids).logits,
    "hidden": torch.stack(told[-2]),
    **{f"attention{layer}": weights for layer, weights in enumerate(told[-1])},
    "greedy": model.generate(ids, **how),
    "assisted": model.generate(ids, assistant_model=model, **how),
    "text": torch.tensor(tokenizer("the old cat sat").input_ids),
}, out)
"""


@pytest.fixture(scope="module")
def shared(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of the finished run. Copy it before changing it."""
    return exporting.export(finished_run, tmp_path_factory.mktemp("shared") / "tiny-gpt2")


def test_it_runs_where_headroom_is_not(shared: Path, finished_run: Path, tiny_tokenizer: Any, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(shared, tmp_path / "moved"))
    program = tmp_path / "stranger.py"
    program.write_text(STRANGER)
    # Isolated: neither this folder nor PYTHONPATH is searched for modules.
    subprocess.run(
        [sys.executable, "-I", program, moved, tmp_path / "out", json.dumps(IDS)],
        cwd=tmp_path,
        env=os.environ | {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"},
        check=True,
        timeout=120,
    )
    found = load_file(tmp_path / "out")
    model = CompactGPT2LMHeadModel.from_pretrained(finished_run / "finetune" / "model_fp16")
    ids = torch.tensor(IDS)
    with torch.no_grad():
        assert found["logits"].dtype == torch.float16 and torch.equal(found["logits"], model(ids).logits)
        told = model(ids, output_hidden_states=True, output_attentions=True)
        assert torch.equal(found["hidden"], torch.stack(told.hidden_states))
        for layer, (weights, heads) in enumerate(zip(told.attentions, model.config.kept_heads, strict=True)):
            assert torch.equal(found[f"attention{layer}"], weights) and weights.shape[1] == len(heads)
        greedy = model.generate(ids, max_new_tokens=9, do_sample=False, eos_token_id=-1, pad_token_id=0)
    assert torch.equal(found["assisted"], greedy)
    assert torch.equal(found["greedy"], greedy) and greedy.shape == (1, len(IDS[0]) + 9)
    assert found["text"].tolist() == tiny_tokenizer("the old cat sat").input_ids


def test_headroom_itself_reads_it(shared: Path, finished_run: Path) -> None:
    ids = torch.tensor(IDS)
    ours = load_model(finished_run / "finetune" / "model_fp16")
    assert torch.equal(load_model(shared)(ids).logits, ours(ids).logits)
    ir, exported = (
        OpenVINOEngine.from_folder(folder) for folder in (finished_run / "quantize/model", shared / "openvino")
    )
    assert exported.precision == "int8" and torch.equal(ir.logits(ids), exported.logits(ids))


def test_fp32_and_a_run_without_fine_tuning(run_copy: Path, tmp_path: Path) -> None:
    exporting.export(run_copy, tmp_path / "fp32", precision="fp32")
    assert load_file(tmp_path / "fp32/model.safetensors")["transformer.wte.weight"].dtype == torch.float32
    for stage in ("finetune", "quantize"):
        shutil.rmtree(run_copy / stage)
    with pytest.raises(UserError, match="no fine-tuned model"):
        exporting.export(run_copy, tmp_path / "pruned", precision="fp32")
    assert not list(tmp_path.glob(".*"))[1:]  # only the folder that was being written, which the next export clears
    exporting.export(run_copy, tmp_path / "pruned")
    assert (
        sha256_tree(tmp_path / "pruned")["model.safetensors"] == sha256_tree(run_copy)["prune/model/model.safetensors"]
    )
    assert not (tmp_path / "pruned/openvino").exists() and "OVModel" not in (tmp_path / "pruned/README.md").read_text()


def test_the_card_and_the_mark(shared: Path, finished_run: Path, tiny_folder: Path) -> None:
    card = (shared / "README.md").read_text()
    _, head, body = card.split("---\n", 2)
    assert yaml.safe_load(head)["license"] == "other" and "base_model" not in yaml.safe_load(head)
    row = json.loads((finished_run / "results.json").read_text())["rows"][0]
    assert f"| {row['quality']['perplexity']:,.2f} (" in body  # the interval follows
    assert "whose licence holds and is not known here" in body and "train.txt: licence not known here" in body
    mark = json.loads((shared / exporting.MARK).read_text())
    files = sha256_tree(shared)
    files.pop(exporting.MARK)
    assert mark["files"] == files and set(mark["stages"]) == {"finetune", "quantize"}
    secrets = [str(path).encode() for path in (tiny_folder.parent, finished_run.parent, Path.cwd())]
    for path in shared.rglob("*"):
        assert path.is_dir() or not any(secret in path.read_bytes() for secret in secrets), path


@pytest.mark.parametrize(
    ("source", "given", "head", "said"),
    [
        ("embedded", None, {"license": "mit"}, "Weights: MIT. They come"),
        ("openai-community/gpt2", None, {"license": "mit", "base_model": "openai-community/gpt2"}, "Weights: mit;"),
        ("someone/model", "apache-2.0", {"license": "apache-2.0"}, "Weights: apache-2.0; they come from someone/model"),
    ],
)
def test_licences(source: str, given: str | None, head: dict, said: str, run_copy: Path, tmp_path: Path) -> None:
    for name, read, write in (
        ("results.json", json.loads, json.dumps),
        ("recipe.yaml", yaml.safe_load, yaml.safe_dump),
    ):
        path = run_copy / name
        tree = read(path.read_text())
        recipe = tree["run"]["recipe"] if name == "results.json" else tree
        recipe["load"]["source"], recipe["data"]["train"] = source, "embedded:train"
        path.write_text(write(tree))
    exporting.export(run_copy, tmp_path / "out", licence=given)
    card = (tmp_path / "out/README.md").read_text()
    found = yaml.safe_load(card.split("---\n")[1])
    assert {key: found.get(key) for key in ("license", "base_model")} == {"base_model": None} | head
    assert said in card and "embedded:train (WikiText-2): CC BY-SA 3.0 and GFDL" in card
    assert "MIT License" in (tmp_path / "out/LICENSE").read_text()


def test_only_an_export_is_replaced(shared: Path, run_copy: Path, tmp_path: Path, cli: Callable) -> None:
    to = tmp_path / "out"
    to.mkdir()
    (to / "thesis.txt").write_text("years of work")
    for force in ([], ["--force"]):
        code, out, err = cli("export", run_copy, "--to", to, *force)
        assert (code, out, err) == (2, "", f"error: {to}: is there already, and no export; give another --to\n")
    assert (to / "thesis.txt").exists()
    shutil.rmtree(to)
    assert cli("export", run_copy, "--to", to)[:2] == (0, f"Export: {to}\n")
    before = sha256_tree(to)
    code, _, err = cli("export", run_copy, "--to", to)
    assert code == 2 and err.endswith("holds an export already; give another --to, or --force to replace it\n")
    (run_copy / "finetune/model/model.safetensors").write_bytes(b"damage")
    code, _, err = cli("export", run_copy, "--to", to, "--force")
    assert code == 2 and "finetune/model/model.safetensors: not what its manifest says" in err
    assert sha256_tree(to) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]


@pytest.mark.parametrize("name", [".", "..", "", "file/x", "run/prune/export", "run", "link", "x" * 250])
def test_places_that_no_export_can_take(name: str, run_copy: Path, tmp_path: Path, cli: Callable, monkeypatch) -> None:
    (tmp_path / "file").write_text("precious")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "headroom.json").write_text('{"export": 1}')  # even if it looks like one
    monkeypatch.chdir(tmp_path)
    before = sha256_tree(tmp_path)
    code, out, err = cli("export", "run", "--to", name, "--force")
    assert (code, out, err.count("\n")) == (2, "", 1) and "give" in err
    assert sha256_tree(tmp_path) == before


def test_only_what_the_manifest_names_goes_out(run_copy: Path, tmp_path: Path) -> None:
    for folder in ("finetune/model_fp16", "quantize/model"):
        (run_copy / folder / "pytorch_model.bin").write_bytes(b"a pickle")
        (run_copy / folder / "private").mkdir()
        (run_copy / folder / "private" / "notes.txt").write_text("a secret")
    to = exporting.export(run_copy, tmp_path / 'a "name" with ``` and \\ in it')
    assert not [path for path in to.rglob("*") if path.name in ("pytorch_model.bin", "private", "notes.txt")]
    code = (to / "README.md").read_text().partition("```python\n")[2].partition("\n```")[0]
    names = [node.value for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Constant)]
    assert names.count(to.name) == 2


def test_a_run_that_may_not_be_written(run_copy: Path, tmp_path: Path) -> None:
    (run_copy / ".lock").chmod(0o444)
    before = {path: path.stat().st_mtime_ns for path in run_copy.rglob("*")}
    exporting.export(run_copy, tmp_path / "out")
    (run_copy / ".lock").unlink()
    exporting.export(run_copy, tmp_path / "out", force=True)
    assert {path: path.stat().st_mtime_ns for path in run_copy.rglob("*") if path.is_file()}.items() <= before.items()
    RunFolder(run_copy).path.joinpath(".lock").touch()
    with holder(run_copy), pytest.raises(UserError, match="another run is at work here"):
        exporting.export(run_copy, tmp_path / "out", force=True)


def test_cut_off_it_leaves_the_old_one(shared: Path, run_copy: Path, tmp_path: Path, monkeypatch) -> None:
    to = Path(shutil.copytree(shared, tmp_path / "out"))
    before = sha256_tree(to)

    def full(folder: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(exporting, "sync", full)
    with pytest.raises(WorkError, match="no space left on the disk"):
        exporting.export(run_copy, to, force=True)
    assert sha256_tree(to) == before
    monkeypatch.undo()
    exporting.export(run_copy, to, force=True, licence="mit")
    assert "license: mit" in (to / "README.md").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]


def test_what_is_no_whole_run(run_copy: Path, tmp_path: Path, cli: Callable) -> None:
    def said(*arguments: object) -> str:
        code, out, err = cli("export", *arguments, "--to", tmp_path / "out")
        assert (code, out, err.count("\n")) == (2, "", 1)
        return err

    assert "holds no results.json; give the folder of a finished run" in said(tmp_path)
    assert "--precision int8: give fp16 or fp32" in said(run_copy, "--precision", "int8")
    assert "--push a b: no name for a repository" in said(run_copy, "--push", "a b")
    results = run_copy / "results.json"
    whole = results.read_text()
    fewer = json.loads(whole)
    fewer["rows"] = [row for row in fewer["rows"] if row["stage"] in ("load", "half", "prune")]
    fewer["agreement"] = None
    results.write_text(json.dumps(fewer))  # as of a later run --until prune
    assert "results.json does not tell of finetune and quantize; run: python -m pipeline run" in said(run_copy)
    results.write_text(whole)
    manifest = run_copy / "quantize/stage.json"
    manifest.write_text(manifest.read_text().replace('"finetune": "', '"finetune": "x'))
    assert "quantize: made from another finetune; run: python -m pipeline run --recipe" in said(run_copy)
    recipe = run_copy / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("ratio: 0.2", "ratio: 0.4"))
    assert "results.json is of another recipe than recipe.yaml" in said(run_copy)
    assert not (tmp_path / "out").exists()


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the Hub as an upload talks to; it keeps what it was sent."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        server: Any = self.server
        server.seen.append((self.path, body))
        if self.headers["Authorization"] != "Bearer hf_right":
            self._answer(401, {"error": "Invalid username or password."})
        elif self.path.endswith("/create"):
            self._answer(200, {"url": f"{server.address}/someone/tiny", "id": "someone/tiny", "name": "someone/tiny"})
        elif "/preupload/" in self.path:
            asked = json.loads(body)["files"]
            modes = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in asked]
            self._answer(200, {"files": modes})
        else:
            self._answer(
                200, {"commitUrl": f"{server.address}/someone/tiny/commit/1", "commitOid": "1", "pullRequestUrl": None}
            )

    def do_GET(self) -> None:
        self._answer(404, {"error": "not here"})

    do_HEAD = do_GET

    def _answer(self, code: int, value: dict[str, Any]) -> None:
        content = json.dumps(value).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A local stand-in for the Hub, which huggingface_hub is told to use."""
    server: Any = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.address, server.seen = f"http://127.0.0.1:{server.server_port}", []
    # As HF_ENDPOINT and HF_TOKEN would, had they been set before the import.
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.address)
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def test_upload(run_copy: Path, tmp_path: Path, hub: Any, cli: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ("export", run_copy, "--to", tmp_path / "out", "--push", "someone/tiny")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    code, _, err = cli(*command)
    assert code == 1 and "someone/tiny: not uploaded (" in err and err.count("\n") == 1
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    hub.seen.clear()
    code, out, err = cli(*command, "--force")
    assert (code, out.splitlines()[-1]) == (0, f"Uploaded: {hub.address}/someone/tiny/commit/1"), err
    create, commit = hub.seen[0], hub.seen[-1]
    assert json.loads(create[1])["visibility"] == "private" and commit[0].startswith(
        "/api/models/someone/tiny/commit/main"
    )
    entries = [json.loads(line) for line in commit[1].splitlines()]
    sent = {each["value"]["path"]: each["value"]["content"] for each in entries if each["key"] == "file"}
    files = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert sent.keys() == files
    assert 'from_pretrained("someone/tiny", trust_remote_code=True)' in base64.b64decode(sent["README.md"]).decode()
