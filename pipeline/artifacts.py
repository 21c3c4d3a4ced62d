"""The run folder: stages that are whole or absent, and manifests that prove what they hold."""

import contextlib
import errno
import fcntl
import functools
import hashlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from eval.errors import UserError, WorkError, shown

MANIFEST = "stage.json"
QUANTIZATION = "quantization.json"
"""Beside an IR: what quantisation did to each matrix."""
LOCK = ".lock"
CHECKPOINTS = "checkpoints"
"""The one folder of a half-made stage that its next run goes on from."""
_IN_A_STAGE = ("model", "model_fp16", "ir_fp32", "ir_fp16", "ir_w8a8")
_PACKAGES = (
    "torch",
    "transformers",
    "optimum-intel",
    "openvino",
    "nncf",
    "neural-compressor",
    "datasets",
    "accelerate",
    "numpy",
)


@dataclass
class Manifest:
    """`stage.json`: what made a stage, and the sha256 of each of its files."""

    stage: str
    fingerprint: str
    config: dict[str, Any]
    inputs: dict[str, str]
    """The content (see `content`) of the stages it was made from."""
    texts: dict[str, str]
    """The sha256 of each text it read."""
    seed: int
    details: dict[str, Any]
    """What the stage found out: kept heads, learning curve, weight errors."""
    files: dict[str, str]
    seconds: float
    machine: dict[str, Any]
    versions: dict[str, str]
    git_commit: str | None
    date: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    @property
    def content(self) -> str:
        """A hash of all its files: what a later stage or a measurement is made from."""
        return fingerprint(self.files)


def fingerprint(value: Any) -> str:
    """A short hash of plain data, the same for the same content."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def sha256_file(path: Path) -> str:
    """The sha256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def named_hashes(files: Iterable[Path]) -> list[list[str]]:
    """`[name, sha256]` of each file. Raises `UserError` for one that cannot be read."""
    try:
        return [[path.name, sha256_file(path)] for path in files]
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}; give a readable text file") from error


def refuse_other_choices(choices: dict[str, Any], path: Path, what: str) -> None:
    """Raise `UserError` if `path` keeps other choices than these, of a `what` that was begun there before."""
    try:
        begun = json.loads(path.read_text(encoding="utf-8")) if path.exists() else choices
    except ValueError as error:
        raise UserError(f"{path}: damaged; give another --out or delete the {what}") from error
    if begun != choices:
        raise UserError(f"{path.parent}: holds a {what} with another recipe or text; give another --out or delete it")


def sha256_tree(folder: Path) -> dict[str, str]:
    """The sha256 of each file below a folder, by relative path; a manifest at its top is left out."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST)
    return {path.relative_to(folder).as_posix(): sha256_file(path) for path in files}


def tree_bytes(folder: Path, pattern: str) -> int:
    """Bytes of the files in `folder` that match `pattern`."""
    return sum(path.stat().st_size for path in folder.glob(pattern))


@functools.cache
def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a result; absent ones are left out."""
    found = {"python": sys.version.split()[0]}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


