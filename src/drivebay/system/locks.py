"""One command at a time: a lock on a file, which ends with the process that holds it.

Context: a short-lived process. The file stays empty, and lies beside what it stands for.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from drivebay.errors import HostError, InUse

__all__ = ["held"]

_LOOK_EVERY_S: Final = 0.05


@contextlib.contextmanager
def held(path: Path, busy: str, *, wait_s: float = 0.0) -> Iterator[None]:
    """Hold the lock while the block runs.

    Raises: InUse, which says ``busy``, when somebody else has it for longer than ``wait_s``
    seconds; HostError.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise HostError(
            f"can't lock '{path}'", error.errno or 0, path=str(path), hint=f"ls -ld {path.parent}"
        ) from error
    try:
        until = time.monotonic() + wait_s
        while not _taken(descriptor):
            if time.monotonic() >= until:
                raise InUse(busy, hint="try again when it is done")
            time.sleep(_LOOK_EVERY_S)
        yield
    finally:
        os.close(descriptor)


def _taken(descriptor: int) -> bool:
    """Take the lock, unless somebody else has it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
