"""The points of a sweep: a recipe at all combinations of some keys' values."""

import itertools
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from eval.errors import UserError, shown
from pipeline import plain
from pipeline.artifacts import fingerprint
from pipeline.recipe import Recipe, holds_text, load_recipe, parse_recipe, read_value, set_value

_MOST_POINTS = 1000


@dataclass(frozen=True)
class Point:
    """One combination of the grid."""

    choices: dict[str, Any]
    """Recipe key -> value."""
    recipe: Recipe

    @property
    def name(self) -> str:
        """A folder name, the same for the same choices."""
        plain = ",".join(f"{key}={value}" for key, value in self.choices.items())
        safe = re.sub(r"[^\w.,=+-]", "_", plain, flags=re.ASCII)[:100]
        return plain if plain == safe else f"{safe}-{fingerprint(self.choices)}"


def expand(recipe: str, grids: Sequence[str], changes: Sequence[str] = ()) -> list[Point]:
    """All combinations of `grids` (`KEY=VALUE,VALUE...`, see `_values`) on a recipe, the last key fastest.

    Raises `UserError` for a grid that cannot be read, or a point whose recipe is wrong.
    """
    axes: dict[str, list[Any]] = {}
    for grid in grids:
        key, _, text = grid.partition("=")
        values = _values(key, text) if key and text else []
        if not values or None in values:
            raise UserError(f"--grid {shown(grid)}: give KEY=VALUE,VALUE as in prune.ratio=0.1,0.2,0.4")
        if key in axes:
            raise UserError(f"--grid {shown(grid)}: the key is given twice")
        axes[key] = values
    if not axes:
        raise UserError("--grid is missing: give KEY=VALUE,VALUE as in prune.ratio=0.1,0.2,0.4")
    if (count := math.prod(map(len, axes.values()))) > _MOST_POINTS:
        raise UserError(f"--grid: {count:,} points; give at most {_MOST_POINTS:,}")
    base = load_recipe(Recipe, recipe, changes).model_dump(mode="json")
    points = []
    for combination in itertools.product(*axes.values()):
        raw = parse_recipe(Recipe, base).model_dump(mode="json")  # a copy
        for key, value in zip(axes, combination, strict=True):
            set_value(raw, key, value)
        chosen = parse_recipe(Recipe, raw, f"recipe {recipe}")
        points.append(Point({key: _value(chosen, key) for key in axes}, chosen))
    for name, count in Counter(point.name for point in points).items():
        if count > 1:
            raise UserError(f"--grid: {name} is given twice; give each value once")
    return points


def _values(key: str, text: str) -> list[Any]:
    """The values of a key: words parted by commas where it holds text, else the items of a YAML list."""
    if holds_text(Recipe, key):
        return [read_value(Recipe, key, word) for word in text.split(",")]
    try:
        values = plain.parse(f"[{text}]", comments=False)
    except ValueError:
        return []
    return values if isinstance(values, list) else []


def _value(recipe: Recipe, key: str) -> Any:
    """What the recipe makes of a value: 1 of the 1.0 that a whole number may be given as."""
    value: Any = recipe.model_dump(mode="json")
    for part in key.split("."):
        value = value[part]
    return value
