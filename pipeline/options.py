"""What the command line's options may be: checked as they are read, without importing what they name."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import typer

from eval.errors import UserError, shown
from pipeline.reading import expanded

ENGINES = ("torch", "cuda", "openvino")
PRECISIONS = ("fp32", "fp16", "bf16", "int8", "int4-int8", "w8a8", "auto")
STAGES = ("load", "half", "prune", "control-random", "finetune", "control-finetune", "control-plain", "quantize")
MEASURE = "measure"
"""What comes after all stages, as --force names it."""


class PathWord(click.Path):
    """A path that the shell may have left as it is (`--out=~/x`); never nothing, as of a variable that is not set."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        if value == "":
            name = param.opts[0] if param and param.opts[0].startswith("--") else param and param.human_readable_name
            raise UserError(f"{name}: is empty; give a path")
        return expanded(value)


def one_of(*words: str) -> Callable[[typer.CallbackParam, Any], Any]:
    """A check of an option's word, or words: each must be one of these."""
    return matching("|".join(map(re.escape, words)), f"give {', '.join(words[:-1])} or {words[-1]}")


def matching(pattern: str, advice: str) -> Callable[[typer.CallbackParam, Any], Any]:
    """The same, by a regular expression of the whole word."""

    def check(param: typer.CallbackParam, value: Any) -> Any:
        for word in [value] if isinstance(value, str) else value or []:
            if not re.fullmatch(pattern, word):
                raise UserError(f"{param.opts[0]} {shown(word)}: {advice}")
        return value

    return check
