"""Model sources: folders, ids of the Hub (from its cache, without network), and why there is nothing."""

import shutil
from pathlib import Path

import httpx
import pytest
from huggingface_hub import constants, errors

from eval.errors import UserError, why_no_hub
from pipeline.hub import EMBEDDED, resolve

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache, and no way out."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def cached(offline: Path, tiny_folder: Path) -> Path:
    """`someone/tiny` as the Hub's client keeps it."""
    folder = offline / "models--someone--tiny"
    shutil.copytree(tiny_folder, folder / "snapshots" / COMMIT)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMIT)
    return folder / "snapshots" / COMMIT


def test_verbs_take_what_load_takes(cached: Path, cli, tiny_folder: Path, tiny_texts: dict[str, Path]) -> None:
    assert resolve("someone/tiny") == cached and resolve("embedded") == EMBEDDED
    text = ("--text", tiny_texts["evaluation"], "--device", "cpu")
    short = ("--prompt-tokens", 4, "--new-tokens", 2, "--device", "cpu", "--json")
    for verb, *rest in (
        ("evaluate", *text),
        ("generate", "--prompt", "a", "--max-new-tokens", 5, "--device", "cpu"),
    ):
        outputs = [cli(verb, model, *rest) for model in ("someone/tiny", tiny_folder)]
        assert outputs[0][:2] == outputs[1][:2] and outputs[0][0] == 0, outputs
    code, stdout, err = cli("compare", "someone/tiny", tiny_folder, *text, "--tokens", 90)
    assert code == 0 and "100.00 %" in stdout, err
    code, stdout, err = cli("bench", "someone/tiny", tiny_folder, *short)
    assert code == 0, err


def test_home_is_expanded(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tiny_folder.parent))
    assert resolve("~/tiny") == tiny_folder


@pytest.mark.parametrize("verb", [["evaluate"], ["generate", "--prompt", "a"], ["bench"], ["compare", "embedded"]])
def test_a_hub_out_of_reach_is_one_line(verb: list[str], cli, offline: Path) -> None:
    code, stdout, err = cli(*verb, "no-one/nothing")
    assert (code, stdout, err.count("\n")) == (2, "", 1)
    assert "model no-one/nothing: no such folder, and the Hub cannot be reached: unset HF_HUB_OFFLINE; or copy" in err


@pytest.mark.parametrize("source", ["x" * 300, "a\0b", "./" + "x" * 300, "a/b/c", "~/no such place"])
def test_names_that_are_none(source: str, offline: Path) -> None:
    with pytest.raises(UserError, match="no such folder") as caught:
        resolve(source)
    assert "\n" not in str(caught.value)


def answered(kind: type[Exception], status: int) -> Exception:
    return kind("said\nmore", response=httpx.Response(status, request=httpx.Request("GET", "https://x")))


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (httpx.ConnectError("[Errno -2] Name or service not known"), "cannot be reached: connect to the network"),
        (httpx.ReadTimeout("slow"), "cannot be reached"),
        (ConnectionResetError("reset"), "cannot be reached"),
        (RuntimeError("Cannot send a request, as the client has been closed."), "cannot be reached"),
        (errors.LocalEntryNotFoundError("nothing cached"), "cannot be reached"),
        (errors.OfflineModeIsEnabled("offline"), "cannot be reached: unset HF_HUB_OFFLINE"),
        (answered(errors.RepositoryNotFoundError, 404), "has none of that name"),
        (answered(errors.RevisionNotFoundError, 404), "no such revision"),
        (answered(errors.GatedRepoError, 403), "accept its terms"),
        (errors.HFValidationError("bad id"), "has none of that name"),
        (ValueError("another\nreason"), "gave none: another"),
    ],
)
def test_why_the_hub_gave_nothing(error: Exception, said: str) -> None:
    assert said in why_no_hub(error)
    outer = RuntimeError("around it")
    outer.__cause__ = error
    assert (said if "another" not in said else "gave none: around it") in why_no_hub(outer)
