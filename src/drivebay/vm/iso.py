"""ISO images as installers come: looked at before a VM gets one.

Context: a short-lived process. Nothing in an ISO is trusted: it is a stranger's file.
"""

from __future__ import annotations

import errno
import stat
from pathlib import Path
from typing import Final

from drivebay.disks.sizes import format_size
from drivebay.errors import HostError, UsageError

__all__ = ["check_iso", "read_label"]

_BLOCK: Final = 2048
_DESCRIPTOR_AT: Final = 16 * _BLOCK  # ECMA-119, 6.2.1: what is before it is anybody's
_PRIMARY: Final = b"\x01CD001\x01"  # ECMA-119, 8.4: type, standard identifier, version
_LABEL: Final = slice(40, 72)
_BLOCKS: Final = slice(80, 84)  # its volume space size
_BLOCK_SIZE: Final = slice(128, 130)
# A disc's last blocks may lack in a copy of it, for which writers put 150 empty ones there.
_PADDING: Final = 150 * _BLOCK
_OTHERS: Final = {
    b"QFI\xfb": "a qcow2 disk image",
    b"KDMV": "a VMDK disk image",
    b"\xfd7zXZ": "a file compressed by xz",
    b"\x1f\x8b": "a file compressed by gzip",
    b"\x28\xb5\x2f\xfd": "a file compressed by zstd",
    b"PK\x03\x04": "a zip archive",
}


def check_iso(path: Path, *, spare: int = _PADDING) -> None:
    """Whether a file can be a CD, of which the last ``spare`` bytes may lack.

    Raises: HostError when it can't be read; UsageError.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise UsageError(f"'{path}' is no file, and so no ISO")
        with path.open("rb") as file:
            begin = file.read(8)
            file.seek(_DESCRIPTOR_AT)
            descriptor = file.read(_BLOCK)
    except OSError as error:
        code = error.errno or errno.EIO
        raise HostError(f"can't read the ISO '{path}'", code, path=str(path)) from error
    if len(descriptor) < _BLOCK or not descriptor.startswith(_PRIMARY):
        raise _no_iso(path, begin, status.st_size)
    blocks = int.from_bytes(descriptor[_BLOCKS], "little")
    size = blocks * int.from_bytes(descriptor[_BLOCK_SIZE], "little")
    if status.st_size + spare < size:
        raise UsageError(
            f"'{path}' is cut off: it has {format_size(status.st_size)}, and says itself that it "
            f"should have {format_size(size)}",
            hint="download it again, and compare its checksum",
        )


def read_label(path: Path) -> bytes:
    """The volume's name, of an ISO that was checked. Raises: OSError."""
    with path.open("rb") as file:
        file.seek(_DESCRIPTOR_AT)
        return file.read(_BLOCK)[_LABEL].rstrip(b" \0")


def _no_iso(path: Path, begin: bytes, size: int) -> UsageError:
    what = next((name for magic, name in _OTHERS.items() if begin.startswith(magic)), None)
    if what is None:
        what = f"{format_size(size)} without the mark of ISO 9660 ('CD001')"
    image = what.endswith("disk image")
    return UsageError(
        f"'{path}' is no ISO: it is {what}",
        hint=f"drivebay image import {path}" if image else "an ISO is what one burns to a CD",
    )
