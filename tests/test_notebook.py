"""`project.ipynb` runs from top to bottom, the saved one shows what it did, and the program that runs it is sound."""

import ast
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import nbformat
import psutil
import pytest
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from benchmarks.notebook import ROOT, main, run_notebook
from eval.errors import UserError
from eval.results import load_results
from pipeline import hardware
from pipeline.stages import BY_NAME

PROJECT = ROOT / "project.ipynb"
FIGURES = ("heads", "curves", "recovery", "size", "layers", "latency", "tradeoff", "agreement", "sweep-figure")
"""The ids of the cells that end in a figure."""
SILENT = ("parameters", "scores", "rounding")
"""Those that show nothing: choices, and what the exercises start from."""
SOLUTIONS = {
    "scores": 'assert without(0, 0) > 1\nmy_scores = pruned.heads["prune"].scores',
    "rounding": "def quantize_rows(weight):\n"
    "    scale = weight.abs().amax(dim=1, keepdim=True) / 127\n"
    "    return (weight / scale).round().to(torch.int8), scale",
}
"""By exercise: what a reader may answer."""


def _code(notebook: NotebookNode) -> dict[str, NotebookNode]:
    return {cell.id: cell for cell in notebook.cells if cell.cell_type == "code"}


def _printed(cell: NotebookNode) -> str:
    return "".join(output.text for output in cell.outputs if output.output_type == "stream")


def _shown(cell: NotebookNode, kind: str) -> list[str]:
    return [output.data[kind] for output in cell.outputs if kind in output.get("data", {})]


def _assert_ran(notebook: NotebookNode) -> None:
    """Every code cell ran, in order, without an error, and all that should left something to see."""
    cells = _code(notebook)
    assert [cell.execution_count for cell in cells.values()] == list(range(1, len(cells) + 1))
    for name, cell in cells.items():
        assert cell.outputs or name.startswith(SILENT), f"cell {name} shows nothing"
        assert not [output for output in cell.outputs if output.output_type == "error"]
        assert not [output for output in cell.outputs if output.get("name") == "stderr"]
    assert [name for name in FIGURES if not _shown(cells[name], "image/png")] == []
    (flames,) = _shown(cells["flame"], "image/svg+xml")
    titles = [title.text or "" for title in ElementTree.fromstring(flames).iter("{http://www.w3.org/2000/svg}title")]
    assert any("transformer.h.0.attn" in title for title in titles)


