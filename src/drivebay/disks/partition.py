"""One more partition on a disk, in space that is free: found, shown, written, taken back.

Context: a short-lived process, mostly root's. What is planned is pure; what is written is a
partition table with one more entry and nothing else: the copy at the end first, made durable,
then the table itself, so that one of the two is whole at any moment. The kernel is told of
the new partition alone (BLKPG), which works while other partitions are mounted.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import re
import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from uuid import UUID, uuid4

from drivebay.disks.contents import Content, find_contents
from drivebay.disks.sizes import format_size
from drivebay.errors import HostError, InUse, StateError
from drivebay.wire.gpt import (
    SPDK_TYPE,
    Entry,
    GptError,
    Table,
    add_entry,
    is_protective_mbr,
    new_table,
    pack_protective_mbr,
    parse_header,
    parse_table,
    table_writes,
)

__all__ = [
    "NewPartition",
    "free_ranges",
    "plan_partition",
    "remove_partition",
    "write_partition",
    "write_table",
]

_MIB: Final = 1 << 20

# <linux/blkpg.h>
_BLKPG: Final = 0x1269
_BLKPG_ADD_PARTITION: Final = 1
_BLKPG_DEL_PARTITION: Final = 2
_BLKPG_PARTITION: Final = struct.Struct("=qqi64s64s4x")
_BLKPG_ARGUMENT: Final = struct.Struct("=iii4xQ")
_NODE_WAIT_S: Final = 10.0
_LINK_WAIT_S: Final = 2.0

Read = Callable[[int, int], bytes]


@dataclass(frozen=True, slots=True)
class NewPartition:
    """One partition that a disk has room for; nothing is written yet."""

    device: str
    block_bytes: int
    blocks: int
    table: Table  # with the new entry
    entry: Entry
    before: Table | None  # the disk's own, None on an empty disk
    holds: tuple[str, ...]  # what is on the disk already, in words

    @property
    def size(self) -> int:
        return (self.entry.last_lba - self.entry.first_lba + 1) * self.block_bytes

    @property
    def offset(self) -> int:
        return self.entry.first_lba * self.block_bytes


def plan_partition(
    read: Read,
    device: str,
    blocks: int,
    block_bytes: int,
    name: str,
    size: int | None,
) -> NewPartition:
    """Find room for one partition on an empty disk or in the free space of one with a GPT.

    ``size`` None takes the largest free range. Raises: InUse when something is on the disk
    that is no GPT; GptError when its table may not be used; StateError when there is no room.
    """
    table = _present_table(read, device, blocks, block_bytes)
    before = table
    if table is None:
        _refuse_contents(read, device, blocks * block_bytes)
        table = new_table(blocks, block_bytes, uuid4())
    ranges = free_ranges(table, block_bytes)
    if size is None:
        wanted = max((last - first + 1 for first, last in ranges), default=0)
    else:
        wanted = -(-size // block_bytes)
    fitting = [first for first, last in ranges if last - first + 1 >= wanted > 0]
    if not fitting:
        largest = max((last - first + 1 for first, last in ranges), default=0) * block_bytes
        raise StateError(
            f"{device} has no room for a partition of {format_size(wanted * block_bytes)}: its "
            f"largest free range has {format_size(largest)}"
        )
    used = {entry.number for entry in table.entries}
    number = next(
        (index for index in range(1, table.header.entry_count + 1) if index not in used), 0
    )
    entry = Entry(number, SPDK_TYPE, uuid4(), fitting[0], fitting[0] + wanted - 1, 0, name[:36])
    holds = tuple(_spell_entry(there, read, block_bytes) for there in table.entries)
    return NewPartition(device, block_bytes, blocks, add_entry(table, entry), entry, before, holds)


def _present_table(read: Read, device: str, blocks: int, block_bytes: int) -> Table | None:
    """The disk's GPT if both of its copies are whole and agree; None when there is none."""
    first = read(block_bytes, block_bytes)
    if first[:8] != b"EFI PART":
        if read((blocks - 1) * block_bytes, 8) == b"EFI PART" and is_protective_mbr(read(0, 512)):
            raise GptError(
                f"the partition table of {device} is damaged; only its copy at the end is left",
                hint=f"mend it first: sgdisk --load-backup … or gdisk {device}",
            )
        return None
    try:
        table = _read_table(read, 1, blocks, block_bytes)
        copy = _read_table(read, table.header.other_lba, blocks, block_bytes)
    except GptError as error:
        raise GptError(
            f"the partition table of {device} can't be used: {error}",
            hint=f"mend it first: sgdisk --verify {device}",
        ) from error
    if copy.raw_entries != table.raw_entries:
        raise GptError(
            f"the partition table of {device} and its copy at the end differ",
            hint=f"mend it first: sgdisk --verify {device}",
        )
    return table


def _read_table(read: Read, lba: int, blocks: int, block_bytes: int) -> Table:
    header = parse_header(read(lba * block_bytes, block_bytes), lba, block_bytes, blocks)
    return parse_table(header, read(header.entries_lba * block_bytes, header.entries_bytes))


def _refuse_contents(read: Read, device: str, size: int) -> None:
    found = find_contents(read, size)
    if not found and not any(read(0, _MIB)) and not any(read(max(0, size - _MIB), _MIB)):
        return
    what = ", ".join(map(str, found)) or "data that is not recognized"
    raise InUse(
        f"{device} is not empty: it holds {what}",
        hint="if nobody needs that: wipefs --all, then blkdiscard -z or dd if=/dev/zero",
    )


