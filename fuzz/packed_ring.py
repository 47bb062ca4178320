"""The driver's side of a packed ring (virtio 1.3 §2.8) that lies now and then."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence

from fuzz.chains import F_INDIRECT, F_NEXT, F_WRITE, Buffer
from fuzz.choices import Choices
from fuzz.guest import Guest

__all__ = ["PackedRing"]

DESC = struct.Struct("<QIHH")  # addr, len, id, flags
F_AVAIL, F_USED = 1 << 7, 1 << 15
WRAP = 1 << 15
TABLES_AREA = 0x6C00  # indirect tables, before the data
EVENT_BYTES = 4


class PackedRing:
    """One ring somewhere in a guest's memory."""

    def __init__(self, guest: Guest, choices: Choices, size: int, base: int) -> None:
        self.guest = guest
        self.size = size
        self.position = base % WRAP % size
        self.wrap = bool(base & WRAP)
        self.used_position, self.used_wrap = (base >> 16) % WRAP % size, bool(base >> 31)
        self.next_id = 0
        self.taken = 0
        self.table = 0
        self.counts: dict[int, int] = {}
        self.lied = False  # about which descriptors are the device's
        self.heads: list[tuple[int, int]] = []
        piece = choices.pick(guest.pieces)
        self.ring = piece.guest_addr + (-piece.guest_addr - piece.offset) % 16
        self.driver = self.ring + 16 * size + choices.pick((0, 4, 64))
        self.device = self.driver + 64
        match choices.below(24):
            case 22:
                self.device = self.driver
            case 23:
                self.device = self.ring
        # Of the lap before: neither available nor in use by the device.
        bits = 0 if self.wrap else F_AVAIL | F_USED
        passed = F_AVAIL | F_USED if self.wrap else 0
        for at in range(size):
            flags = bits if at >= self.position else passed
            guest.write(self.ring + 16 * at, DESC.pack(0, 0, 0, flags))
        guest.write(self.driver, bytes(EVENT_BYTES))
        guest.write(self.device, bytes(EVENT_BYTES))

    @staticmethod
    def first_base(choices: Choices, size: int) -> int:
        if choices.rarely(20):
            return choices.number(4)
        half = choices.pick((0, 0, size - 1, size // 2)) | choices.pick((WRAP, WRAP, 0))
        return half | half << 16

    @property
    def parts(self) -> dict[str, int]:
        """Front-end addresses, by the names of BlkQueue's arguments."""
        names = {"desc": self.ring, "avail": self.driver, "used": self.device}
        return {name: self.guest.user_addr(addr) for name, addr in names.items()}

    def spans(self) -> tuple[tuple[int, int], ...]:
        """(guest address, length) of its parts."""
        ring = (self.ring, 16 * self.size)
        return (ring, ring, (self.driver, EVENT_BYTES), (self.device, EVENT_BYTES))

    def take_used(self) -> bool:
        """Whether the next chain came back; the one after it is the next then."""
        at = self.ring + 16 * self.used_position
        _addr, _len, identity, flags = DESC.unpack(self.guest.read(at, 16))
        if bool(flags & F_AVAIL) != self.used_wrap or bool(flags & F_USED) != self.used_wrap:
            return False
        self.used_position += self.counts.get(identity, 1)
        if self.used_position >= self.size:
            self.used_position -= self.size
            self.used_wrap = not self.used_wrap
        return True

    # What a driver does -----------------------------------------------------------------

    def add(self, chain: Sequence[Buffer], choices: Choices) -> None:
        """Descriptors for a chain, all but its first one's flags."""
        if choices.pick((False, False, True)):
            chain = [self._indirect(chain, choices)]
        self.taken += len(chain)
        if self.taken > self.size:
            if not choices.rarely(40):
                return
            self.lied = True
        identity = self.next_id % self.size
        self.next_id += 1
        if choices.rarely(30):
            identity = choices.pick((self.size, 0xFFFF, 0, choices.number(2)))
        self.counts[identity] = len(chain)
        for place, buffer in enumerate(chain[: 2 * self.size]):
            flags = buffer.flags & ~(F_AVAIL | F_USED) | self._lap()
            if place < len(chain) - 1:
                flags |= F_NEXT
            if choices.rarely(100):
                flags ^= choices.pick((F_NEXT, F_AVAIL, F_USED, choices.number(2)))
                self.lied = True
            at = self.ring + 16 * self.position
            entry = DESC.pack(buffer.addr, buffer.length, identity, flags & 0xFFFF)
            if place == 0:
                self.guest.write(at, entry[:14])
                self.heads.append((at + 14, flags & 0xFFFF))
            else:
                self.guest.write(at, entry)
            self.position += 1
            if self.position == self.size:
                self.position, self.wrap = 0, not self.wrap

    def _lap(self) -> int:
        return F_AVAIL if self.wrap else F_USED

    def _indirect(self, chain: Sequence[Buffer], choices: Choices) -> Buffer:
        """A table elsewhere; returns the buffer that it is. Its entries follow each other."""
        piece = choices.pick(self.guest.pieces)
        room = TABLES_AREA + 16 * len(chain)
        table = piece.guest_addr + TABLES_AREA + self.table % 0x400
        if choices.rarely(12):  # over the end of a region: part of it is elsewhere, or nowhere
            table = piece.end - choices.below(room % 200 + 1)
        self.table += 16 * len(chain)
        for place, buffer in enumerate(chain):
            flags = buffer.flags ^ (F_NEXT if choices.rarely(60) else 0)
            entry = DESC.pack(buffer.addr, buffer.length, choices.pick((0, 0xFFFF)), flags)
            self.guest.write(table + 16 * place, entry)
        length = 16 * len(chain)
        if choices.rarely(30):
            length = choices.pick((0, 1, length + 1, length - 16, 16 * self.size + 16, 0xFFFF_FFF0))
        return Buffer(table, length, F_INDIRECT)

    def publish(self, choices: Choices) -> None:
        """The flags of first descriptors, one after another: that is what the device looks at."""
        if choices.rarely(40):
            self.lied = True
            self.heads.append((self.ring + 16 * choices.below(self.size) + 14, choices.number(2)))
        for at, flags in self.heads:
            self.guest.write(at, flags.to_bytes(2, "little"))
        self.heads.clear()
        self.taken = 0

    def scramble(self, choices: Choices) -> None:
        """Anything anywhere in the ring."""
        part, length = choices.pick(self.spans())
        at = choices.number(2) % length
        self.lied = True
        self.guest.write(part + at, choices.raw(choices.pick((1, 2, 4, 8))))

    def ask_for_calls(self, choices: Choices) -> None:
        flags = choices.pick((0, 1, 2, choices.number(2)))
        self.guest.write(self.driver, struct.pack("<HH", choices.number(2), flags))

    # What the device may do -------------------------------------------------------------

    def device_writes(self) -> list[tuple[int, int]] | None:
        """A superset of what it may write now, as (address, length).

        None: nobody can tell. It may write to descriptors by way of buffers; and in a ring that
        lied, what it takes for a descriptor may be a used element of its own.
        """
        if self.lied:
            return None
        ring = (self.ring, 16 * self.size)
        buffers: list[tuple[int, int]] = []
        tables = [ring]
        for desc in descriptors(self.guest.read(*ring)):
            if desc.flags & F_INDIRECT:
                length = min(desc.length, 16 * self.size)
                tables.append((desc.addr, length))
                inner = descriptors(self.guest.read(desc.addr, length))
                buffers += [(d.addr, d.length) for d in inner if d.flags & F_WRITE]
            elif desc.flags & F_WRITE:
                buffers.append((desc.addr, desc.length))
        event = (self.device, EVENT_BYTES)
        if self.guest.share_a_byte([*buffers, event], tables):
            return None
        # An indirect table that lies in the ring is rewritten with it.
        if self.guest.share_a_byte([ring], tables[1:]):
            return None
        return [*buffers, ring, event]


def descriptors(table: bytes) -> Iterator[Buffer]:
    for addr, length, _identity, flags in DESC.iter_unpack(table[: len(table) // 16 * 16]):
        yield Buffer(addr, length, flags)
