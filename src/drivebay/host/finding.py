"""What a check says: one sentence about the host, how bad it is, and the command that mends it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from drivebay.errors import DrivebayError

__all__ = ["LEVELS", "Finding", "failed"]

# From good to bad. A note is a thing that is not there and may not be wanted; a warning will
# hurt some day or some VM; with a problem VMs, or this one, do not start.
LEVELS: Final = ("ok", "note", "warning", "problem")


@dataclass(frozen=True)
class Finding:
    """``mend`` is a command, or where there is none, what to do."""

    level: str
    subject: str
    what: str
    mend: str | None = None

    def __post_init__(self) -> None:
        assert self.level in LEVELS, self.level


def failed(subject: str, error: DrivebayError, level: str = "problem") -> Finding:
    """An error that a command would end with."""
    return Finding(level, subject, str(error), error.hint)
