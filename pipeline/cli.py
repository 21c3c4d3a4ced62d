"""The command line: one verb, one typed function. Heavy imports happen inside the verbs."""

import contextlib
import errno
import io
import json
import math
import os
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any

import click
import typer

from eval.errors import UserError, WorkError, reason, shown
from pipeline.artifacts import NO_PATH
from pipeline.options import ENGINES, MEASURE, PRECISIONS, STAGES, PathWord, matching, one_of

app = typer.Typer(
    help=(
        "Compress GPT-2 and know what each step cost and gained: load, half, prune, finetune, quantize to INT8, "
        "and measure every stage side by side. Start with: python -m pipeline run --recipe demo"
    ),
    epilog=(
        "Mistakes end with one line on stderr and exit code 2, failed work with 1. HEADROOM_DEBUG=1 shows the "
        "traceback of an error that nobody foresaw."
    ),
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
data = typer.Typer(no_args_is_help=True, help="Make training data: see data prepare --help.")
app.add_typer(data, name="data")

PATH = PathWord()
_TASKS = matching(r"(hellaswag|lambada)(,(hellaswag|lambada))*", "give hellaswag, lambada or hellaswag,lambada")
_DEVICE = matching(r"cpu|cuda(:\d+)?", "give cpu, cuda or cuda:N")
Out = Annotated[
    Path, typer.Option(click_type=PATH, help="The run folder; stages that are up to date there are skipped.")
]
RecipeName = Annotated[str | None, typer.Option("--recipe", help="A preset (demo, gpt2) or a .yaml file.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", help="Change one recipe key, as in prune.ratio=0.3. A key of text takes the word as it is."),
]
Model = Annotated[
    str, typer.Argument(help="A model folder (safetensors in Hub format, or an OpenVINO IR), a Hub id, or embedded.")
]
ModelDir = Annotated[
    Path, typer.Argument(click_type=PATH, help="A model folder: safetensors in Hub format, or an OpenVINO IR.")
]
EngineName = Annotated[
    str | None,
    typer.Option(
        "--engine",
        callback=one_of(*ENGINES),
        help="torch, cuda (own kernels) or openvino; by default torch, or openvino for an IR.",
    ),
]
_TEST_TEXT = "embedded:test"
Text = Annotated[
    str,
    typer.Option(
        help="embedded:test, hub:DATASET[@CONFIG]:SPLIT, wikitext:FILE (WikiText's raw form), or a text file, taken as "
        "it is: UTF-8, or .jsonl with a text in each line. .gz, .bz2 and .xz are unpacked. Rows are joined by a blank "
        "line. Special tokens that the tokenizer would put around a text are left out."
    ),
]
Device = Annotated[
    str | None,
    typer.Option(callback=_DEVICE, help="cpu or cuda:0 (not for openvino); by default the GPU if there is one."),
]
Precision = Annotated[
    str | None,
    typer.Option(
        callback=one_of(*PRECISIONS),
        help="fp32, fp16, bf16, int8, int4-int8, w8a8, auto (an IR's defaults); by default what is held.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else on stdout.")]
Track = Annotated[
    str,
    typer.Option(
        callback=one_of("tensorboard", "mlflow", "none"),
        help="Log trainings and the table: tensorboard (OUT/tracking), mlflow (MLFLOW_TRACKING_URI), none.",
    ),
]
Force = Annotated[
    bool, typer.Option(help="Make the stage again although it is up to date, or other choices made what is there.")
]


def _recipe(name: str | None, changes: list[str] | None, out: Path) -> Any:
    """The recipe named, else the one the run folder keeps, else the demo; its model has been looked into."""
    from pipeline.hub import resolve
    from pipeline.recipe import Recipe, load_recipe

    kept = out / "recipe.yaml"
    if name is None:
        name = str(kept) if kept.exists() else "demo"
    choices = load_recipe(Recipe, name, changes or [])
    _looked_into(resolve(choices.load.source, choices.load.revision))
    return choices


def _folder(model: str | Path) -> Path:
    """The folder of a model that a verb is given; what lies there goes before the embedded model."""
    from pipeline.hub import resolve

    there = str(model) == "embedded" and Path(model).is_dir()
    return _looked_into(Path(model) if there else resolve(str(model)))


def _looked_into(folder: Path) -> Path:
    """A model folder that is none is refused before what takes seconds to be imported."""
    from cuda_ext.checkpoint import read_checkpoint
    from cuda_ext.errors import CheckpointError
    from pipeline.engines import default_engine

    if default_engine(folder) == "torch":
        try:
            read_checkpoint(folder)
        except CheckpointError as error:
            raise UserError(str(error)) from error
    return folder


@app.command()
def run(
    recipe: RecipeName = None,
    out: Out = Path("runs/demo"),
    set: Set = None,
    until: Annotated[
        str | None,
        typer.Option(callback=one_of(*STAGES), help="Stop after this stage; it and those before it are measured."),
    ] = None,
    force: Annotated[
        list[str] | None,
        typer.Option(
            callback=one_of(*STAGES, MEASURE),
            help="Make this stage again although it is up to date, and it and those after it although other choices "
            "made them; measure, the last, stands for the measurements.",
        ),
    ] = None,
    track: Track = "none",
    as_json: Json = False,
) -> Any:
    """The whole chain: every stage, every measurement, the table and the report. Interrupted, it resumes."""
    choices = _recipe(recipe, set, out)
    from pipeline.runner import RESULTS, Runner

    results = Runner(choices, out, track=track).execute(until=until, force=force or [])
    if as_json:
        print((out / RESULTS).read_text(encoding="utf-8"))
    else:
        _print_table(results)
        print(f"\nReport: {out / 'report.html'}")
    return results


def _stage(
    name: str, out: Path, recipe: str | None, changes: list[str] | None, force: bool, track: str = "none"
) -> Any:
    choices = _recipe(recipe, changes, out)
    from pipeline.runner import Runner

    results = Runner(choices, out, track=track).stage(name, force=force)
    if results.rows:
        _print_table(results)
    return results


@app.command()
def load(out: Out = Path("runs/demo"), recipe: RecipeName = None, set: Set = None, force: Force = False) -> Any:
    """Stage 1: bring a GPT-2 in (Hub, folder or embedded), in FP32.

    --set load.n_kv_head=N pools its key/value heads, --set load.window=N lets its layers see the last N tokens alone.
    """
    return _stage("load", out, recipe, set, force)


@app.command()
def half(out: Out = Path("runs/demo"), recipe: RecipeName = None, set: Set = None, force: Force = False) -> Any:
    """Stage 2: the weights in FP16."""
    return _stage("half", out, recipe, set, force)


@app.command()
def prune(out: Out = Path("runs/demo"), recipe: RecipeName = None, set: Set = None, force: Force = False) -> Any:
    """Stage 3: score the attention heads and cut the weakest out of the matrices.

    Where query heads share key/value heads, query heads are cut, and a key/value head with the last of its group.
    --set prune.mlp=0.25 cuts that share of each layer's hidden neurons as well, --set prune.layers=1 takes whole
    layers out, those that change the residual stream least.
    """
    return _stage("prune", out, recipe, set, force)


@app.command()
def finetune(
    out: Out = Path("runs/demo"),
    recipe: RecipeName = None,
    set: Set = None,
    force: Force = False,
    track: Track = "none",
) -> Any:
    """Stage 4: recover what pruning cost. Also under torchrun and accelerate launch."""
    return _stage("finetune", out, recipe, set, force, track)


@app.command()
def quantize(out: Out = Path("runs/demo"), recipe: RecipeName = None, set: Set = None, force: Force = False) -> Any:
    """Stage 5: INT8 weights, exported to OpenVINO for the CPU, with FP32 and FP16 beside it."""
    return _stage("quantize", out, recipe, set, force)


@app.command()
def sweep(
    grid: Annotated[list[str], typer.Option(help="A recipe key and its values, as in prune.ratio=0.1,0.2,0.4.")],
    recipe: Annotated[str, typer.Option(help="A preset (demo, gpt2) or a .yaml file.")] = "demo",
    out: Annotated[
        Path, typer.Option(click_type=PATH, help="The sweep's folder; what is there is not done again.")
    ] = Path("runs/sweep"),
    set: Set = None,
    launcher: Annotated[
        str,
        typer.Option(
            callback=one_of("local", "ray"), help="Who makes the stages: local, or ray (RAY_ADDRESS names a cluster)."
        ),
    ] = "local",
    workers: Annotated[int, typer.Option(min=1, help="Points made at a time; measuring is one by one.")] = 1,
    as_json: Json = False,
) -> Any:
    """All combinations of the grids: stages shared, results in one table and figure. Interrupted, it resumes."""
    from pipeline.grids import expand

    points = expand(recipe, grid, set or [])
    from pipeline.sweep import plain, report
    from pipeline.sweep import sweep as work

    outcomes = work(points, out, launcher=launcher, workers=workers)
    print(json.dumps(list(plain(outcomes))) if as_json else f"{report(outcomes)}\n\nTable and figure: {out}/sweep.*")
    failed = [outcome for outcome in outcomes if outcome.failure]
    if failed:
        raise WorkError(
            f"{len(failed)} of {len(outcomes)} points, as the table says; the same command tries them again"
        )
    return outcomes


@app.command()
def evaluate(
    model: Model,
    engine: EngineName = None,
    text: Text = _TEST_TEXT,
    stride: Annotated[int | None, typer.Option(min=1, help="Tokens between windows; by default the context.")] = None,
    context: Annotated[int | None, typer.Option(min=2, help="Tokens a window; by default the model's limit.")] = None,
    tasks: Annotated[
        str | None,
        typer.Option(callback=_TASKS, help="hellaswag,lambada: score these by lm-evaluation-harness, and no text."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=2, help="Only the first documents of each task.")] = None,
    task_data: Annotated[
        Path | None,
        typer.Option(
            click_type=PATH,
            envvar="HEADROOM_TASK_DATA",
            help="A folder with hellaswag_val*.jsonl or .txt[.bz2] and lambada_test*.jsonl; by default from the Hub.",
        ),
    ] = None,
    task_cache: Annotated[
        Path,
        typer.Option(
            click_type=PATH, help="Where answers are kept: an interrupted evaluation goes on, a repeated one is quick."
        ),
    ] = Path("runs/tasks"),
    device: Device = None,
    precision: Precision = None,
    as_json: Json = False,
) -> Any:
    """Perplexity of a model folder on a text, by sliding window; or its accuracy on tasks."""
    from dataclasses import asdict

    ignored = {"--limit": limit} if tasks is None else {"--stride": stride, "--context": context}
    for name, given in ignored.items():
        if given is not None:
            raise UserError(f"{name} {given}: {'goes with --tasks' if tasks is None else 'does not go with --tasks'}")
    folder = _folder(model)
    if tasks is not None:
        if text != _TEST_TEXT:
            raise UserError(f"--text {text}: does not go with --tasks, which are scored on no text; leave one out")
        from pipeline.task_scores import format_scores, score_folder

        options = {"engine": engine, "device": device, "precision": precision}
        outcome = score_folder(
            folder, [name.strip() for name in tasks.split(",")], options, data=task_data, limit=limit, cache=task_cache
        )
        print(json.dumps(outcome) if as_json else format_scores(outcome))
        return outcome
    from eval.perplexity import perplexity
    from pipeline.data import encode, scored_bytes, sha256_text
    from pipeline.engines import default_engine, load_engine
    from pipeline.texts import load_text
    from pipeline.tokenizer import load_tokenizer

    content = load_text(text)
    loaded = load_engine(engine or default_engine(folder), folder, device=device, precision=precision)
    tokenizer = load_tokenizer(folder, loaded.vocab_size)
    ids = encode(content, tokenizer)
    window = context or loaded.context
    quality = perplexity(
        loaded,
        ids,
        context=window,
        stride=stride or window,
        text_sha256=sha256_text(content),
        text_share=1.0,
    )
    size = scored_bytes(content, tokenizer)
    bits = quality.nll * quality.tokens / math.log(2) / size
    if as_json:
        about = {"engine": loaded.name, "device": loaded.device, "compute": loaded.compute}
        print(json.dumps({**about, **asdict(quality), "scored_bytes": size, "bits_per_byte": bits}))
    else:
        error = f" ± {quality.stderr:.4f}" if quality.stderr is not None else ""
        few = "" if error else "; too few for a standard error"
        scored = f"{quality.tokens:,} tokens, {quality.nll:.4f} nats a token{few}"
        print(f"perplexity {quality.perplexity:.4f}{error}  ({scored})")
        print(f"bits per byte {bits:.4f}  ({size:,} bytes)")
        print(f"{loaded.name} on {loaded.device}: {loaded.compute}; context {quality.context}, stride {quality.stride}")
    return quality


@app.command()
def compare(
    a: Annotated[str, typer.Argument(metavar="A", help="A model folder or Hub id: what the other is taken for.")],
    b: Annotated[str, typer.Argument(metavar="B", help="A model folder or Hub id; the same one for another engine.")],
    engine: Annotated[
        list[str] | None, typer.Option("--engine", callback=one_of(*ENGINES), help="Once for both, or twice: A's, B's.")
    ] = None,
    device: Annotated[
        list[str] | None, typer.Option("--device", callback=_DEVICE, help="Once for both, or twice.")
    ] = None,
    precision: Annotated[
        list[str] | None, typer.Option("--precision", callback=one_of(*PRECISIONS), help="Once for both, or twice.")
    ] = None,
    text: Text = _TEST_TEXT,
    tokens: Annotated[int, typer.Option(min=1, help="Compare on this many tokens from the text's start.")] = 1024,
    as_json: Json = False,
) -> Any:
    """Whether two models or engines say the same: logits, KL, likeliest token, greedy continuations.

    One folder on two engines: compare DIR DIR --engine torch --engine cuda
    """
    from eval.results import load_results
    from pipeline.comparing import compare_folders, format_comparison

    options = {"--engine": engine or [], "--device": device or [], "--precision": precision or []}
    folders = (_folder(a), _folder(b))
    outcome = compare_folders(folders, options, text=text, tokens=tokens)
    for run in dict.fromkeys(folder.absolute().parent.parent for folder in folders):
        with contextlib.suppress(UserError):  # most folders are no run's
            _say_stale(run, load_results(run / "results.json"))
    print(json.dumps(outcome) if as_json else format_comparison(outcome))
    return outcome


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str, typer.Option(help="The text to go on from.")],
    engine: EngineName = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_k: Annotated[int | None, typer.Option(help="Sample among the k likeliest.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Sample among the fewest that reach this share.")] = None,
    seed: int = 0,
    device: Device = None,
    precision: Precision = None,
) -> str:
    """Go on from a prompt until one of the model's end-of-text tokens; the text streams to stdout."""
    from pipeline.engines import default_engine, load_engine
    from pipeline.generation import check_sampling, end_tokens
    from pipeline.generation import generate as pieces
    from pipeline.tokenizer import load_tokenizer

    sampling: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    check_sampling(prompt, **sampling)
    folder = _folder(model)
    loaded = load_engine(engine or default_engine(folder), folder, device=device, precision=precision)
    tokenizer = load_tokenizer(folder, loaded.vocab_size)
    ends = end_tokens(folder, tokenizer)
    text = ""
    for piece in pieces(loaded, tokenizer, prompt, max_new_tokens=max_new_tokens, ends=ends, **sampling):
        print(piece, end="", flush=True)
        text += piece
    print()
    return text


