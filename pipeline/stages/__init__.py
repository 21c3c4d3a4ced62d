"""The stages of a run and how they hang together."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pipeline.recipe import Recipe
from pipeline.stages import finetune, half, load, prune, quantize
from pipeline.stages.job import Job


@dataclass(frozen=True)
class Stage:
    """A step from one stage folder to the next."""

    name: str
    after: str | None
    """The stage it starts from."""
    version: int
    """Part of the fingerprint: raised when the code changes what the stage makes."""
    config: Callable[[Recipe], dict[str, Any]]
    build: Callable[[Job], dict[str, Any]]
    part: str = ""
    """The part of the recipe that `config` takes its keys from, beside the seed."""
    wanted: Callable[[Recipe], bool] = lambda recipe: True
    reads: Callable[[Recipe], tuple[str, ...]] = lambda recipe: ()
    """The sources of the texts it reads."""
    consults: Callable[[Recipe], tuple[str, ...]] = lambda recipe: ()
    """Other stages it reads."""


def _calibration(recipe: Recipe) -> tuple[str, ...]:
    return (recipe.data.calibration,)


def _teacher(recipe: Recipe) -> tuple[str, ...]:
    return ("half",) if recipe.finetune.distill else ()


def _train(recipe: Recipe) -> tuple[str, ...]:
    return (recipe.data.train,)


STAGES = (
    Stage("load", None, load.VERSION, load.config, load.build, "load"),
    Stage("half", "load", half.VERSION, half.config, half.build),
    Stage("prune", "half", prune.VERSION, prune.config, prune.build, "prune", reads=_calibration),
    Stage(
        "control-random",
        "half",
        prune.VERSION,
        prune.control_config,
        prune.build_control,
        "prune",
        wanted=lambda recipe: recipe.controls.random_heads,
        reads=_calibration,
    ),
    Stage(
        "finetune",
        "prune",
        finetune.VERSION,
        finetune.config,
        finetune.build,
        "finetune",
        reads=_train,
        consults=_teacher,
    ),
    Stage(
        "control-finetune",
        "half",
        finetune.VERSION,
        finetune.config,
        finetune.build,
        "finetune",
        wanted=lambda recipe: recipe.controls.dense_finetuned,
        reads=_train,
        consults=_teacher,
    ),
    Stage(
        "control-plain",
        "prune",
        finetune.VERSION,
        finetune.plain_config,
        finetune.build_plain,
        "finetune",
        wanted=lambda recipe: recipe.controls.plain_finetuned and recipe.finetune.distill is not None,
        reads=_train,
        consults=_teacher,
    ),
    Stage("quantize", "finetune", quantize.VERSION, quantize.config, quantize.build, "quantize", reads=quantize.reads),
)
BY_NAME = {stage.name: stage for stage in STAGES}

__all__ = ["BY_NAME", "STAGES", "Job", "Stage"]
