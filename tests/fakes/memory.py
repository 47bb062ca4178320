"""Guest memory as a VM monitor shares it: memfds, mapped here, described to the other side.

Context: tests. Every region has its own memfd, a guest address and a front-end user address
that is nobody's real address, so a target that confuses two of the three reads the wrong bytes.
Never imports drivebay.
"""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Sequence
from typing import NamedTuple

PAGE = 4096
MIB = 1 << 20
USER_BASE = 0x7F00_0000_0000
USER_STRIDE = 0x10_0000_0000


class Layout(NamedTuple):
    """Where one region lies for the guest, and where its bytes lie in its file."""

    guest_addr: int
    size: int
    mmap_offset: int = 0


# Apart for the guest, as below and above the hole under 4 GiB of a PC.
APART = (Layout(0, 4 * MIB), Layout(1 << 32, 4 * MIB, mmap_offset=2 * MIB))


def adjacent(sizes: Sequence[int], guest_addr: int = MIB) -> tuple[Layout, ...]:
    """Regions that follow each other for the guest, but not in any other sense."""
    layouts = []
    for size in sizes:
        layouts.append(Layout(guest_addr, size))
        guest_addr += size
    return tuple(layouts)


class GuestRegion:
    """One memfd, mapped shared. ``fd`` stays open until close()."""

    def __init__(self, layout: Layout, user_addr: int, fd: int | None = None) -> None:
        self.guest_addr = layout.guest_addr
        self.size = layout.size
        self.mmap_offset = layout.mmap_offset
        self.user_addr = user_addr
        if fd is None:
            fd = os.memfd_create("guest", os.MFD_CLOEXEC)
            os.ftruncate(fd, layout.mmap_offset + layout.size)
        self.fd = fd
        self._map = mmap.mmap(fd, layout.size, offset=layout.mmap_offset)
        self.bytes = memoryview(self._map)
        # Native u16 access is one store or load; struct's "<H" would write byte by byte,
        # and a device that looks at avail.idx between the two bytes would see a jump.
        self.u16 = self.bytes.cast("H")

    @property
    def end(self) -> int:
        return self.guest_addr + self.size

    def close(self) -> None:
        self.u16.release()
        self.bytes.release()
        self._map.close()
        os.close(self.fd)


class GuestMemory:
    """All of a guest's memory, with an allocator that hands out guest addresses."""

    def __init__(self, layouts: Sequence[Layout] = APART) -> None:
        self.regions = [
            GuestRegion(layout, USER_BASE + i * USER_STRIDE) for i, layout in enumerate(layouts)
        ]
        self._fence = threading.Lock()
        # Page 0 is kept back: an address of zero is then always somebody's mistake.
        self._free: list[tuple[int, int]] = []
        for region in self.regions:
            self._release_range(max(region.guest_addr, PAGE), region.end)

    def __enter__(self) -> GuestMemory:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        for region in self.regions:
            region.close()
        self.regions = []

    def region_of(self, guest_addr: int) -> GuestRegion:
        for region in self.regions:
            if region.guest_addr <= guest_addr < region.end:
                return region
        raise LookupError(f"no region holds guest address {guest_addr:#x}")

    def user_addr(self, guest_addr: int) -> int:
        region = self.region_of(guest_addr)
        return region.user_addr + guest_addr - region.guest_addr

    def read(self, guest_addr: int, length: int) -> bytes:
        """Bytes from one or several adjacent regions."""
        out = bytearray()
        while length > 0:
            region = self.region_of(guest_addr)
            start = guest_addr - region.guest_addr
            piece = region.bytes[start : start + length]
            out += piece
            guest_addr += len(piece)
            length -= len(piece)
        return bytes(out)

    def write(self, guest_addr: int, data: bytes) -> None:
        """Bytes into one or several adjacent regions."""
        while data:
            region = self.region_of(guest_addr)
            start = guest_addr - region.guest_addr
            room = min(len(data), region.size - start)
            region.bytes[start : start + room] = data[:room]
            guest_addr += room
            data = data[room:]

    def load_u16(self, guest_addr: int) -> int:
        region = self.region_of(guest_addr)
        return region.u16[(guest_addr - region.guest_addr) >> 1]

    def store_u16(self, guest_addr: int, value: int) -> None:
        region = self.region_of(guest_addr)
        region.u16[(guest_addr - region.guest_addr) >> 1] = value & 0xFFFF

    def fence(self) -> None:
        """A full barrier: taking a lock is a locked instruction on x86-64 and aarch64 alike."""
        with self._fence:
            pass

    def allocate(self, length: int, align: int = 1, *, one_region: bool = False) -> int:
        """A guest address with ``length`` free bytes; in one region if it shall be mapped so."""
        length = max(length, 1)
        for start, end in sorted(self._free):
            place = -(-start // align) * align
            if one_region:
                place = self._inside_one_region(place, length, align)
            if place + length <= end:
                self._free.remove((start, end))
                self._release_range(start, place)
                self._release_range(place + length, end)
                return place
        raise MemoryError(f"the fake guest has no {length} free bytes")

    def free(self, guest_addr: int, length: int) -> None:
        """Give back what allocate() handed out."""
        self._release_range(guest_addr, guest_addr + max(length, 1))

    def keep_below(self, guest_addr: int) -> None:
        """Hand out nothing below this address any more."""
        free, self._free = self._free, []
        for start, end in free:
            self._release_range(max(start, guest_addr), end)

    def _inside_one_region(self, place: int, length: int, align: int) -> int:
        for region in self.regions:
            here = max(place, -(-region.guest_addr // align) * align)
            if here + length <= region.end:
                return here
        return place

    def _release_range(self, start: int, end: int) -> None:
        if start >= end:
            return
        for other in list(self._free):
            if other[1] == start or other[0] == end:
                self._free.remove(other)
                start, end = min(start, other[0]), max(end, other[1])
        self._free.append((start, end))
