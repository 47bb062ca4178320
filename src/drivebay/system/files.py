"""Files written at once or not at all, and what is said when the system refuses.

Context: any.
"""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path

from drivebay.errors import HostError

__all__ = ["refusal", "write_at_once", "write_private", "write_public"]


def write_private(path: Path, data: bytes) -> None:
    """Write a file that only its owner may read, at once. Raises: HostError."""
    write_at_once(path, data, 0o600)


def write_public(path: Path, data: bytes) -> None:
    """Write a file that everybody may read, at once. Raises: HostError."""
    write_at_once(path, data, 0o644)


def write_at_once(path: Path, data: bytes, mode: int) -> None:
    """Write a file: who reads it, also after a power cut, finds the old or the new content.

    Raises: HostError.
    """
    fresh = path.with_name(f".{path.name}.new")
    try:
        descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            os.fchmod(descriptor, mode)
            file.flush()
            os.fsync(descriptor)
        fresh.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            fresh.unlink()
        raise refusal("can't write", path, error) from error


def refusal(what: str, path: Path, error: Exception) -> HostError:
    """The error to raise for what the operating system said about ``path``."""
    code = getattr(error, "errno", None) or errno.EINVAL  # what is no UTF-8 has no number
    return HostError(f"{what} '{path}'", code, path=str(path), hint=f"ls -ld {path.parent}")
