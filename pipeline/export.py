"""Share a run: a folder in Hub format that works where Headroom is not installed, with its model card."""

import importlib.metadata
import json
import os
import shutil
from pathlib import Path
from typing import Any

import yaml

from eval.errors import UserError, WorkError, reason, shown
from eval.results import Results, load_results, save_json
from pipeline import __version__
from pipeline.artifacts import Manifest, RunFolder, disk_errors, replace_folder, sha256_tree, sync
from pipeline.choices import differences, kept_recipe
from pipeline.recipe import Recipe
from pipeline.runner import RECIPE, RESULTS
from pipeline.stages import BY_NAME
from pipeline.stale import stale_caveat

MARK = "headroom.json"
"""What tells an export from any other folder: the run, its stages and the sha256 of each file."""
_OF_A_RUN = (*BY_NAME, "measurements", "plots", "tracking", "traces")
_LONGEST = 240
"""Bytes of the folder's name, so that the one it is written in beside can have its own."""
_CODE = Path(__file__).parent / "model"
_MODULES = ("configuration.py", "grouping.py", "modeling.py", "rope.py", "window.py")
_AUTO_MAP = {
    "AutoConfig": "configuration.CompactGPT2Config",
    "AutoModel": "modeling.CompactGPT2Model",
    "AutoModelForCausalLM": "modeling.CompactGPT2LMHeadModel",
}
# As their cards on the Hub say.
_OPENAI = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
_WEIGHTS = {"embedded": "mit"} | {prefix + name: "mit" for name in _OPENAI for prefix in ("", "openai-community/")}
_WIKITEXT = ("embedded:", "hub:Salesforce/wikitext")
_TOLD = ("name", "recipe.load.source", "recipe.data.train", "recipe.data.calibration", "machine", "versions")
"""What a model card tells of the run."""


def export(
    run_folder: Path,
    to: Path,
    *,
    precision: str = "fp16",
    licence: str | None = None,
    repo: str | None = None,
    force: bool = False,
) -> Path:
    """Write the run's last pruned model to `to`; returns `to`.

    The folder holds `model.safetensors` (`precision` fp16 or fp32), `config.json` with an `auto_map` onto the
    model code beside it, tokenizer, generation config, the INT8 IR in `openvino/`, `README.md` (the model card),
    `LICENSE` and `headroom.json`. `licence` is the weights' licence by its Hub identifier, where the model they
    come from does not tell; `repo` is what the card's examples call the model.
    It is written beside its place and takes it at once. Raises `UserError` where the run is not whole, or `to`
    is there: only an export is ever replaced, and that with `force`.
    """
    if precision not in ("fp16", "fp32"):
        raise UserError(f"--precision {precision}: give fp16 or fp32")
    if not (run_folder / RESULTS).exists():
        raise UserError(f"{run_folder}: holds no {RESULTS}; give the folder of a finished run")
    run = RunFolder(run_folder)
    partial = to.absolute().with_name(f".{to.name}.partial") if to.name else to
    with disk_errors(partial), run.unchanging():
        _check_place(to, run_folder, force)
        results = load_results(run_folder / RESULTS)
        if untold := [key for key in _TOLD if not _told(results.run, key)]:
            raise UserError(f"{run_folder / RESULTS}: run.{untold[0]}: missing; run the pipeline again")
        stages = _chain(run, results)
        name = next(iter(stages))
        weights = _weights(run, name, precision)
        partial.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        _copy_model(run.stage(name), weights, stages[name], partial)
        if "quantize" in stages:
            _copy_model(run.stage("quantize"), "model", stages["quantize"], partial / "openvino")
        (partial / "LICENSE").write_text(_code_licence(), encoding="utf-8")
        card = _card(results, stages[name], precision, licence, repo or to.name, "quantize" in stages)
        (partial / "README.md").write_text(card, encoding="utf-8")
        mark = {
            "export": 1,
            "headroom": __version__,
            "run": results.run["name"],
            "stages": {stage: manifest.content for stage, manifest in stages.items()},
            "files": sha256_tree(partial),
        }
        save_json(mark, partial / MARK)
        sync(partial)
        replace_folder(partial, to)
    return to


