"""A person's public ssh key, read from a file: it is told to cloud-init.

Context: a short-lived process.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from drivebay.errors import HostError, UsageError

__all__ = ["read_public_key"]

_KEY_BYTES_MOST: Final = 65536


def read_public_key(path: Path) -> str:
    """The line that lets its owner log in. Raises: HostError, UsageError."""
    try:
        if path.stat().st_size > _KEY_BYTES_MOST:
            raise UsageError(f"'{path}' is too long for a public key")
        text = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise HostError(
            f"can't read the public key '{path}'", getattr(error, "errno", None) or 0,
            path=str(path),
        ) from error  # fmt: skip
    if "PRIVATE KEY" in text:
        raise UsageError(
            f"'{path}' is a private key, which must not leave this host", hint=f"use {path}.pub"
        )
    return text
