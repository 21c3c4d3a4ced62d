"""Where tasks are worked on, the points of a sweep say: processes of this machine, or Ray."""

import contextlib
import logging
import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from eval.errors import UserError, WorkError, reason
from pipeline import hardware
from pipeline.children import end_with_parent

LOG = "log.txt"


@dataclass(frozen=True)
class Task:
    """What a process is told: make the stages of a point, or measure it."""

    recipe: dict[str, Any]
    folder: Path
    store: Path
    measure: bool
    threads: int | None = None
    """torch's threads; `None` leaves them as they are."""


class Launcher(Protocol):
    """Works on one task at a time for each thread that calls it."""

    def __call__(self, task: Any) -> str | None:
        """Do it; `None`, or one line on what went wrong. A task has a `folder`, with a log in it."""

    def stop(self) -> None:
        """End what is under way."""


def each(launch: Launcher, tasks: Sequence[Any], workers: int, done: Callable[[int, str | None], None]) -> None:
    """Launch all tasks, `workers` at a time; `done` is told the number and the outcome of each as it ends."""
    with ThreadPoolExecutor(workers) as pool:
        futures = {pool.submit(launch, task): number for number, task in enumerate(tasks)}
        try:
            for future in as_completed(futures):
                done(futures[future], future.result())
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            launch.stop()
            raise


def work(task: Task) -> str | None:
    """Do a point's task in this process; `None`, or what went wrong."""
    from pipeline.recipe import Recipe, parse_recipe
    from pipeline.runner import Runner

    def do() -> None:
        runner = Runner(parse_recipe(Recipe, task.recipe), task.folder, task.store)
        if task.measure:
            runner.execute()
        else:
            runner.build()

    return attempt(task.folder, task.threads, do)


def attempt(folder: Path, threads: int | None, do: Callable[[], object]) -> str | None:
    """Do something in this process, its output appended to `folder/log.txt`; `None`, or what went wrong."""
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    folder.mkdir(parents=True, exist_ok=True)
    with _logged(folder / LOG):
        try:
            do()
        except (UserError, WorkError) as error:
            print(f"failed: {error}", file=sys.stderr)
            return str(error)
        except Exception as error:  # whatever it is, the other tasks go on
            traceback.print_exc()
            return f"{type(error).__name__}: {reason(error)} (see {folder / LOG})"
    return None


@contextlib.contextmanager
def _logged(path: Path) -> Iterator[None]:
    """Send stdout and stderr, those of C libraries too, to the end of a file."""
    kept = [os.dup(number) for number in (1, 2)]
    with path.open("ab") as log:
        for number in (1, 2):
            os.dup2(log.fileno(), number)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, earlier in zip((1, 2), kept, strict=True):
            os.dup2(earlier, number)
            os.close(earlier)


class Local:
    """A process of its own for each task: one that is killed, for its memory say, takes no other along.

    `do` works on a task there; the module `preload` is imported once for all.
    """

    def __init__(self, do: Callable[[Any], str | None] = work, preload: str = "pipeline.warm") -> None:
        self.do = do
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload([preload])
        self.running: set[Any] = set()
        self.stopped = False

    def __call__(self, task: Any) -> str | None:
        reader, writer = self.context.Pipe(duplex=False)
        process = self.context.Process(target=_report, args=(self.do, task, writer))
        if self.stopped:
            return "stopped"
        process.start()
        self.running.add(process)
        if self.stopped:
            process.terminate()
        writer.close()
        try:
            return reader.recv()
        except EOFError:
            process.join()
            return f"its process ended with exit code {process.exitcode} (see {task.folder / LOG})"
        finally:
            process.join()
            self.running.discard(process)

    def stop(self) -> None:
        self.stopped = True
        for process in list(self.running):
            process.terminate()


def _report(do: Callable[[Any], str | None], task: Any, answer: Any) -> None:
    end_with_parent()
    with contextlib.suppress(KeyboardInterrupt):  # Ctrl-C reaches all; the parent says so
        answer.send(do(task))


class Ray:
    """Tasks on a Ray cluster, or, where `RAY_ADDRESS` names none, on a Ray started for the purpose.

    Its machines must see the sweep's folder, the texts and this source tree at the same paths.
    Raises `UserError` where Ray is not installed or the cluster cannot be reached.
    """

    def __init__(self, workers: int):
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            import ray
        except ImportError as error:
            raise UserError(
                "--launcher ray: Ray is not installed; pip install ray, or give --launcher local"
            ) from error
        self.ray = ray
        own: dict[str, Any] = {} if os.environ.get("RAY_ADDRESS") else {"num_cpus": workers, "include_dashboard": False}
        try:
            ray.init(**own, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, RuntimeError) as error:
            raise UserError(f"--launcher ray: no cluster at RAY_ADDRESS ({reason(error)})") from error
        # One GPU a task: two trainings on one would have to share its memory.
        self.remote = ray.remote(num_cpus=1, num_gpus=1 if hardware.gpu() else 0, max_retries=0)(work)

    def __call__(self, task: Task) -> str | None:
        try:
            return self.ray.get(self.remote.remote(task))
        except self.ray.exceptions.RayError as error:
            return f"Ray: {reason(error)} (see {task.folder / LOG})"

    def stop(self) -> None:
        self.ray.shutdown()