def upload(folder: Path, repo: str, *, public: bool = False) -> str:
    """Upload an export to the Hub (or whatever `HF_ENDPOINT` names); returns the commit's address.

    A repository that is not there is made, private unless `public`. Raises `WorkError` where the upload fails.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi(library_name="headroom", library_version=__version__)
        api.create_repo(repo, private=not public, exist_ok=True)
        commit = api.upload_folder(repo_id=repo, folder_path=folder, commit_message=f"Headroom {__version__} export")
        return commit.commit_url
    except Exception as error:  # no token, no permission, no network, a server's refusal: many types
        raise WorkError(
            f"{repo}: not uploaded ({reason(error)}); {folder} is whole: mend that, then run again with --force"
        ) from error


def check_repo(repo: str) -> None:
    """Raise `UserError` where `repo` is no name that the Hub allows."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UserError(f"--push {repo}: no name for a repository on the Hub; give OWNER/NAME") from error


def _check_place(to: Path, run: Path, force: bool) -> None:
    """Raise `UserError` unless the export can take its place, alone or in place of an earlier one."""
    here, place, inside = (Path(os.path.realpath(path)) for path in (".", to, run))
    if not to.name or to.name == ".." or here.is_relative_to(place):
        raise UserError(f"--to {to}: is the folder you are in, or above it; give a folder to be made, such as exported")
    if inside.is_relative_to(place):
        raise UserError(f"--to {to}: is the run's folder, or around it; give one of its own")
    if place.is_relative_to(inside) and place.relative_to(inside).parts[0] in _OF_A_RUN:
        raise UserError(f"--to {to}: among what the run itself keeps; give one of its own, such as {run / 'export'}")
    if len(os.fsencode(to.name)) > _LONGEST:
        raise UserError(f"--to {shown(str(to))}: the name is too long; give one of at most {_LONGEST} bytes")
    if to.exists() or to.is_symlink():
        _replaceable(to, force)


def _replaceable(to: Path, force: bool) -> None:
    try:
        mark = json.loads((to / MARK).read_text(encoding="utf-8"))
        ours = isinstance(mark, dict) and mark.get("export") == 1 and not to.is_symlink()
    except (OSError, ValueError):
        ours = False
    if not ours:
        raise UserError(f"{to}: is there already, and no export; give another --to")
    if not force:
        raise UserError(f"{to}: holds an export already; give another --to, or --force to replace it")


def _chain(run: RunFolder, results: Results) -> dict[str, Manifest]:
    """The manifests of what is exported: the last pruned model, then the IR if there is one; all of one making."""
    kept = kept_recipe(run.path / RECIPE)
    if kept is None:
        raise UserError(f"{run.path / RECIPE}: missing or damaged; {_finish(run)}")
    if differences(results.run.get("recipe"), kept.model_dump(mode="json"), Recipe().model_dump(mode="json")):
        raise UserError(f"{run.path}: {RESULTS} is of another recipe than {RECIPE}; {_finish(run)}")
    for line in stale_caveat(run.path, results):
        raise UserError(f"{run.path}: {line.removesuffix('.')}; {_finish(run)}")
    name = next((stage for stage in ("finetune", "prune") if run.stage(stage).exists()), None)
    if name is None:
        raise UserError(f"{run.path}: holds no pruned model; {_finish(run)}")
    with_ir = run.stage("quantize").exists()
    if untold := {name, *(["quantize"] if with_ir else [])} - {row.stage for row in results.rows}:
        raise UserError(f"{run.path}: {RESULTS} does not tell of {' and '.join(sorted(untold))}; {_finish(run)}")
    stages = {name: run.verify(name)}
    if with_ir:
        stages["quantize"] = run.verify("quantize")
        if stages["quantize"].inputs.get(name) != stages[name].content:
            raise UserError(f"{run.stage('quantize')}: made from another {name}; {_finish(run)}")
    return stages


