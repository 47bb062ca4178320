"""One command at a time: a lock on a file, which ends with the process that holds it.

Context: a short-lived process. The file stays empty, and lies beside what it stands for.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from drivebay.errors import HostError, InUse

__all__ = ["held"]


@contextlib.contextmanager
def held(path: Path, busy: str) -> Iterator[None]:
    """Hold the lock while the block runs.

    Raises: InUse, which says ``busy``, when somebody else has it; HostError.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise HostError(
            f"can't lock '{path}'", error.errno or 0, path=str(path), hint=f"ls -ld {path.parent}"
        ) from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InUse(busy, hint="try again when it is done") from None
        yield
    finally:
        os.close(descriptor)