@pytest.mark.thorough
class TestProject:
    """The notebook itself, on the embedded model and text, with as little work as shows everything.

    Each exercise is answered once more behind its check, and checked again.
    """

    @pytest.fixture(scope="class")
    def folder(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        return tmp_path_factory.mktemp("notebook")

    @pytest.fixture(scope="class")
    def executed(self, folder: Path) -> NotebookNode:
        notebook = nbformat.read(PROJECT, as_version=4)
        for name, answer in SOLUTIONS.items():
            check = _code(notebook)[f"check-{name}"]
            place = notebook.cells.index(check) + 1
            again = new_code_cell(check.source, id=f"check-{name}-again")
            notebook.cells[place:place] = [new_code_cell(answer, id=f"{name}-answered"), again]
        nbformat.write(notebook, folder / "project.ipynb")
        before = (folder / "project.ipynb").read_bytes()
        arguments = [str(folder / "project.ipynb"), "--out", str(folder / "out.ipynb")]
        with pytest.MonkeyPatch.context() as environment:
            environment.setenv("HEADROOM_QUICK", "1")
            assert main([*arguments, "--run-folder", str(folder / "run")]) == 0
        assert (folder / "project.ipynb").read_bytes() == before, "the notebook was touched"
        return nbformat.read(folder / "out.ipynb", as_version=4)

    def test_every_cell_runs(self, executed: NotebookNode) -> None:
        _assert_ran(executed)

    def test_it_tells_which_parameters_it_ran_with(self, executed: NotebookNode, folder: Path) -> None:
        assigned = {
            ast.unparse(node.targets[0]): ast.literal_eval(node.value)
            for node in ast.parse(_code(executed)["parameters"].source).body
            if isinstance(node, ast.Assign)
        }
        assert assigned.keys() == {"recipe", "run_folder", "overrides"}
        assert (assigned["recipe"], assigned["run_folder"]) == ("demo", str(folder / "run"))

    def test_the_table_holds_every_stage_and_the_perplexities_measured(
        self, executed: NotebookNode, folder: Path
    ) -> None:
        rows = {
            line.split(" ")[0]: line for line in _printed(_code(executed)["run"]).splitlines() if " · cpu · " in line
        }
        assert set(BY_NAME) <= set(rows)
        results = load_results(folder / "run" / "results.json")
        for row in results.rows:
            if row.device == "cpu" and row.quality and row.stage != "quantize":
                assert f"{row.quality.perplexity:.2f}" in rows[row.stage]
        irs = {row.precision for row in results.rows if row.stage == "quantize" and row.quality}
        assert {"fp32", "fp16", "int8", "w8a8"} <= irs

    def test_the_heads_named_are_those_that_the_stage_dropped(self, executed: NotebookNode, folder: Path) -> None:
        kept = json.loads((folder / "run/prune/stage.json").read_text())["details"]["kept"]
        lines = _printed(_code(executed)["gone"]).splitlines()
        assert [json.loads(line.split("kept ")[1]) for line in lines] == kept
        for line, heads in zip(lines, kept, strict=True):
            gone = json.loads(line.split("pruned ")[1].split("]")[0] + "]")
            assert gone and sorted(gone + heads) == [0, 1, 2, 3, 4]

    def test_words_in_order_are_likelier_than_shuffled(self, executed: NotebookNode) -> None:
        lines = _printed(_code(executed)["perplexity"]).splitlines()
        in_order, shuffled = (float(line.split()[1]) for line in lines if line.startswith("perplexity "))
        assert 2 * in_order < shuffled

    @pytest.mark.parametrize("exercise", SOLUTIONS)
    def test_a_check_tells_an_answer_from_what_the_exercise_starts_with(
        self, executed: NotebookNode, exercise: str
    ) -> None:
        cells = _code(executed)
        assert ": not yet, " in _printed(cells[f"check-{exercise}"])
        assert ": done." in _printed(cells[f"check-{exercise}-again"])

    def test_optimum_continues_the_prompt_from_the_ir(self, executed: NotebookNode) -> None:
        text = _printed(_code(executed)["optimum"])
        assert text.startswith("The city was founded in") and len(text.split()) > 15

    def test_the_sweep_makes_nothing_but_the_other_quantisation(self, executed: NotebookNode, folder: Path) -> None:
        log = (folder / "run/sweep/points/quantize.bits=mixed/log.txt").read_text()
        made = {name for name in BY_NAME if f"{name}: at work" in log}
        assert made == {"quantize"} and "finetune: shared" in log
        bits = [line.split()[0] for line in _printed(_code(executed)["bits"]).splitlines()]
        assert len(bits) == 4 * 4 + 1 and set(bits) == {"4", "8"}

    def test_the_exported_code_gives_the_same_logits(self, executed: NotebookNode, folder: Path) -> None:
        said = _printed(_code(executed)["reload"]).splitlines()
        assert said[0].startswith("CompactGPT2LMHeadModel from transformers_modules,")
        assert said[1].endswith(": 0.0") and (folder / "run/export/model.safetensors").is_file()

    def test_it_ends_with_the_report_and_with_sentences(self, executed: NotebookNode, folder: Path) -> None:
        report = folder / "run" / "report.html"
        assert report.is_file() and str(report) in _printed(_code(executed)["run"])
        (said,) = _shown(_code(executed)["conclude"], "text/markdown")
        assert "INT8" in said and "against the dense model fine-tuned alike" in said
        assert "5.00 % of the evaluation text" in _shown(_code(executed)["caveats"], "text/markdown")[0]

    @pytest.mark.skipif(hardware.gpu() is not None, reason="a GPU is here")
    def test_without_a_gpu_one_sentence_says_so(self, executed: NotebookNode) -> None:
        (line,) = _printed(_code(executed)["gpu"]).splitlines()
        assert line.startswith("Skipped: ")


def test_the_saved_notebook_shows_a_whole_run() -> None:
    text = PROJECT.read_text(encoding="utf-8")
    notebook = nbformat.reads(text, as_version=4)
    _assert_ran(notebook)
    assert len(text.encode()) < 1_000_000
    assert notebook.metadata.kernelspec.name == "python3"
    assert all("execution" not in cell.metadata for cell in notebook.cells), "time stamps"
    assert str(ROOT) not in text and str(Path.home()) not in text, "paths of the machine it ran on"
    assert text == nbformat.writes(notebook) + "\n"


def test_it_names_the_line_to_change_for_gpt2() -> None:
    notebook = nbformat.read(PROJECT, as_version=4)
    prose = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    first = _code(notebook)["parameters"].source.splitlines()[0]
    assert first.startswith('recipe = "demo"') and 'recipe = "gpt2"' in first
    assert '```python\nrecipe = "gpt2"\n```' in prose and "GPU" in prose


Notebook = Callable[..., Path]


@pytest.fixture
def notebook(tmp_path: Path) -> Notebook:
    """Writes a notebook whose code cells hold the given lines; the first one is tagged `parameters`."""

    def write(*sources: str) -> Path:
        cells = [new_code_cell(source) for source in sources]
        cells[0].metadata.tags = ["parameters"]
        path = tmp_path / "some.ipynb"
        nbformat.write(new_notebook(cells=[new_markdown_cell("# Title"), *cells]), path)
        return path

    return write


def test_progress_goes_to_stderr_and_answers_stay(notebook: Notebook, capfd: pytest.CaptureFixture[str]) -> None:
    bar = "from IPython.display import display\nbar = display('10 %', display_id=True)\nbar.update('20 %')"
    bar += "\ndisplay({'text/plain': '', 'text/html': '<pre></pre>'}, raw=True)"
    pieces = "import sys\nfor word in 'abc':\n    print(word, end='', flush=True)\n    print('busy', file=sys.stderr)"
    path = notebook("import os\nprint(os.getcwd())", pieces, bar, "6 * 7")
    run_notebook(path)
    where, text, progress, answer = (cell.outputs for cell in _code(nbformat.read(path, as_version=4)).values())
    assert where[0].text == f"{ROOT}\n"
    assert [(output.name, output.text) for output in text] == [("stdout", "abc")]
    assert progress == []
    assert answer[0].data["text/plain"] == "42"
    shown = capfd.readouterr()
    assert shown.out == "" and shown.err.count("busy\n") == 3 and "cell 3 of 5 (import sys)" in shown.err


def test_two_runs_write_the_same_file(notebook: Notebook) -> None:
    path = notebook("x = 1", "print(x)")
    run_notebook(path)
    first = path.read_bytes()
    run_notebook(path)
    assert path.read_bytes() == first


def test_parameters_are_replaced_and_comments_stay(notebook: Notebook, tmp_path: Path) -> None:
    path = notebook(
        'first = "é"; overrides = [\n    "a=1",  # é\n]  # stays\nlast = 2', "print(overrides, first, last)"
    )
    out = tmp_path / "out.ipynb"
    assert main([str(path), "--out", str(out), "--set", "b='2'", "--set", "c.d=3"]) == 0
    cells = list(_code(nbformat.read(out, as_version=4)).values())
    assert cells[0].source == "first = \"é\"; overrides = [\"b='2'\", 'c.d=3']  # stays\nlast = 2"
    assert cells[1].outputs[0].text == "[\"b='2'\", 'c.d=3'] é 2\n"


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("raise ValueError('too odd\\nand more')", "ValueError: too odd"),
        ("import os\nos._exit(3)", "the kernel died"),
        ("1 +", "SyntaxError"),
    ],
)
def test_a_cell_that_fails_is_named_and_nothing_is_written(
    notebook: Notebook, source: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = notebook("x = 1", source, "print('never')")
    before = path.read_bytes()
    assert main([str(path)]) == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith(f"failed: {path}: ")
    assert said in message and f"cell 3 of 4 ({source.splitlines()[0]})" in message
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]


