"""What a disk in plain Python derives from, and what becomes of its faults.

Context: the threads of a PythonBdev; never a reactor, never the asyncio thread.
"""

from __future__ import annotations

import errno
import logging
import threading
import time
from typing import Any, Final

__all__ = ["Faults", "PythonDisk"]

_log = logging.getLogger(__name__)

QUIET_S: Final = 60.0
MOST_KINDS: Final = 32
_MOST_ERRNO: Final = 4095


class PythonDisk:
    """A disk that somebody writes in Python: derive from it and give it ``read``.

    What a class has of ``write``, ``flush``, ``unmap`` and ``write_zeroes`` is what the
    guest gets: without ``write`` the disk is read-only, with ``flush`` it has a write cache.
    Offsets and lengths are bytes, always whole blocks within the disk. Raise OSError with an
    errno, or anything else, to fail a request.
    """

    block_size: int = 512
    num_blocks: int = 0  # set it in __init__, unless whoever makes the disk tells it
    threads: int = 1  # so many calls at once; with one they never overlap

    def read(self, offset: int, length: int) -> Any:
        """Return ``length`` bytes, as anything bytes-like. At most 1 MiB."""
        raise NotImplementedError

    def write(self, offset: int, data: bytes) -> None:
        """Take ``data``; at most 1 MiB, a longer request comes in several calls."""
        raise NotImplementedError

    def flush(self) -> None:
        """Return when all that was written is stable."""
        raise NotImplementedError

    def unmap(self, offset: int, length: int) -> None:
        """Forget the content: it is not needed any more."""
        raise NotImplementedError

    def write_zeroes(self, offset: int, length: int) -> None:
        """Make it zeroes."""
        raise NotImplementedError

    def close(self) -> None:
        """Give everything back; after the last call."""

    def has(self, method: str) -> bool:
        """Whether the class brings this method itself."""
        return getattr(type(self), method) is not getattr(PythonDisk, method)


class Faults:
    """Counts what a disk raised; logs each kind once in a while, with its traceback."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._lock = threading.Lock()
        self._kinds: dict[tuple[str, type[BaseException], int], _Kind] = {}
        self.count = 0

    def add(self, method: str, error: BaseException) -> int:
        """Take note of it. Returns: the errno that the I/O ends with."""
        code = _errno_of(error)
        with self._lock:
            self.count += 1
            kind = self._kinds.get((method, type(error), code))
            if kind is None and len(self._kinds) < MOST_KINDS:
                kind = self._kinds[method, type(error), code] = _Kind()
            left_out = None if kind is None else kind.tell(time.monotonic())
        if left_out is not None:
            more = f"; {left_out} more like it before" if left_out else ""
            _log.error(
                "%s: %s failed with %s, so its I/O ended with %s%s",
                self._what,
                method,
                type(error).__name__,
                errno.errorcode.get(code, str(code)),
                more,
                exc_info=error,
            )
        return code


class _Kind:
    """One kind of fault: when it was logged last, and how often not since."""

    def __init__(self) -> None:
        self._told: float | None = None
        self._left_out = 0

    def tell(self, now: float) -> int | None:
        """How many were left out if this one is to be logged, else None."""
        if self._told is not None and now - self._told < QUIET_S:
            self._left_out += 1
            return None
        self._told, left_out, self._left_out = now, self._left_out, 0
        return left_out


def _errno_of(error: BaseException) -> int:
    code = error.errno if isinstance(error, OSError) else None
    return code if isinstance(code, int) and 0 < code <= _MOST_ERRNO else errno.EIO