@functools.cache
def git_commit() -> str | None:
    """The commit of this source tree, with `+` if it was changed since; `None` outside a checkout."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


# What a full disk is called by safetensors, torch and SQLite, which keep the system's error to themselves.
_FULL = (
    "No space left",
    "disk is full",
    "quota exceeded",
    "PytorchStreamWriter failed",
    "iostream error",
    "unexpected pos",
)


NO_PATH = {
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), "give one that you may write to"),
    **dict.fromkeys((errno.ENOTDIR, errno.EEXIST, errno.EISDIR), "give a folder or file elsewhere"),
    errno.ENAMETOOLONG: "give a shorter path",
    errno.ELOOP: "give a path without such links",
}
"""What the system says of paths that cannot be used, and what to do."""


@contextlib.contextmanager
def disk_errors(where: Path) -> Iterator[None]:
    """Turn a full or read-only disk below `where`, or a path that cannot be there, into one clear line."""
    try:
        yield
    except Exception as error:
        code, text = getattr(error, "errno", None), str(error)
        if code in (errno.ENOSPC, errno.EDQUOT) or any(words in text for words in _FULL):
            raise WorkError(
                f"{where}: no space left on the disk; free some and run again, finished stages stay"
            ) from error
        if code in NO_PATH:
            name = Path(getattr(error, "filename", None) or where)
            advice = NO_PATH[code]
            if code in (errno.EROFS, errno.EACCES, errno.EPERM):
                inside = name.is_relative_to(where) or where.is_relative_to(name)
                advice = "give a folder that you may write to" if inside else "give a readable one"
            raise UserError(f"{shown(str(name))}: {os.strerror(code)}; {advice}") from error
        raise


class RunFolder:
    """`runs/NAME/`: finished stages, measurements, results; one process works in it at a time."""

    def __init__(self, path: Path):
        self.path = path

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder; the lock falls with the process, however it ends.

        Raises `UserError` if another run holds it or it cannot be made.
        """
        with disk_errors(self.path):
            if self.path.is_symlink() and not self.path.exists():
                raise UserError(f"{self.path}: a link that leads nowhere; give a folder as --out")
            if self.path.exists() and not self.path.is_dir():
                raise UserError(f"{self.path}: is a file; give a folder as --out")
            self.path.mkdir(parents=True, exist_ok=True)
            lock = (self.path / LOCK).open("w")
        with lock:
            lock_file(lock, fcntl.LOCK_EX | fcntl.LOCK_NB, self.path)
            yield

    @contextlib.contextmanager
    def unchanging(self) -> Iterator[None]:
        """Let no run change the folder, which need not be writable. Raises `UserError` if one is at work."""
        try:
            lock = (self.path / LOCK).open()
        except OSError:  # copied without it, and no run can be at work
            yield
            return
        with lock:
            lock_file(lock, fcntl.LOCK_SH | fcntl.LOCK_NB, self.path)
            yield

    def stage(self, name: str) -> Path:
        """The folder of a finished stage, whether it is there or not."""
        return self.path / name

    def manifest(self, name: str) -> Manifest | None:
        """The manifest of a stage; `None` if the stage is not there. Raises `UserError` if it is damaged."""
        path = self.stage(name) / MANIFEST
        if not self.stage(name).exists():
            return None
        try:
            manifest = Manifest(**json.loads(path.read_text(encoding="utf-8")))
            if not isinstance(manifest.files, dict) or not isinstance(manifest.details, dict):
                raise TypeError("files and details are mappings")
            return manifest
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{path}: missing or damaged; {self._again(name)}") from error

    def verify(self, name: str) -> Manifest:
        """The manifest of a stage whose files all have the sha256 it names.

        Raises `UserError` if the stage is missing, or a file is missing, changed or truncated.
        """
        manifest = self.manifest(name)
        if manifest is None:
            raise UserError(f"{self.stage(name)}: no such stage; run: python -m pipeline {name} --out {self.path}")
        found = sha256_tree(self.stage(name))
        for file, digest in manifest.files.items():
            if found.get(file) != digest:
                state = "missing" if file not in found else "not what its manifest says"
                raise UserError(f"{self.stage(name) / file}: {state}; {self._again(name)}")
        return manifest

    def _again(self, name: str) -> str:
        return f"make the stage again: python -m pipeline run --out {self.path} --force {name}"

    def replaceable(self, name: str) -> None:
        """Raise `UserError` if what stands in a stage's place is more than that stage: it would be deleted."""
        place = self.stage(name)
        if place.is_symlink() or (place.exists() and not place.is_dir()):
            raise UserError(f"{place}: no folder, so no stage; move it away, or give another --out")
        try:
            manifest = self.manifest(name)
        except UserError:  # damaged: the files' places must tell
            manifest = None
        for path in sorted(place.rglob("*")):
            inside = path.relative_to(place)
            ours = inside.as_posix() in manifest.files if manifest else inside.parts[0] in _IN_A_STAGE
            if not (ours or path.is_dir() or inside == Path(MANIFEST)):
                raise UserError(f"{path}: not of the stage that would be made in its place; move it away")

    def partial(self, name: str, mark: str) -> Path:
        """The folder where a stage is being made; an interrupted run of the same stage leaves its checkpoints."""
        path = self.path / f".{name}-{mark}.partial"
        path.mkdir(exist_ok=True)
        others = [other for other in self.path.glob(f".{name}-*.partial") if other != path]
        for left in [*others, *(entry for entry in path.iterdir() if entry.name != CHECKPOINTS)]:
            if left.is_dir():
                shutil.rmtree(left)
            else:
                left.unlink()
        return path

    def publish(
        self,
        name: str,
        mark: str,
        build: Callable[[Path], dict[str, Any]],
        *,
        config: dict[str, Any],
        inputs: dict[str, str],
        texts: dict[str, str],
        seed: int,
        machine: dict[str, Any],
    ) -> Manifest:
        """Make a stage: `build` fills a partial folder, which is synced and takes the stage's place at once."""
        begun = time.monotonic()
        with disk_errors(self.path):
            folder = self.partial(name, mark)
            details = build(folder)
            manifest = Manifest(
                stage=name,
                fingerprint=mark,
                config=config,
                inputs=inputs,
                texts=texts,
                seed=seed,
                details=details,
                files=sha256_tree(folder),
                seconds=round(time.monotonic() - begun, 3),
                machine=machine,
                versions=versions(),
                git_commit=git_commit(),
            )
            (folder / MANIFEST).write_text(json.dumps(asdict(manifest), indent=1), encoding="utf-8")
            sync(folder)
            replace_folder(folder, self.stage(name))
        return manifest


def lock_file(lock: IO[str], how: int, folder: Path) -> None:
    """Lock an open file of `folder`, or wait for it. Raises `UserError` if another holds it, or none can.

    Not by flock: a child that some library forked would inherit it, and hold it once this process is gone.
    """
    try:
        fcntl.lockf(lock, how)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            raise UserError(f"{folder}: another run is at work here; wait for it or give another --out") from error
        raise UserError(
            f"{folder}: files cannot be locked there ({error.strerror}); give an --out on another disk"
        ) from error


def refuse_strangers(folder: Path, names: Iterable[str], what: str) -> None:
    """Raise `UserError` if a folder, in which nothing tells of a `what` of ours, holds anything of that name.

    `names` are glob patterns of what a verb would write there, or replace, or delete.
    """
    if folder.is_dir() and (found := sorted(path.name for name in names for path in folder.glob(name))):
        raise UserError(f"{folder}: holds {found[0]}, but no {what} of Headroom's; give another --out")


def sync(folder: Path) -> None:
    """Force a folder and all below it onto the disk."""
    for path in [*folder.rglob("*"), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def replace_folder(new: Path, place: Path) -> None:
    """Put `new` at `place`. A kill in between leaves the stage absent, to be made again; never half of it."""
    old = place.with_name(f".{place.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if place.exists():
        place.rename(old)
    new.rename(place)
    shutil.rmtree(old, ignore_errors=True)
