"""noVNC, the VNC client that runs in a browser: found on this host, or fetched from Debian.

Context: a short-lived process; may take seconds. It is a library and no part of ours. Debian,
Ubuntu and Fedora keep it at one place; its package there brings a web server of its own along,
which nobody needs here: so it is unpacked into the user's cache, and nothing is installed.
"""

from __future__ import annotations

import fcntl
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Final

from drivebay.errors import HostError, NotFound
from drivebay.vm.guest_image import unpack_packages
from drivebay.vm.packages import everywhere, install_command
from drivebay.vm.places import cache_dir

__all__ = ["BELOW", "find_novnc"]

BELOW: Final = ("core", "vendor")
_INSTALLED: Final = Path("/usr/share/novnc")
_PACKAGE: Final = "novnc"
_CLIENT: Final = "core/rfb.js"


def find_novnc(progress: Callable[[str], None], installed: Path = _INSTALLED) -> Path:
    """Return the folder that holds it. Raises: NotFound."""
    if (installed / _CLIENT).is_file():
        return installed
    home = cache_dir() / "novnc"
    home.mkdir(exist_ok=True)
    with (home / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        kept = home / "tree"
        if not (kept / _CLIENT).is_file():
            _fetch(home, kept, progress)
    return kept


def _fetch(home: Path, kept: Path, progress: Callable[[str], None]) -> None:
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        raise _missing("")
    progress(f"downloading {_PACKAGE}, the VNC client for browsers (once)")
    with tempfile.TemporaryDirectory(prefix=".new-", dir=home) as name:
        try:
            tree = unpack_packages(Path(name), [_PACKAGE])
        except HostError as error:
            raise _missing(f", and can't be fetched: {error}") from error
        found = tree / _INSTALLED.relative_to("/")
        if not (found / _CLIENT).is_file():
            raise _missing(f", and the package '{_PACKAGE}' holds no {_CLIENT}")
        shutil.rmtree(kept, ignore_errors=True)
        found.rename(kept)


def _missing(why: str) -> NotFound:
    return NotFound(
        f"noVNC, which shows a screen in a browser, is not on this host{why}",
        hint=install_command("novnc") or f"install it: {everywhere('novnc')}",
    )
