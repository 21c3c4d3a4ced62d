"""Order the stages, skip what is up to date, resume what was cut off, measure, report."""

import contextlib
import shlex
import sys
from collections.abc import Sequence
from dataclasses import fields
from datetime import UTC, datetime
from pathlib import Path

import yaml

from eval.errors import UserError
from eval.results import CurvePoint, Heads, Results, save_results, save_text
from pipeline import hardware
from pipeline.artifacts import RunFolder, disk_errors, fingerprint, git_commit, versions
from pipeline.data import sha256_text
from pipeline.measure import Measurer, check_lengths, load_tasks
from pipeline.model import CompactGPT2Config
from pipeline.recipe import Recipe
from pipeline.report import write_report
from pipeline.stages import BY_NAME, STAGES, Job, Stage
from pipeline.store import Store
from pipeline.texts import load_text, refuse_overlap
from pipeline.tracking import Tracking
from pipeline.training import is_main_process, world_size

_HEADS = tuple(field.name for field in fields(Heads))
RESULTS = "results.json"
RECIPE = "recipe.yaml"


class Runner:
    """One run folder and the recipe it follows."""

    def __init__(self, recipe: Recipe, out: Path, store: Path | None = None, *, track: str = "none"):
        """`store` is a folder of stages that other runs may have made, and may go on with.

        `track` says where trainings and table are logged beside `out`: tensorboard, mlflow or none.
        """
        self.recipe = recipe
        self.run = RunFolder(out)
        self.store = Store(store) if store else None
        self.tracking = Tracking(track, out / "tracking")
        self.device = hardware.default_device()
        self._digests: dict[str, str] = {}

    def execute(self, *, until: str | None = None, force: Sequence[str] = ()) -> Results:
        """Make all stages (up to `until`), measure them side by side, write results and report."""
        wanted = self._plan(until)
        for name in force:
            if name not in BY_NAME:
                raise UserError(f"--force {name}: no such stage; give one of {', '.join(BY_NAME)}")
        with self.run.locked(), disk_errors(self.run.path):
            self._make(wanted, force)
            results = self._results([stage.name for stage in wanted], latency=True)
            save_results(results, self.run.path / RESULTS)
            write_report(self.run.path)
            self.tracking.called(f"{self.recipe.name}-stages").table(results, self.run.path / RESULTS)
        return results

    def build(self) -> None:
        """Make all stages and measure nothing."""
        with self.run.locked(), disk_errors(self.run.path):
            self._make(self._plan(None), ())

    def _make(self, wanted: Sequence[Stage], force: Sequence[str]) -> None:
        self._check_texts(wanted)
        load_tasks(self.recipe.measure.tasks)
        self._keep_recipe()
        for stage in wanted:
            self._bring_up_to_date(stage, stage.name in force)
            if stage.name == "load":
                config = CompactGPT2Config.from_pretrained(self.run.stage("load") / "model")
                check_lengths(self.recipe.measure, config.n_positions)

    def stage(self, name: str, *, force: bool = False) -> Results:
        """Make one stage from the stages before it, which must be there; then measure its quality."""
        stage = BY_NAME[name]
        if world_size() > 1:
            self._stage_with_others(stage)
            return Results(run={}, rows=[])
        with self.run.locked(), disk_errors(self.run.path):
            self._check_texts([stage])
            self._require(stage)
            self._keep_recipe()
            self._bring_up_to_date(stage, force)
            return self._results([name], latency=False)

    def _results(self, stages: Sequence[str], *, latency: bool) -> Results:
        """Rows, heads and curves of finished stages."""
        manifests = {name: self.run.verify(name) for name in stages}
        measurer = Measurer(self.run, self.recipe, manifests)
        return Results(
            run={
                "name": self.recipe.name,
                "recipe": self.recipe.model_dump(mode="json"),
                "machine": {"cpu": hardware.cpu(), "gpu": hardware.gpu()},
                "versions": versions(),
                "git_commit": git_commit(),
                "date": datetime.now(UTC).isoformat(timespec="seconds"),
                "seconds": {name: manifest.seconds for name, manifest in manifests.items()},
                "training_seconds": {
                    name: manifest.details["training_seconds"]
                    for name, manifest in manifests.items()
                    if "training_seconds" in manifest.details
                },
                "command": shlex.join(
                    [
                        "python",
                        "-m",
                        "pipeline",
                        "run",
                        "--recipe",
                        f"{self.run.path}/{RECIPE}",
                        "--out",
                        str(self.run.path),
                    ]
                ),
            },
            rows=measurer.rows(latency=latency),
            quantization=measurer.quantization(),
            agreement=measurer.agreement() if latency else None,
            heads={
                name: Heads(**{key: manifest.details[key] for key in _HEADS if key in manifest.details})
                for name, manifest in manifests.items()
                if "scores" in manifest.details
            },
            curves={
                name: [CurvePoint(**point) for point in manifest.details["curve"]]
                for name, manifest in manifests.items()
                if "curve" in manifest.details
            },
        )

    def _plan(self, until: str | None) -> list[Stage]:
        """The wanted stages in order; with `until`, up to that one."""
        if until is not None and until not in BY_NAME:
            raise UserError(f"--until {until}: no such stage; give one of {', '.join(BY_NAME)}")
        last = len(STAGES) if until is None else STAGES.index(BY_NAME[until]) + 1
        return [stage for stage in STAGES[:last] if stage.wanted(self.recipe) or stage.name == until]

    def fingerprint(self, stage: Stage) -> str:
        """What decides a stage's content: its recipe part, texts, code version, and the content of its input.

        The input's content, not its fingerprint: made again elsewhere, on a GPU say, a stage may differ.
        """
        return fingerprint(
            {
                "stage": stage.name,
                "version": stage.version,
                "config": stage.config(self.recipe),
                "texts": self._texts(stage),
                "inputs": self._inputs(stage),
            }
        )

    def _inputs(self, stage: Stage) -> dict[str, str]:
        """The content of the stages it is made from. Raises `UserError` if one is not there."""
        found = {}
        for name in (*([stage.after] if stage.after else []), *stage.consults(self.recipe)):
            manifest = self.run.manifest(name)
            if manifest is None:
                raise UserError(f"{self.run.stage(name)}: no such stage; {self._how_to_make(name)}")
            found[name] = manifest.content
        return found

    def _texts(self, stage: Stage) -> dict[str, str]:
        """The sha256 of each text it reads."""
        return {source: self._digest(source) for source in stage.reads(self.recipe)}

    def _how_to_make(self, name: str) -> str:
        return f"run: python -m pipeline {name} --out {self.run.path}"

    def _digest(self, source: str) -> str:
        if source not in self._digests:
            self._digests[source] = sha256_text(load_text(source))
        return self._digests[source]

    def _check_texts(self, stages: Sequence[Stage]) -> None:
        """Before any work: the texts can be had, and none is also what the model will be judged on."""
        sources = dict.fromkeys(source for stage in stages for source in stage.reads(self.recipe))
        if sources:
            evaluation = load_text(self.recipe.data.evaluation)
            for source in sources:
                refuse_overlap(source, load_text(source), evaluation)

    def _keep_recipe(self) -> None:
        save_text(yaml.safe_dump(self.recipe.model_dump(mode="json"), sort_keys=False), self.run.path / RECIPE)

    def _require(self, stage: Stage) -> None:
        """Check that what a stage is made from is there, whole, and made by this recipe."""
        for name in self._inputs(stage):
            manifest = self.run.verify(name)
            if manifest.fingerprint != self.fingerprint(BY_NAME[name]):
                raise UserError(
                    f"{self.run.stage(name)}: made with other choices than the recipe's; {self._how_to_make(name)}"
                )

    def _bring_up_to_date(self, stage: Stage, force: bool) -> None:
        mark = self.fingerprint(stage)
        with self.store.claimed(stage.name, mark) if self.store else contextlib.nullcontext():
            self._obtain(stage, mark, force)
            if self.store:
                self.store.keep(stage.name, mark, self.run)

    def _obtain(self, stage: Stage, mark: str, force: bool) -> None:
        """The stage as it is, or from the store, or made."""
        manifest = None if force else self.run.manifest(stage.name)
        if manifest is not None and manifest.fingerprint == mark:
            self.run.verify(stage.name)
            print(f"{stage.name}: up to date", file=sys.stderr)
            return
        if self.store and not force and self.store.take(stage.name, mark, self.run):
            print(f"{stage.name}: shared", file=sys.stderr)
            return
        print(f"{stage.name}: at work", file=sys.stderr)
        made = self.run.publish(
            stage.name,
            mark,
            lambda folder: stage.build(self._job(stage, folder)),
            config=stage.config(self.recipe),
            inputs=self._inputs(stage),
            texts=self._texts(stage),
            seed=self.recipe.seed,
            machine={"cpu": hardware.cpu(), "gpu": hardware.gpu()},
        )
        print(f"{stage.name}: done in {made.seconds:.1f} s", file=sys.stderr)

    def _job(self, stage: Stage, folder: Path) -> Job:
        source = self.run.stage(stage.after) if stage.after else None
        # A training that goes on has the same name, one by other choices another.
        tracking = self.tracking.called(f"{self.recipe.name}-{stage.name}-{self.fingerprint(stage)[:8]}")
        return Job(self.recipe, folder, source, self.device, teacher=self.run.stage("half"), tracking=tracking)

    def _stage_with_others(self, stage: Stage) -> None:
        """Fine-tune under `torchrun` or `accelerate launch`: the first process keeps the folder."""
        from accelerate import PartialState

        if stage.build is not BY_NAME["finetune"].build:
            raise UserError(f"{stage.name}: works in one process; start it without torchrun or accelerate launch")
        state = PartialState(cpu=self.device == "cpu")
        if is_main_process():
            with self.run.locked(), disk_errors(self.run.path):
                self._check_texts([stage])
                self._require(stage)
                self._keep_recipe()
                self.run.partial(stage.name, self.fingerprint(stage))
                state.wait_for_everyone()
                self._bring_up_to_date(stage, force=True)
        else:
            state.wait_for_everyone()
            stage.build(self._job(stage, self.run.partial(stage.name, self.fingerprint(stage))))
