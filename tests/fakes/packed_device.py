"""The device's side of a packed virtqueue, in Python: the sibling of ``device``.

Written from virtio 1.3 §2.8 and not from our headers. What ``Device`` calls a head is a
buffer id here. It can be told to misbehave in the same ways.
"""

from __future__ import annotations

import struct

from tests.fakes.device import Buffer, Device

_DESC = struct.Struct("<QIHH")  # address, length, id, flags
_NEXT, _WRITE, _INDIRECT = 1, 2, 4
_AVAIL, _USED = 1 << 7, 1 << 15


class PackedDevice(Device):
    """Serves one packed queue; ``avail`` and ``used`` are its event suppression areas."""

    wrap = True
    used_at = 0
    used_wrap = True

    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)  # type: ignore[arg-type]
        self._held: dict[int, tuple[list[Buffer], int]] = {}  # by id: chain, ring entries

    def descriptor(self, at: int) -> tuple[int, int, int, int]:
        address, length, buffer_id, flags = _DESC.unpack_from(self.memory, self.desc + 16 * at)
        return address, length, buffer_id, flags

    def chain(self, head: int) -> list[Buffer]:
        return self._held[head][0]

    def waiting(self) -> list[int]:
        ids = []
        while self._is_available(self.descriptor(self.next_avail)[3]):
            ids.append(self._take())
        return ids

    def complete(self, head: int, length: int = 0) -> None:
        at = self.desc + 16 * self.used_at
        struct.pack_into("<IH", self.memory, at + 8, length, head & 0xFFFF)
        # The flags last: they hand it over.
        self.set_u16(at + 14, _AVAIL | _USED if self.used_wrap else 0)
        self.used_at += self._held.pop(head, ([], 1))[1]
        if self.used_at >= self.size:
            self.used_at -= self.size
            self.used_wrap = not self.used_wrap

    def _is_available(self, flags: int) -> bool:
        return bool(flags & _AVAIL) == self.wrap != bool(flags & _USED)

    def _take(self) -> int:
        """One chain: in the ring from here on, or in the table that its entry points to."""
        buffers, taken = [], 0
        while True:
            address, length, buffer_id, flags = self.descriptor(self.next_avail)
            assert self._is_available(flags), "a chain with a part that is not available"
            taken += 1
            self.next_avail += 1
            if self.next_avail == self.size:
                self.next_avail, self.wrap = 0, not self.wrap
            if flags & _INDIRECT:
                assert taken == 1
                assert not flags & _NEXT
                buffers = self._table(address - self.base, length)
                break
            buffers.append(Buffer(address - self.base, length, bool(flags & _WRITE)))
            if not flags & _NEXT:
                break
        assert buffer_id not in self._held, "an id that is in flight"
        self._held[buffer_id] = buffers, taken
        return buffer_id

    def _table(self, offset: int, length: int) -> list[Buffer]:
        assert length % 16 == 0
        buffers = []
        for at in range(offset, offset + length, 16):
            address, size, _, flags = _DESC.unpack_from(self.memory, at)
            # virtio 1.3 §2.8.8: nothing but WRITE means anything in a table.
            assert flags & ~_WRITE == 0
            buffers.append(Buffer(address - self.base, size, bool(flags & _WRITE)))
        return buffers