def test_ctrl_c_ends_it_and_its_kernel_in_one_line(notebook: Notebook) -> None:
    path = notebook("import os, sys, time\nprint('pid', os.getpid(), file=sys.stderr)", "time.sleep(600)")
    before = path.read_bytes()
    command = [sys.executable, "-m", "benchmarks.notebook", str(path)]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        kernel = next(psutil.Process(int(line.split()[1])) for line in process.stderr if line.startswith("pid "))
        next(line for line in process.stderr if "time.sleep" in line)
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read().splitlines()
    assert process.returncode == 130 and rest == ["interrupted; the notebook was left as it was"]
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]
    psutil.wait_procs([kernel], timeout=30)
    assert not kernel.is_running()


def test_mistakes_are_told_in_one_line(notebook: Notebook, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = notebook("x = 1")
    (tmp_path / "text.ipynb").write_text("{]")
    (tmp_path / "list.ipynb").write_text("[1]")
    (tmp_path / "bytes.ipynb").write_bytes(b"\xff\xfe")
    bad = [
        ([str(tmp_path / "none.ipynb")], "No such file"),
        ([str(tmp_path / "text.ipynb")], "no notebook"),
        ([str(tmp_path / "list.ipynb")], "no notebook"),
        ([str(tmp_path / "bytes.ipynb")], "no notebook"),
        ([str(path), "--set", "a=1"], "does not assign overrides"),
        ([str(path), "--out", str(tmp_path / "none" / "out.ipynb")], "in a folder that is there"),
        ([str(path), "--out", str(tmp_path)], "give a file"),
    ]
    for arguments, said in bad:
        assert main(arguments) == 2
        told = capsys.readouterr().err.splitlines()
        assert said in told[-1] and told[-1].startswith("error: ")


def test_nothing_can_be_set_without_a_parameters_cell(notebook: Notebook) -> None:
    path = notebook("overrides = []")
    untagged = nbformat.read(path, as_version=4)
    untagged.cells[1].metadata = {}
    nbformat.write(untagged, path)
    with pytest.raises(UserError, match="no code cell tagged 'parameters'"):
        run_notebook(path, parameters={"overrides": ["a=1"]})
