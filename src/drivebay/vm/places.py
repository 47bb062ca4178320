"""Where the VM tools keep things: the user's cache (made anew when absent) and state (logs).

Context: any. The XDG variables are read at each call, so that a test may point them elsewhere.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

__all__ = ["cache_dir", "cache_folder", "remember", "state_dir"]


def cache_folder() -> Path:
    """Return the folder for what can be downloaded or computed again; it need not be there."""
    return _folder("XDG_CACHE_HOME", ".cache")


def cache_dir() -> Path:
    """Return that folder, made if absent."""
    return _made(cache_folder())


def state_dir() -> Path:
    """Return the folder for logs and other things to keep, made if absent."""
    return _made(_folder("XDG_STATE_HOME", ".local/state"))


def remember(name: str, text: str) -> None:
    """Write a file of the cache, at once or not at all; where that can't be, it is found out anew.

    The caller finds it at ``cache_folder() / name``.
    """
    path = cache_folder() / name
    fresh = path.with_suffix(f".{os.getpid()}.new")
    with contextlib.suppress(OSError):
        cache_dir()
        try:
            fresh.write_text(text)
            fresh.replace(path)
        except OSError:
            fresh.unlink(missing_ok=True)


def _folder(variable: str, below_home: str) -> Path:
    """XDG base directories: an unset, empty or relative value means the default."""
    value = Path(os.environ.get(variable, ""))
    base = value if value.is_absolute() else Path.home() / below_home
    return base / "drivebay"


def _made(folder: Path) -> Path:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder
