"""Two model folders, or one on two engines, asked the same: how alike they answer."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from eval.agreement import Questions, compare, listen
from eval.errors import UserError
from pipeline.data import encode, sha256_text
from pipeline.engines import default_engine, load_engine
from pipeline.texts import load_text
from pipeline.tokenizer import load_tokenizer


def compare_folders(
    models: tuple[Path, Path], options: Mapping[str, Sequence[str]], *, text: str, tokens: int
) -> dict[str, Any]:
    """An `eval.results.Agreement` of rows `A` and `B` as plain data, and `subjects`: what each of them is.

    `options` holds what was given as `--engine`, `--device` and `--precision`: one for both, one for each, or none.
    Raises `UserError` for three of them, other tokenizers, or what the folders, engines and text raise.
    """
    chosen = {name: _for_each(name, given) for name, given in options.items()}
    content = load_text(text)
    engines = [
        load_engine(engine or default_engine(model), model, device=device, precision=precision)
        for model, engine, device, precision in zip(models, *chosen.values(), strict=True)
    ]
    ids, other = (
        encode(content, load_tokenizer(model, engine.vocab_size)) for model, engine in zip(models, engines, strict=True)
    )
    if not np.array_equal(ids, other):
        raise UserError(f"{models[0]} and {models[1]}: their tokenizers cut the text otherwise; compare models of one")
    questions = Questions.fitting(ids[:tokens], min(engine.context for engine in engines))
    answers = {name: listen(engine, questions) for name, engine in zip("AB", engines, strict=True)}
    return {
        "subjects": [
            {
                "model": str(model),
                "engine": engine.name,
                "device": engine.device,
                "precision": engine.precision,
                "compute": engine.compute,
            }
            for model, engine in zip(models, engines, strict=True)
        ],
        **asdict(compare(answers, questions, text_sha256=sha256_text(content))),
    }


def _for_each(name: str, given: Sequence[str]) -> Sequence[str | None]:
    if len(given) > 2:
        raise UserError(f"{name} is given {len(given)} times for two models; give it once for both, or twice")
    return given if len(given) == 2 else [*given, *given] or [None, None]


def format_comparison(outcome: dict[str, Any]) -> str:
    """What a person reads."""
    new = outcome["new_tokens"]
    shared = ["all" if count is None else str(count) for count in outcome["diverged"][0][1]]
    return "\n".join(
        [
            *(
                f"{name}  {subject['model']}: {subject['engine']} on {subject['device']}, {subject['compute']}"
                for name, subject in zip("AB", outcome["subjects"], strict=True)
            ),
            f"on {outcome['tokens']:,} tokens in windows of {outcome['context']}:",
            f"  logits differ by {outcome['logit_mean'][0][1]:.3g} on average, by {outcome['logit_max'][0][1]:.3g} "
            "at most",
            f"  KL(A||B) {outcome['kl'][0][1]:.3g}{_error(outcome['kl_stderr'], 0, 1)} nats a token, "
            f"KL(B||A) {outcome['kl'][1][0]:.3g}{_error(outcome['kl_stderr'], 1, 0)}",
            f"  the same likeliest token at {100 * outcome['top1'][0][1]:.2f}"
            f"{_error(outcome['top1_stderr'], 0, 1, 100)} % of the positions",
            f"  of {new} greedy new tokens after {len(shared)} prompts of {outcome['prompt_tokens']}, alike from the "
            f"start: {', '.join(shared)}",
        ]
    )


def _error(errors: list[list[float]] | None, a: int, b: int, scale: float = 1) -> str:
    """` ± 0.0031`: the standard error; nothing where the text is too short for one."""
    return f" ± {scale * errors[a][b]:.2g}" if errors else ""
