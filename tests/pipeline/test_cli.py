"""The command line as a person meets it: help, exit codes, one line for each mistake, clean JSON."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest
from typer.main import get_command_from_info

from eval.perplexity import perplexity
from pipeline import options
from pipeline.checkpoint import load_model
from pipeline.cli import app, data
from pipeline.data import encode
from pipeline.engines.openvino import _HINTS
from pipeline.engines.torch import _DTYPES, TorchEngine
from pipeline.stages import BY_NAME
from pipeline.texts import load_text

ROOT = Path(__file__).parents[2]
EMBEDDED = ROOT / "pipeline/assets/gpt2-mini"
VERBS = [command.callback.__name__ for command in app.registered_commands if command.callback]


def test_the_verbs() -> None:
    chain = ["run", "load", "half", "prune", "finetune", "quantize"]
    judging = ["evaluate", "compare", "generate", "bench", "profile", "report"]
    assert [*chain, "sweep", *judging, "export", "pretrain", "scaling", "doctor", "probe"] == VERBS


@pytest.mark.parametrize("verb", ["", *VERBS])
def test_help(verb: str, cli) -> None:
    code, stdout, err = cli(*([verb] if verb else []), "--help")
    assert (code, err) == (0, "")
    assert stdout.startswith("Usage: ") and len(stdout.splitlines()) > 4


def test_help_needs_no_heavy_import() -> None:
    program = (
        "import sys\n"
        "from pipeline.cli import main\n"
        "sys.argv = ['pipeline', '--help']\n"
        "try:\n    main()\n"
        "finally:\n"
        "    heavy = {'torch', 'transformers', 'numpy', 'openvino', 'matplotlib', 'datasets', 'pydantic'}\n"
        "    print(sorted(heavy & set(sys.modules)), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "[]\n")
    listed = [line.split()[0] for line in done.stdout.partition("Commands:")[2].splitlines() if line.strip()]
    assert [verb for verb in VERBS if verb != "probe"] == [word for word in listed if word in VERBS]


@pytest.mark.parametrize(
    "words",
    [
        ["run", "--set", "prune.ration=0.2"],
        ["finetune", "--recipe", "nothing"],
        ["sweep", "--grid", "prune.ration=0.2"],
        ["pretrain", "--set", "model.n_kv_head=3"],
        ["scaling", "--set", "pretrain.model.n_head=x"],
        ["run", "--colour", "red"],
        ["run", "--until", "pruned"],
        ["run", "--force", "prune", "--force", "measured"],
        ["finetune", "--track", "wandb"],
        ["sweep", "--grid", "prune.ratio=0.2", "--launcher", "slurm"],
        ["evaluate", "embedded", "--engine", "onnx"],
        ["evaluate", "embedded", "--tasks", "lambada,glue"],
        ["generate", "embedded", "--prompt", "x", "--device", "gpu"],
        ["bench", "embedded", "--engine", ""],
        ["compare", "embedded", "embedded", "--precision", "fp32", "--precision", "fp64"],
        ["profile", "embedded", "--engine", "Torch"],
        ["export", "runs/demo", "--to", "x", "--precision", "int8"],
        ["data", "prepare", "x", "--out", "y", "--style", "markdown"],
        ["run", "--out", ""],
        ["evaluate", ""],
    ],
)
def test_a_mistyped_choice_is_refused_before_any_heavy_import(words: list[str]) -> None:
    program = (
        "import sys\n"
        "from pipeline.cli import main\n"
        "try:\n    main()\n"
        "finally:\n    print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))\n"
    )
    command = [sys.executable, "-c", program, *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "[]\n")
    assert done.stderr.startswith(("error: ", "Usage: ")) and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["generate", "x", "--prompt", os.fsdecode(b"\xff")], 2, "holds bytes that are no utf-8 text"),
        (["run", "--out", os.fsdecode(b"\xff")], 2, "holds bytes that are no utf-8 text"),
        (["evaluate", "x" * 300], 2, "File name too long); give another"),
        (["run", "--recipe", "x" * 300], 2, "File name too long"),
    ],
)
def test_words_that_no_path_can_be(words: list[str], code: int, said: str, cli) -> None:
    found, stdout, err = cli(*words)
    assert (found, stdout, err.count("\n")) == (code, "", 1) and said in err and len(err) < 500


@pytest.mark.parametrize("out", ["x" * 300, "loop", "dangling", "file", "file/below", "locked"])
def test_an_out_that_cannot_be(out: str, cli, tiny_recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "file").write_text("precious")
    (tmp_path / "locked" / ".lock").mkdir(parents=True)
    code, stdout, err = cli("run", "--recipe", tiny_recipe, "--out", tmp_path / out)
    assert (code, stdout, err.count("\n")) == (2, "", 1) and "give" in err and "Traceback" not in err
    assert not (tmp_path / "nowhere").exists() and (tmp_path / "file").read_text() == "precious"


def test_output_that_cannot_be_written(run_copy: Path) -> None:
    def call(**options) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "pipeline", "report", str(run_copy)]
        return subprocess.run(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, check=False, **options)

    with Path("/dev/full").open("w") as full:
        done = call(stdout=full)
    assert done.returncode == 1 and done.stderr.startswith("failed: the output: No space left on device")
    assert done.stderr.count("\n") == 1
    done = call(stdout=subprocess.PIPE, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stderr) == (0, "") and "Report: " in done.stdout


def test_what_nobody_foresaw_is_one_line(cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise RuntimeError("a bug\nof two lines")

    monkeypatch.setattr("pipeline.doctor.diagnose", broken)
    code, stdout, err = cli("doctor")
    assert (code, stdout, err.count("\n")) == (1, "", 1)
    assert re.match(r"failed: unexpected RuntimeError \(a bug\) at .*test_cli.py:\d+; please report it", err)
    monkeypatch.setenv("HEADROOM_DEBUG", "1")
    assert "Traceback" in cli("doctor")[2]
    monkeypatch.setattr("pipeline.doctor.diagnose", lambda: bytearray(1 << 62))
    code, _, err = cli("doctor")
    assert (code, err.count("\n")) == (1, 1) and err.startswith("failed: not enough memory")


def test_the_names_that_options_know() -> None:
    assert (*BY_NAME,) == options.STAGES and {*_DTYPES, *_HINTS} == {*options.PRECISIONS}


def test_a_tilde_that_no_shell_expanded(cli, tiny_recipe: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    shutil.copy(tiny_recipe, tmp_path / "recipe.yaml")
    assert cli("run", "--recipe=~/recipe.yaml", "--out=~/run", "--until", "load")[0] == 0
    assert (tmp_path / "run/results.json").exists() and not (tmp_path / "~").exists()
    assert cli("report", "~/run")[0] == 0


def test_profile_and_compare_tell_of_stages_made_again(run_copy: Path, tiny_texts: dict[str, Path], cli) -> None:
    shutil.rmtree(run_copy / "quantize")
    path = run_copy / "prune" / "stage.json"
    manifest = json.loads(path.read_text())
    manifest["seconds"], manifest["files"]["model/no"] = 1, "0" * 64
    path.write_text(json.dumps(manifest))
    said = f"note: {run_copy}: prune was made again after these results were measured: they tell of other files.\n"
    models = (run_copy / "half/model", run_copy / "prune/model")
    code, _, err = cli("compare", *models, "--text", tiny_texts["evaluation"], "--tokens", 40)
    assert code == 0 and err.count(said) == 1
    code, _, err = cli("profile", run_copy, "--out", run_copy.parent / "traces", "--precision", "int8")
    assert code == 2 and err.startswith(said)


def test_results_beside_other_stages_are_told(run_copy: Path, finished_run: Path, cli) -> None:
    assert cli("report", run_copy)[2] == ""
    path = run_copy / "prune" / "stage.json"
    manifest = json.loads(path.read_text())
    manifest["files"]["model/config.json"] = "0" * 64
    path.write_text(json.dumps(manifest))
    said = "prune was made again after these results were measured: they tell of other files."
    code, stdout, err = cli("report", run_copy)
    assert (code, err) == (0, f"note: {run_copy}: {said}\n")
    assert said in (run_copy / "report.html").read_text() and said in (run_copy / "report.md").read_text()
    code, stdout, err = cli("report", finished_run, run_copy, "--out", run_copy / "page.html")
    assert (code, err) == (0, f"note: {run_copy}: {said}\n") and f"In B, {said}" in stdout
    assert f"In B, {said}" in (run_copy / "page.html").read_text()
    code, _, err = cli("export", run_copy, "--to", run_copy.parent / "exported")
    assert (code, err.count("\n")) == (2, 1) and said.removesuffix(".") in err
    assert not (run_copy.parent / "exported").exists()

    results = json.loads((run_copy / "results.json").read_text())  # of a version that did not record the stages
    del results["run"]["stages"]
    (run_copy / "results.json").write_text(json.dumps(results))
    assert cli("report", run_copy)[2] == ""
    path.write_text(json.dumps(manifest | {"date": "2999-01-01T00:00:00+00:00"}))
    assert said in cli("report", run_copy)[2]
    del results["run"]["date"]
    (run_copy / "results.json").write_text(json.dumps(results))
    assert "made again after these results were measured cannot be told." in cli("report", run_copy)[2]


@pytest.mark.parametrize(
    "words",
    [
        ["nothing"],
        ["run", "--colour", "red"],
        ["evaluate"],
        ["evaluate", "x", "--stride", "0"],
        ["evaluate", "x", "--context", "1"],
        ["evaluate", "x", "--tasks", "lambada", "--limit", "1"],
        ["evaluate", "x", "--context", "many"],
        ["generate", "x"],
        ["bench", "x", "--new-tokens", "0"],
        ["compare", "x"],
        ["compare", "x", "y", "--tokens", "0"],
    ],
)
def test_misuse(words: list[str], cli) -> None:
    code, stdout, err = cli(*words)
    assert (code, stdout) == (2, "")
    assert err.startswith("error: ") and err.endswith(" --help)\n") and err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--recipe", "nothing"], "recipe nothing: not found; give a preset (demo"),
        (["--recipe", "no/where.yaml"], "no/where.yaml: not found"),
        (["--set", "prune.ratio=1.5"], "prune.ratio is 1.5"),
        (["--set", "prune.ration=0.2"], "unknown key 'prune.ration'"),
        (["--set", "prune.ratio"], "--set prune.ratio: give key=value"),
        (["--set", "=3"], "give key=value"),
        (["--set", "prune.ratio=[1"], "prune.ratio is '[1': Input should be a valid number"),
        (["--set", "prune=3"], "prune is 3"),
        (["--set", "prune.ratio.deep=3"], "prune.ratio is {'deep': 3}"),
        (["--set", "seed=-1"], "seed is -1"),
        (["--until", "nothing"], "--until nothing: give load, half"),
        (["--force", "nothing"], "--force nothing: give load, half"),
        (["--set", "load.source=./no/model"], "model ./no/model: no such folder"),
        (["--set", "data.train=no.txt"], "no.txt: No such file"),
        (["--set", "measure.tasks.names=[glue]"], "measure.tasks.names.0 is 'glue'"),
        (
            ["--set", "measure.tasks.names=[lambada]", "--set", "measure.tasks.data=absent"],
            "no lambada_test*.jsonl below absent",
        ),
    ],
)
def test_a_mistake_in_a_run_is_one_line(words: list[str], said: str, cli, tiny_recipe: Path, tmp_path: Path) -> None:
    recipe = [] if "--recipe" in words else ["--recipe", tiny_recipe]
    code, stdout, err = cli("run", "--out", tmp_path / "run", *recipe, *words)
    assert (code, stdout) == (2, "")
    assert err.startswith("error: ") and said in err and err.count("\n") == 1


def test_a_broken_recipe_file(cli, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    for content in (b"a: [", b"- 1\n- 2\n", b"\xff\xfe\x00", b"seed: .nan\n"):
        path.write_bytes(content)
        code, stdout, err = cli("run", "--recipe", path, "--out", tmp_path / "run")
        assert (code, stdout, err.count("\n")) == (2, "", 1) and err.startswith("error: recipe ")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["evaluate", "./nowhere"], "model ./nowhere: no such folder"),
        (["evaluate", "{model}", "--engine", "onnx"], "--engine onnx: give torch, cuda or openvino"),
        (["evaluate", "{model}", "--engine", "openvino"], "no openvino_model.xml"),
        (["evaluate", "{model}", "--text", "no.txt"], "no.txt: No such file"),
        (["evaluate", "{model}", "--text", "{text}", "--context", "49"], "at most 48"),
        (["evaluate", "{model}", "--text", "{text}", "--stride", "49"], "stride is 49"),
        (["evaluate", "{model}", "--tasks", "glue"], "--tasks glue: give hellaswag, lambada or hellaswag,lambada"),
        (["evaluate", "{model}", "--tasks", "lambada", "--task-data", "no"], "no lambada_test*.jsonl below no"),
        (["evaluate", "./nowhere", "--tasks", "lambada", "--task-data", "{tasks}"], "./nowhere: no such folder"),
        (["evaluate", "{model}", "--tasks", "lambada", "--stride", "3"], "--stride 3: does not go with --tasks"),
        (["evaluate", "{model}", "--tasks", "lambada", "--text", "{text}"], "does not go with --tasks"),
        (["evaluate", "{model}", "--text", "{text}", "--limit", "3"], "--limit 3: goes with --tasks"),
        (["generate", "{model}", "--prompt", ""], "the prompt is empty"),
        (["generate", "{model}", "--prompt", "a", "--top-k", "0"], "top_k >= 1"),
        (["generate", "./nowhere", "--prompt", "a", "--top-p", "nan"], "top_p <= 1"),
        (["generate", "./nowhere", "--prompt", "a", "--temperature", "nan"], "a finite temperature"),
        (["generate", "./nowhere", "--prompt", "a", "--temperature", "inf"], "a finite temperature"),
        (["generate", "./nowhere", "--prompt", "a", "--seed", str(10**30)], "more than 64 bits"),
        (["generate", "./nowhere", "--prompt", "a", "--seed", str(-(10**30))], "more than 64 bits"),
        (["generate", "./nowhere", "--prompt", "a\udcff"], "holds bytes that are no utf-8 text"),
        (["generate", "{model}", "--prompt", "a", "--max-new-tokens", str(10**30)], "exceed the context of 48"),
        (["bench", "{model}", "{model}"], "named twice"),
        (["bench", "{embedded}", "{model}", "--device", "cpu"], "has no token"),
        (["compare", "{model}", "./nowhere"], "./nowhere: no such folder"),
        (["compare", "{model}", "{model}", *["--device", "cpu"] * 3], "--device is given 3 times for two models"),
        (
            ["compare", "{model}", "{model}", "--precision", "fp32", "--precision", "int4"],
            "--precision int4: give fp32",
        ),
        (["compare", "{model}", "{embedded}"], "their tokenizers cut the text otherwise"),
        (["report", "nowhere"], "nowhere/results.json: No such file"),
        (["report", "nowhere", "else"], "nowhere/results.json: No such file"),
        (["report", "nowhere", "nowhere/"], "nowhere and nowhere are one run; give two"),
        (["report", "nowhere", "--out", "page.html"], "goes with two runs"),
        (["pretrain", "--text", "no.txt", "--out", "{out}"], "no.txt: No such file"),
        (["half", "--out", "{out}"], "no such stage; first run, by the same recipe: python -m pipeline load"),
    ],
)
def test_a_mistake_in_another_verb_is_one_line(
    words: list[str], said: str, cli, tiny_folder: Path, tiny_texts: dict[str, Path], task_data: Path, tmp_path: Path
) -> None:
    places = {
        "tasks": task_data,
        "model": tiny_folder,
        "text": tiny_texts["evaluation"],
        "out": tmp_path / "out",
        "embedded": EMBEDDED,
    }
    code, stdout, err = cli(*(word.format(**places) for word in words))
    assert (code, stdout) == (2, ""), err
    last = err.splitlines()[-1]
    assert last.startswith("error: ") and said in last and "Traceback" not in err


def test_home_is_found_where_no_shell_looks(cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.yaml").write_text("nonsense: 1\n")
    for words in (("run", "--recipe=~/mine.yaml"), ("pretrain", "--text=~/mine.yaml", "--recipe=~/mine.yaml")):
        assert "nonsense" in cli(*words)[2]
    assert f"error: {tmp_path}/none/results.json" in cli("report", "~/none")[2]
    assert f"{tmp_path}/out" in cli("half", "--out=~/out")[2] and not Path("~").exists()
    verbs = [*app.registered_commands, *data.registered_commands]
    commands = [get_command_from_info(verb, pretty_exceptions_short=False, rich_markup_mode=None) for verb in verbs]
    plain = [
        option.name
        for command in commands
        for option in command.params
        if isinstance(option.type, click.Path) and not isinstance(option.type, options.PathWord)
    ]
    assert not plain, "these take a path without looking for ~"


def test_run_speaks_json(run_copy: Path, cli) -> None:
    # Without --recipe the folder's own is followed.
    code, stdout, err = cli("run", "--out", run_copy, "--json")
    assert code == 0 and err.count("up to date") == 7
    document = json.loads(stdout)
    assert document == json.loads((run_copy / "results.json").read_text())
    again = f"python -m pipeline run --recipe {run_copy}/recipe.yaml --out {run_copy}"
    assert document["run"]["command"] == again
    code, stdout, _ = cli("run", "--out", run_copy)
    assert stdout.splitlines()[-1] == f"Report: {run_copy / 'report.html'}"
    assert (run_copy / "report.html").stat().st_size > 10_000
    for stage in ("load", "half", "prune", "finetune", "quantize", "control-finetune", "control-random"):
        assert stage in stdout


def test_report_draws_again_from_the_results_alone(run_copy: Path, cli, tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    alone.mkdir()
    (run_copy / "results.json").rename(alone / "results.json")
    code, stdout, err = cli("report", alone)
    assert (code, err) == (0, "")
    assert stdout.splitlines()[-1] == f"Report: {alone / 'report.html'}"
    assert (alone / "report.html").read_bytes() == (run_copy / "report.html").read_bytes()
    (alone / "results.json").write_text("{}")
    code, stdout, err = cli("report", alone)
    assert (code, stdout, err.count("\n")) == (2, "", 1)


def test_report_of_two_runs(run_copy: Path, finished_run: Path, cli, tmp_path: Path) -> None:
    before = (finished_run / "report.html").read_bytes()
    code, stdout, err = cli("report", finished_run, run_copy)
    page = run_copy / f"against-{finished_run.name}.html"
    assert (code, err) == (0, "") and page.is_file()
    assert stdout.startswith("B/A ") and stdout.splitlines()[-1] == f"Comparison: {page}"
    assert re.search(r"^quantize · openvino · cpu · int8 +1\.000 ", stdout, re.M)
    code, stdout, err = cli("report", finished_run, run_copy, "--out", tmp_path / "page.html")
    assert (code, err) == (0, "") and (tmp_path / "page.html").read_bytes() == page.read_bytes()
    for wrong in (tmp_path, tmp_path / "no" / "page.html"):
        code, stdout, err = cli("report", finished_run, run_copy, "--out", wrong)
        assert (code, stdout) == (2, "") and err.count("\n") == 1
        assert f"--out {wrong}: give a file, such as comparison.html, in a folder that exists" in err
    assert (finished_run / "report.html").read_bytes() == before
    code, stdout, err = cli("report", finished_run)  # as the run itself wrote it
    assert code == 0 and (finished_run / "report.html").read_bytes() == before


@pytest.mark.parametrize(("context", "stride"), [(None, None), (17, 5)])
def test_evaluate_is_eval_perplexity(
    context: int | None, stride: int | None, cli, tiny_folder: Path, tiny_texts: dict[str, Path], tiny_tokenizer
) -> None:
    text = tiny_texts["evaluation"]
    lengths = [
        word for name, value in (("--context", context), ("--stride", stride)) if value for word in (name, value)
    ]
    command = ("evaluate", tiny_folder, "--text", text, "--device", "cpu", *lengths)
    code, stdout, err = cli(*command, "--json")
    assert code == 0, err
    found = json.loads(stdout)
    wanted = perplexity(
        TorchEngine(load_model(tiny_folder)),
        encode(load_text(str(text)), tiny_tokenizer),
        context=context or 48,
        stride=stride or 48,
        text_sha256="",
        text_share=1.0,
    )
    assert found["perplexity"] == pytest.approx(wanted.perplexity, rel=1e-6)
    assert (found["tokens"], found["context"], found["stride"]) == (wanted.tokens, wanted.context, wanted.stride)
    assert math.log(found["perplexity"]) == pytest.approx(found["nll"])
    code, stdout, _ = cli(*command)
    error = f" ± {wanted.stderr:.4f}"
    assert found["stderr"] == pytest.approx(wanted.stderr, rel=1e-4) and found["parts"] == pytest.approx(wanted.parts)
    assert code == 0 and stdout.startswith(f"perplexity {wanted.perplexity:.4f}{error}  ({wanted.tokens:,} tokens")


def test_a_text_too_short_for_an_error_is_said(cli, tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("the cat sat on the mat and the other cat sat on the hat")
    code, stdout, err = cli("evaluate", tiny_folder, "--text", tmp_path / "short.txt", "--device", "cpu")
    assert code == 0 and "too few for a standard error)" in stdout and "±" not in stdout, err


@pytest.mark.parametrize(
    "damage",
    [
        {"rows": [{"stage": "load"}]},
        {"run": []},
        {"heads": {"prune": {}}},
        {"run": {}},
        {"run": {"name": "x", "recipe": {"load": {}}}},
    ],
)
@pytest.mark.parametrize("verb", ["report", "against", "profile", "export"])
def test_results_that_are_json_but_wrong_are_one_line(run_copy: Path, finished_run: Path, cli, verb, damage) -> None:
    raw = json.loads((run_copy / "results.json").read_text())
    (run_copy / "results.json").write_text(json.dumps(raw | damage))
    before = sorted(run_copy.rglob("*"))
    commands = {
        "report": ("report", run_copy),
        "against": ("report", finished_run, run_copy),
        "profile": ("profile", run_copy, "--out", run_copy / "traces", "--engine", "torch", "--device", "cpu"),
        "export": ("export", run_copy, "--to", run_copy.parent / "exported"),
    }
    code, stdout, err = cli(*commands[verb])
    (place,) = damage
    if (
        isinstance(damage.get("run"), dict) and verb != "export"
    ):  # which tells little of itself: the others can do without
        return
    assert (code, stdout) == (2, "") and err.count("\n") == 1, err
    assert "results.json: " in err and place in err
    assert sorted(run_copy.rglob("*")) == before


def test_evaluate_scores_tasks(finished_run: Path, cli, task_data: Path, tmp_path: Path, monkeypatch) -> None:
    words = ("--tasks", "hellaswag,lambada", "--task-cache", tmp_path / "cache", "--device", "cpu")
    values = {}
    for folder in ("finetune/model", "quantize/ir_fp32"):
        code, stdout, err = cli("evaluate", finished_run / folder, *words, "--task-data", task_data, "--json")
        assert code == 0, err
        values[folder] = json.loads(stdout)
    torch_found, ir_found = values.values()
    assert (torch_found["engine"], ir_found["engine"]) == ("torch", "openvino")
    assert torch_found["tasks"] == ir_found["tasks"]
    assert torch_found["tasks"]["hellaswag"]["documents"] == 5

    files = {path: path.read_bytes() for path in (tmp_path / "cache").iterdir()}
    assert len(files) == 2 and all(content.count(b"\n") == 25 for content in files.values())
    monkeypatch.setenv("HEADROOM_TASK_DATA", str(task_data))
    code, stdout, _ = cli("evaluate", finished_run / "finetune/model", *words, "--limit", 3)
    accuracy = stdout.splitlines()[0].split()[2]
    assert (
        code == 0 and stdout.startswith("hellaswag  accuracy 0.") and "(3 of 5 documents; no published score" in stdout
    )
    assert 3 * float(accuracy) == pytest.approx(round(3 * float(accuracy)), abs=1e-3)
    assert {path: path.read_bytes() for path in (tmp_path / "cache").iterdir()} == files


def test_evaluate_reads_an_ir(finished_run: Path, cli, tiny_texts: dict[str, Path]) -> None:
    command = ("--text", tiny_texts["evaluation"], "--json")
    values = {}
    for folder in ("finetune/model", "quantize/ir_fp32", "quantize/ir_fp16", "quantize/model"):
        code, stdout, err = cli("evaluate", finished_run / folder, *command)
        assert code == 0, err
        document = json.loads(stdout)
        values[folder] = document["perplexity"]
        assert document["engine"] == ("torch" if folder == "finetune/model" else "openvino")
    exact = values["finetune/model"]
    assert values["quantize/ir_fp32"] == pytest.approx(exact, rel=1e-4)
    assert values["quantize/ir_fp16"] == pytest.approx(exact, rel=1e-2)
    assert values["quantize/model"] == pytest.approx(exact, rel=5e-2)


def test_compare_engines(finished_run: Path, cli, tiny_texts: dict[str, Path]) -> None:
    pair = (finished_run / "finetune/model", finished_run / "quantize/model")
    words = ("compare", *pair, "--text", tiny_texts["evaluation"], "--tokens", 101, "--device", "cpu")
    code, stdout, err = cli(*words, "--json")
    assert code == 0, err
    found = json.loads(stdout)
    assert [(subject["engine"], subject["precision"]) for subject in found["subjects"]] == [
        ("torch", "fp32"),
        ("openvino", "int8"),
    ]
    assert (found["tokens"], found["context"], found["new_tokens"]) == (101, 48, 24)
    assert 0 < found["kl"][0][1] < 0.05 and 0.8 < found["top1"][0][1] <= 1
    code, stdout, _ = cli(*words)
    assert code == 0 and stdout.startswith(f"A  {pair[0]}: torch on cpu, FP32 weights")
    assert f"KL(A||B) {found['kl'][0][1]:.3g} nats a token" in stdout

    same = ("compare", pair[0], pair[0], "--text", tiny_texts["evaluation"], "--device", "cpu")
    code, stdout, _ = cli(*same, "--precision", "fp32", "--precision", "fp16", "--json")
    rounded = json.loads(stdout)
    assert code == 0 and [subject["precision"] for subject in rounded["subjects"]] == ["fp32", "fp16"]
    assert 0 < rounded["kl"][0][1] < found["kl"][0][1]


def test_doctor(cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code, stdout, _ = cli("doctor", "--json")
    findings = json.loads(stdout)
    assert code == 0
    by_name = {finding["what"]: finding for finding in findings}
    assert {"torch", "CPU", "GPU", "OpenVINO", "embedded model", "Hub access", "disk"} <= by_name.keys()
    assert all(finding["detail"] and isinstance(finding["works"], bool) for finding in findings)
    assert by_name["torch"]["works"] and by_name["CPU"]["works"] and by_name["OpenVINO"]["works"]
    code, stdout, _ = cli("doctor")
    assert code == 0 and len(stdout.splitlines()) == len(findings)
    assert all(line[:3] in ("ok ", "NO ") for line in stdout.splitlines())


def test_probe_prints_one_record(cli, tiny_folder: Path) -> None:
    code, stdout, _ = cli("probe", tiny_folder, "--device", "cpu", "--prompt-tokens", 5, "--new-tokens", 3)
    assert code == 0 and json.loads(stdout)["rss"] > 0


def test_a_real_process(tiny_folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pipeline", "generate", str(tiny_folder), "--prompt", "x" * 99]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert done.stderr.startswith("error: 99 prompt and 64 new tokens exceed the context of 48")


def test_interrupted_before_the_command_line_is_there() -> None:
    program = (
        "import runpy, sys\n"
        "class Interrupting:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'pipeline.cli': raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Interrupting())\n"
        "runpy.run_module('pipeline', run_name='__main__', alter_sys=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "interrupted; run the same command to resume\n")
