"""The driver's side of a split virtqueue (virtio 1.3 §2.7), with a way to lie in every field.

Written from the specification. The well-behaved half allocates descriptors, publishes and
collects; the ``poke_*`` half writes any value anywhere. Never imports drivebay.
Context: tests.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

from tests.fakes.memory import GuestMemory

F_NEXT = 1
F_WRITE = 2
F_INDIRECT = 4
AVAIL_F_NO_INTERRUPT = 1
USED_F_NO_NOTIFY = 1

DESC = struct.Struct("<QIHH")
USED_ELEM = struct.Struct("<II")


class Segment(NamedTuple):
    """One buffer of a chain: where, how long, and whether the device may write it."""

    addr: int
    length: int
    writable: bool


class Used(NamedTuple):
    """One used element."""

    head: int
    length: int


def need_event(event: int, new: int, old: int) -> bool:
    """Does passing from old to new step over event? All three wrap at 65,536 (§2.7.10)."""
    return (new - event - 1) & 0xFFFF < (new - old) & 0xFFFF


class SplitRing:
    """One ring in guest memory, ready at index ``start`` (both indexes free-running)."""

    def __init__(
        self, memory: GuestMemory, size: int = 16, *, event_idx: bool = False, start: int = 0
    ) -> None:
        self.memory = memory
        self.size = size
        self.event_idx = event_idx
        # §2.7: alignment 16, 2, 4; sizes 16·n, 6 + 2·n, 6 + 8·n.
        self.desc = memory.allocate(16 * size, 16, one_region=True)
        self.avail = memory.allocate(6 + 2 * size, 2, one_region=True)
        self.used = memory.allocate(6 + 8 * size, 4, one_region=True)
        self.start = start
        self._avail_idx = start
        self._seen_used = start
        self._published = start
        self._free = list(range(size))
        self._chains: dict[int, tuple[list[int], int, int]] = {}
        memory.write(self.desc, bytes(16 * size))
        memory.write(self.avail, bytes(6 + 2 * size))
        memory.write(self.used, bytes(6 + 8 * size))
        self.poke_avail_idx(start)
        # As a device that stopped here has left it: its wish is the next entry.
        memory.store_u16(self.used + 2, start)
        memory.store_u16(self.used + 4 + 8 * size, start)
        if event_idx:
            self.ask_for_interrupt()

    def release(self) -> None:
        """Give the ring's memory back."""
        self.memory.free(self.desc, 16 * self.size)
        self.memory.free(self.avail, 6 + 2 * self.size)
        self.memory.free(self.used, 6 + 8 * self.size)

    # ---- raw ---------------------------------------------------------------------------

    def poke_desc(
        self, index: int, addr: int, length: int, flags: int = 0, next_index: int = 0
    ) -> None:
        """Write one descriptor, of any value."""
        self.memory.write(self.desc + 16 * index, DESC.pack(addr, length, flags, next_index))

    def poke_avail(self, position: int, head: int) -> None:
        """Write one avail entry; ``position`` is free-running."""
        self.memory.store_u16(self.avail + 4 + 2 * (position % self.size), head)

    def poke_avail_idx(self, index: int) -> None:
        """Publish: all earlier stores are visible before this one (total store order, or fence)."""
        self.memory.fence()
        self.memory.store_u16(self.avail + 2, index)

    def poke_used_event(self, index: int) -> None:
        """§2.7.7: the driver's wish, behind the avail entries."""
        self.memory.store_u16(self.avail + 4 + 2 * self.size, index)

    def poke_avail_flags(self, flags: int) -> None:
        self.memory.store_u16(self.avail, flags)

    @property
    def base(self) -> int:
        """Where the ring starts, as SET_VRING_BASE says it."""
        return self.start & 0xFFFF

    @property
    def avail_idx(self) -> int:
        return self._avail_idx & 0xFFFF

    @property
    def used_idx(self) -> int:
        """What the device has published."""
        return self.memory.load_u16(self.used + 2)

    @property
    def used_flags(self) -> int:
        return self.memory.load_u16(self.used)

    @property
    def avail_event(self) -> int:
        """§2.7.10: the device's wish, behind the used elements."""
        return self.memory.load_u16(self.used + 4 + 8 * self.size)

    def used_at(self, position: int) -> Used:
        raw = self.memory.read(self.used + 4 + 8 * (position % self.size), 8)
        return Used(*USED_ELEM.unpack(raw))

    # ---- well-behaved ------------------------------------------------------------------

    @property
    def free_descriptors(self) -> int:
        return len(self._free)

    def add(self, segments: Sequence[Segment], *, indirect: bool = False) -> int:
        """Put a chain into the avail ring, unpublished; returns its head."""
        table = 0
        if indirect:
            table = self.memory.allocate(16 * len(segments), 16)
            head = self._free.pop()
            self.memory.write(table, chain_bytes(segments, list(range(len(segments)))))
            self.poke_desc(head, table, 16 * len(segments), F_INDIRECT)
            self._chains[head] = ([head], table, len(segments))
        else:
            taken = [self._free.pop() for _ in segments]
            head = taken[0]
            packed = chain_bytes(segments, taken)
            for position, index in enumerate(taken):
                self.memory.write(
                    self.desc + 16 * index, packed[16 * position : 16 * position + 16]
                )
            self._chains[head] = (taken, 0, 0)
        self.poke_avail(self._avail_idx, head)
        self._avail_idx += 1
        return head

    def publish(self) -> bool:
        """Show what was added to the device; True if it wants a kick."""
        old, new = self._published & 0xFFFF, self._avail_idx & 0xFFFF
        self.poke_avail_idx(new)
        self._published = self._avail_idx
        self.memory.fence()
        if self.event_idx:
            return need_event(self.avail_event, new, old)
        return not self.used_flags & USED_F_NO_NOTIFY

    def take_used(self) -> list[Used]:
        """Collect what the device has finished, and free those chains.

        With EVENT_IDX the wish for a notification is renewed, and the ring looked at once
        more: what the device finished in between came without one.
        """
        taken: list[Used] = []
        while True:
            while self._seen_used & 0xFFFF != self.used_idx:
                taken.append(self._take_one())
            if not self.event_idx:
                return taken
            self.ask_for_interrupt()
            if self._seen_used & 0xFFFF == self.used_idx:
                return taken

    def _take_one(self) -> Used:
        element = self.used_at(self._seen_used)
        self._seen_used += 1
        if element.head not in self._chains:
            raise AssertionError(f"used element {element} names no chain in flight")
        descriptors, table, count = self._chains.pop(element.head)
        self._free += descriptors
        if count:
            self.memory.free(table, 16 * count)
        return element

    def ask_for_interrupt(self) -> None:
        """With EVENT_IDX: notify me at the very next used element."""
        self.poke_used_event(self._seen_used & 0xFFFF)
        self.memory.fence()


def chain_bytes(segments: Sequence[Segment], indexes: Sequence[int]) -> bytes:
    """Descriptors of one chain, in chain order, linked through ``indexes``."""
    out = b""
    for position, segment in enumerate(segments):
        last = position == len(segments) - 1
        flags = (F_WRITE if segment.writable else 0) | (0 if last else F_NEXT)
        follow = 0 if last else indexes[position + 1]
        out += DESC.pack(segment.addr, segment.length, flags, follow)
    return out
