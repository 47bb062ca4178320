"""What a guest and its QEMU have said, read as it grows.

Context: any. A guest writes into its console's log whatever it likes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from drivebay.errors import HostError

__all__ = ["new_bytes"]

_CHUNK_BYTES: Final = 1 << 16


def new_bytes(log: Path) -> Iterator[bytes]:
    """What a log has, and b"" whenever there is no more yet; it never ends.

    A log that the VM's next start has turned over is read to its end, then the new one.
    Raises: HostError.
    """
    while True:
        try:
            file = log.open("rb")
        except FileNotFoundError:
            yield b""
            continue
        except OSError as error:
            raise HostError(f"can't read '{log}'", error.errno or 0, path=str(log)) from error
        with file:
            turned_over = False
            while not turned_over:
                # Looked at before reading: who turned it over writes into it no more.
                turned_over = _turned_over(log, file.fileno())
                while data := file.read(_CHUNK_BYTES):
                    yield data
                yield b""


def _turned_over(log: Path, descriptor: int) -> bool:
    try:
        return log.stat().st_ino != os.fstat(descriptor).st_ino
    except FileNotFoundError:
        return True
