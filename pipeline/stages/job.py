"""What a stage is given to work with."""

from dataclasses import dataclass, field
from pathlib import Path

from pipeline.recipe import Recipe
from pipeline.tracking import Tracking


@dataclass(frozen=True)
class Job:
    """One stage's work: fill `out` from the recipe and the folders of the stages it stands on."""

    recipe: Recipe
    out: Path
    source: Path | None
    """The finished stage this one starts from; `None` for the first."""
    device: str
    """`cpu` or `cuda:0`."""
    teacher: Path | None = None
    """The dense FP16 stage, for distillation."""
    tracking: Tracking = field(default_factory=Tracking)
    """Where a training is logged."""
