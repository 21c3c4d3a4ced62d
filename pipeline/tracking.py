"""Follow a run in TensorBoard or MLflow: its trainings, by the Trainer's own integrations, and its table."""

import contextlib
import importlib.util
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from eval.errors import UserError, WorkError, reason
from eval.results import Results
from pipeline.training import is_main_process


@dataclass(frozen=True)
class Tracking:
    """`none`, `tensorboard` (event files below `folder`) or `mlflow` (wherever `MLFLOW_TRACKING_URI` says).

    Raises `UserError` where `kind` is none of these or is not installed.
    """

    kind: str = "none"
    folder: Path = Path()
    name: str = ""
    """What the next run is called there."""

    def __post_init__(self) -> None:
        if self.kind not in ("none", "tensorboard", "mlflow"):
            raise UserError(f"--track {self.kind}: give tensorboard, mlflow or none")
        if self.kind != "none" and importlib.util.find_spec(self.kind) is None:
            raise UserError(f"--track {self.kind}: {self.kind} is not installed; pip install {self.kind}")

    def called(self, name: str) -> Self:
        """The same place, another run in it; its folder is below the place, whatever the name holds."""
        return replace(self, name=re.sub(r"[^\w.,=+-]", "_", name, flags=re.ASCII)[:200])

    @contextlib.contextmanager
    def training(self) -> Iterator[str]:
        """Where a training within reports to, as `TrainingArguments.report_to` wants it."""
        kind = self.kind if is_main_process() else "none"
        if kind == "mlflow":
            with _mlflow_run(self.name):
                yield kind  # the integration joins the run that it finds
        elif kind == "tensorboard":
            with _environment("TENSORBOARD_LOGGING_DIR", str(self.folder / self.name)):
                yield kind
        else:
            yield kind

    def table(self, results: Results, path: Path) -> None:
        """Log all rows of the results, which lie at `path`: the table as text, its numbers as scalars."""
        from pipeline.report import flat, markdown_table

        if self.kind == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            for earlier in (self.folder / self.name).glob("events.out.tfevents.*"):
                earlier.unlink()
            with SummaryWriter(str(self.folder / self.name)) as writer:
                writer.add_text("stages", markdown_table(results))
                for tag, value in _numbers(results).items():
                    writer.add_scalar(tag, value)
        elif self.kind == "mlflow":
            with _mlflow_run(self.name) as mlflow:
                mlflow.log_params(dict(flat(results.run["recipe"])))
                mlflow.log_metrics({tag.replace(":", ""): value for tag, value in _numbers(results).items()})
                mlflow.log_text(markdown_table(results), "stages.md")
                mlflow.log_artifact(str(path))


def _numbers(results: Results) -> dict[str, float]:
    """`perplexity/ROW` and the like -> value, for all that was measured."""
    return {f"{name}/{row.key}": value for row in results.rows for name, value in row.numbers().items()}


@contextlib.contextmanager
def _mlflow_run(name: str) -> Iterator[Any]:
    import mlflow

    try:
        mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", "headroom"))
        with mlflow.start_run(run_name=name):
            yield mlflow
    except mlflow.exceptions.MlflowException as error:
        raise WorkError(f"--track mlflow: {reason(error)}; mend that, or go on without --track") from error


@contextlib.contextmanager
def _environment(key: str, value: str) -> Iterator[None]:
    earlier = os.environ.get(key)
    os.environ[key] = value
    try:
        yield
    finally:
        del os.environ[key]
        if earlier is not None:
            os.environ[key] = earlier
