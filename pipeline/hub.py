"""Where models come from: the embedded one, folders, the Hub; and why the Hub gave nothing."""

from collections.abc import Iterator
from pathlib import Path

from eval.errors import UserError, reason
from pipeline.reading import expanded

EMBEDDED = Path(__file__).parent / "assets" / "gpt2-mini"
WANTED = ["*.json", "*.safetensors", "merges.txt", "*.model"]
"""The files of a model folder that decide what it computes."""
_UNREACHABLE = {"OfflineModeIsEnabled", "LocalEntryNotFoundError", "TransportError", "ConnectionError"}


def resolve(source: str, revision: str | None = None) -> Path:
    """The local folder of a model source; a Hub id is downloaded (safetensors only).

    Raises `UserError` where there is no such folder and the Hub gives none.
    """
    if source == "embedded":
        return EMBEDDED
    folder = expanded(source)
    try:
        there = folder.is_dir()
        taken = there or folder.exists()
    except (OSError, ValueError) as error:  # too long a name, a NUL in it, a folder that may not be looked into
        raise UserError(f"model {source}: no such folder ({reason(error)}); give another") from error
    if there:
        return folder
    if source.startswith((".", "/", "~")) or source.count("/") > 1 or taken:
        raise UserError(
            f"model {source}: no such folder; give a folder with config.json and model.safetensors, or a Hub id"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import enable_progress_bars

    enable_progress_bars()
    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=WANTED))
    except Exception as error:  # offline, unknown id, no permission: all mean that the model is not to be had
        raise UserError(
            f"model {source}: no such folder, and {why_not(error)}; "
            "or copy the model to a folder and give its path, or use the embedded model"
        ) from error


def why_not(error: BaseException) -> str:
    """Why the Hub gave nothing, and what would help."""
    causes = list(_causes(error))
    kinds = {kind.__name__ for cause in causes for kind in type(cause).__mro__}
    if kinds & _UNREACHABLE or any("client has been closed" in str(cause) for cause in causes):
        offline = "OfflineModeIsEnabled" in kinds
        return f"the Hub cannot be reached: {'unset HF_HUB_OFFLINE' if offline else 'connect to the network'}"
    if "GatedRepoError" in kinds:
        return "the Hub gives it only to those who asked: accept its terms there and set HF_TOKEN"
    if "RevisionNotFoundError" in kinds:
        return "the Hub has no such revision of it: give another"
    if kinds & {"RepositoryNotFoundError", "HFValidationError", "DatasetNotFoundError"}:
        return "the Hub has none of that name: check it, or set HF_TOKEN if it is private"
    return f"the Hub gave none: {reason(error)}"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what it came of."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
