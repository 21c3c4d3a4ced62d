"""Stages are whole or absent, and a manifest proves what a stage holds."""

import errno
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
from forks import holder

from eval.errors import UserError, WorkError
from pipeline.artifacts import CHECKPOINTS, RunFolder, disk_errors, fingerprint, replace_folder, sha256_tree


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A folder with one finished stage."""
    run = RunFolder(tmp_path / "run")
    with run.locked():
        publish(run, "good")
    return run


def publish(run: RunFolder, content: str, mark: str = "m1") -> None:
    def build(folder: Path) -> dict[str, Any]:
        (folder / "model" / "deep").mkdir(parents=True)
        (folder / "model" / "weights").write_text(content)
        (folder / "model" / "deep" / "ünï.txt").write_text("x" * 1000)
        return {"found": content}

    run.publish("prune", mark, build, config={"a": 1}, inputs={"half": "h"}, texts={}, seed=3, machine={})


def test_a_published_stage(run: RunFolder) -> None:
    manifest = run.verify("prune")
    assert (manifest.fingerprint, manifest.details, manifest.seed) == ("m1", {"found": "good"}, 3)
    assert manifest.files == {
        "model/weights": hashlib.sha256(b"good").hexdigest(),
        "model/deep/ünï.txt": hashlib.sha256(b"x" * 1000).hexdigest(),
    }
    assert manifest.versions["python"] and manifest.date
    assert sorted(path.name for path in run.path.iterdir()) == [".lock", "prune"]


def test_a_failed_build_leaves_the_old_stage(run: RunFolder) -> None:
    def build(folder: Path) -> dict[str, Any]:
        (folder / "half a file").write_text("...")
        raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        run.publish("prune", "m2", build, config={}, inputs={}, texts={}, seed=0, machine={})
    assert run.verify("prune").details == {"found": "good"}
    publish(run, "better", "m2")
    assert run.verify("prune").details == {"found": "better"}
    assert not (run.stage("prune") / "half a file").exists()
    assert not list(run.path.glob(".prune*"))


def test_only_checkpoints_of_the_same_work_survive(run: RunFolder) -> None:
    mine, others = run.partial("finetune", "same"), run.path / ".finetune-other.partial"
    for folder in (mine, others):
        (folder / CHECKPOINTS / "checkpoint-5").mkdir(parents=True)
        (folder / "model").mkdir()
        (folder / "stage.json").write_text("{}")
    assert run.partial("finetune", "same") == mine
    assert [path.relative_to(mine).as_posix() for path in mine.rglob("*")] == [
        CHECKPOINTS,
        f"{CHECKPOINTS}/checkpoint-5",
    ]
    assert not others.exists()


def test_replacing_clears_what_an_earlier_kill_left(tmp_path: Path) -> None:
    for name in ("new", "place", ".place.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    replace_folder(tmp_path / "new", tmp_path / "place")
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["place", "place/new"]


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", '{"stage": "prune"}', '{"unknown": 1}', b"\xff\xfe"],
)
def test_a_damaged_manifest(run: RunFolder, text: str | bytes) -> None:
    (run.stage("prune") / "stage.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=r"stage\.json: missing or damaged; .* --force prune"):
        run.verify("prune")


@pytest.mark.parametrize("field", ["files", "details"])
def test_a_manifest_with_holes(run: RunFolder, field: str) -> None:
    path = run.stage("prune") / "stage.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: None}))
    with pytest.raises(UserError, match="missing or damaged"):
        run.verify("prune")


def test_a_stage_without_manifest_and_none_at_all(run: RunFolder) -> None:
    (run.stage("prune") / "stage.json").unlink()
    with pytest.raises(UserError, match="missing or damaged"):
        run.manifest("prune")
    assert run.manifest("half") is None
    with pytest.raises(UserError, match="no such stage; run: python -m pipeline half"):
        run.verify("half")


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda path: path.unlink(), "missing"),
        (lambda path: path.write_text("goo"), "not what its manifest says"),
        (lambda path: path.write_text("gooD"), "not what its manifest says"),
    ],
    ids=["missing", "truncated", "changed"],
)
def test_a_file_that_is_not_what_the_manifest_says(run: RunFolder, harm: Any, said: str) -> None:
    harm(run.stage("prune") / "model" / "weights")
    with pytest.raises(
        UserError, match=f"model/weights: {said}; make the stage again: python -m pipeline run --out .* --force prune"
    ):
        run.verify("prune")


def test_one_process_at_a_time(run: RunFolder) -> None:
    with holder(run.path) as other:
        with pytest.raises(UserError, match="another run is at work here"), run.locked():
            pass
        other.kill()
        other.wait()
        with run.locked():  # though the child that it forked lives on
            pass


def test_a_disk_without_locks(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.lockf", refuse)
    with pytest.raises(UserError, match=r"files cannot be locked there .* give an --out on another disk"), run.locked():
        pass


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), WorkError),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), WorkError),
        (RuntimeError("I/O error: No space left on device (os error 28)"), WorkError),
        (OSError(errno.EROFS, "Read-only file system", "/x"), UserError),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), UserError),
        (OSError(errno.EIO, "Input/output error"), OSError),
        (ValueError("a bug"), ValueError),
    ],
)
def test_which_errors_speak_to_the_user(error: Exception, kind: type[Exception]) -> None:
    with pytest.raises(kind) as caught, disk_errors(Path("out")):
        raise error
    assert "\n" not in str(caught.value)
    assert caught.value is error or caught.value.__cause__ is error


def test_fingerprints_follow_content_not_order() -> None:
    assert fingerprint({"a": 1, "b": [2, None]}) == fingerprint({"b": [2, None], "a": 1})
    assert len({fingerprint(value) for value in ({"a": 1}, {"a": 1.5}, {"a": "1"}, {"a": None}, {})}) == 5


def test_a_tree_is_hashed_without_the_manifest_at_its_top(tmp_path: Path) -> None:
    (tmp_path / "stage.json").write_text("top")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "stage.json").write_text("below")
    assert list(sha256_tree(tmp_path)) == ["model/stage.json"]


def test_folders_are_made_with_their_parents(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "a" / "b").locked():
        assert os.listdir(tmp_path / "a" / "b") == [".lock"]  # noqa: PTH208
