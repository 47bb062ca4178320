"""Files of the host changed one by one, each with its old one beside it, and put back.

Context: root. The old file of NAME is `.NAME.drivebay-before`: hidden, because ifupdown reads
all others of its folder, and so does NetworkManager.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from drivebay.errors import HostError
from drivebay.system.files import refusal, write_at_once

__all__ = ["NewFile", "kept_beside", "put_back_files", "write_files"]

_MODE: Final = 0o644


@dataclass(frozen=True)
class NewFile:
    """A file as it should be; ``text`` is None when it should not be there."""

    path: Path
    text: str | None
    mode: int = _MODE


def kept_beside(path: Path) -> Path:
    """Where the old file is kept."""
    return path.with_name(f".{path.name}.drivebay-before")


def write_files(files: Sequence[NewFile], note: Callable[[list[dict[str, Any]]], object]) -> None:
    """Write them; ``note`` is told of each before it is touched. All are put back if one fails.

    Raises: HostError.
    """
    noted: list[dict[str, Any]] = []
    try:
        for file in files:
            new = not os.path.lexists(file.path)
            folder = not file.path.parent.exists()
            noted.append({"path": str(file.path), "new": new, "new_folder": folder})
            note(noted)
            _write(file)
    except HostError:
        put_back_files(noted)
        note([])
        raise


def _write(file: NewFile) -> None:
    path, kept = file.path, kept_beside(file.path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not kept.exists():
            shutil.copy2(path, kept)
        if file.text is None:
            path.unlink(missing_ok=True)
            return
        mode = path.stat().st_mode & 0o777 if path.exists() else file.mode
    except OSError as error:
        raise refusal("can't write", path, error) from error
    write_at_once(path, file.text.encode(), mode)


def put_back_files(noted: Sequence[dict[str, Any]]) -> None:
    """Each as it was before; harmless twice. Raises: HostError for the first that can't be."""
    failed: HostError | None = None
    for entry in reversed(noted):
        path = Path(entry["path"])
        kept = kept_beside(path)
        try:
            if kept.exists():
                kept.replace(path)
            elif entry["new"] and os.path.lexists(path):
                path.unlink()
            if entry["new_folder"]:
                with contextlib.suppress(OSError):  # somebody has put a file of his own there
                    path.parent.rmdir()
        except OSError as error:
            failed = failed or refusal("can't put back", path, error)
    if failed is not None:
        raise failed
