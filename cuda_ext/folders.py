"""Where compiled libraries and measured choices are kept."""

import functools
import os
import stat
import tempfile
from pathlib import Path


def user_folder(name: str) -> Path:
    """$XDG_CACHE_HOME/headroom/NAME or ~/.cache/headroom/NAME, which need not be there, nor be writable."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path("~/.cache").expanduser()) / "headroom" / name


def cache_folder(name: str) -> Path:
    """The user's folder, made if it is not there; a private one among the temporary files where it is read-only.

    Raises OSError where neither can be made.
    """
    folder = user_folder(name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return _temporary(name)
    return folder if os.access(folder, os.W_OK | os.X_OK) else _temporary(name)


def _temporary(name: str) -> Path:
    """Libraries are loaded from there, so nobody else may have made it or may write to it."""
    folder = Path(tempfile.gettempdir()) / f"headroom-{name}-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError:
        return _fresh(name)
    ours = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077
    return folder if ours else _fresh(name)


@functools.cache
def _fresh(name: str) -> Path:
    """For this process alone."""
    return Path(tempfile.mkdtemp(prefix=f"headroom-{name}-"))