def _spell_entry(entry: Entry, read: Read, block_bytes: int) -> str:
    start, size = (
        entry.first_lba * block_bytes,
        (entry.last_lba - entry.first_lba + 1) * block_bytes,
    )
    found = find_contents(lambda offset, length: read(start + offset, length), size)
    what = ", ".join(map(str, found)) or str(Content("nothing that is recognized", "", size))
    return f"partition {entry.number}" + (f" '{entry.name}'" if entry.name else "") + f": {what}"


def free_ranges(table: Table, block_bytes: int) -> list[tuple[int, int]]:
    """Free blocks (first, last), each beginning and ending on a whole MiB of the disk."""
    grain = max(_MIB // block_bytes, 1)
    edges = sorted((entry.first_lba, entry.last_lba) for entry in table.entries)
    found = []
    next_free = table.header.first_usable
    for first, last in [*edges, (table.header.last_usable + 1, 0)]:
        start, end = -(-next_free // grain) * grain, first // grain * grain - 1
        if start <= end:
            found.append((start, end))
        next_free = last + 1
    return found


def write_partition(plan: NewPartition) -> str:
    """Write the table and tell the kernel; returns the partition's path, a stable one if any.

    Raises: HostError; InUse when somebody else changed the table meanwhile.
    """
    with _opened(plan) as descriptor:
        write_table(descriptor, plan)
        _call_kernel(descriptor, plan, _BLKPG_ADD_PARTITION)
    return _wait_for_node(plan)


@contextlib.contextmanager
def _opened(plan: NewPartition) -> Iterator[int]:
    """The disk, locked against sgdisk and udev, which take the same lock for their work."""
    try:
        descriptor = os.open(plan.device, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise HostError(f"can't write {plan.device}", error.errno or errno.EIO) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield descriptor
    except BlockingIOError:
        raise InUse(f"another program is at work on the partitions of {plan.device}") from None
    except OSError as error:
        raise HostError(
            f"can't change the partitions of {plan.device}", error.errno or errno.EIO
        ) from error
    finally:
        os.close(descriptor)


def write_table(descriptor: int, plan: NewPartition) -> None:
    """Write copy, then table, each durably. Raises: OSError, InUse."""
    _expect(descriptor, plan, plan.before)
    if plan.before is None:
        _write(descriptor, 0, pack_protective_mbr(plan.blocks, plan.block_bytes))
    _write_groups(descriptor, plan.table, plan.block_bytes)


def _expect(descriptor: int, plan: NewPartition, table: Table | None) -> None:
    """Refuse when the table on the disk is not the one that was looked at. Raises: InUse."""

    def read(offset: int, length: int) -> bytes:
        return os.pread(descriptor, length, offset)

    if _present_table(read, plan.device, plan.blocks, plan.block_bytes) != table:
        raise InUse(f"the partitions of {plan.device} have changed meanwhile; nothing was written")


def _write_groups(descriptor: int, table: Table, block_bytes: int, *, blank: bool = False) -> None:
    for group in table_writes(table, block_bytes):
        for offset, data in group:
            _write(descriptor, offset, bytes(len(data)) if blank else data)
        os.fsync(descriptor)


def remove_partition(plan: NewPartition) -> None:
    """Take back what `write_partition` did: the disk is as it was before. Raises: as that."""
    with _opened(plan) as descriptor:
        _expect(descriptor, plan, plan.table)
        _call_kernel(descriptor, plan, _BLKPG_DEL_PARTITION)
        if plan.before is None:
            _write_groups(descriptor, plan.table, plan.block_bytes, blank=True)
            _write(descriptor, 0, bytes(plan.block_bytes))
            os.fsync(descriptor)
        else:
            _write_groups(descriptor, plan.before, plan.block_bytes)


def _write(descriptor: int, offset: int, data: bytes) -> None:
    while data:
        written = os.pwrite(descriptor, data, offset)
        offset, data = offset + written, data[written:]


def _call_kernel(descriptor: int, plan: NewPartition, operation: int) -> None:
    partition = ctypes.create_string_buffer(
        _BLKPG_PARTITION.pack(plan.offset, plan.size, plan.entry.number, b"", b"")
    )
    argument = _BLKPG_ARGUMENT.pack(
        operation, 0, _BLKPG_PARTITION.size, ctypes.addressof(partition)
    )
    try:
        fcntl.ioctl(descriptor, _BLKPG, argument)
    except OSError as error:
        # Somebody (udev) has made the kernel read the new table already.
        if not (operation == _BLKPG_ADD_PARTITION and error.errno == errno.EBUSY):
            raise


def partition_path(device: str, number: int) -> str:
    """The node of a partition: sda3, nvme0n1p3."""
    return f"{device}p{number}" if re.search(r"\d$", device) else f"{device}{number}"


def _wait_for_node(plan: NewPartition) -> str:
    """Names of disks change at a boot; the link by the partition's own GUID does not."""
    node = partition_path(str(Path(plan.device).resolve()), plan.entry.number)
    stable = stable_path(plan.entry.unique_guid)
    deadline = time.monotonic() + _NODE_WAIT_S
    while not Path(node).exists():
        if time.monotonic() > deadline:
            raise HostError(f"the partition is made, but '{node}' did not appear", errno.ENODEV)
        time.sleep(0.02)
    if not stable.parent.exists():  # no udev here
        return node
    deadline = time.monotonic() + _LINK_WAIT_S
    while not stable.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    return str(stable) if stable.exists() else node


def stable_path(guid: UUID) -> Path:
    """Where udev links a partition by its GUID."""
    return Path("/dev/disk/by-partuuid") / str(guid)