def _finish(run: RunFolder) -> str:
    return f"run: python -m pipeline run --recipe {run.path / RECIPE} --out {run.path}"


def _weights(run: RunFolder, stage: str, precision: str) -> str:
    """The folder of the weights in their stage's."""
    if stage == "finetune":
        return "model" if precision == "fp32" else "model_fp16"
    if precision == "fp32":
        raise UserError(f"{run.path}: has no fine-tuned model, and only that is kept in FP32; leave out --precision")
    return "model"


def _copy_model(stage: Path, model: str, manifest: Manifest, target: Path) -> None:
    """A stage's model folder, without what its manifest does not name, and with the code that runs it."""
    for name in manifest.files:
        if name.startswith(f"{model}/"):
            copy = target / name.removeprefix(f"{model}/")
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(stage / name, copy)
    for module in _MODULES:
        shutil.copyfile(_CODE / module, target / module)
    config = json.loads((target / "config.json").read_text(encoding="utf-8"))
    save_json(config | {"auto_map": _AUTO_MAP}, target / "config.json")


def _code_licence() -> str:
    """Headroom's licence, which its model code carries along."""
    path = Path(__file__).parents[1] / "LICENSE"
    if path.exists():
        return path.read_text(encoding="utf-8")
    return importlib.metadata.distribution("headroom").read_text("licenses/LICENSE") or ""


def _told(run: Any, key: str) -> bool:
    """Whether a dotted key is in what is told of a run."""
    for part in key.split("."):
        if part not in run:
            return False
        run = run[part]
    return True


def _card(results: Results, manifest: Manifest, precision: str, licence: str | None, model: str, with_ir: bool) -> str:
    from pipeline.report import fence, flat, templates
    from plots import findings
    from plots.table import legend, markdown, markdown_table

    recipe = _without_paths(results.run["recipe"])
    source, data = recipe["load"]["source"], recipe["data"]
    known = licence or _WEIGHTS.get(source)
    texts = {
        text: "CC BY-SA 3.0 and GFDL" if text.startswith(_WIKITEXT) else None
        for text in dict.fromkeys((data["train"], data["calibration"]))
    }
    head: dict[str, Any] = {
        "license": known or "other",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["gpt2", "pruned", "compact_gpt2", *(["openvino", "int8"] if with_ir else [])],
    }
    if source in _WEIGHTS and source != "embedded":
        head["base_model"] = source
    return (
        templates()
        .get_template("card.md.j2")
        .render(
            head=yaml.safe_dump(head, sort_keys=False),
            title=results.run["name"],
            model=json.dumps(model, ensure_ascii=False),
            precision=precision,
            parameters=manifest.details["parameters"],
            finetuned=manifest.stage == "finetune",
            with_ir=with_ir,
            summary=findings.summary(results),
            table=markdown_table(results),
            legend=[line for line in legend(results) if not line.startswith(("b: ", "c: "))],
            protocol=findings.protocol(results),
            caveats=findings.caveats(results),
            machine=flat(results.run["machine"]),
            versions=results.run["versions"],
            recipe=fence(yaml.safe_dump(recipe, sort_keys=False), "yaml"),
            source=source,
            licence=known,
            texts=texts,
            markdown=markdown,
        )
    )


def _without_paths(recipe: dict[str, Any]) -> dict[str, Any]:
    """The recipe with local files and folders by name alone: where they lie is nobody's business."""
    source = recipe["load"]["source"]
    local = source.startswith((".", "/", "~")) or source.count("/") > 1 or Path(source).exists()
    load = recipe["load"] | {"source": Path(source).name if local else source}
    data = {
        key: text if text.startswith(("embedded:", "hub:")) else Path(text).name for key, text in recipe["data"].items()
    }
    return recipe | {"load": load, "data": data}
