"""Order the stages, skip what is up to date, resume what was cut off, measure, report."""

import contextlib
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import fields
from datetime import UTC, datetime
from pathlib import Path

from eval.errors import UserError, shown
from eval.results import CurvePoint, Heads, Results, load_results, save_results, save_text
from pipeline import hardware, plain
from pipeline.artifacts import Manifest, RunFolder, disk_errors, fingerprint, git_commit, refuse_strangers, versions
from pipeline.choices import differences, kept_recipe, listed, written_by_a_run
from pipeline.data import sha256_text
from pipeline.measure import Measurer, check_lengths, load_tasks
from pipeline.model import CompactGPT2Config
from pipeline.options import MEASURE
from pipeline.recipe import Recipe
from pipeline.report import REPORTS, write_report
from pipeline.stages import BY_NAME, STAGES, Job, Stage, load
from pipeline.store import Store
from pipeline.texts import load_text, refuse_overlap
from pipeline.tracking import Tracking
from pipeline.training import is_main_process, world_size

_HEADS = tuple(field.name for field in fields(Heads))
RESULTS = "results.json"
RECIPE = "recipe.yaml"
_ORDER = (*BY_NAME, MEASURE)


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
        """Make all stages (up to `until`), measure them side by side, write results and report.

        What is finished there by other choices is refused, but for `force`d stages and those after them;
        `measure`, the last, are the measurements.
        """
        wanted = self._plan(until)
        for name in force:
            if name not in (*BY_NAME, MEASURE):
                raise UserError(f"--force {name}: no such stage; give one of {', '.join((*BY_NAME, MEASURE))}")
            if name != MEASURE and BY_NAME[name] not in wanted:
                raise UserError(f"--force {name}: no stage of this call; leave it out, or --until")
        self._check(wanted)
        with self.run.locked(), disk_errors(self.run.path):
            with self._recipe_kept():
                self._make(wanted, force)
                results = self._results([stage.name for stage in wanted], latency=True)
            save_results(results, self.run.path / RESULTS)
            write_report(self.run.path)
            self.tracking.called(f"{self.recipe.name}-stages").table(results, self.run.path / RESULTS)
        return results

    def build(self) -> None:
        """Make all stages and measure nothing."""
        wanted = self._plan(None)
        self._check(wanted)
        with self.run.locked(), disk_errors(self.run.path), self._recipe_kept():
            self._make(wanted, ())

    def _make(self, wanted: Sequence[Stage], force: Sequence[str]) -> None:
        for stage in wanted:
            if stage.name in force:
                self.run.replaceable(stage.name)
            else:
                self.run.manifest(stage.name)  # which says so if it is damaged
        allowed = min((_ORDER.index(name) for name in force), default=len(_ORDER))
        for where, what in self.other_choices(wanted):
            if _ORDER.index(where) < allowed:
                raise UserError(f"{self.run.path}: {what}; give another --out, or {self._remedy(where, wanted)}")
        for stage in wanted:
            self._bring_up_to_date(stage, stage.name in force)

    def _remedy(self, where: str, wanted: Sequence[Stage]) -> str:
        """What lets other choices of a stage, or of `measure`, in."""
        if where == MEASURE or BY_NAME[where] in wanted:
            return f"--force {where}"
        later = STAGES.index(BY_NAME[where]) > STAGES.index(wanted[-1])
        return "leave out --until" if later else f"delete {self.run.stage(where)}"

    def stage(self, name: str, *, force: bool = False) -> Results:
        """Make one stage from the stages before it, which must be there; then measure its quality."""
        stage = BY_NAME[name]
        if world_size() > 1:
            self._stage_with_others(stage, force)
            return Results(run={}, rows=[])
        self._inputs(stage)
        self._check([stage])
        with self.run.locked(), disk_errors(self.run.path):
            self._acceptable(stage, force)
            with self._recipe_kept():
                self._bring_up_to_date(stage, force)
                return self._results([name], latency=False)

    def _acceptable(self, stage: Stage, force: bool) -> None:
        """What one stage alone needs: the stages before it, and that nothing is finished by other choices."""
        self._require(stage)
        if force:
            self.run.replaceable(stage.name)
            return
        going_on = kept_recipe(self.run.path / RECIPE) == self.recipe
        for name, what in self.other_choices([stage]):
            if name == stage.name or not going_on:
                raise UserError(f"{self.run.path}: {what}; give another --out, or --force")

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
                "stages": {name: manifest.content for name, manifest in manifests.items()},
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
        return f"first run, by the same recipe: python -m pipeline {name} --out {self.run.path}"

    def _digest(self, source: str) -> str:
        if source not in self._digests:
            self._digests[source] = sha256_text(load_text(source))
        return self._digests[source]

    def _check(self, wanted: Sequence[Stage]) -> None:
        """Before anything is written: the folder is no other's, the model, texts and tasks can be had, lengths fit."""
        self._refuse_strangers()
        if BY_NAME["load"] in wanted:
            check_lengths(self.recipe.measure, self._loaded_config().n_positions)
        evaluation = load_text(self.recipe.data.evaluation)
        for source in dict.fromkeys(source for stage in wanted for source in stage.reads(self.recipe)):
            refuse_overlap(source, load_text(source), evaluation)
        load_tasks(self.recipe.measure.tasks)

    def _loaded_config(self) -> CompactGPT2Config:
        """Of the model that `load` gives: as it stands there if it is up to date, else of the source, tried whole."""
        stage = BY_NAME["load"]
        manifest = self._finished(stage)
        if manifest is not None and manifest.fingerprint == self.fingerprint(stage):
            with contextlib.suppress(UserError):  # a damaged one is told of, or made again, where it is used
                self.run.verify(stage.name)
                return CompactGPT2Config.from_pretrained(self.run.stage(stage.name) / "model")
        model, _ = load.wanted(self.recipe)
        return model.config

    def _refuse_strangers(self) -> None:
        path = self.run.path / RECIPE
        if any(self._finished(stage) for stage in STAGES) or self._last_results() or written_by_a_run(path):
            return
        refuse_strangers(self.run.path, (*BY_NAME, "measurements", "plots", RESULTS, *REPORTS), "run")
        if path.exists() and kept_recipe(path) != self.recipe:
            raise UserError(f"{path}: not written by a run, so none replaces it; give another --out")

    def other_choices(self, wanted: Sequence[Stage]) -> Iterator[tuple[str, str]]:
        """What is finished in the folder by other choices than the recipe's: the stage, or `measure`, and how it
        differs; the earliest first. Of the stages that are not `wanted` no text is read.

        A recipe that the folder keeps already is no other choice, whatever was measured before.
        """
        for stage in STAGES:
            manifest = self._finished(stage)
            changes = self._changes(stage, manifest, stage in wanted) if manifest else []
            if changes:
                yield stage.name, f"{stage.name} was made by other choices ({listed(changes)})"
        results = self._last_results()
        if results is None:
            return
        changes = []
        if kept_recipe(self.run.path / RECIPE) != self.recipe:
            defaults = Recipe().model_dump(mode="json")
            changes = differences(results.run.get("recipe", {}), self.recipe.model_dump(mode="json"), defaults)
        evaluation = self._digest(self.recipe.data.evaluation)
        if not changes and any(row.quality and row.quality.text_sha256 != evaluation for row in results.rows):
            changes = [f"{self.recipe.data.evaluation} was another text"]
        if changes:
            yield MEASURE, f"it was measured by other choices ({listed(changes)})"

    def _changes(self, stage: Stage, manifest: Manifest, read: bool) -> list[str]:
        """How the choices that made a stage differ from the recipe's, each by its key; with `read`, its texts too."""
        defaults = Recipe().model_dump(mode="json").get(stage.part, {})
        chosen = stage.config(self.recipe)
        changes = []
        if chosen.pop("content", None) != manifest.config.get("content"):
            changes = [f"{self.recipe.load.source} was another model"]
        seed = [manifest.config.get("seed"), chosen.pop("seed", None)]
        if seed[0] != seed[1]:
            changes.append(f"seed was {seed[0]}, is {seed[1]}")
        was = {key: value for key, value in manifest.config.items() if key not in ("content", "seed")}
        # One that is left out stands for its default, on either side.
        changes = differences({stage.part: was}, {stage.part: defaults | chosen}, {stage.part: defaults}) + changes
        key = "data.train" if stage.part == "finetune" else "data.calibration"
        for source in stage.reads(self.recipe):
            if source not in manifest.texts:
                changes.append(f"{key} was {shown(', '.join(manifest.texts) or 'none')}, is {source}")
            elif read and manifest.texts[source] != self._digest(source):
                changes.append(f"{source} was another text")
        return changes

    def _finished(self, stage: Stage) -> Manifest | None:
        """The manifest of a stage; `None` where there is none, or a damaged one."""
        try:
            return self.run.manifest(stage.name)
        except UserError:
            return None

    def _last_results(self) -> Results | None:
        try:
            return load_results(self.run.path / RESULTS)
        except UserError:
            return None

    @contextlib.contextmanager
    def _recipe_kept(self) -> Iterator[None]:
        """Keep the recipe in the folder, so that recipe.yaml always tells of work that was accepted.

        Beside results it changes only when the work within is done. Before there are any it is written at once, so
        that a killed run goes on by it; but work that fails before a stage was finished leaves what was there.
        """
        path = self.run.path / RECIPE
        finished = self._last_results() is not None
        before = path.read_text(encoding="utf-8") if path.exists() else None
        stages = [self._finished(stage) for stage in STAGES]
        if not finished:
            self._write_recipe(path)
        try:
            yield
        except Exception:
            if not finished and stages == [self._finished(stage) for stage in STAGES]:
                path.unlink() if before is None else save_text(before, path)
            raise
        self._write_recipe(path)

    def _write_recipe(self, path: Path) -> None:
        if kept_recipe(path) != self.recipe:
            save_text(plain.dump(self.recipe.model_dump(mode="json")), path)

    def _require(self, stage: Stage) -> None:
        """Check that what a stage is made from is there, whole, and made by this recipe."""
        for name in self._inputs(stage):
            manifest = self.run.verify(name)
            if manifest.fingerprint != self.fingerprint(BY_NAME[name]):
                changes = listed(self._changes(BY_NAME[name], manifest, read=True))
                raise UserError(
                    f"{self.run.stage(name)}: made with other choices than the recipe's{changes and f' ({changes})'}; "
                    f"give another --out, or {self._how_to_make(name)} --force"
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
        self.run.replaceable(stage.name)
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

    def _stage_with_others(self, stage: Stage, force: bool) -> None:
        """Fine-tune under `torchrun` or `accelerate launch`: the first process keeps the folder."""
        from accelerate import PartialState

        if stage.build is not BY_NAME["finetune"].build:
            raise UserError(f"{stage.name}: works in one process; start it without torchrun or accelerate launch")
        state = PartialState(cpu=self.device == "cpu")
        if is_main_process():
            self._check([stage])
            with self.run.locked(), disk_errors(self.run.path):
                self._acceptable(stage, force)
                with self._recipe_kept():
                    self.run.partial(stage.name, self.fingerprint(stage))
                    state.wait_for_everyone()
                    self._bring_up_to_date(stage, force=True)
        else:
            state.wait_for_everyone()
            stage.build(self._job(stage, self.run.partial(stage.name, self.fingerprint(stage))))
