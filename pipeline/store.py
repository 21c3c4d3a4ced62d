"""Finished stages by fingerprint, which several runs share through hard links: no stage is made twice."""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from eval.errors import UserError
from pipeline.artifacts import RunFolder, lock_file, replace_folder, sync


class Store:
    """`PATH/NAME-FINGERPRINT/`: stages as a run folder holds them. Any number of processes may use it."""

    def __init__(self, path: Path):
        self.stages = RunFolder(path)
        path.mkdir(parents=True, exist_ok=True)

    @contextlib.contextmanager
    def claimed(self, name: str, mark: str) -> Iterator[None]:
        """Wait until no other process makes this stage; the claim falls with the process, however it ends."""
        with (self.stages.path / f".{name}-{mark}.lock").open("w") as lock:
            lock_file(lock, fcntl.LOCK_EX, self.stages.path)
            yield

    def take(self, name: str, mark: str, run: RunFolder) -> bool:
        """Put the stage into `run`. `False` if it is not here; a damaged one is dropped."""
        kept = self.stages.stage(f"{name}-{mark}")
        if not kept.exists():
            return False
        try:
            self.stages.verify(kept.name)
        except UserError:
            shutil.rmtree(kept)
            return False
        partial = run.partial(name, mark)
        shutil.rmtree(partial)  # checkpoints of a training that somebody else has finished
        _place(kept, partial, run.stage(name))
        return True

    def keep(self, name: str, mark: str, run: RunFolder) -> None:
        """Take in a stage that `run` has finished."""
        kept = self.stages.stage(f"{name}-{mark}")
        if not kept.exists():
            partial = kept.with_name(f".{kept.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            _place(run.stage(name), partial, kept)


def _place(source: Path, partial: Path, target: Path) -> None:
    shutil.copytree(source, partial, copy_function=link)
    sync(partial)
    replace_folder(partial, target)


def link(source: str | Path, target: str | Path) -> None:
    """A second name for a file, or a copy where the file system knows no such thing."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
