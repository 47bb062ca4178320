"""The files that a browser may load: listed once, found by their whole name.

Context: any. A name that is not in the list is nothing, so no path ever leads elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Final

__all__ = ["KINDS", "our_files", "script_files"]

KINDS: Final[Mapping[str, str]] = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
}


def our_files() -> dict[str, bytes]:
    """Those of this package, by their names."""
    folder = resources.files("drivebay.web").joinpath("static")
    return {
        entry.name: entry.read_bytes()
        for entry in folder.iterdir()
        if Path(entry.name).suffix in KINDS
    }


def script_files(folder: Path, below: tuple[str, ...]) -> dict[str, Path]:
    """The scripts in some of a folder's folders, by their paths in it."""
    return {
        path.relative_to(folder).as_posix(): path
        for name in below
        for path in sorted((folder / name).rglob("*.js"))
        if path.is_file()
    }
