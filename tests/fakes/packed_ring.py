"""The driver's side of a packed virtqueue (virtio 1.3 §2.8), with a way to lie in every field.

Written from the specification. Positions run free: the index in the ring is the position
modulo its size, the wrap counter is 1 in even laps and 0 in odd ones. Buffer ids are far
larger than the ring, because the specification gives them no meaning. Never imports drivebay.
Context: tests.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

from tests.fakes.memory import GuestMemory
from tests.fakes.ring import F_INDIRECT, F_NEXT, F_WRITE, Segment, Used

F_AVAIL = 1 << 7
F_USED = 1 << 15
EVENT_ENABLE = 0
EVENT_DISABLE = 1
EVENT_DESC = 2
WRAP = 1 << 15

PACKED_DESC = struct.Struct("<QIHH")
FIRST_ID = 0xFFFF


class Event(NamedTuple):
    """An event suppression area (§2.8.10)."""

    off_wrap: int
    flags: int


class PackedDesc(NamedTuple):
    """One descriptor as it stands in the ring."""

    addr: int
    length: int
    id: int
    flags: int


class Chain(NamedTuple):
    """What the driver must remember of a buffer: descriptors of the ring, and its table."""

    descriptors: int
    table: int
    table_bytes: int


class PackedRing:
    """One ring in guest memory, ready at position ``start`` as a device left it there."""

    def __init__(
        self, memory: GuestMemory, size: int = 16, *, event_idx: bool = False, start: int = 0
    ) -> None:
        self.memory = memory
        self.size = size
        self.event_idx = event_idx
        # §2.8.10.1: alignment 16, 4, 4; sizes 16·n, 4, 4.
        self.desc = memory.allocate(16 * size, 16, one_region=True)
        self.avail = memory.allocate(4, 4, one_region=True)
        self.used = memory.allocate(4, 4, one_region=True)
        self.start = start
        self._next = start
        self._published = start
        self._seen_used = start
        self._firsts: list[tuple[int, int]] = []
        self._ids = [FIRST_ID - 3 * i for i in range(size)]
        self._chains: dict[int, Chain] = {}
        for index in range(size):
            lap = start // size - (0 if index < start % size else 1)
            self.poke_desc(index, 0, 0, 0, F_AVAIL | F_USED if lap >= 0 and lap % 2 == 0 else 0)
        self.poke_event(self.avail, 0, EVENT_ENABLE)
        self.poke_event(self.used, self.off_wrap(start), EVENT_DESC if event_idx else EVENT_ENABLE)
        if event_idx:
            self.ask_for_interrupt()

    def release(self) -> None:
        """Give the ring's memory back."""
        self.memory.free(self.desc, 16 * self.size)
        self.memory.free(self.avail, 4)
        self.memory.free(self.used, 4)

    # ---- positions ---------------------------------------------------------------------

    def wrap(self, position: int) -> bool:
        """§2.8.1: the wrap counter starts with 1 and is changed after the last descriptor."""
        return position // self.size % 2 == 0

    def off_wrap(self, position: int) -> int:
        return position % self.size | (WRAP if self.wrap(position) else 0)

    def available(self, position: int) -> int:
        """The flags that make a descriptor there available."""
        return F_AVAIL if self.wrap(position) else F_USED

    @property
    def base(self) -> int:
        """Where the ring starts, as SET_VRING_BASE says it: nothing is in flight."""
        return self.off_wrap(self.start) * 0x10001

    @property
    def position(self) -> int:
        """Of the next descriptor that the driver makes available."""
        return self._next

    # ---- raw ---------------------------------------------------------------------------

    def poke_desc(self, position: int, addr: int, length: int, buffer_id: int, flags: int) -> None:
        """Write one descriptor, of any value; its flags last."""
        at = self.desc + 16 * (position % self.size)
        self.memory.write(at, PACKED_DESC.pack(addr, length, buffer_id, 0)[:14])
        self.memory.fence()
        self.memory.store_u16(at + 14, flags)

    def poke_flags(self, position: int, flags: int) -> None:
        self.memory.fence()
        self.memory.store_u16(self.desc + 16 * (position % self.size) + 14, flags)

    def poke_event(self, area: int, off_wrap: int, flags: int) -> None:
        """Write an event area: ``avail`` is the driver's, ``used`` the device's."""
        self.memory.store_u16(area, off_wrap)
        self.memory.fence()
        self.memory.store_u16(area + 2, flags)

    def desc_at(self, position: int) -> PackedDesc:
        raw = self.memory.read(self.desc + 16 * (position % self.size), 16)
        return PackedDesc(*PACKED_DESC.unpack(raw))

    @property
    def device_event(self) -> Event:
        """The device's wish."""
        return Event(self.memory.load_u16(self.used), self.memory.load_u16(self.used + 2))

    # ---- well-behaved ------------------------------------------------------------------

    @property
    def free_descriptors(self) -> int:
        return self.size - sum(chain.descriptors for chain in self._chains.values())

    def add(self, segments: Sequence[Segment], *, indirect: bool = False) -> int:
        """Put a chain into the ring, unpublished; returns its buffer id."""
        table = table_bytes = 0
        elements = list(segments)
        flags = [F_WRITE if segment.writable else 0 for segment in segments]
        if indirect:
            table_bytes = 16 * len(segments)
            table = self.memory.allocate(table_bytes, 16)
            self.memory.write(table, table_of(segments))
            elements, flags = [Segment(table, table_bytes, False)], [F_INDIRECT]
        if len(elements) > self.free_descriptors:
            raise AssertionError(f"the ring has no room for {len(elements)} descriptors")
        buffer_id = self._ids.pop()
        first = self._next
        for offset, (segment, own) in enumerate(zip(elements, flags, strict=True)):
            position = first + offset
            last = offset == len(elements) - 1
            wanted = own | self.available(position) | (0 if last else F_NEXT)
            # Its own flags wait if it is the first: the chain is seen whole or not at all.
            shown = wanted if offset else self.desc_at(position).flags
            # §2.8.6: the id counts in the last descriptor; elsewhere it says nothing.
            given = buffer_id if last else 0x5A5A
            self.poke_desc(position, segment.addr, segment.length, given, shown)
            if not offset:
                self._firsts.append((position, wanted))
        self._next += len(elements)
        self._chains[buffer_id] = Chain(len(elements), table, table_bytes)
        return buffer_id

    def publish(self) -> bool:
        """Show what was added to the device, first chain last; True if it wants a kick."""
        for position, flags in reversed(self._firsts):
            self.poke_flags(position, flags)
        self._firsts.clear()
        old, self._published = self._published, self._next
        self.memory.fence()
        wish = self.device_event
        if self.event_idx and wish.flags == EVENT_DESC:
            return any(self.off_wrap(at) == wish.off_wrap for at in range(old, self._next))
        return wish.flags != EVENT_DISABLE

    def take_used(self) -> list[Used]:
        """Collect what the device has finished, and free those chains.

        With EVENT_IDX the wish for a notification is renewed, and the ring looked at once
        more: what the device finished in between came without one.
        """
        taken: list[Used] = []
        while True:
            while self._is_used(self._seen_used):
                taken.append(self._take_one())
            if not self.event_idx:
                return taken
            self.ask_for_interrupt()
            if not self._is_used(self._seen_used):
                return taken

    def _is_used(self, position: int) -> bool:
        flags = self.memory.load_u16(self.desc + 16 * (position % self.size) + 14)
        wrap = self.wrap(position)
        return bool(flags & F_AVAIL) == wrap and bool(flags & F_USED) == wrap

    def _take_one(self) -> Used:
        desc = self.desc_at(self._seen_used)
        if desc.id not in self._chains:
            raise AssertionError(f"used descriptor {desc} names no buffer in flight")
        chain = self._chains.pop(desc.id)
        self._seen_used += chain.descriptors
        self._ids.insert(0, desc.id)
        if chain.table_bytes:
            self.memory.free(chain.table, chain.table_bytes)
        # §2.8.4: without WRITE nothing was written, and len says nothing.
        return Used(desc.id, desc.length if desc.flags & F_WRITE else 0)

    def ask_for_interrupt(self) -> None:
        """With EVENT_IDX: notify me at the very next used descriptor."""
        self.poke_event(self.avail, self.off_wrap(self._seen_used), EVENT_DESC)
        self.memory.fence()


def table_of(segments: Sequence[Segment]) -> bytes:
    """An indirect table (§2.8.7): in order, and no flag but WRITE means anything."""
    return b"".join(
        PACKED_DESC.pack(segment.addr, segment.length, 0, F_WRITE if segment.writable else 0)
        for segment in segments
    )
