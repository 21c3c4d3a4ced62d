"""Where models come from: the embedded one, folders, the Hub."""

from pathlib import Path

from eval.errors import UserError, reason, shown, why_no_hub
from pipeline.reading import expanded

EMBEDDED = Path(__file__).parent / "assets" / "gpt2-mini"
WANTED = ["*.json", "*.safetensors", "merges.txt", "*.model"]
"""The files of a model folder that decide what it computes."""


def resolve(source: str, revision: str | None = None) -> Path:
    """The local folder of a model source; a Hub id is downloaded (safetensors only).

    Raises `UserError` where there is no such folder and the Hub gives none.
    """
    if source == "embedded":
        return EMBEDDED
    if not source:
        raise UserError("the model's name is empty; give a folder, a Hub id or embedded")
    folder = expanded(source)
    try:
        there = folder.is_dir()
        taken = there or folder.exists()
    except (OSError, ValueError) as error:  # too long a name, a NUL in it, a folder that may not be looked into
        why = error.strerror if isinstance(error, OSError) else reason(error)
        raise UserError(f"model {shown(source)}: no such folder ({why}); give another") from error
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
            f"model {source}: no such folder, and {why_no_hub(error)}; "
            "or copy the model to a folder and give its path, or use the embedded model"
        ) from error
