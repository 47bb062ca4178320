"""The errors Drivebay raises on purpose, and where each one goes.

    DrivebayError
    ├── UsageError        the caller asked for something that makes no sense
    ├── StateError        right request, wrong moment
    ├── NotFound          no object of that name
    ├── AlreadyExists     an object of that name is there already
    ├── InUse             somebody else holds it
    ├── PeerError         the other side of a socket broke the protocol
    ├── Unreachable       no target answers
    ├── HostError         the operating system said no (errno, path)
    └── InternalError     we broke our own rules

A message says what failed, the value that was seen and the limit; ``hint`` is
the next command to type. The command line prints both, the RPC server carries
both, and nothing on the data path raises at all.
"""

from __future__ import annotations

import errno as errno_codes
import os

__all__ = [
    "AlreadyExists",
    "DrivebayError",
    "HostError",
    "InUse",
    "InternalError",
    "NotFound",
    "PeerError",
    "StateError",
    "Unreachable",
    "UsageError",
]


class DrivebayError(Exception):
    """Root of the tree; ``errno`` is the code an RPC client sees, negated."""

    errno: int = errno_codes.EIO

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class UsageError(DrivebayError):
    """A value is missing, malformed or out of range."""

    errno = errno_codes.EINVAL

    def __init__(self, message: str, *, field: str | None = None, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.field = field


class StateError(DrivebayError):
    """The request is valid, but not in the present state."""

    errno = errno_codes.EPERM


class NotFound(DrivebayError):
    """Nothing of that name is here."""

    errno = errno_codes.ENODEV


class AlreadyExists(DrivebayError):
    """Something of that name is here already."""

    errno = errno_codes.EEXIST


class InUse(DrivebayError):
    """Somebody else holds the object; the message says who."""

    errno = errno_codes.EBUSY


class PeerError(DrivebayError):
    """The other side sent what the protocol forbids; its session ends."""

    errno = errno_codes.EPROTO


class Unreachable(DrivebayError):
    """No target answers on the RPC socket; the message says why."""


class HostError(DrivebayError):
    """The operating system refused: ``errno`` says why, ``path`` says where."""

    def __init__(
        self, message: str, code: int, *, path: str | None = None, hint: str | None = None
    ) -> None:
        super().__init__(f"{message}: {os.strerror(code)}", hint=hint)
        self.errno = code
        self.path = path


class InternalError(DrivebayError):
    """One of our own rules was broken; please report it."""
