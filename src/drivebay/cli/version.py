"""The version of this installation, as `drivebay --version` prints it."""

from __future__ import annotations

__all__ = ["version_line"]


def version_line() -> str:
    """Return 'drivebay VERSION'. Importing the metadata takes 30 ms: only when asked."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return f"drivebay {version('drivebay')}"
    except PackageNotFoundError:
        return "drivebay (not installed)"
