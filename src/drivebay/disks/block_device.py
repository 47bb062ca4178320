"""Who a block device of this host is, and what the kernel does with it: from sysfs and /proc.

Context: a short-lived process; reads only.
"""

from __future__ import annotations

import errno
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from drivebay.errors import HostError, UsageError

__all__ = ["BlockDevice", "find_device"]

_SYSFS: Final = Path("/sys")


@dataclass(frozen=True, slots=True)
class BlockDevice:
    """What the kernel says of a device."""

    path: str
    name: str  # sda, sda1
    size: int
    block_bytes: int
    is_partition: bool
    read_only: bool
    model: str
    serial: str
    holders: tuple[str, ...]  # 'sda1 is mounted on /'

    def __str__(self) -> str:
        """As people know it: its model and serial number, if it has any."""
        words = [word for word in (self.model, self.serial and f"serial {self.serial}") if word]
        return f"{self.path} ({', '.join(words) or 'no model or serial number'})"


def find_device(path: str, sysfs: Path = _SYSFS, proc: Path = Path("/proc")) -> BlockDevice:
    """Look a block device up. Raises: HostError; UsageError for anything else."""
    place = Path(path)
    try:
        status = place.stat()
    except OSError as error:
        raise HostError(f"can't find '{path}'", error.errno or errno.EIO, path=path) from error
    if not stat.S_ISBLK(status.st_mode):
        raise UsageError(
            f"'{path}' is no block device",
            hint="for a pool in a file: --file FILE --size SIZE",
        )
    number = f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"
    base = (sysfs / "dev" / "block" / number).resolve()
    is_partition = (base / "partition").exists()
    disk = base.parent if is_partition else base
    return BlockDevice(
        path=path,
        name=base.name,
        size=int(_read(base / "size") or "0") * 512,
        block_bytes=int(_read(disk / "queue" / "logical_block_size") or "512"),
        is_partition=is_partition,
        read_only=_read(base / "ro") == "1",
        model=_model(disk),
        serial=_read(disk / "device" / "serial") or _read(disk / "serial"),
        holders=tuple(_holders(base, proc)),
    )


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _model(disk: Path) -> str:
    words = [_read(disk / "device" / "vendor"), _read(disk / "device" / "model")]
    # A virtio disk's vendor is a number.
    named = " ".join(word for word in words if word and not word.startswith("0x"))
    backing = _read(disk / "loop" / "backing_file")
    return named or (f"loop device on {backing}" if backing else "")


def _holders(base: Path, proc: Path) -> list[str]:
    """Mounts, swap, md and device mapper on a device and its partitions."""
    numbers = {_read(base / "dev"): base.name}
    numbers |= {_read(part): part.parent.name for part in base.glob("*/dev")}
    found = []
    for line in _read(proc / "self" / "mountinfo").splitlines():
        fields = line.split()
        if fields[2] in numbers:
            found.append(f"{numbers[fields[2]]} is mounted on {fields[4]}")
    for line in _read(proc / "swaps").splitlines()[1:]:
        swap = Path(line.split()[0])
        if swap.name in numbers.values():
            found.append(f"{swap.name} is swap")
    holders = sorted([*base.glob("holders/*"), *base.glob("*/holders/*")])
    return found + [f"{holder.parent.parent.name} is held by {holder.name}" for holder in holders]