@app.command()
def bench(
    models: Annotated[
        list[str],
        typer.Argument(help="Model folders or Hub ids; the first one is what the others are compared with."),
    ],
    engine: Annotated[
        list[str] | None,
        typer.Option("--engine", callback=one_of(*ENGINES), help="One for each folder, or one for all."),
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(min=1)] = 128,
    new_tokens: Annotated[int, typer.Option(min=2)] = 32,
    batch: Annotated[int, typer.Option(min=1)] = 1,
    device: Device = None,
    precision: Precision = None,
    as_json: Json = False,
) -> Any:
    """Prefill and decode latency side by side, interleaved, with ratios and their 95 % intervals."""
    from pipeline.bench import bench as compare
    from pipeline.bench import format_bench

    outcome = compare(
        [_folder(model) for model in models],
        engine or [],
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        batch=batch,
        device=device,
        precision=precision,
    )
    print(json.dumps(outcome) if as_json else format_bench(outcome))
    return outcome


@app.command()
def profile(
    models: Annotated[
        list[Path], typer.Argument(click_type=PATH, help="Model folders, or a run folder for all that is in its table.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(click_type=PATH, help="The TensorBoard log folder; by default RUN/traces, or runs/profile."),
    ] = None,
    engine: Annotated[
        list[str] | None,
        typer.Option(
            "--engine", callback=one_of(*ENGINES), help="torch, cuda or openvino; may be given more than once."
        ),
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(min=1)] = 128,
    new_tokens: Annotated[int, typer.Option(min=2, help="At most 8 steps are traced.")] = 8,
    device: Device = None,
    precision: Precision = None,
) -> list[Path]:
    """Traces, flame graphs, tables and scalars of prefill and of decode, for TensorBoard, Perfetto and a browser.

    A model folder is profiled on each --engine. A run folder stands for every row of its table that can run
    here (--engine, --device and --precision narrow them); its figures and learning curves come along.
    """
    from pipeline.profiling import profile_all

    log, folders = profile_all(
        models,
        out,
        engines=engine or [],
        device=device,
        precision=precision,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
    )
    print(f"Open: tensorboard --logdir {log}   (or load the .json in https://ui.perfetto.dev)")
    return folders


@app.command()
def report(
    run_folder: Annotated[Path, typer.Argument(click_type=PATH, metavar="A", help="A run folder with results.json.")],
    other: Annotated[
        Path | None,
        typer.Argument(click_type=PATH, metavar="[B]", help="Another run: one page shows both side by side."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(click_type=PATH, help="That page's file; by default against-A.html in B.")
    ] = None,
) -> Path:
    """Draw figures and report again from results.json; or compare two runs, row by row."""
    from eval.results import load_results
    from pipeline.artifacts import disk_errors
    from pipeline.report import write_comparison, write_report
    from pipeline.runner import RESULTS

    if other is not None:
        from plots.versus import text_table

        with disk_errors((out or other / "page").parent):
            path, comparison = write_comparison(run_folder, other, out)
        for folder in (run_folder, other):
            _say_stale(folder, load_results(folder / RESULTS))
        print(f"{text_table(comparison)}\n")
        print("\n".join((*comparison.summary, *comparison.caveats)))
        print(f"\nComparison: {path}")
        return path
    if out is not None:
        raise UserError(f"--out {out}: goes with two runs; the report of one is {run_folder / 'report.html'}")
    results = load_results(run_folder / RESULTS)
    with disk_errors(run_folder):
        path = write_report(run_folder)
    _say_stale(run_folder, results)
    _print_table(results)
    print(f"\nReport: {path}")
    return path


@app.command()
def export(
    run_folder: Annotated[Path, typer.Argument(click_type=PATH, help="The folder of a finished run.")],
    to: Annotated[Path, typer.Option(click_type=PATH, help="The folder to write, in Hub format.")],
    precision: Annotated[
        str, typer.Option(callback=one_of("fp16", "fp32"), help="fp16 or fp32: what the weights are stored in.")
    ] = "fp16",
    licence: Annotated[
        str | None, typer.Option(help="The weights' licence by its Hub name, where their source does not tell.")
    ] = None,
    push: Annotated[str | None, typer.Option(metavar="OWNER/NAME", help="Upload it to this Hub repository.")] = None,
    public: Annotated[bool, typer.Option("--public", help="Let all see a repository that --push makes.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier export.")] = False,
) -> Path:
    """Write a run's model with its code, INT8 IR and model card, for use without Headroom; or publish it."""
    from pipeline.export import check_repo, upload
    from pipeline.export import export as write

    if push is not None:
        check_repo(push)
    folder = write(run_folder, to, precision=precision, licence=licence, repo=push, force=force)
    print(f"Export: {folder}")
    if push is not None:
        print(f"Uploaded: {upload(folder, push, public=public)}")
    return folder


@data.command()
def prepare(
    inputs: Annotated[list[str], typer.Argument(metavar="INPUT...", help="Files, folders, hub:DATASET:SPLIT.")],
    out: Annotated[
        Path, typer.Option(click_type=PATH, help="The shards' folder; an interrupted preparation goes on there.")
    ],
    tokenizer: Annotated[
        str, typer.Option(help="Whose tokens: embedded, a folder with tokenizer.json, or a Hub id such as gpt2.")
    ] = "embedded",
    workers: Annotated[
        int | None, typer.Option(min=1, help="Tokenising processes, by default one a core; they decide no byte.")
    ] = None,
    shard_tokens: Annotated[int, typer.Option(min=1, help="Tokens a shard, of 2 bytes each.")] = 100_000_000,
    validation_share: Annotated[
        float | None,
        typer.Option(
            help="Hold out this share of the tokens, at most one shard; 0: none. By default a tenth of the first ten "
            "million, and one in 200 of the rest."
        ),
    ] = None,
    validation_every: Annotated[int | None, typer.Option(hidden=True)] = None,
    end_of_text: Annotated[
        str, typer.Option(help="after or before each document; llm.c's scripts put it before.")
    ] = "after",
    style: Annotated[str, typer.Option(help="plain, or wikitext: put prose in WikiText's style first.")] = "plain",
    as_json: Json = False,
) -> Any:
    """Tokenise a corpus into uint16 shards that llm.c and pretrain (--set shards=OUT) read.

    An INPUT is a text file (<|endoftext|> and the space around it part its documents), a .jsonl file (the text in each
    line is one), a folder of .txt and .jsonl, or hub:DATASET[@CONFIG]:SPLIT, streamed; a local folder in the Hub's
    format will do as DATASET. .gz, .bz2 and .xz are unpacked. In the text of a line or row <|endoftext|> is that
    token, not its letters.

    Documents that occur again, are empty, or are not UTF-8 are counted and left out; OUT/manifest.json tells what came
    of which input. The others are taken as they are. Memory does not grow with the text: a document over 4 MiB is
    counted in pieces, and is never held out as a whole.

    What is held out are whole documents from all over the corpus, or, where it has too few, its end. With
    --end-of-text before the tokens are those of llm.c's own scripts; no shard but an only one is under half full.
    """
    if style not in ("plain", "wikitext"):
        raise UserError(f"--style {style}: give plain or wikitext")
    if end_of_text not in ("after", "before"):
        raise UserError(f"--end-of-text {end_of_text}: give after or before")
    if validation_every is not None:
        raise UserError("--validation-every: tokens are held out now; give --validation-share, such as 0.005; 0: none")
    from pipeline import hardware
    from pipeline.hub import resolve
    from pipeline.prepare import prepare as work
    from pipeline.prepare import summary

    manifest = work(
        inputs,
        out,
        resolve(tokenizer),
        workers=workers or hardware.cpu()["cores"],
        shard_tokens=shard_tokens,
        validation_share=validation_share,
        end_of_text=end_of_text,  # type: ignore[arg-type]
        style=style,  # type: ignore[arg-type]
    )
    print(json.dumps(manifest) if as_json else f"{summary(manifest)}\nShards: {out}")
    return manifest


@app.command()
def pretrain(
    text: Annotated[
        Path | None,
        typer.Option(
            click_type=PATH,
            help="Training text (.txt or .jsonl, also .gz, .bz2, .xz); more may follow. Or: --set shards=FOLDER",
        ),
    ] = None,
    more: Annotated[
        list[Path] | None, typer.Argument(click_type=PATH, metavar="[FILE]...", help="More training text.")
    ] = None,
    recipe: Annotated[str, typer.Option(help="A preset (mini, gpt2-124M, gpt2-350M) or a .yaml file.")] = "mini",
    out: Annotated[
        Path, typer.Option(click_type=PATH, help="Checkpoints, curve and model; resumes what is there.")
    ] = Path("runs/mini"),
    set: Set = None,
    track: Track = "none",
    estimate: Annotated[
        bool, typer.Option("--estimate", help="Tell memory and time for the hardware named, and train nothing.")
    ] = False,
    on: Annotated[
        str | None, typer.Option(help="With --estimate: a GPU such as A100 or H100; by default this machine's.")
    ] = None,
    devices: Annotated[int, typer.Option(min=1, help="With --estimate: how many of them.")] = 1,
    utilisation: Annotated[
        float, typer.Option(min=0.01, max=1, help="With --estimate: the share of their peak FLOPs that is reached.")
    ] = 0.4,
    as_json: Json = False,
) -> Any:
    """Train a GPT-2-architecture model and its tokenizer from scratch. Also under torchrun and accelerate launch.

    One node:      torchrun --nproc-per-node 8 -m pipeline pretrain --recipe R --set parallel=ddp ...

    Several nodes: on each of them, with one OUT that all see: torchrun --nnodes 2 --nproc-per-node 8
    --rdzv-backend c10d --rdzv-endpoint FIRST_NODE:29500 -m pipeline pretrain ...

    The presets gpt2-124M and gpt2-350M want shards of GPT-2's tokens. parallel is none, ddp, zero1 or fsdp. A step
    takes batch_size x accumulation blocks on any number of processes, and a checkpoint fits any number of them.
    """
    from pipeline.recipe import Pretrain, load_recipe

    choices = load_recipe(Pretrain, recipe, set or [])
    if estimate:
        from pipeline.estimate import estimate as reckon
        from pipeline.estimate import format_estimate

        found = reckon(choices, on, devices, utilisation)
        print(json.dumps(found) if as_json else format_estimate(found))
        return found
    if (on, devices, utilisation) != (None, 1, 0.4):
        raise UserError("pretrain: --on, --devices and --utilisation go with --estimate; add it, or leave them out")
    files = [*([text] if text else []), *(more or [])]
    if bool(files) == bool(choices.shards):
        raise UserError("pretrain: give either --text FILES or --set shards=FOLDER (see data prepare)")
    from pipeline.pretrain import pretrain as train
    from pipeline.texts import load_text
    from pipeline.tracking import Tracking
    from pipeline.training import is_main_process

    validation = choices.validation or ("embedded:valid" if files else None)
    tracking = Tracking(track, out / "tracking", choices.name)
    folder = train(choices, files, out, load_text(validation) if validation else None, tracking)
    if is_main_process():
        print(json.dumps({"model": str(folder)}) if as_json else f"Model: {folder}")
    return folder


@app.command()
def scaling(
    text: Annotated[
        Path | None,
        typer.Option(
            click_type=PATH,
            help="Training text (.txt or .jsonl, also .gz, .bz2, .xz); more may follow. By default the embedded text.",
        ),
    ] = None,
    more: Annotated[
        list[Path] | None, typer.Argument(click_type=PATH, metavar="[FILE]...", help="More training text.")
    ] = None,
    recipe: Annotated[str, typer.Option(help="A preset (scaling-mini, scaling-gpu) or a .yaml file.")] = "scaling-mini",
    out: Annotated[
        Path, typer.Option(click_type=PATH, help="The family's folder; what is trained there is not trained again.")
    ] = Path("runs/scaling"),
    set: Set = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Trainings at a time; by default one, or without a GPU one a core.")
    ] = None,
    as_json: Json = False,
) -> Any:
    """Train a family of sizes over several budgets and fit how loss falls with parameters, tokens and FLOPs.

    The law is L(N, D) = E + A/N^alpha + B/D^beta (Hoffmann et al. 2022, approach 3), with bootstrap intervals, the
    compute frontier, and where to stop trusting them. Interrupted, it resumes; sizes and budgets may be added later.
    """
    from pipeline.recipe import Scaling, load_recipe

    choices = load_recipe(Scaling, recipe, set or [])
    files = [*([text] if text else []), *(more or [])]
    if files and choices.pretrain.shards:
        raise UserError("scaling: give either --text FILES or --set pretrain.shards=FOLDER (see data prepare)")
    from pipeline import hardware
    from pipeline.scaling import scaling as work
    from plots.scaling import markdown

    at_a_time = workers or (1 if hardware.gpu() else hardware.cpu()["cores"])
    record = work(choices, files, out, workers=at_a_time)
    print(json.dumps(record) if as_json else f"{markdown(record)}\nTable and figure: {out}/scaling.*")
    return record


@app.command()
def doctor(as_json: Json = False) -> Any:
    """What works on this machine, and why the rest does not."""
    from pipeline.doctor import diagnose, format_findings

    findings = diagnose()
    print(json.dumps(findings) if as_json else format_findings(findings))
    return findings


@app.command(hidden=True)
def probe(
    model: ModelDir,
    engine: EngineName = None,
    device: Device = None,
    precision: Precision = None,
    prompt_tokens: int = 128,
    new_tokens: int = 32,
    batch: int = 1,
) -> None:
    """Memory of one engine in this fresh process, as JSON: what `run` starts for its memory column."""
    from dataclasses import asdict

    import torch

    from cuda_ext.configuration import read_sizes
    from cuda_ext.errors import CheckpointError
    from eval.memory import exercise
    from pipeline.engines import default_engine, import_engine, load_engine

    name = engine or default_engine(model)
    import_engine(name)
    try:
        vocab_size = read_sizes(model, "vocab_size")["vocab_size"]
    except CheckpointError as error:
        raise UserError(str(error)) from error
    prompt = (torch.arange(prompt_tokens) % vocab_size).repeat(batch, 1)
    memory = exercise(lambda: load_engine(name, model, device=device, precision=precision), prompt, new_tokens)
    print(json.dumps(asdict(memory)))


def _say_stale(folder: Path, results: Any) -> None:
    """One line on stderr for each way in which results are not those of what stands in the run folder."""
    from pipeline.stale import stale_caveat

    for line in stale_caveat(folder, results):
        print(f"note: {folder}: {line}", file=sys.stderr)


def _print_table(results: Any) -> None:
    from pipeline.report import table

    print(table(results))


def main() -> None:
    """Run a verb. Exit 2 with one line on stderr for the user's mistakes, 1 for failed work.

    What is neither is told in one line as well; with HEADROOM_DEBUG=1 by its traceback.
    """
    # Libraries that chat or phone home are told not to, before any of them is imported.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("KINETO_LOG_LEVEL", "5")
    code = 0
    try:
        _prepare_streams()
        _check_words(sys.argv[1:])
        try:
            ended = app(standalone_mode=False)
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
        code = ended if isinstance(ended, int) else 0  # --help ends so, and Ctrl-C, of which typer makes 130
        if code == 130:
            print(_INTERRUPTED, file=sys.stderr)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        code = error.exit_code
    except (KeyboardInterrupt, click.Abort):
        print(_INTERRUPTED, file=sys.stderr)
        code = 130
    except BaseException as error:  # some libraries' panics are no Exceptions
        code, line = _told(error)
        print(shown(line, 2000), file=sys.stderr)
    sys.exit(code)


_INTERRUPTED = "interrupted; run the same command to resume"


def _prepare_streams() -> None:
    """Let what a terminal cannot show be replaced, and no file become stdout or stderr where they are closed."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace" if stream is sys.stderr else "replace")


def _check_words(words: list[str]) -> None:
    for word in words:
        if any("\ud800" <= letter <= "\udfff" for letter in word):
            raise UserError(f"{shown(ascii(word))}: holds bytes that are no {sys.getfilesystemencoding()} text")


def _told(error: BaseException) -> tuple[int, str]:
    """The exit code and the one line that tell of an error."""
    said = " ".join(str(error).split())
    code = error.errno if isinstance(error, OSError) else None
    if isinstance(error, UserError):
        return 2, f"error: {said}"
    if isinstance(error, WorkError):
        return 1, f"failed: {said}"
    if isinstance(error, click.UsageError):
        advice = f" (see {error.ctx.command_path} --help)" if error.ctx else ""
        return 2, f"error: {' '.join(error.format_message().split())}{advice}"
    if isinstance(error, ModuleNotFoundError):
        return 2, f"error: {error.name} is not installed; pip install -r requirements.txt"
    if isinstance(error, OSError) and code in NO_PATH and error.filename:
        return 2, f"error: {shown(str(error.filename))}: {os.strerror(code)}; {NO_PATH[code]}"
    if isinstance(error, MemoryError) or code == errno.ENOMEM or any(words in said for words in _NO_MEMORY):
        return 1, f"failed: not enough memory ({shown(said or type(error).__name__)}); free some, or do with less"
    if code in (errno.ENOSPC, errno.EIO, errno.EPIPE, errno.EBADF, errno.EDQUOT):
        _drop_output()
        where = error.filename if isinstance(error, OSError) and error.filename else "the output"
        return 1, f"failed: {where}: {os.strerror(code)}; nothing more can be written there"
    if sys.flags.optimize >= 2:
        return 2, "error: Python runs with -OO, without the docstrings that libraries need; run it without"
    if os.environ.get("HEADROOM_DEBUG") == "1":
        traceback.print_exception(error)
    place = traceback.extract_tb(error.__traceback__)[-1:]
    where = "".join(f" at {frame.filename}:{frame.lineno}" for frame in place)
    return 1, (
        f"failed: unexpected {type(error).__name__} ({shown(reason(error))}){where}; please report it "
        "(HEADROOM_DEBUG=1 shows all)"
    )


_NO_MEMORY = ("annot allocate memory", "can't allocate memory", "out of memory", "bad_alloc", "start new thread")


def _drop_output() -> None:
    """Let nothing try to write the rest once more when Python ends."""
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
