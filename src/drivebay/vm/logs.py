"""What a guest and its QEMU have said: read as it grows, and made harmless for a terminal.

Context: any. A guest writes into its console's log whatever it likes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from drivebay.errors import HostError

__all__ = ["harmless", "new_bytes"]

_CHUNK_BYTES: Final = 1 << 16
# Colours stay. All else that a terminal would obey goes: whole sequences, then what is left of
# cut ones.
_COLOUR = rb"\x1b\[[0-9;]*m"
_SEQUENCE = (
    rb"\x1b\[[0-?]*[ -/]*[@-~]|\x1b[PX^_\]][^\x07\x1b]*(?:\x07|\x1b\\)?|\x1b[ -/]*[0-Z\\`-~]"
)
_CONTROL = rb"[\x00-\x08\x0b-\x0c\x0e-\x1f\x7f]|\xc2[\x80-\x9f]"
_PATTERN: Final = re.compile(rb"(%s)|%s|%s" % (_COLOUR, _SEQUENCE, _CONTROL))


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


def harmless(text: bytes) -> bytes:
    r"""Return ``text`` without what would change more of a terminal than its colours.

    >>> harmless(b"\x1b[2J\x1b[31mred\x1b[0m\x1b]0;title\x07\x08!\r\n")
    b'\x1b[31mred\x1b[0m!\r\n'
    """
    return _PATTERN.sub(lambda found: found[1] or b"", text)
