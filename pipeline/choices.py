"""Whether two recipes are one, and how they differ: what keeps a finished folder from other choices."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eval.errors import UserError, shown
from pipeline import plain
from pipeline.recipe import Recipe, load_recipe

_LISTED = 3
_VALUE = 100


def kept_recipe(path: Path) -> Recipe | None:
    """The recipe that a folder keeps; `None` if it keeps none that can be read."""
    try:
        return load_recipe(Recipe, path)
    except UserError:
        return None


def written_by_a_run(path: Path) -> bool:
    """Whether a run wrote this recipe.yaml: whole, and in the very form that runs write. Another is a user's own."""
    try:
        raw = plain.read(path)
        return kept_recipe(path) is not None and set(raw) == set(Recipe.model_fields) and _same(plain.dump(raw), path)
    except (OSError, ValueError):
        return False


def _same(text: str, path: Path) -> bool:
    return path.read_text(encoding="utf-8") == text


def differences(was: Any, now: Any, defaults: Any, key: str = "") -> list[str]:
    """`KEY was OLD, is NEW` for each key of `now` that differs in `was`; one that is missing there had its default."""
    if isinstance(now, dict) and isinstance(was, dict):
        inner = defaults if isinstance(defaults, dict) else {}
        return [
            line
            for name, value in now.items()
            for line in differences(was.get(name, inner.get(name)), value, inner.get(name), f"{key}.{name}".strip("."))
        ]
    return [] if was == now else [f"{key} was {_value(was)}, is {_value(now)}"]


def listed(changes: Sequence[str]) -> str:
    """The first changes, and how many more there are."""
    more = len(changes) - _LISTED
    return "; ".join(changes[:_LISTED]) + (f"; and {more} more" if more > 0 else "")


def _value(value: Any) -> str:
    return shown(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False), _VALUE)
