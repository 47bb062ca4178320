"""A driver's guest memory: one memfd, and where each queue lies in it.

Context: control. The target maps the same memory and may write anything to it
at any time; it cannot shrink it (sealed), so no access of ours can fault.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from dataclasses import dataclass
from typing import Final

from drivebay.errors import HostError, UsageError

__all__ = ["GUEST_BASE", "DriverMemory", "QueueLayout"]

# Where the memory lies in the imagined guest. Not zero, and not the address at
# which we map it: a target that mixes the two up is found at once.
GUEST_BASE: Final = 1 << 32
PAGE_BYTES: Final = 4096
HUGE_PAGE_BYTES: Final = 2 << 20
MAX_QUEUE_SIZE: Final = 1024
MIN_QUEUE_SIZE: Final = 128
_LINE: Final = 128  # two cache lines: processors fetch them in pairs


def _aligned(offset: int, unit: int) -> int:
    return -(-offset // unit) * unit


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


@dataclass(frozen=True, slots=True)
class QueueLayout:
    """Offsets of one queue's parts in the memory; made by ``plan``.

    Of a packed ring, ``avail`` and ``used`` are the driver's and the device's event
    suppression areas, and the slots' chains lie apart from the ring; an ``indirect`` one's
    entries point to them.
    """

    packed: bool
    indirect: bool
    size: int
    slots: int
    chain_shift: int
    desc: int
    avail: int
    used: int
    chains: int
    headers: int
    statuses: int
    data: int
    data_stride: int
    slot_bytes: int
    segment_bytes: int
    end: int

    @classmethod
    def plan(
        cls,
        start: int,
        slots: int,
        slot_bytes: int,
        segment_bytes: int,
        *,
        packed: bool = False,
        indirect: bool = False,
    ) -> QueueLayout:
        """Lay out a queue for ``slots`` requests of up to ``slot_bytes`` each.

        Raises: UsageError when the ring would be longer than 1,024.
        """
        segments = max(1, -(-slot_bytes // segment_bytes))
        chain = _power_of_two(segments + 2)
        size = max(MIN_QUEUE_SIZE, _power_of_two(slots * chain))
        if size > MAX_QUEUE_SIZE:
            raise UsageError(
                f"a depth of {slots} needs a ring of {size} descriptors "
                f"(at most {MAX_QUEUE_SIZE} are served)",
                field="depth",
                hint=f"use a depth of at most {MAX_QUEUE_SIZE // chain} and more queues",
            )
        desc = _aligned(start, PAGE_BYTES)
        avail = _aligned(desc + 16 * size, _LINE)
        used = _aligned(avail + (4 if packed else 4 + 2 * size + 2), _LINE)
        used_end = _aligned(used + (4 if packed else 4 + 8 * size + 2), _LINE)
        chains = used_end if packed else desc
        headers = _aligned(chains + 16 * slots * chain, _LINE) if packed else used_end
        statuses = _aligned(headers + 16 * slots, _LINE)
        data = _aligned(statuses + slots, PAGE_BYTES)
        stride = _aligned(slot_bytes, PAGE_BYTES)
        return cls(
            packed=packed,
            indirect=indirect,
            size=size,
            slots=slots,
            chain_shift=chain.bit_length() - 1,
            desc=desc,
            avail=avail,
            used=used,
            chains=chains,
            headers=headers,
            statuses=statuses,
            data=data,
            data_stride=stride,
            slot_bytes=slot_bytes,
            segment_bytes=segment_bytes,
            end=data + stride * slots,
        )


class DriverMemory:
    """Shared memory of at least ``length`` bytes, zeroed, in whole huge pages' sizes.

    Raises: HostError when there is not enough memory, or no huge page is free.
    """

    def __init__(self, length: int, *, hugepages: bool = False) -> None:
        self.size = _aligned(length, HUGE_PAGE_BYTES)
        flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
        if hugepages:
            flags |= os.MFD_HUGETLB
        try:
            self.fd = os.memfd_create("drivebay-driver", flags)
        except OSError as error:
            raise _no_memory(self.size, error, hugepages) from error
        try:
            os.ftruncate(self.fd, self.size)
            seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, seals)
            self.map = mmap.mmap(self.fd, self.size, mmap.MAP_SHARED | mmap.MAP_POPULATE)
        except OSError as error:
            os.close(self.fd)
            raise _no_memory(self.size, error, hugepages) from error

    def close(self) -> None:
        """Give up the descriptor; the mapping ends with the last queue that uses it."""
        os.close(self.fd)


def _no_memory(size: int, error: OSError, hugepages: bool) -> HostError:
    kind = "huge pages" if hugepages else "shared memory"
    hint = "see /proc/sys/vm/nr_hugepages" if hugepages else None
    return HostError(f"cannot get {size >> 20} MiB of {kind}", error.errno or 0, hint=hint)
